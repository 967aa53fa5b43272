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
from .plan import Job, next_wave

# How often Ray repeats a job whose worker or machine was lost.
RETRIES = 3
CONNECT_LIMIT_S = 10.0
Node = dict[str, Any]


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
    GPU where its device is one. Measurements follow when all trainings that do not wait for them
    have ended, one at a time on one machine and all of its processors, so that they run alone and
    are comparable.

    Args:
        jobs: Each after those that it needs.
        folder: The absolute path of the study folder.
        address: `auto`, or the address of a cluster. `auto` starts one on this machine where none
            runs. A process that is connected to a cluster uses that one.
        jobs_per_machine: Trainings at a time on one machine.

    Yields:
        Events. A job counts as started when Ray has it.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or none of its machines
            has what a run needs.
    """
    require_ray()
    import ray

    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address)
    try:
        nodes = living_nodes(ray.nodes())
        for job in jobs:
            # Ray waits for a machine that is not there, without a word.
            training_resources(job, nodes, jobs_per_machine)
        task = ray.remote(_task)
        pending, machine = list(jobs), ""
        while wave := next_wave(pending):
            failed = set[str]()
            for part in [[job] for job in wave] if wave[0].measures else [wave]:
                # Machines may have come and gone since the part before.
                nodes = living_nodes(ray.nodes())
                if part[0].measures:
                    node = measuring_node(part[0], nodes, machine)
                    resources, machine = [_whole(part[0], node)], node["NodeID"]
                else:
                    resources = [training_resources(job, nodes, jobs_per_machine) for job in part]
                failed |= yield from _all(ray, task, part, folder, resources)
            done = {job.name for job in wave}
            pending = [job for job in pending if job.name not in done and job.run.id not in failed]
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


def living_nodes(nodes: Sequence[Node]) -> list[Node]:
    """The machines of a cluster that can compute: a head without processors only manages.

    Raises:
        InputError: There is none.
    """
    found = [node for node in nodes if node["Alive"] and _amount(node, "CPU") >= 1]
    if not found:
        raise InputError(
            "--ray: no machine of the cluster has a processor; add one with `ray start "
            "--address HEAD:PORT`"
        )
    return found


def training_resources(job: Job, nodes: Sequence[Node], per_machine: int) -> dict[str, Any]:
    """What Ray reserves for a training, by the device of its recipe.

    Args:
        job: The training.
        nodes: The machines (`living_nodes`).
        per_machine: Trainings at a time on one machine.

    Returns:
        Options of the task.

    Raises:
        InputError: No machine has that.
    """
    train = job.run.recipe.train
    smallest = min(_amount(node, "CPU") for node in nodes)
    threads = train.threads or max(1, math.floor(smallest / per_machine))
    able = _with_device(job, nodes)
    most = max(_amount(node, "CPU") for node in able)
    if threads > most:
        raise InputError(
            f"--ray: train.threads = {threads}, and no machine of the cluster"
            f"{' with a GPU' if _wants_gpu(job, nodes) else ''} has more than {most:g} processors; "
            f"write train.threads = {math.floor(most)}, or add a machine"
        )
    return {"num_cpus": threads, **_gpu(job, nodes)}


def measuring_node(job: Job, nodes: Sequence[Node], before: str = "") -> Node:
    """The machine of a measurement: the one that has most processors.

    Args:
        job: The measurement.
        nodes: The machines (`living_nodes`).
        before: Id of the machine of earlier ones, which is kept while it is there.

    Returns:
        The machine.

    Raises:
        InputError: None has the device of the recipe.
    """

    def order(node: Node) -> tuple[bool, float, str]:
        return node["NodeID"] == before, _amount(node, "CPU"), node["NodeID"]

    return max(_with_device(job, nodes), key=order)


def _whole(job: Job, node: Node) -> dict[str, Any]:
    """All processors of a machine."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    cpus = _amount(node, "CPU")
    return {"num_cpus": cpus, "scheduling_strategy": strategy, **_gpu(job, [node])}


def _with_device(job: Job, nodes: Sequence[Node]) -> Sequence[Node]:
    """The machines that have the device of the recipe."""
    if not _wants_gpu(job, nodes):
        return nodes
    found = [node for node in nodes if _amount(node, "GPU") >= 1]
    if not found:
        raise InputError(
            'train.device = "cuda": no machine of the cluster has a GPU; write train.device = '
            '"auto", or add one'
        )
    return found


def _wants_gpu(job: Job, nodes: Sequence[Node]) -> bool:
    device = job.run.recipe.train.device
    return device == "cuda" or (
        device == "auto" and any(_amount(node, "GPU") >= 1 for node in nodes)
    )


def _gpu(job: Job, nodes: Sequence[Node]) -> dict[str, Any]:
    # Ray hides the GPUs from a task that reserves none.
    return {"num_gpus": 1} if _wants_gpu(job, nodes) else {}


def _amount(node: Node, resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))
