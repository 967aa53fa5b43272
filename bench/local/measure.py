"""Measure artifacts on this machine, each in a fresh process, interleaved in rounds.

The rounds go on until the time ratios are as precise as requested, or the time limit is reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.progress import Progress, progress_bar
from ...export.artifact import Artifact
from ...runtimes import EngineError
from ...runtimes.subprocess_inference import interpreter
from ...targets.catalog import list_targets, load_target
from ...targets.profile import TargetProfile
from ..results.measurement import Environment, Measurement
from ..results.operator_table import OperatorTable, operator_rows
from ..results.warnings import warnings_for, wrong_provider
from . import environment
from .artifact_facts import ArtifactFacts, artifact_facts
from .bucket_jobs import bucket_jobs, measured_bucket, own_score
from .conductor import ConductorError, RunnerProcess, conduct
from .options import CPU, MeasureOptions

Measurable = Artifact | Path | str
Json = dict[str, Any]


def measure(
    artifact: Measurable,
    target: TargetProfile | str = "host",
    threads: int = 1,
    *,
    name: str | None = None,
    **options: Any,
) -> Measurement:
    """Measure one artifact in a fresh process on this machine.

    Args:
        artifact: An `Artifact`, its folder, or an .onnx file.
        target: The device profile that the measurement names, or its name in the catalog.
        threads: Threads of the runtime.
        name: The measurement's name; by default the artifact's, or the file's without its suffix.
        **options: `quiet`, `progress` and the fields of `MeasureOptions`, such as `time_limit_s`
            (seconds, 60 by default), `dataset` (for top-1) and `batch`.

    Returns:
        Raw latency samples in seconds, memory in bytes, and the machine's state; `summary()` and
        `interval()` derive the statistics. Of an artifact with buckets it is the largest bucket,
        unless `bucket` names one; `measure_interleaved` measures all of them.

    Raises:
        InputError: The artifact or an option is invalid, or the runner failed.
    """
    title = name or (
        artifact.manifest.name if isinstance(artifact, Artifact) else Path(artifact).stem
    )
    if options.get("bucket") is None and (buckets := artifact_facts(artifact).buckets):
        options["bucket"] = buckets[-1]
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
    """Measure artifacts against each other on this machine, in rounds of random order.

    Args:
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        threads: Threads of the runtime.
        target: The device profile that the measurements name, or its name in the catalog.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.
        **options: The fields of `MeasureOptions`.

    Returns:
        {name: measurement}; the measurements share one session, so `compare` pairs their rounds.
        Top-1 comes from the process that was timed. Of an artifact with buckets each is measured,
        with the name that `bucket_name` returns; see `bucket_tables`.

    Raises:
        InputError: An artifact or an option is invalid, or a runner failed.
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
    """Run `measure_interleaved` with its options as one value.

    Args:
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        options: What is measured, and for how long.
        target: The device profile that the measurements name, or its name in the catalog.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.

    Returns:
        {name: measurement}.

    Raises:
        InputError: An artifact is invalid, or a runner failed.
    """
    plan, facts = make_plan(artifacts, options)
    title = target_name(target)
    with progress_bar(quiet=quiet, replacement=progress) as report:
        try:
            raw = conduct(plan, report)
        except ConductorError as error:
            raise InputError(str(error)) from None
    return assemble(raw, plan, facts, target=title, device="host")


def profile_operators(
    artifact: Measurable,
    threads: int = 1,
    *,
    runs: int = 20,
    batch: int | None = None,
    providers: Sequence[str] = (CPU,),
) -> OperatorTable:
    """Profile a model by operator, with the runtime's own profiler in a fresh process.

    Args:
        artifact: An `Artifact`, its folder, or an .onnx file.
        threads: Threads of the runtime.
        runs: Profiled inferences; two untimed ones come first.
        batch: Batch size of a model whose batch dimension is free.
        providers: Execution providers of onnxruntime, preferred ones first.

    Returns:
        One row for each operator, with the seconds of one inference.

    Raises:
        InputError: The artifact is invalid, its runtime has no profiler, or the runner failed.
    """
    if runs < 1:
        raise InputError(f"runs = {runs}: must be at least 1")
    options = MeasureOptions(threads=threads, batch=batch, providers=tuple(providers))
    plan, _ = make_plan({"model": artifact}, options)
    try:
        runner = RunnerProcess("model", plan["jobs"]["model"], 300.0)
        try:
            event = runner.request("profile", count=runs)
        finally:
            runner.close()
    except ConductorError as error:
        raise InputError(str(error)) from None
    return OperatorTable(operator_rows(event["rows"]), runs)


