"""Jobs in worker processes of this machine; measurements run alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from .jobs import Outcome, run_job
from .memory import MemoryWatch
from .plan import MEASURED, Job

# A job whose process was killed is tried once more.
ATTEMPTS = 2
# How often the memory of running workers is read while another one waits for it.
MEMORY_POLL_S = 0.5
_WAIT_POLICY = "OMP_WAIT_POLICY"


@dataclass(frozen=True)
class Started:
    """A job that has started."""

    job: Job


Event = Started | Outcome


@dataclass
class _Worker:
    process: SpawnProcess
    link: Connection
    job: Job | None = None


class LocalWorkers:
    """Worker processes that do the jobs of a study.

    Args:
        folder: The study folder.
        count: Number of processes.
        threads: Threads of a training whose recipe does not set them (default: an equal share of
            the processors).
    """

    def __init__(self, folder: Path, count: int, threads: int | None = None) -> None:
        self.folder, self.count = folder, count
        self.threads = threads or max(1, processors() // count)
        self.workers: list[_Worker] = []
        self.attempts: dict[str, int] = {}
        self.memory = MemoryWatch()
        self.lacks_memory = False

    def run(self, jobs: Sequence[Job]) -> Iterator[Event]:
        """Do the jobs, and yield their beginnings and ends.

        Args:
            jobs: Each after those that it needs. After a failure, later jobs of its run are left
                out.

        Yields:
            Events in the order in which they happen.
        """
        pending = list(jobs)
        try:
            while pending or self._busy():
                while (job := self._next(pending)) is not None:
                    pending.remove(job)
                    self._start(job)
                    yield Started(job)
                for outcome in self._ended(pending):
                    if outcome.reason is not None:
                        pending[:] = [job for job in pending if job.run.id != outcome.run]
                    yield outcome
        finally:
            self._stop()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def _next(self, pending: Sequence[Job]) -> Job | None:
        """The job to start now; None if a running one must end first."""
        self.lacks_memory = False
        busy = self._busy()
        running = [worker.job for worker in busy if worker.job is not None]
        if len(running) >= self.count or any(job.alone for job in running):
            return None
        unfinished = {job.name for job in [*pending, *running]}
        ready = [job for job in pending if not unfinished.intersection(job.needs)]
        # A device measures beside trainings, one job at a time.
        device_busy = any(job.measures for job in running)
        beside = (job for job in ready if not (job.measures and device_busy))
        training = next((job for job in beside if not job.alone), None)
        if not running:
            # Measurements here run alone: those of masks, all that are ready, before the trainings
            # that wait for them; the others last.
            masks = (job for job in ready if job.alone and job.until != MEASURED)
            return next(masks, training or next(iter(ready), None))
        if training is None:
            return None
        numbers = [worker.process.pid for worker in busy if worker.process.pid is not None]
        self.lacks_memory = not self.memory.suffices_for_another(numbers)
        return None if self.lacks_memory else training

    def _start(self, job: Job) -> None:
        worker = next((worker for worker in self.workers if worker.job is None), None)
        if worker is None:
            worker = _new_worker(self.folder, self.threads)
            self.workers.append(worker)
        worker.job = job
        self.attempts[job.name] = self.attempts.get(job.name, 0) + 1
        with contextlib.suppress(OSError):  # It was killed while idle: noticed by _ended.
            worker.link.send(job)

    def _ended(self, pending: list[Job]) -> Iterator[Outcome]:
        """Wait for a worker; a job whose process was killed returns to the front of `pending`.

        Where another job lacks memory, not for long: a worker that runs may have what it needs.
        """
        busy = {worker.link: worker for worker in self._busy()}
        for link in wait(list(busy), MEMORY_POLL_S if self.lacks_memory else None):
            worker = busy[link]  # type: ignore[index]
            job, worker.job = worker.job, None
            assert job is not None
            try:
                outcome: Outcome = worker.link.recv()
            except (EOFError, OSError):
                worker.process.join()
                self.workers.remove(worker)
                if self.attempts[job.name] < ATTEMPTS:
                    pending.insert(0, job)
                    continue
                yield Outcome(job.name, job.run.id, _killed(worker.process.exitcode))
            else:
                self.memory.ended(outcome.peak_bytes)
                yield outcome

    def _stop(self) -> None:
        for worker in self.workers:
            if worker.job is None:
                with contextlib.suppress(OSError):
                    worker.link.send(None)
            else:
                worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
        self.workers.clear()


def processors() -> int:
    """The processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Not Linux.
        return os.cpu_count() or 1


def _killed(code: int | None) -> str:
    name = f"exit code {code}"
    with contextlib.suppress(ValueError, TypeError):
        name = signal.Signals(-code).name if code is not None and code < 0 else name
    return (
        f"its process ended {ATTEMPTS} times ({name}); if memory was short, use fewer --jobs or a "
        "smaller train.batch_size"
    )


def _new_worker(folder: Path, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Idle threads of torch sleep, as in commands.run.
    added = _WAIT_POLICY not in os.environ
    os.environ.setdefault(_WAIT_POLICY, "passive")
    process = context.Process(target=_work, args=(theirs, folder, threads, added))
    try:
        process.start()
    finally:
        if added:
            del os.environ[_WAIT_POLICY]
    theirs.close()
    return _Worker(process, ours)


def _work(link: Connection, folder: Path, threads: int, remove_policy: bool) -> None:
    """The loop of a worker process; torch is imported already."""
    if remove_policy:
        # Runners of artifacts start with the user's own environment.
        del os.environ[_WAIT_POLICY]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches the whole group; the study itself reports it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    while True:
        try:
            job = link.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        link.send(run_job(job, folder, threads))


def _end_with_parent() -> None:
    """End this process with the study, also if that is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
