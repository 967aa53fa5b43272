"""The few numbers that the kernels leave open."""

from __future__ import annotations

from dataclasses import dataclass

from ....targets.vector import VectorUnit


@dataclass(frozen=True)
class Schedule:
    """Register tiles: a product holds rows x vectors accumulators. steps: how often the loop over K is unrolled. threads: shares of the parallel loops."""

    rows: int
    vectors: int
    attention_rows: int
    attention_vectors: int
    steps: int = 1
    threads: int = 1

    def tile(self, rows: int) -> tuple[int, int]:
        """(rows, vectors) for a product of so many rows: fewer rows leave registers for more vectors, else latency would show."""
        most = self.rows * self.vectors
        if rows >= self.rows:
            return self.rows, self.vectors
        return rows, max(self.vectors, min(8, most // rows))


def default_schedule(unit: VectorUnit, threads: int = 1) -> Schedule:
    """What is good for a vector unit: accumulators, one row of weights and one broadcast fill the registers."""
    if unit.registers >= 32:
        return Schedule(8, 3, 8, 3, threads=threads)
    return Schedule(6, 2, 6, 2, threads=threads)
