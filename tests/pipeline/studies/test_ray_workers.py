"""A study on a local Ray cluster of two processors, with one worker killed in the middle."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from study_sample import logged_processes, write_study
from vitrim.core.errors import InputError
from vitrim.pipeline.studies.engine import StudyOptions, run_study
from vitrim.pipeline.studies.ray_workers import require_ray
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
        named = logged_processes(folder)
        # Ray's own processes are children of this one, and the workers theirs.
        for worker in psutil.Process().children(recursive=True):
            if worker.pid in named[:1]:
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
