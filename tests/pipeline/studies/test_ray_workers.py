"""A study on a local Ray cluster of two processors, with one worker killed in the middle."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from study_sample import logged_processes, write_study
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.studies import ray_workers
from vitrim.pipeline.studies.engine import StudyOptions, run_study
from vitrim.pipeline.studies.expansion import StudyRun
from vitrim.pipeline.studies.jobs import Outcome
from vitrim.pipeline.studies.plan import Job
from vitrim.pipeline.studies.ray_workers import (
    Node,
    living_nodes,
    measuring_node,
    require_ray,
    run_on_ray,
    training_resources,
)
from vitrim.pipeline.studies.study_file import load_study
from warm_processes import start

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'vitrim[ray]'", allow_module_level=True)

TEXT = """
[axes]
"masks.params" = [0.6, 0.5]
"""


def _kill_first_worker(folder: Path, killed: list[int]) -> None:
    """Kill the process of the first job as soon as its log names it."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        # Ray's own processes are children of this one, and the workers theirs. All processes of the
        # machine are read for that, which costs more than the trainings: only once one is named.
        for named in logged_processes(folder)[:1]:
            for worker in psutil.Process().children(recursive=True):
                if worker.pid == named:
                    worker.kill()
                    killed.append(worker.pid)
                    return
        time.sleep(0.01)


def test_a_study_on_ray_survives_a_killed_worker(tmp_path: Path) -> None:
    # Ray ends a process without a word minutes after its cluster has gone (ray-project/ray#45570:
    # "The program will terminate"), so it gets one of its own.
    running = start(_study_with_a_killed_worker, tmp_path, log=tmp_path / "log")
    assert running.wait() == 0, running.errors()


def _study_with_a_killed_worker(tmp_path: Path) -> None:
    import ray

    trained = load_study(write_study(tmp_path, f'until = "finetune"\n{TEXT}'))
    local = run_study(trained, tmp_path / "local", StudyOptions(quiet=True))
    study = load_study(write_study(tmp_path, TEXT))
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    try:
        killed: list[int] = []
        killer = threading.Thread(target=_kill_first_worker, args=(tmp_path / "ray", killed))
        killer.start()
        table = run_study(study, tmp_path / "ray", StudyOptions(ray="auto", jobs=2, quiet=True))
        killer.join(300)
        text = 'until = "finetune"\nearly_stop = "asha"\n[set]\n"finetune.epochs" = 2\n' + TEXT
        stopping = load_study(write_study(tmp_path, text, "stopping"))
        options = StudyOptions(ray="auto", jobs=2, quiet=True)
        early = run_study(stopping, tmp_path / "early", options)
    finally:
        ray.shutdown()
    assert len(killed) == 1
    rows = table.rows()
    assert [row["state"] for row in rows] == ["done"] * 2
    assert all(row["compact_fp32_ms"] > 0 for row in rows)  # type: ignore[operator]
    same = ("id", "masks.params", "params", "macs", "val_top1", "params_dense")
    assert [[row[name] for name in same] for row in rows] == [
        [row[name] for name in same] for row in local.rows()
    ]
    logs = [(tmp_path / "ray/logs" / f"{row['id']}.log").read_text() for row in rows]
    jobs = [line for log in logs for line in log.splitlines() if line.startswith("--- ")]
    assert set(logged_processes(tmp_path / "ray")) > set(killed)
    # Runs of other sizes are no competitors, so that both continue after their rung.
    assert set(early.states().values()) == {"done"}
    rungs = [path.stem for path in (tmp_path / "early/rungs/1").glob("*.json")]
    assert sorted(rungs) == sorted(early.states())
    # The job of the killed process ran twice.
    names = [line.partition(",")[0] for line in jobs]
    assert len(names) == len(set(names)) + 1


