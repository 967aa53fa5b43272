"""The figures of a finished run, read from its report, as columns of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bench.report.model import ArtifactEntry, Report
from ...compress.network.architecture import Architecture
from ...compress.network.count import count_macs, count_params
from ...compress.network.files import ARCHITECTURE, read_architecture
from ...compress.oneshot.allocation import params_cost
from ...compress.train.training_files import read_history
from ...core.errors import InputError
from ...core.written_kinds import json_object
from ..artifacts import Planned
from ..magnitude_step import EXACT, read_dead
from ..run_folder import LEDGER
from ..training_steps import BASELINE, COMPACT, CUT, HISTORY
from .expansion import Cell
from .table import Column, declared

TRAININGS = ("baseline", "masks", "finetune")
# Models of a run with the endings of their columns.
MODELS = ((COMPACT, ""), (BASELINE, "_dense"))
# In the table of a study that has such runs; those of the exact model beside them.
ZERO_COLUMNS = declared(
    "figure",
    """
    sparsity        REAL      share of zeros among the weights in scope, 0 to 1
    params_nonzero  INTEGER   parameters of the compact model but its zeros
    heads           INTEGER   heads of all attentions
    heads_dead      INTEGER+  heads that add nothing, or a constant
    units_dead      INTEGER+  the same of hidden units of FFNs
    channels_dead   INTEGER+  removable channels of the stream
    params_exact    INTEGER   parameters without what is dead
    macs_exact      INTEGER   multiply-adds without what is dead
    top1_exact      REAL+     test accuracy of the model without it, 0 to 1
    """,
)


def read_figures(run_folder: Path) -> tuple[dict[str, Cell], list[Column]]:
    """The figures of a run, and the columns of its artifacts.

    Args:
        run_folder: A finished run, measured or not.

    Returns:
        Values by column, and the columns that depend on the recipe: for each artifact, e.g.
        `compact_int8`, the median latency `_ms`, the accuracy `_top1` and the size `_bytes`. With
        buckets `_ms` is the latency of the slowest one, and `_mean_ms` that of an image on average.

    Raises:
        InputError: A file of the run is damaged.
    """
    steps = json_object(run_folder / LEDGER) or {}
    found: dict[str, Cell] = {
        "train_s": _seconds(steps.get("steps", {})),
        "val_top1": _validation(run_folder / HISTORY),
    }
    architectures = [read_architecture(run_folder / name / ARCHITECTURE) for name, _ in MODELS]
    for (_, suffix), architecture in zip(MODELS, architectures, strict=True):
        found[f"params{suffix}"] = count_params(architecture)
        found[f"macs{suffix}"] = count_macs(architecture)
    found |= kept_shares(*architectures)
    zeros, columns = _zero_figures(run_folder)
    found |= zeros
    if (run_folder / "report.json").is_file():
        report = _report(run_folder / "report.json")
        exact = ((EXACT, "_exact"),) if EXACT in report.models else ()
        for name, suffix in (*MODELS, *exact):
            entry = report.models[name]
            for figure in ("top1", "params", "macs"):
                found[f"{figure}{suffix}"] = getattr(entry, figure)
            means = {table.name: table.mean_s for table in entry.buckets}
            for artifact in entry.one_each:
                values = _artifact_figures(artifact, means)
                prefix = artifact_prefix(name, artifact.runtime, artifact.precision)
                found |= {f"{prefix}_{key}": value for key, value in values.items()}
                listed = _artifact_columns(prefix, name, artifact)
                columns += [column for column in listed if column.name in found]
    return found, columns


def stopped_figures(run_folder: Path) -> dict[str, Cell]:
    """What is known of a run that was stopped during its fine-tuning, by column.

    Raises:
        InputError: A file of the run is damaged.
    """
    cut = read_architecture(run_folder / CUT / ARCHITECTURE)
    return {
        "val_top1": _validation(run_folder / HISTORY),
        "params": count_params(cut),
        "macs": count_macs(cut),
    }


def kept_shares(compact: Architecture, dense: Architecture) -> dict[str, Cell]:
    """The shares of parameters that a cut left in attentions, in FFNs, and by depth.

    Args:
        compact: The network after the cut, whose sub-layers have the names of those before.
        dense: The network before.

    Returns:
        Shares by column; a middle block counts for neither half.
    """
    kinds = ("attention", "ffn")
    names = {
        kind: [branch.name for branch in dense.branches if branch.core.kind == kind]
        for kind in kinds
    }
    parts = {f"kept_{kind}": names[kind] for kind in kinds}
    halves: tuple[list[str], list[str]] = ([], [])
    for listed in names.values():
        half = len(listed) // 2
        halves[0].extend(listed[:half])
        halves[1].extend(listed[len(listed) - half :])
    parts["kept_first_half"], parts["kept_second_half"] = halves
    left, whole = (
        {branch.name: params_cost(branch, each.embed, 0, 0) for branch in each.branches}
        for each in (compact, dense)
    )
    found: dict[str, Cell] = {}
    for column, part in parts.items():
        total = sum(whole[name] for name in part)
        if total:
            found[column] = round(sum(left.get(name, 0) for name in part) / total, 6)
    return found


def _zero_figures(run_folder: Path) -> tuple[dict[str, Cell], list[Column]]:
    """The figures of a run with zeros among single weights, and their columns; else none."""
    record = read_dead(run_folder)
    if record is None:
        return {}, []
    names = ("sparsity", "heads", "heads_dead", "units_dead", "channels_dead")
    found = {name: record[name] for name in (*names, "params_exact", "macs_exact")}
    found["params_nonzero"] = record["params"] - record["zeros"]
    return found, list(ZERO_COLUMNS)


def _report(path: Path) -> Report:
    try:
        report = Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable report ({type(error).__name__})") from error
    if not {name for name, _ in MODELS} <= set(report.models):
        raise InputError(f"{path}: not the report of a run; it lacks a model")
    return report


def _validation(history: Path) -> float | None:
    """The best validation accuracy of the fine-tuning; None without epochs."""
    epochs = [line for line in read_history(history) if line.get("phase") == TRAININGS[-1]]
    known = [float(line["val_top1"]) for line in epochs if line.get("val_top1") is not None]
    return round(max(known) / 100, 6) if known else None


def artifact_prefix(model: str, runtime: str, precision: str) -> str:
    """The beginning of the columns of an artifact: `compact_tvm_int8`."""
    return Planned(model, runtime, precision).name.replace("-", "_")  # type: ignore[arg-type]


def _artifact_figures(
    artifact: ArtifactEntry, means: Mapping[str, float | None]
) -> dict[str, Cell]:
    """The figures of an artifact; `means` has seconds of those with buckets, by their names."""
    measured = artifact.measurement
    mean_s = None if measured is None else means.get(measured.name)
    mean = {} if mean_s is None else {"mean_ms": round(1e3 * mean_s, 6)}
    return {
        **mean,
        "ms": None if measured is None else round(1e3 * measured.summary().p50_s, 6),
        "top1": None if measured is None else measured.top1,
        "bytes": artifact.bytes,
        "memory_bytes": None if measured is None else measured.beyond_floor_rss_bytes,
    }


def _artifact_columns(prefix: str, model: str, artifact: ArtifactEntry) -> list[Column]:
    what = f"{model} model, {artifact.runtime}, {artifact.precision}"
    return [
        Column(f"{prefix}_ms", "figure", "REAL", f"{what}: median latency in milliseconds"),
        Column(
            f"{prefix}_mean_ms",
            "figure",
            "REAL",
            f"{what}: median latency of an image in its bucket, the mean over images, milliseconds",
        ),
        Column(f"{prefix}_top1", "figure", "REAL", f"{what}: test accuracy, 0 to 1", True),
        Column(f"{prefix}_bytes", "figure", "INTEGER", f"{what}: bytes of its files"),
        Column(f"{prefix}_memory_bytes", "figure", "INTEGER", f"{what}: memory beyond the runtime"),
    ]


def _seconds(steps: Mapping[str, Any]) -> float:
    times = (steps[step].get("seconds", 0.0) for step in TRAININGS if step in steps)
    return round(sum(map(float, times)), 3)
