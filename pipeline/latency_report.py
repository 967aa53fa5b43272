"""The latency budget in the report: how the cut came to it, and what the shipped file takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bench.results.measurement import Measurement
from ..compress.network.architecture import Architecture
from .latency_loop import LATENCY_FILE
from .latency_table import shipped_artifact
from .recipe import Recipe


def latency_entry(
    recipe: Recipe, dense: Architecture, folder: Path, measurements: Mapping[str, Measurement]
) -> dict[str, Any] | None:
    """The entry `latency` of report.json, from latency.json and the measurements of all artifacts.

    Args:
        recipe: The recipe.
        dense: The dense network.
        folder: The run folder.
        measurements: By the names of the artifacts.

    Returns:
        None where the budget is no latency.

    Raises:
        InputError: The cost table cannot be read.
    """
    path = folder / LATENCY_FILE
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = {key: value for key, value in record.items() if key != "schema"}
    name = shipped_artifact(recipe, dense)
    if name is None or name not in measurements:
        return found
    # The record is of the cut before fine-tuning, which is another file.
    p50_ms = 1e3 * measurements[name].summary().p50_s
    met = p50_ms <= record["latency_ms"]
    return {**found, "shipped": name, "shipped_ms": p50_ms, "shipped_met": met}
