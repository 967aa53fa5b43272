"""One row an operator: what a runtime's own profiler told of an inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class OperatorRow(BaseModel):
    """One node of the graph as the runtime ran it, fusions included; seconds are of one
    inference.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    node: str
    operator: str
    provider: str
    output_shapes: tuple[tuple[int, ...], ...] = ()
    calls: int = Field(ge=0)
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class OperatorTable:
    """Rows by falling time. The profiler itself costs time, so shares are to be trusted more than
    seconds.
    """

    rows: tuple[OperatorRow, ...]
    runs: int = 0

    @property
    def seconds(self) -> float:
        """Time of all operators in one inference, in seconds."""
        return sum(row.seconds for row in self.rows)

    def share(self, seconds: float) -> float:
        """Seconds as a share of all operators' time."""
        return seconds / (self.seconds or 1.0)

    def by_operator(self) -> dict[str, tuple[int, float, float]]:
        """{operator: (nodes, seconds, share)}, by falling time."""
        found: dict[str, tuple[int, float]] = {}
        for row in self.rows:
            nodes, seconds = found.get(row.operator, (0, 0.0))
            found[row.operator] = (nodes + 1, seconds + row.seconds)
        ordered = sorted(found.items(), key=lambda item: -item[1][1])
        return {name: (nodes, seconds, self.share(seconds)) for name, (nodes, seconds) in ordered}


def operator_rows(told: Sequence[dict[str, Any]]) -> tuple[OperatorRow, ...]:
    """Rows as a runner tells them, by falling time."""
    rows = [OperatorRow.model_validate(row) for row in told]
    return tuple(sorted(rows, key=lambda row: -row.seconds))
