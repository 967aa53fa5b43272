"""Whether the memory of this machine suffices for a further worker of a study."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

# Free memory that a further worker needs, in units of the largest one so far.
MARGIN = 1.2
# A worker whose memory has not grown by this factor for so many seconds has what it needs.
GROWTH, SETTLED_S = 1.05, 2.0


class MemoryWatch:
    """The memory of the workers that run, and the largest of those whose jobs have ended."""

    def __init__(self) -> None:
        self.largest = 0
        # By process: a size, and when the process was seen to have outgrown the one before.
        self._seen: dict[int, tuple[int, float]] = {}

    def ended(self, peak_bytes: int) -> None:
        """Note the largest memory of a job that has ended."""
        self.largest = max(self.largest, peak_bytes)

    def suffices_for_another(self, running: Sequence[int]) -> bool:
        """Whether there is memory for another worker, if all become as large as the largest.

        Until a job has ended, that size is unknown, so the workers that run must have stopped
        growing first.

        Args:
            running: The numbers of the processes that have a job.

        Returns:
            Whether there is; True where the system does not report its memory.
        """
        free, now = free_memory_bytes(), time.monotonic()
        if free is None:
            return True
        sizes = [self._size(process, now) for process in running]
        grown = all(now - self._seen[process][1] >= SETTLED_S for process in running)
        if not (self.largest or grown):
            return False
        largest = max(self.largest, *sizes, 0)
        growth = sum(largest - size for size in sizes)
        return free - growth > MARGIN * largest

    def _size(self, process: int, now: float) -> int:
        size = resident_bytes(process)
        if process not in self._seen or size > GROWTH * self._seen[process][0]:
            self._seen[process] = (size, now)
        return size


def free_memory_bytes() -> int | None:
    """Memory that new processes may use; None where the system does not report it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def resident_bytes(process: int) -> int:
    """The memory that a process has now; 0 where the system does not report it."""
    # psutil, which knows other systems, is no dependency; they do not report free memory either.
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0
