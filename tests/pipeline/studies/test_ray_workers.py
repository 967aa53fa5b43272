"""A study on a local Ray cluster of two processors, with one worker killed in the middle."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from study_sample import rows_without_time, write_study
from vitrim.core.errors import InputError
from vitrim.pipeline.studies.engine import StudyOptions, run_study
from vitrim.pipeline.studies.ray_workers import require_ray
from vitrim.pipeline.studies.study_file import load_study
from vitrim.pipeline.studies.table import StudyTable

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: pip install 'vitrim[ray]'", allow_module_level=True)

TEXT = """
[axes]
"masks.params" = [0.6, 0.5]
"finetune.lr" = [1e-3, 1e-4]
"""


def _kill_first_worker(folder: Path, killed: list[int]) -> None:
    """Kill the process of the first job as soon as its log names it."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        for log in (folder / "logs").glob("*.log"):
            lines = log.read_text().splitlines()
            if lines and lines[0].startswith("--- "):
                killed.append(int(lines[0].rpartition(" ")[2]))
                os.kill(killed[0], signal.SIGKILL)
                return
        time.sleep(0.01)


def test_a_study_on_ray_survives_a_killed_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    study = load_study(write_study(tmp_path, TEXT))
    local = run_study(study, tmp_path / "local", StudyOptions(quiet=True))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    address = str(ray.get_runtime_context().gcs_address)
    try:
        killed: list[int] = []
        killer = threading.Thread(target=_kill_first_worker, args=(tmp_path / "ray", killed))
        killer.start()
        options = StudyOptions(ray=address, jobs=2, quiet=True)
        table = run_study(study, tmp_path / "ray", options)
        killer.join()
    finally:
        ray.shutdown()
    assert len(killed) == 1
    assert [row["state"] for row in table.rows()] == ["done"] * 4
    assert rows_without_time(table) == rows_without_time(local)
    _require_two_workers(table, tmp_path / "ray", killed[0])


def _require_two_workers(table: StudyTable, folder: Path, killed: int) -> None:
    logs = [(folder / "logs" / f"{row['id']}.log").read_text() for row in table.rows()]
    jobs = [line for log in logs for line in log.splitlines() if line.startswith("--- ")]
    processes = {int(line.rpartition(" ")[2]) for line in jobs}
    assert len(processes - {killed}) >= 2
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
    with pytest.raises(InputError, match=r"--ray cluster: .* an address is HOST:PORT"):
        run_study(study, tmp_path / "other", StudyOptions(ray="cluster", quiet=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray is not installed; pip install 'vitrim\[ray\]'"):
        require_ray()