def test_a_missing_ray_or_cluster_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(write_study(tmp_path, ""))
    options = StudyOptions(ray="127.0.0.1:1", quiet=True)
    with pytest.raises(InputError, match=r"--ray 127.0.0.1:1: the cluster cannot be reached"):
        run_study(study, tmp_path / "out", options)
    with pytest.raises(InputError, match=r"--ray cluster: .*\(an address is HOST:PORT"):
        run_study(study, tmp_path / "other", StudyOptions(ray="cluster", quiet=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray is not installed; pip install 'vitrim\[ray\]'"):
        require_ray()


def node(name: str, cpus: float, gpus: float = 0, *, alive: bool = True) -> Node:
    """A machine as Ray describes it; one without processors has no entry for them."""
    resources = {key: value for key, value in (("CPU", cpus), ("GPU", gpus)) if value}
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def job(*sets: str, run: str = "run", until: str = "finetune") -> Job:
    recipe = load_recipe(None, sets)
    return Job(StudyRun(run, 1, 7, 1, {}, recipe), until)  # type: ignore[arg-type]


# The recipe of the package sets one thread.
SHARE = 'train.device="cpu"'


def test_a_head_without_processors_gives_no_share() -> None:
    nodes = living_nodes([node("head", 0), node("a", 8), node("b", 16), node("c", 2, alive=False)])
    assert [each["NodeID"] for each in nodes] == ["a", "b"]
    recipe = load_recipe(None, [SHARE])
    train = recipe.train.model_copy(update={"threads": None})
    run = StudyRun("run", 1, 7, 1, {}, recipe.model_copy(update={"train": train}))
    assert training_resources(Job(run, "finetune"), nodes, 2) == {"num_cpus": 4}
    with pytest.raises(InputError, match=r"--ray: no machine of the cluster has a processor; add"):
        living_nodes([node("head", 0)])


def test_what_no_machine_has_is_refused_and_not_waited_for() -> None:
    nodes = [node("a", 8), node("b", 4, 1)]
    wide = job("train.threads=9", SHARE)
    with pytest.raises(InputError, match=r"train.threads = 9, and no machine of the cluster has m"):
        training_resources(wide, nodes, 1)
    # The machine with the GPU has fewer.
    message = "train.threads = 6, and .* with a GPU has more than 4 processors; write .* = 4, or"
    with pytest.raises(InputError, match=message):
        training_resources(job("train.threads=6"), nodes, 1)
    assert training_resources(job("train.threads=4"), nodes, 1) == {"num_cpus": 4, "num_gpus": 1}
    with pytest.raises(InputError, match=r'train.device = "cuda": no machine .* has a GPU; write'):
        training_resources(job("train.device=cuda"), nodes[:1], 1)
    with pytest.raises(InputError, match="has a GPU"):
        measuring_node(job("train.device=cuda"), nodes[:1])


def test_measurements_stay_on_the_largest_machine_while_it_is_there() -> None:
    nodes = [node("a", 8), node("b", 16)]
    assert measuring_node(job(SHARE), nodes)["NodeID"] == "b"
    more = [*nodes, node("c", 32)]
    assert measuring_node(job(SHARE), more, "b")["NodeID"] == "b"
    assert measuring_node(job(SHARE), nodes[:1], "b")["NodeID"] == "a"
    # Masks that are measured are trained, so that a GPU matters more than processors.
    assert measuring_node(job(), [*nodes, node("g", 4, 1)])["NodeID"] == "g"


def test_machines_are_read_again_before_each_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest machine is lost after the trainings, and another one after a measurement."""
    import ray

    cluster = [node("a", 8), node("b", 16), node("c", 4)]
    used: list[tuple[str, str]] = []

    def did(ray: object, task: object, jobs: list[Job], folder: Path, resources: list[Any]) -> Any:
        del ray, task, folder
        for each, needed in zip(jobs, resources, strict=True):
            where = needed.get("scheduling_strategy")
            used.append((each.name, "" if where is None else where.node_id))
            yield Outcome(each.name, each.run.id)
        if len(cluster) > 1:
            cluster.remove(max(cluster, key=lambda one: one["Resources"]["CPU"]))
        return set()

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: list(cluster))
    monkeypatch.setattr(ray_workers, "_all", did)
    # Ids of nodes are checked where a strategy is made.
    for each, name in zip(cluster, ("aa", "bb", "cc"), strict=True):
        each["NodeID"] = name * 28
    jobs = [job(SHARE, run=run, until=until) for until in ("finetune", "report") for run in "xy"]
    outcomes = list(run_on_ray(jobs, tmp_path, "auto", 1))
    assert len(outcomes) == 4
    assert [(name, place[:2]) for name, place in used] == [
        *(("x/finetune", ""), ("y/finetune", "")),
        *(("x/report", "aa"), ("y/report", "cc")),
    ]
