"""The figures of a finished run, read from its report, as columns of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bench.report.model import ArtifactEntry, Report
from ...core.errors import InputError
from ..artifacts import Planned
from .expansion import Cell
from .table import Column

TRAININGS = ("baseline", "masks", "finetune")


def read_figures(run_folder: Path) -> tuple[dict[str, Cell], list[Column]]:
    """The figures of a run, and the columns of its artifacts.

    Args:
        run_folder: A finished run.

    Returns:
        Values by column, and the columns that depend on the recipe: for each artifact, e.g.
        `compact_int8`, the median latency `_ms`, the accuracy `_top1` and the size `_bytes`.

    Raises:
        InputError: The run has no valid report.
    """
    path = run_folder / "report.json"
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
        report = Report.model_validate(tables)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable report ({type(error).__name__})") from error
    found: dict[str, Cell] = {"train_s": _seconds(tables.get("seconds", {}))}
    columns: list[Column] = []
    for name, suffix in (("compact", ""), ("baseline", "_dense")):
        entry = report.models.get(name)
        if entry is None:
            continue
        for figure in ("top1", "params", "macs"):
            found[f"{figure}{suffix}"] = getattr(entry, figure)
        for artifact in entry.artifacts:
            values = _artifact_figures(artifact)
            prefix = artifact_prefix(name, artifact.runtime, artifact.precision)
            found |= {f"{prefix}_{key}": value for key, value in values.items()}
            columns += _artifact_columns(prefix, name, artifact)
    return found, columns


def artifact_prefix(model: str, runtime: str, precision: str) -> str:
    """The beginning of the columns of an artifact: `compact_tvm_int8`."""
    return Planned(model, runtime, precision).name.replace("-", "_")  # type: ignore[arg-type]


def _artifact_figures(artifact: ArtifactEntry) -> dict[str, Cell]:
    measured = artifact.measurement
    return {
        "ms": None if measured is None else round(1e3 * measured.summary().p50_s, 6),
        "top1": None if measured is None else measured.top1,
        "bytes": artifact.bytes,
    }


def _artifact_columns(prefix: str, model: str, artifact: ArtifactEntry) -> list[Column]:
    what = f"{model} model, {artifact.runtime}, {artifact.precision}"
    return [
        Column(f"{prefix}_ms", "figure", "REAL", f"{what}: median latency in milliseconds"),
        Column(f"{prefix}_top1", "figure", "REAL", f"{what}: test accuracy, 0 to 1", True),
        Column(f"{prefix}_bytes", "figure", "INTEGER", f"{what}: bytes of its files"),
    ]


def _seconds(steps: Mapping[str, Any]) -> float:
    return round(sum(float(steps.get(step, 0.0)) for step in TRAININGS), 3)
