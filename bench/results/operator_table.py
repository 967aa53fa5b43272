"""The profile of a model by operator, as the runtime's own profiler reports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class OperatorRow(BaseModel):
    """One node of the graph that the runtime ran, after its fusions.

    Attributes:
        node: Name of the node.
        operator: Type of the operator.
        provider: The execution provider or the kernel that ran it.
        output_shapes: Shapes of its outputs.
        calls: How often it was profiled.
        seconds: Time in one inference, in seconds.
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
    """Rows by falling time.

    The profiler itself takes time, so the shares are more reliable than the seconds.
    """

    rows: tuple[OperatorRow, ...]
    runs: int = 0

    @property
    def seconds(self) -> float:
        """Time of all operators in one inference, in seconds."""
        return sum(row.seconds for row in self.rows)

    def share(self, seconds: float) -> float:
        """Return seconds as a share of all operators' time."""
        return seconds / (self.seconds or 1.0)

    def by_operator(self) -> dict[str, tuple[int, float, float]]:
        """Return {operator: (nodes, seconds, share)}, by falling time."""
        found: dict[str, tuple[int, float]] = {}
        for row in self.rows:
            nodes, seconds = found.get(row.operator, (0, 0.0))
            found[row.operator] = (nodes + 1, seconds + row.seconds)
        ordered = sorted(found.items(), key=lambda item: -item[1][1])
        return {name: (nodes, seconds, self.share(seconds)) for name, (nodes, seconds) in ordered}


def operator_rows(rows_json: Sequence[dict[str, Any]]) -> tuple[OperatorRow, ...]:
    """Validate the rows of a runner's profile event and sort them by falling time."""
    rows = [OperatorRow.model_validate(row) for row in rows_json]
    return tuple(sorted(rows, key=lambda row: -row.seconds))
