"""Measure artifacts on this machine: a fresh process each, interleaved, as many rounds as the wanted confidence needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from ..export.artifact import Artifact
from ..runtimes import EngineError
from ..runtimes.interpreter import interpreter
from ..targets.profile import TargetProfile, load_target
from . import environment
from .conductor import ConductorError, conduct
from .measurement import Environment, Measurement
from .progress import Progress, progress_bar
from .subject import Subject, open_subject
from .warnings import warnings_for, wrong_provider

CPU = "CPUExecutionProvider"
Measurable = Artifact | Path | str


def measure(
    artifact: Measurable,
    target: TargetProfile | str = "host",
    threads: int = 1,
    *,
    name: str | None = None,
    **options: Any,
) -> Measurement:
    """Measure one artifact (an Artifact, its folder, or an .onnx file) in a fresh process on this machine.

    Takes the options of `measure_interleaved`. Errors: InputError, one line, for a bad input or a runner that failed.
    """
    title = name or (artifact.manifest.name if isinstance(artifact, Artifact) else Path(artifact).stem)
    return measure_interleaved({title: artifact}, target=target, threads=threads, **options)[title]


def measure_interleaved(
    artifacts: Mapping[str, Measurable],
    threads: int = 1,
    *,
    target: TargetProfile | str = "host",
    dataset: Path | str | None = None,
    dataset_limit: int | None = None,
    time_limit_s: float = 60.0,
    half_width: float = 0.01,
    least_rounds: int = 20,
    most_rounds: int = 1000,
    batch: int | None = None,
    pinning: Sequence[int] | None = None,
    priority: Literal["high", "normal"] = "high",
    spinning: bool = False,
    arena: bool = True,
    providers: Sequence[str] = (CPU,),
    seed: int = 0,
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Measure artifacts against each other on this machine, in rounds of random order, and return {name: Measurement}.

    The rounds end when every ratio to the first artifact (or the one artifact's p50) is known to ± `half_width` at 95 %, after at least
    `least_rounds`, or when `time_limit_s` of rounds have passed. dataset: an .npz with `images` (N, C, H, W) float32 as the model takes them, or
    bytes that the manifest's mean and std normalise, and `labels` (N); top-1 is computed by the very process that was timed.
    priority: "high" lets the runners go before other work where that is permitted; the niceness they got is recorded.
    `progress(share, text)` replaces the bar on the terminal. Errors: InputError, one line.
    """
    plan, subjects = make_plan(
        artifacts,
        threads=threads,
        dataset=dataset,
        dataset_limit=dataset_limit,
        time_limit_s=time_limit_s,
        half_width=half_width,
        least_rounds=least_rounds,
        most_rounds=most_rounds,
        batch=batch,
        pinning=pinning,
        priority=priority,
        spinning=spinning,
        arena=arena,
        providers=providers,
        seed=seed,
    )
    profile = target if isinstance(target, TargetProfile) else load_target(target)
    with progress_bar(quiet=quiet, replacement=progress) as tell:
        try:
            raw = conduct(plan, tell)
        except ConductorError as error:
            raise InputError(str(error)) from None
    return assemble(raw, plan, subjects, target=profile.name, device="host")


def make_plan(
    artifacts: Mapping[str, Measurable],
    *,
    threads: int = 1,
    dataset: Path | str | None = None,
    dataset_limit: int | None = None,
    time_limit_s: float = 60.0,
    half_width: float = 0.01,
    least_rounds: int = 20,
    most_rounds: int = 1000,
    batch: int | None = None,
    pinning: Sequence[int] | None = None,
    priority: Literal["high", "normal"] = "high",
    spinning: bool = False,
    arena: bool = True,
    providers: Sequence[str] = (CPU,),
    seed: int = 0,
    profile_runs: int = 0,
) -> tuple[dict[str, Any], dict[str, Subject]]:
    """The conductor's plan and what it measures. Errors: InputError for no artifact, a bad number, or a path that is not there."""
    if not artifacts:
        raise InputError("nothing to measure: name at least one artifact")
    for label, value in {"threads": threads, "batch": batch or 1, "least_rounds": least_rounds, "most_rounds": most_rounds}.items():
        if value < 1:
            raise InputError(f"{label} = {value}: at least 1 is wanted")
    if time_limit_s <= 0 or half_width <= 0:
        raise InputError(f"time_limit_s = {time_limit_s}, half_width = {half_width}: both must be above 0")
    if dataset is not None and not Path(dataset).exists():
        raise InputError(f"{dataset}: no such data set; give an .npz with the arrays `images` and `labels`")
    subjects = {name: open_subject(artifact) for name, artifact in artifacts.items()}
    jobs = {
        name: {
            "model": str(subject.model.resolve()),
            "runtime": subject.runtime,
            "python": _interpreter(name, subject),
            "threads": threads,
            "pinning": list(pinning) if pinning else None,
            "priority": priority,
            "spinning": spinning,
            "arena": arena,
            "providers": _with_fallback(providers),
            "batch": batch,
            "session": {key: value for key, value in subject.session.items() if not (spinning and key.endswith("allow_spinning"))},
            "input": subject.input,
            "output": subject.output,
            "preprocessing": subject.preprocessing,
            "seed": seed,
        }
        for name, subject in subjects.items()
    }
    plan = {
        "jobs": jobs,
        "seed": seed,
        "time_limit_s": time_limit_s,
        "half_width": half_width,
        "least_rounds": least_rounds,
        "most_rounds": most_rounds,
        "dataset": None if dataset is None else str(Path(dataset).resolve()),
        "dataset_limit": dataset_limit,
        "profile": profile_runs,
    }
    return plan, subjects


def assemble(
    raw: dict[str, Any], plan: dict[str, Any], subjects: Mapping[str, Subject], *, target: str, device: str
) -> dict[str, Measurement]:
    """Measurements from the conductor's raw result."""
    where = Environment.model_validate(environment.combine(raw["machine"], raw["before"], raw["after"]))
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
            input_shape=tuple(ready["input_shape"]),
            input_type=ready["input_type"],
            batch=ready["input_shape"][0],
            threads=job["threads"],
            pinning=tuple(job["pinning"]) if job["pinning"] else None,
            niceness=ready["niceness"],
            spinning=job["spinning"] or job["session"].get("session.intra_op.allow_spinning") == "1",
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
            peak_rss_exact=ready["peak_rss_exact"],
            cpu_share=min(1.0, run["cpu_s"] / run["wall_s"]) if one_cpu_thread and run["wall_s"] > 0 else None,
            energy_per_inference_j=energy[0] / energy[1] if energy and energy[1] else None,
            top1=score["correct"] / score["total"] if score else None,
            correct=score["correct"] if score else None,
            total=score["total"] if score else None,
            environment=where,
        )
        warned = list(warnings_for(measured, stopped_by=raw["stopped_by"], half_width=plan["half_width"]))
        # Only onnxruntime is asked for a provider by name.
        if subject.runtime == "onnxruntime" and (message := wrong_provider(job["providers"][0], measured)):
            warned.insert(0, message)
        found[name] = measured.model_copy(update={"warnings": tuple(warned)})
    return found


def _interpreter(name: str, subject: Subject) -> str | None:
    try:
        return interpreter(subject.runtime)
    except EngineError as error:
        raise InputError(f"{name}: {error}") from None


def _with_fallback(providers: Sequence[str]) -> list[str]:
    # onnxruntime needs the CPU for what a device does not take; how much that was is recorded and warned of.
    return list(dict.fromkeys([*providers, CPU]))
