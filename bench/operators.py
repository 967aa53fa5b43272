"""Where the time goes inside a model: one row an operator, from the runtime's own profiler in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..export.artifact import Artifact
from .conductor import Child, ConductorError
from .measure import make_plan
from .options import CPU


@dataclass(frozen=True)
class OperatorRow:
    """One node of the graph as the runtime ran it, fusions included; seconds and share are of one inference."""

    node: str
    operator: str
    provider: str
    output_shapes: tuple[tuple[int, ...], ...]
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class OperatorTable:
    """Rows by falling time. The profiler itself costs time, so shares are to be trusted more than seconds."""

    rows: tuple[OperatorRow, ...]
    runs: int

    @property
    def seconds(self) -> float:
        """Time of all operators in one inference, in seconds."""
        return sum(row.seconds for row in self.rows)

    def by_operator(self) -> dict[str, tuple[int, float, float]]:
        """{operator: (nodes, seconds, share)}, by falling time."""
        found: dict[str, tuple[int, float, float]] = {}
        for row in self.rows:
            nodes, seconds, share = found.get(row.operator, (0, 0.0, 0.0))
            found[row.operator] = (nodes + 1, seconds + row.seconds, share + row.share)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def profile_operators(
    artifact: Artifact | Path | str,
    threads: int = 1,
    *,
    runs: int = 20,
    batch: int | None = None,
    providers: Sequence[str] = (CPU,),
) -> OperatorTable:
    """Profile `runs` inferences after two warm ones. Errors: InputError, one line, for a bad artifact or a runner that failed."""
    if runs < 1:
        raise InputError(f"runs = {runs}: at least 1 is wanted")
    plan, _ = make_plan({"model": artifact}, threads=threads, batch=batch, providers=providers)
    try:
        child = Child("model", plan["jobs"]["model"], 300.0)
        try:
            told = child.ask("profile", count=runs)
        finally:
            child.close()
    except ConductorError as error:
        raise InputError(str(error)) from None
    total = sum(row["seconds"] for row in told["rows"]) or 1.0
    rows = tuple(
        OperatorRow(
            node=row["node"],
            operator=row["operator"],
            provider=row["provider"],
            output_shapes=tuple(tuple(shape) for shape in row["output_shapes"]),
            calls=row["calls"],
            seconds=row["seconds"],
            share=row["seconds"] / total,
        )
        for row in told["rows"]
    )
    return OperatorTable(rows, runs)
