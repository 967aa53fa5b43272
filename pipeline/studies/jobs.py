"""A job in a worker process: take the shared steps, run the chain, and report how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...compress.network.files import TOKENS_FILE, TRIM_FILE
from ...core.errors import InputError
from ...core.staging import only_writer
from ...core.storage import disk_errors, replace_file
from ..latency_loop import LATENCY_FILE
from ..recipe import Recipe
from ..run import run
from ..run_folder import RunFolder
from ..training_steps import HISTORY, ROTATED, START
from .early_stop import PHASE, Judge, Stopped, stop_reason
from .plan import Job, Source
from .table import LOGS, RUNS

# What a step writes beside the files in the ledger.
BESIDE = {"masks": (TRIM_FILE, TOKENS_FILE, LATENCY_FILE, ROTATED, START)}
# A worker of a study that was killed ends within a moment.
LOCK_WAIT_S = 30.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: Its name.
        run: Id of its run.
        reason: Why it failed, in one line; None if it did not.
        peak_bytes: Largest memory of the process so far; 0 if unknown.
        stopped: Whether the reason is that other runs are better, and no failure.
    """

    job: str
    run: str
    reason: str | None = None
    peak_bytes: int = 0
    stopped: bool = False


def run_job(job: Job, folder: Path, threads: int | None = None) -> Outcome:
    """Do a job; errors become its outcome.

    Args:
        job: The job.
        folder: The study folder. The output of the job is appended to logs/ID.log.
        threads: Threads of the training where the recipe does not set them.

    Returns:
        The outcome.
    """
    place = folder / RUNS / job.run.id
    reason, stopped = None, False
    judge = None if job.early_stop is None else Judge(job.early_stop, job.run, folder)
    with _output_to(folder / LOGS / f"{job.run.id}.log", f"--- {job.name}, process {os.getpid()}"):
        try:
            _wait_for_lock(place)
            if job.source is not None:
                owner = job.source.run
                why = stop_reason(folder, owner)
                take_steps(folder / RUNS / owner, place, job.source, stopped=why)
            if judge is not None:
                judge.check()
            recipe = _with_threads(job.run.recipe, threads)
            run(recipe, place, until=job.until, resume=True, on_epoch=judge)
        except Stopped as end:
            reason, stopped = str(end), True
            print(reason)
        except InputError as error:
            reason = str(error)
            print(f"vitrim: {reason}", file=sys.stderr)
        except MemoryError:
            reason = "out of memory; choose a smaller train.batch_size, or fewer --jobs"
        except Exception as error:
            reason = unexpected(error)
            traceback.print_exc()
    reason = None if reason is None else " ".join(reason.split())
    return Outcome(job.name, job.run.id, reason, _peak_bytes(), stopped)


def unexpected(error: Exception) -> str:
    """An error that no one foresaw in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first}"


def take_steps(source: Path, place: Path, shared: Source, *, stopped: str | None = None) -> None:
    """Take finished steps from another run of the study.

    Args:
        source: The run folder that has them.
        place: The run folder that receives them; it is created.
        shared: The steps.
        stopped: Why the other run was stopped during its fine-tuning, if it was.

    Raises:
        InputError: The other run has not finished one of them, because it failed.
        Stopped: It was stopped, and so is this run, whose fine-tuning is the same.
    """
    other = RunFolder(source)
    folder = RunFolder.open(place, resume=True, overwrite=False)
    with only_writer(place):
        for step, mark in shared.marks.items():
            if not folder.adopt(other, step, mark, BESIDE.get(step, ())):
                if stopped is not None and step == PHASE:
                    # The accuracy so far is that of both.
                    _take_history(source / HISTORY, place / HISTORY, step)
                    raise Stopped(stopped)
                raise InputError(
                    f"it shares the step {step} with run {shared.run}, which failed; see there"
                )
            _take_history(source / HISTORY, place / HISTORY, step)


def _take_history(source: Path, place: Path, phase: str) -> None:
    """Copy the epochs of a phase, unless they are there."""
    lines = [*_lines(place)]
    taken = [line for line in _lines(source) if _phase(line) == phase]
    if taken and not any(_phase(line) == phase for line in lines):
        replace_file(place, "".join(f"{line}\n" for line in [*lines, *taken]))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _phase(line: str) -> str | None:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(line).get("phase"))
    return None


def _with_threads(recipe: Recipe, threads: int | None) -> Recipe:
    if threads is None or recipe.train.threads is not None:
        return recipe
    train = recipe.train.model_copy(update={"threads": threads})
    return recipe.model_copy(update={"train": train})


def _wait_for_lock(place: Path) -> None:
    """Wait until a process of a study that was killed has ended."""
    end = time.monotonic() + LOCK_WAIT_S
    while place.is_dir():
        try:
            with only_writer(place):
                return
        except InputError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def _output_to(path: Path, title: str) -> Iterator[None]:
    """Append everything that this process and its children print to a file."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(log, f"{title}\n".encode())
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, descriptor in enumerate(saved, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows.
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
