"""Jobs on a Ray cluster: Ray places them, retries those whose worker was lost, and uses all nodes.

The study folder must be on a file system that all machines have under the same path. Only the
process that runs the study writes to its table.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import socket
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from .jobs import Outcome, run_job
from .local_workers import Event, Started
from .plan import Job

# How often Ray repeats a job whose worker or machine was lost.
RETRIES = 3
CONNECT_LIMIT_S = 10.0


def require_ray() -> None:
    """Validate that Ray is installed.

    Raises:
        InputError: It is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray: Ray is not installed; pip install 'vitrim[ray]'")


def run_on_ray(
    jobs: Sequence[Job], folder: Path, address: str, jobs_per_machine: int
) -> Iterator[Event]:
    """Do the jobs of a study on a cluster, and yield their beginnings and ends.

    A training takes a share of the processors of a machine, or those of `train.threads`, and one
    GPU where its device is one. Measurements follow when all trainings have ended, on one machine
    and all of its processors, so that they run alone and are comparable.

    Args:
        jobs: Each after those that it needs.
        folder: The absolute path of the study folder.
        address: `auto`, or the address of a cluster. `auto` starts one on this machine where none
            runs. A process that is connected to a cluster uses that one.
        jobs_per_machine: Trainings at a time on one machine.

    Yields:
        Events. A job counts as started when Ray has it.

    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached.
    """
    require_ray()
    import ray

    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        task = ray.remote(_task)
        trainings = [job for job in jobs if not job.measures]
        resources = [_resources(job, nodes, jobs_per_machine) for job in trainings]
        failed = yield from _all(ray, task, trainings, folder, resources)
        measured = [job for job in jobs if job.measures and job.run.id not in failed]
        yield from _all(ray, task, measured, folder, [_whole_machine(nodes)] * len(measured))
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        _require_listener(address)
        try:
            ray.init(address=address, **options)
        except ConnectionError:
            if address != "auto":
                raise
            ray.init(include_dashboard=False, **options)
    except (OSError, ValueError, RuntimeError, SystemExit) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--ray {address}: the cluster cannot be reached ({first}); start one with "
            "`ray start --head`, or write --ray auto"
        ) from error


def _require_listener(address: str) -> None:
    """Validate that somebody listens at an address: Ray itself waits for minutes, then exits.

    Raises:
        OSError: Nobody does.
        ValueError: It has no port.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError("an address is HOST:PORT, ray://HOST:PORT or auto")
    socket.create_connection((host, int(port)), timeout=CONNECT_LIMIT_S).close()


def _task(job: Job, folder: Path, threads: int, *needed: Outcome) -> Outcome:
    """What a worker of Ray does; `needed` are the outcomes of the jobs that it waits for."""
    own = next((each for each in needed if each.run == job.run.id and each.reason), None)
    if own is not None:
        # An earlier part of the same run failed, and was reported.
        return Outcome(job.name, job.run.id, own.reason)
    return run_job(job, folder, threads)


def _all(
    ray: Any, task: Any, jobs: Sequence[Job], folder: Path, resources: Sequence[dict[str, Any]]
) -> Generator[Event, None, set[str]]:
    """Submit jobs, each with the results that it needs, and collect them; the failed runs."""
    results: dict[str, Any] = {}
    waiting: dict[Any, Job] = {}
    for job, needed in zip(jobs, resources, strict=True):
        threads = max(1, int(needed["num_cpus"]))
        inputs = [results[name] for name in job.needs if name in results]
        result = task.options(max_retries=RETRIES, **needed).remote(job, folder, threads, *inputs)
        results[job.name] = result
        waiting[result] = job
        yield Started(job)
    failed = set[str]()
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(ready)
        outcome = _result(ray, ready, job)
        if outcome.reason is not None and job.run.id in failed:
            continue
        if outcome.reason is not None:
            failed.add(job.run.id)
        yield outcome
    return failed


def _result(ray: Any, ready: Any, job: Job) -> Outcome:
    try:
        outcome: Outcome = ray.get(ready)
    except ray.exceptions.RayError as error:
        # The worker was lost too often, or one that this job needs was.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Outcome(job.name, job.run.id, f"Ray gave the job up: {first}")
    return outcome


def _resources(job: Job, nodes: Sequence[dict[str, Any]], per_machine: int) -> dict[str, Any]:
    """What Ray reserves for a training, by the device of its recipe."""
    train = job.run.recipe.train
    smallest = min(_amount(node, "CPU") for node in nodes)
    threads = train.threads or max(1, math.floor(smallest / per_machine))
    gpus = sum(_amount(node, "GPU") for node in nodes)
    wants_gpu = train.device == "cuda" or (train.device == "auto" and gpus > 0)
    return {"num_cpus": threads, **({"num_gpus": 1} if wants_gpu else {})}


def _whole_machine(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All processors of one machine: the one that has most."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = max(nodes, key=lambda node: (_amount(node, "CPU"), node["NodeID"]))
    strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    return {"num_cpus": _amount(node, "CPU"), "scheduling_strategy": strategy}


def _amount(node: dict[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))
