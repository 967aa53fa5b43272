"""Measure artifacts on this machine: a fresh process each, interleaved, as many rounds as the
wanted confidence needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...export.artifact import Artifact
from ...runtimes import EngineError
from ...runtimes.interpreter import interpreter
from ...targets.catalog import load_target
from ...targets.profile import TargetProfile
from ..results.measurement import Environment, Measurement
from ..results.warnings import warnings_for, wrong_provider
from . import environment
from .artifact_facts import Subject, open_subject
from .conductor import ConductorError, conduct
from ..results.operator_table import operator_rows
from .options import CPU, MeasureOptions
from .progress import Progress, progress_bar

Measurable = Artifact | Path | str


def measure(
    artifact: Measurable,
    target: TargetProfile | str = "host",
    threads: int = 1,
    *,
    name: str | None = None,
    **options: Any,
) -> Measurement:
    """Measure one artifact (an Artifact, its folder, or an .onnx file) in a fresh process on this
    machine.

    Takes the options of `measure_interleaved`. Errors: InputError, one line, for a bad input or a
    runner that failed.
    """
    title = name or (
        artifact.manifest.name if isinstance(artifact, Artifact) else Path(artifact).stem
    )
    return measure_interleaved({title: artifact}, target=target, threads=threads, **options)[title]


def measure_interleaved(
    artifacts: Mapping[str, Measurable],
    threads: int = 1,
    *,
    target: TargetProfile | str = "host",
    quiet: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Measurement]:
    """Measure artifacts against each other on this machine, in rounds of random order, and return
    {name: Measurement}.

    options: the fields of `MeasureOptions`. Top-1 is computed by the very process that was timed.
    `progress(share, text)` replaces the bar on the terminal. Errors: InputError, one line.
    """
    return measure_here(
        artifacts,
        MeasureOptions(threads=threads, **options),
        target=target,
        quiet=quiet,
        progress=progress,
    )


def measure_here(
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    *,
    target: TargetProfile | str = "host",
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """`measure_interleaved` with its options as one value."""
    plan, subjects = make_plan(artifacts, options)
    profile = target if isinstance(target, TargetProfile) else load_target(target)
    with progress_bar(quiet=quiet, replacement=progress) as tell:
        try:
            raw = conduct(plan, tell)
        except ConductorError as error:
            raise InputError(str(error)) from None
    return assemble(raw, plan, subjects, target=profile.name, device="host")


def make_plan(
    artifacts: Mapping[str, Measurable], options: MeasureOptions | None = None, **named: Any
) -> tuple[dict[str, Any], dict[str, Subject]]:
    """The conductor's plan and what it measures; the options as one value, or by name.

    Errors: InputError for no artifact, a bad number, or a path that is not there.
    """
    options = options or MeasureOptions(**named)
    if not artifacts:
        raise InputError("nothing to measure: name at least one artifact")
    if options.dataset is not None and not Path(options.dataset).exists():
        raise InputError(
            f"{options.dataset}: no such data set; give an .npz with the arrays `images` and `labels`"
        )
    subjects = {name: open_subject(artifact) for name, artifact in artifacts.items()}
    jobs = {
        name: {
            "model": str(subject.model.resolve()),
            "runtime": subject.runtime,
            "python": _interpreter(name, subject),
            "threads": options.threads,
            "pinning": list(options.pinning) if options.pinning else None,
            "priority": options.priority,
            "spinning": options.spinning,
            "arena": options.arena,
            "providers": _with_fallback(options.providers),
            # torch is told of a device, onnxruntime of a provider.
            "device": "cuda"
            if subject.runtime == "torch" and options.providers[0].startswith("CUDA")
            else None,
            "copies": options.copies,
            "cuda_graph": options.cuda_graph,
            "batch": options.batch,
            "session": {
                key: value
                for key, value in subject.session.items()
                if not (options.spinning and key.endswith("allow_spinning"))
            },
            "input": subject.input,
            "output": subject.output,
            "preprocessing": subject.preprocessing,
            "seed": options.seed,
        }
        for name, subject in subjects.items()
    }
    plan = {
        "jobs": jobs,
        "seed": options.seed,
        "time_limit_s": options.time_limit_s,
        "half_width": options.half_width,
        "least_rounds": options.least_rounds,
        "most_rounds": options.most_rounds,
        "dataset": None if options.dataset is None else str(Path(options.dataset).resolve()),
        "dataset_limit": options.dataset_limit,
        "profile": options.profile_runs,
    }
    return plan, subjects


def assemble(
    raw: dict[str, Any],
    plan: dict[str, Any],
    subjects: Mapping[str, Subject],
    *,
    target: str,
    device: str,
) -> dict[str, Measurement]:
    """Measurements from the conductor's raw result."""
    where = Environment.model_validate(
        environment.combine(raw["machine"], raw["before"], raw["after"])
    )
    found = {}
    for name, run in raw["runs"].items():
        job, ready, subject = plan["jobs"][name], run["ready"], subjects[name]
        score, energy = run.get("score"), run["energy_j"]
        one_cpu_thread = job["threads"] == 1 and ready["provider"] in (CPU, "CPU")
        measured = Measurement(
            name=name,
            target=target,
            device=device,
            started_at=raw["started_at"],
            session=raw["session"],
            artifact_sha256=subject.sha256,
            file_bytes=subject.file_bytes,
            precision=subject.precision,
            runtime=ready["runtime"],
            runtime_version=ready["runtime_version"],
            provider=ready["provider"],
            provider_nodes=ready["provider_nodes"],
            copies_timed=ready.get("copies_timed"),
            cuda_graph=job.get("cuda_graph", False) and ready.get("copies_timed") is not None,
            input_shape=tuple(ready["input_shape"]),
            input_type=ready["input_type"],
            batch=ready["input_shape"][0],
            threads=job["threads"],
            pinning=tuple(job["pinning"]) if job["pinning"] else None,
            niceness=ready["niceness"],
            spinning=job["spinning"]
            or job["session"].get("session.intra_op.allow_spinning") == "1",
            arena=job["arena"],
            latency_s=tuple(run["latency_s"]),
            samples_per_turn=tuple(run["samples_per_turn"]),
            first_inference_s=ready["first_inference_s"],
            load_s=ready["load_s"],
            warm_up_count=run["warm"]["count"],
            warm_up_stable=run["warm"]["stable"],
            floor_rss_bytes=ready["floor_rss_bytes"],
            peak_rss_bytes=run["memory"]["peak_rss_bytes"],
            steady_rss_bytes=run["memory"]["steady_rss_bytes"],
            arena_bytes=run["memory"].get("arena_bytes"),
            device_memory_peak_bytes=run["memory"].get("device_memory_peak_bytes"),
            peak_rss_exact=ready["peak_rss_exact"],
            cpu_share=min(1.0, run["cpu_s"] / run["wall_s"])
            if one_cpu_thread and run["wall_s"] > 0
            else None,
            energy_per_inference_j=energy[0] / energy[1] if energy and energy[1] else None,
            energy_source=raw.get("energy_source") if energy and energy[1] else None,
            top1=score["correct"] / score["total"] if score else None,
            correct=score["correct"] if score else None,
            total=score["total"] if score else None,
            operators=operator_rows(run["profile"]["rows"]) if run.get("profile") else (),
            environment=where,
        )
        warned = list(
            warnings_for(measured, stopped_by=raw["stopped_by"], half_width=plan["half_width"])
        )
        # Only onnxruntime is asked for a provider by name.
        if subject.runtime == "onnxruntime" and (
            message := wrong_provider(job["providers"][0], measured)
        ):
            warned.insert(0, message)
        if message := run.get("profile_error"):
            warned.append(f"no profile of its operators: {message.removeprefix(f'{name}: ')}")
        found[name] = measured.model_copy(update={"warnings": tuple(warned)})
    return found


def _interpreter(name: str, subject: Subject) -> str | None:
    try:
        return interpreter(subject.runtime)
    except EngineError as error:
        raise InputError(f"{name}: {error}") from None


def _with_fallback(providers: Sequence[str]) -> list[str]:
    # onnxruntime needs the CPU for what a device does not take; how much that was is recorded and
    # warned of.
    return list(dict.fromkeys([*providers, CPU]))
