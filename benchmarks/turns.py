"""Timing of several calls in turns, so that other work on the machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
IDLE_SHARE = 0.9


class Turn(NamedTuple):
    """One turn of a call.

    Attributes:
        least_s: The fastest of its repetitions, by the chosen clock.
        processor_s: Mean processor time of a repetition, of all threads.
    """

    least_s: float
    processor_s: float


def in_turns(
    calls: Mapping[Key, Callable[[], object]],
    rounds: Iterable[object],
    *,
    repeats: int = 3,
    untimed: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    shuffle: bool = False,
) -> dict[Key, list[Turn]]:
    """Time every call once a round.

    Args:
        calls: What to time.
        rounds: One item a round, e.g. `range(30)` or `until(20.0)`.
        repeats: Timed calls of a turn.
        untimed: Calls of a turn before them, which bring the data back into the caches.
        clock: `time.thread_time` is not lengthened by other programs, but counts one thread only.
        shuffle: Draw the order of every round; otherwise it is rotated.

    Returns:
        One `Turn` a round for each call.
    """
    keys, random = list(calls), np.random.default_rng(0)
    turns: dict[Key, list[Turn]] = {key: [] for key in keys}
    for number, _ in enumerate(rounds):
        first = number % len(keys)
        rotated = [*range(first, len(keys)), *range(first)]
        for place in random.permutation(len(keys)) if shuffle else rotated:
            key = keys[place]
            turns[key].append(_turn(calls[key], repeats, untimed, clock))
    return turns


def _turn(
    call: Callable[[], object], repeats: int, untimed: int, clock: Callable[[], float]
) -> Turn:
    for _ in range(untimed):
        call()
    least_s, before_s = float("inf"), time.process_time()
    for _ in range(repeats):
        start = clock()
        call()
        least_s = min(least_s, clock() - start)
    return Turn(least_s, (time.process_time() - before_s) / repeats)


def least(turns: Mapping[Key, list[Turn]]) -> dict[Key, list[float]]:
    """The fastest repetition of every turn, in seconds."""
    return {key: [turn.least_s for turn in found] for key, found in turns.items()}


def until(limit_s: float, at_least: int = 10) -> Iterator[int]:
    """Rounds until a time limit, and `at_least` so many."""
    start, number = time.perf_counter(), 0
    while number < at_least or time.perf_counter() - start < limit_s:
        yield number
        number += 1


def on_an_idle_machine(rounds: int, patience_s: float) -> Iterator[int]:
    """Rounds that begin when the machine has been idle for a moment.

    Another program on a core that a thread waits for costs more than the wait itself. The rounds
    end early where the machine stays busy for `patience_s` in total.
    """
    end = time.monotonic() + patience_s
    for number in range(rounds):
        while idle_share() < IDLE_SHARE and time.monotonic() <= end:
            pass
        if time.monotonic() > end and number:
            return
        yield number


def idle_share(moment_s: float = 0.3) -> float:
    """The idle share of the busiest core over a moment; 1 where the system does not report it."""
    before = _ticks()
    time.sleep(moment_s)
    after = _ticks()
    shares = (
        (after[core][0] - before[core][0]) / max(1, after[core][1] - before[core][1])
        for core in before
    )
    return min(shares, default=1.0)


def _ticks() -> dict[str, tuple[int, int]]:
    """Idle and total ticks of each core."""
    path = Path("/proc/stat")
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    cores = [line for line in lines if line[0].startswith("cpu") and line[0] != "cpu"]
    return {line[0]: (int(line[4]) + int(line[5]), sum(map(int, line[1:]))) for line in cores}
