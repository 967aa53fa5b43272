"""When memory suffices for a further worker: by what the running ones have, from the start."""

from __future__ import annotations

import os

import pytest
from vitrim.pipeline.studies import memory
from vitrim.pipeline.studies.memory import MemoryWatch, free_memory_bytes, resident_bytes


class Machine:
    """A machine whose free memory, processes and clock are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free: int | None = 1000
        self.sizes: dict[int, int] = {}
        self.now = 0.0
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: self.free)
        monkeypatch.setattr(memory, "resident_bytes", lambda process: self.sizes.get(process, 0))
        monkeypatch.setattr("vitrim.pipeline.studies.memory.time.monotonic", lambda: self.now)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_nobody_starts_beside_a_first_worker_that_grows(machine: Machine) -> None:
    watch = MemoryWatch()
    for machine.now, size in ((0.0, 10), (1.0, 300), (2.0, 400), (3.0, 405), (3.9, 410)):
        machine.sizes[1] = size
        assert not watch.suffices_for_another([1])
    machine.now = 4.1
    assert watch.suffices_for_another([1])
    # A second one grows now, and a third waits for it, and for memory.
    machine.sizes[2], machine.free = 10, 990
    assert not watch.suffices_for_another([1, 2])
    machine.now = 7.0
    assert watch.suffices_for_another([1, 2])
    machine.free = 800
    assert not watch.suffices_for_another([1, 2])


def test_workers_are_expected_to_become_as_large_as_the_largest(machine: Machine) -> None:
    watch = MemoryWatch()
    watch.ended(400)
    machine.sizes[1] = 10
    # 390 for the one that runs, and 480 for another one.
    assert watch.suffices_for_another([1])
    machine.free = 860
    assert not watch.suffices_for_another([1])
    machine.sizes[1] = 400
    assert watch.suffices_for_another([1])
    # One that runs may be larger than all that have ended.
    machine.sizes[1] = 800
    assert not watch.suffices_for_another([1])


def test_an_unknown_memory_limits_nobody(machine: Machine) -> None:
    machine.free = None
    assert MemoryWatch().suffices_for_another([1])


@pytest.mark.skipif(free_memory_bytes() is None, reason="the system does not report its memory")
def test_the_memory_of_a_process_is_read() -> None:
    assert resident_bytes(os.getpid()) > 10_000_000
    assert resident_bytes(2**22 + 1) == 0