def target_name(target: TargetProfile | str) -> str:
    """Return the name of a profile; raises InputError for a name without a profile."""
    if isinstance(target, TargetProfile):
        return target.name
    # The profile of `host` would have to be detected, and a device's host is another machine.
    return target if target == "host" else load_target(target).name


def target_features(name: str) -> tuple[str, ...] | None:
    """Return the instruction sets of a shipped profile, None for `host` and for others."""
    return load_target(name).features if name in list_targets() else None


def make_plan(
    artifacts: Mapping[str, Measurable], options: MeasureOptions | None = None, **named: Any
) -> tuple[Json, dict[str, ArtifactFacts]]:
    """Return the conductor's plan, and the facts of each artifact in it.

    The options are one value, or the fields of `MeasureOptions` by name. Raises InputError without
    artifacts, for an option out of range, and for a path that does not exist.
    """
    options = options or MeasureOptions(**named)
    if not artifacts:
        raise InputError("nothing to measure: name at least one artifact")
    if options.dataset is not None and not Path(options.dataset).exists():
        raise InputError(
            f"{options.dataset}: no such data set; "
            "give an .npz with the arrays `images` and `labels`"
        )
    found = {name: artifact_facts(artifact) for name, artifact in artifacts.items()}
    jobs: dict[str, Json] = {}
    facts: dict[str, ArtifactFacts] = {}
    for name, about in found.items():
        each = bucket_jobs(name, about, options, _job)
        if taken := set(each) & set(jobs):
            raise InputError(f"{taken.pop()}: a second measurement of this name; rename {name}")
        jobs.update(each)
        facts.update(dict.fromkeys(each, about))
    if options.dataset is not None:
        for name, about in facts.items():
            if not about.logits:
                returned = ", ".join(output["name"] for output in about.outputs or ())
                raise InputError(
                    f"{name}: returns {returned} and no logits, which top-1 on a data set needs; "
                    "leave the data set out, or export it with logits among its outputs"
                )
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
    return plan, facts


def _job(name: str, facts: ArtifactFacts, options: MeasureOptions) -> Json:
    try:
        python = interpreter(facts.runtime)
    except EngineError as error:
        raise InputError(f"{name}: {error}") from None
    if options.bucket is not None and options.bucket not in facts.buckets:
        known = ", ".join(map(str, facts.buckets))
        raise InputError(
            f"{name}: has no bucket of {options.bucket} patches; "
            + (f"choose {known}" if known else "its images all keep the same number; leave it out")
        )
    on_cuda = facts.runtime == "torch" and options.providers[0].startswith("CUDA")
    session = {
        key: value
        for key, value in facts.session.items()
        if not (options.spinning and key.endswith("allow_spinning"))
    }
    return {
        "model": str(facts.model.resolve()),
        "runtime": facts.runtime,
        "python": python,
        "threads": options.threads,
        "pinning": list(options.pinning) if options.pinning else None,
        "priority": options.priority,
        "spinning": options.spinning,
        "arena": options.arena,
        # onnxruntime needs the CPU for the operators that a device does not support; how many
        # those are is recorded and warned of.
        "providers": list(dict.fromkeys([*options.providers, CPU])),
        # torch has devices where onnxruntime has providers.
        "device": "cuda" if on_cuda else None,
        "copies": options.copies,
        "cuda_graph": options.cuda_graph,
        "batch": options.batch,
        **({} if options.bucket is None else {"inputs": {"bucket": options.bucket}}),
        "session": session,
        "input": facts.input,
        "cpu": facts.cpu,
        "output": facts.output,
        **({"outputs": facts.outputs} if facts.outputs else {}),
        "preprocessing": facts.preprocessing,
        "seed": options.seed,
    }


