"""Cost tables with simple costs, for tests of latency budgets."""

from __future__ import annotations

from typing import Any

from vitrim import CostTable
from vitrim.targets.cost_parts import PARTS

COSTS = dict.fromkeys(PARTS, 1e-6) | {"attention": 0.004, "ffn": 0.003, "call": 0.01}


def latency_table(**fields: Any) -> CostTable:
    """A table of `COSTS` in tiles of four columns."""
    given = {"target": "host", "runtime": "onnxruntime", "tile": 4, "costs_ms": COSTS}
    return CostTable(**given | fields)
