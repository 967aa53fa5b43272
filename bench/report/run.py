"""A run folder, or a set of measurements, read into one value; a malformed file is refused by its
name and key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ...core.errors import InputError
from ..results.measurement import Measurement
from .model import SCHEMA, ArtifactEntry, Epoch, KeptBranch, ModelEntry, Report

Entry = TypeVar("Entry", bound=BaseModel)
LONGEST_RECIPE = 20_000


@dataclass(frozen=True)
class Run:
    """Everything that a report is made of; `missing` holds one line for each piece that the folder
    does not have.
    """

    report: Report
    kept: tuple[KeptBranch, ...] = ()
    history: tuple[Epoch, ...] = ()
    recipe_toml: str | None = None
    missing: tuple[str, ...] = ()


def load_run(folder: Path | str) -> Run:
    """Read report.json, kept.json, history.jsonl, recipe.toml and measurements/*.json; only a
    report or a measurement is required.

    Measurements that report.json does not hold already (made later, on another device) join the
    model that their name begins with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such run folder; name a folder that `vitrim run` wrote, or measurement files"
        )
    path = folder / "report.json"
    loose = [Measurement.load(file) for file in sorted((folder / "measurements").glob("*.json"))]
    if path.is_file():
        report = join(load_report(path), loose)
    elif loose:
        report = from_measurements(loose)
    else:
        raise InputError(
            f"{folder}: holds neither report.json nor measurements/*.json; name a folder that `vitrim run` wrote"
        )
    kept = _load_kept(folder / "kept.json") or report.kept
    history = _load_history(folder / "history.jsonl") or report.curves
    recipe = folder / "recipe.toml"
    missing = []
    if not kept:
        missing.append("What was kept in each block is not shown: the folder holds no kept.json.")
    if not history:
        missing.append("Training curves are not shown: the folder holds no history.jsonl.")
    if not report.parity:
        missing.append("Parity is not shown: report.json holds no parity figures.")
    return Run(
        report=report,
        kept=kept,
        history=history,
        recipe_toml=_text(recipe)[:LONGEST_RECIPE] if recipe.is_file() else None,
        missing=tuple(missing),
    )


def load_measurements(files: Iterable[Path | str]) -> Run:
    """A run made of measurement files alone: no model counts, no masks, no curves."""
    return _alone([Measurement.load(file) for file in files])


def _alone(measurements: Sequence[Measurement]) -> Run:
    if not measurements:
        raise InputError(
            "no measurement file was named; give one or more JSON files that `vitrim bench` wrote"
        )
    return Run(
        report=from_measurements(measurements),
        missing=(
            "Made of measurements alone: parameters, MACs, kept widths, training curves and parity are not in them.",
        ),
    )


def load_sources(sources: Iterable[Path | str]) -> Run:
    """A run made of run folders, folders of measurements (searched to any depth) and measurement
    files, in any mixture.

    Counts, parity and curves come from the first run folder among them. Errors: InputError naming
    the file, or the folder that holds nothing.
    """
    named = [Path(source) for source in sources]
    runs = [load_run(path) for path in named if is_run_folder(path)]
    measurements: list[Measurement] = [
        m
        for run in runs[1:]
        for model in run.report.models.values()
        for a in model.artifacts
        if (m := a.measurement)
    ]
    for path in named:
        if path.is_dir() and not is_run_folder(path):
            found = [file for file in sorted(path.rglob("*.json")) if _is_measurement(file)]
            if not found:
                raise InputError(
                    f"{path}: holds no measurements; name a folder that `vitrim run` or `vitrim bench --out` wrote, or their JSON files"
                )
            measurements += [Measurement.load(file) for file in found]
        elif not path.is_dir():
            measurements.append(Measurement.load(path))
    if not runs:
        return _alone(measurements)
    return replace(runs[0], report=join(runs[0].report, measurements))


def is_run_folder(path: Path) -> bool:
    """Does `load_run` read this folder?"""
    report = path / "report.json"
    if report.is_file():
        return True
    return path.is_dir() and any((path / "measurements").glob("*.json"))


def load_report(path: Path | str) -> Report:
    """Read report.json; InputError names the file and the key that is wrong."""
    path = Path(path)
    data = _json(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(
            f"{path}: schema is {found!r}, not {SCHEMA!r}; give a report.json that `vitrim run` wrote"
        )
    return _validated(Report, data, str(path))


def from_measurements(measurements: Sequence[Measurement]) -> Report:
    """A report without counts: measurements grouped into models by their names (`compact-int8`
    belongs to `compact`).
    """
    return join(None, measurements)


def join(report: Report | None, measurements: Sequence[Measurement]) -> Report:
    """`report` with the measurements that it does not hold yet."""
    models = dict(report.models) if report else {}
    held = {
        _identity(a.measurement)
        for model in models.values()
        for a in model.artifacts
        if a.measurement is not None
    }
    for measurement in measurements:
        if _identity(measurement) in held:
            continue
        held.add(_identity(measurement))
        name = model_name(measurement)
        model = models.get(name) or ModelEntry(params=None, macs=None, top1=None)
        entry = ArtifactEntry(
            runtime=measurement.runtime,
            precision=measurement.precision or "unknown",
            target=measurement.target,
            bytes=measurement.file_bytes,
            measurement=measurement,
        )
        models[name] = model.model_copy(update={"artifacts": (*model.artifacts, entry)})
    if report is not None:
        return report.model_copy(update={"models": models})
    return Report.model_validate({"schema": SCHEMA, "models": models})


def model_name(measurement: Measurement) -> str:
    """The model that a measurement's name belongs to: its name without the precision and the
    runtime at its end.
    """
    name = measurement.name
    endings = [
        f"{mark}{word}"
        for mark in "-_ "
        for word in (measurement.precision, measurement.runtime)
        if word
    ]
    while ending := next(
        (ending for ending in endings if name.endswith(ending) and len(name) > len(ending)), None
    ):
        name = name[: -len(ending)]
    return name


def _identity(measurement: Measurement) -> tuple[str, str, str, str, str, int]:
    m = measurement
    return (m.artifact_sha256, m.session, m.started_at, m.device, m.name, len(m.latency_s))


def _is_measurement(file: Path) -> bool:
    """By its schema: beside measurements may lie reports and cost tables, which are no fault. What
    is broken JSON is left to the loader to refuse.
    """
    try:
        data = json.loads(file.read_bytes())
    except ValueError:
        return True
    return isinstance(data, dict) and str(data.get("schema", "")).startswith("vitrim.measurement/")


def _load_kept(path: Path) -> tuple[KeptBranch, ...]:
    if not path.is_file():
        return ()
    data = _json(path)
    if not isinstance(data, list):
        raise InputError(
            f"{path}: a list of branches is wanted, not {type(data).__name__}; make it again with `vitrim run`"
        )
    return tuple(
        _validated(KeptBranch, entry, f"{path}: branch {number}")
        for number, entry in enumerate(data)
    )


def _load_history(path: Path) -> tuple[Epoch, ...]:
    if not path.is_file():
        return ()
    lines = [
        (number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()
    ]
    epochs = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            if number == lines[-1][0]:
                # A run that was killed may have cut its last line short; the epochs before it
                # stand.
                break
            raise InputError(
                f"{path}: line {number}: not JSON; remove the line, or train again"
            ) from None
        epochs.append(_validated(Epoch, record, f"{path}: line {number}"))
    return tuple(epochs)


def _validated(kind: type[Entry], data: Any, where: str) -> Entry:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{where}: {key + ': ' if key else ''}{reason[:1].lower() + reason[1:]}; mend it, or run the step again"
        ) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run the step that wrote it again") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not a text file in UTF-8; run the step that wrote it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