def assemble(
    raw: Json,
    plan: Json,
    facts: Mapping[str, ArtifactFacts],
    *,
    target: str,
    device: str,
) -> dict[str, Measurement]:
    """Build measurements from the conductor's raw result.

    Args:
        raw: What `conduct` returned.
        plan: The plan that it ran.
        facts: The facts of the plan's artifacts, by name.
        target: Name of the device profile.
        device: How the device was reached: host, ssh, adb, ...

    Returns:
        {name: measurement}, with their warnings.
    """
    where = Environment.model_validate(
        environment.combine(raw["machine"], raw["before"], raw["after"])
    )
    found = {}
    for name, run in raw["runs"].items():
        job = plan["jobs"][name]
        measured = Measurement(
            name=name,
            target=target,
            target_features=target_features(target),
            device=device,
            started_at=raw["started_at"],
            session=raw["session"],
            artifact_sha256=facts[name].sha256,
            file_bytes=facts[name].file_bytes,
            precision=facts[name].precision,
            environment=where,
            **_model_fields(run["ready"], job),
            **_run_fields(run, raw.get("energy_source"), job),
            bucket=measured_bucket(run, job, facts[name]),
            cpu_share=_cpu_share(run, job),
        )
        found[name] = measured.model_copy(
            update={
                "warnings": (
                    *facts[name].warnings,
                    *_warnings(measured, run, job, raw["stopped_by"], plan),
                )
            }
        )
    return found


def _model_fields(ready: Json, job: Json) -> Json:
    allowed_to_spin = job["session"].get("session.intra_op.allow_spinning") == "1"
    return {
        "runtime": ready["runtime"],
        "runtime_version": ready["runtime_version"],
        "provider": ready["provider"],
        "provider_nodes": ready["provider_nodes"],
        "copies_timed": ready.get("copies_timed"),
        "cuda_graph": job.get("cuda_graph", False) and ready.get("copies_timed") is not None,
        "input_shape": tuple(ready["input_shape"]),
        "input_type": ready["input_type"],
        "batch": ready["input_shape"][0],
        "threads": job["threads"],
        "pinning": tuple(job["pinning"]) if job["pinning"] else None,
        "niceness": ready["niceness"],
        "spinning": job["spinning"] or allowed_to_spin,
        "arena": job["arena"],
        "first_inference_s": ready["first_inference_s"],
        "load_s": ready["load_s"],
        "floor_rss_bytes": ready["floor_rss_bytes"],
        "peak_rss_exact": ready["peak_rss_exact"],
    }


def _run_fields(run: Json, energy_source: str | None, job: Json) -> Json:
    memory, counted = run["memory"], own_score(run, job)
    # A bucket may have none of the images.
    score = counted if counted is not None and counted[1] else None
    total_j, inferences = run["energy_j"] or (0.0, 0)
    return {
        "latency_s": tuple(run["latency_s"]),
        "samples_per_turn": tuple(run["samples_per_turn"]),
        "warm_up_count": run["warm"]["count"],
        "warm_up_stable": run["warm"]["stable"],
        "peak_rss_bytes": memory["peak_rss_bytes"],
        "steady_rss_bytes": memory["steady_rss_bytes"],
        "arena_bytes": memory.get("arena_bytes"),
        "device_memory_peak_bytes": memory.get("device_memory_peak_bytes"),
        "energy_per_inference_j": total_j / inferences if inferences else None,
        "energy_source": energy_source if inferences else None,
        "top1": score[0] / score[1] if score else None,
        "correct": score[0] if score else None,
        "total": score[1] if score else None,
        "operators": operator_rows(run["profile"]["rows"]) if run.get("profile") else (),
    }


def _cpu_share(run: Json, job: Json) -> float | None:
    one_cpu_thread = job["threads"] == 1 and run["ready"]["provider"] in (CPU, "CPU")
    if not one_cpu_thread or run["wall_s"] <= 0:
        return None
    return min(1.0, float(run["cpu_s"] / run["wall_s"]))


def _warnings(
    measured: Measurement, run: Json, job: Json, stopped_by: str, plan: Json
) -> tuple[str, ...]:
    found = list(warnings_for(measured, stopped_by=stopped_by, half_width=plan["half_width"]))
    # Only onnxruntime has providers that can be requested by name.
    if job["runtime"] == "onnxruntime":
        message = wrong_provider(job["providers"][0], measured)
        found = [message, *found] if message else found
    if message := run.get("profile_error"):
        found.append(f"no profile of its operators: {message.removeprefix(f'{measured.name}: ')}")
    return tuple(found)
