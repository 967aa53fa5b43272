"""A run folder or a set of measurements, loaded and validated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ...core.errors import InputError
from ..results.measurement import Measurement
from .model import SCHEMA, ArtifactEntry, Epoch, KeptBranch, ModelEntry, Report
from .waterfall import WATERFALL_FILE, Waterfall

Entry = TypeVar("Entry", bound=BaseModel)
LONGEST_RECIPE = 20_000
# The address of a device, and the keys of [bench] that have paths on it and here.
_ADDRESS = re.compile(r"""\b(ssh|adb|tvm-rpc)://[^\s"',\]}]+""")
_DEVICE_KEYS = re.compile(
    r"""^(\s*["']?(?:bench\.)?(?:python|runtime_library|ssh_options)["']?\s*=\s*).+$""",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Run:
    """Everything that a report shows.

    Attributes:
        report: The contents of report.json.
        kept: The contents of kept.json.
        history: The contents of history.jsonl.
        recipe_toml: The recipe's text.
        missing: One line for each part that the folder does not have.
        waterfall: The contents of waterfall.json.
    """

    report: Report
    kept: tuple[KeptBranch, ...] = ()
    history: tuple[Epoch, ...] = ()
    recipe_toml: str | None = None
    missing: tuple[str, ...] = ()
    waterfall: Waterfall | None = None


def load_run(folder: Path | str) -> Run:
    """Read report.json, kept.json, history.jsonl, recipe.toml and measurements/*.json.

    Only a report or a measurement is required. Measurements that report.json does not contain, such
    as later ones on another device, are added to the model that their name begins with.

    Raises:
        InputError: A file is damaged, or the folder contains neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such run folder; name a folder that `vitrim run` wrote, "
            "or measurement files"
        )
    path = folder / "report.json"
    loose = [Measurement.load(file) for file in sorted((folder / "measurements").glob("*.json"))]
    if path.is_file():
        report = join(load_report(path), loose)
    elif loose:
        report = from_measurements(loose)
    else:
        raise InputError(
            f"{folder}: contains neither report.json nor measurements/*.json; "
            "name a folder that `vitrim run` wrote"
        )
    kept = _load_kept(folder / "kept.json") or report.kept
    history = _load_history(folder / "history.jsonl") or report.curves
    recipe = folder / "recipe.toml"
    waterfall = folder / WATERFALL_FILE
    return Run(
        report=report,
        kept=kept,
        history=history,
        recipe_toml=without_address(_text(recipe))[:LONGEST_RECIPE] if recipe.is_file() else None,
        missing=_missing(report, kept, history),
        waterfall=Waterfall.load(waterfall) if waterfall.is_file() else None,
    )


def without_address(text: str) -> str:
    """The text of a recipe or a study without the address of a device and how it is reached."""
    return _DEVICE_KEYS.sub(r'\1"…"', _ADDRESS.sub(r"\1://…", text))


def _missing(
    report: Report, kept: tuple[KeptBranch, ...], history: tuple[Epoch, ...]
) -> tuple[str, ...]:
    parts = (
        (kept, "Kept units per block are not shown: the folder contains no kept.json."),
        (history, "Training curves are not shown: the folder contains no history.jsonl."),
        (report.parity, "Parity is not shown: report.json contains no parity figures."),
    )
    return tuple(line for part, line in parts if not part)


def load_measurements(files: Iterable[Path | str]) -> Run:
    """A run made of measurement files alone, without counts, masks and curves."""
    return _measurements_only([Measurement.load(file) for file in files])


def _measurements_only(measurements: Sequence[Measurement]) -> Run:
    if not measurements:
        raise InputError(
            "no measurement file was named; give one or more JSON files that `vitrim bench` wrote"
        )
    missing = (
        "This report is made of measurements alone: parameters, MACs, kept units, training curves "
        "and parity are not part of them."
    )
    return Run(report=from_measurements(measurements), missing=(missing,))


def load_sources(sources: Iterable[Path | str]) -> Run:
    """A run made of run folders, folders of measurements (at any depth) and measurement files.

    Counts, parity and curves are those of the first run folder.

    Raises:
        InputError: A file is damaged, or a folder contains no measurements.
    """
    paths = [Path(source) for source in sources]
    runs = [load_run(path) for path in paths if is_run_folder(path)]
    measurements = [
        artifact.measurement
        for run in runs[1:]
        for model in run.report.models.values()
        for artifact in model.artifacts
        if artifact.measurement
    ]
    for path in paths:
        if not is_run_folder(path):
            measurements += _load_measurements(path)
    if not runs:
        return _measurements_only(measurements)
    return replace(runs[0], report=join(runs[0].report, measurements))


def _load_measurements(path: Path) -> list[Measurement]:
    if not path.is_dir():
        return [Measurement.load(path)]
    files = [file for file in sorted(path.rglob("*.json")) if _is_measurement(file)]
    if not files:
        raise InputError(
            f"{path}: contains no measurements; name a folder that `vitrim run` or "
            "`vitrim bench --out` wrote, or their JSON files"
        )
    return [Measurement.load(file) for file in files]


def is_run_folder(path: Path) -> bool:
    """Whether `load_run` accepts the folder."""
    if (path / "report.json").is_file():
        return True
    return path.is_dir() and any((path / "measurements").glob("*.json"))


def load_report(path: Path | str) -> Report:
    """Read report.json.

    Raises:
        InputError: The file is damaged; the message names the key.
    """
    path = Path(path)
    data = _json(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(
            f"{path}: schema is {found!r}, not {SCHEMA!r}; "
            "give a report.json that `vitrim run` wrote"
        )
    return _validated(Report, data, str(path))


def from_measurements(measurements: Sequence[Measurement]) -> Report:
    """A report without counts; a measurement's name gives its model (`compact-int8`: `compact`)."""
    return join(None, measurements)


def join(report: Report | None, measurements: Sequence[Measurement]) -> Report:
    """Add measurements to a report, except for those that it contains already."""
    models = dict(report.models) if report else {}
    known = {
        _identity(artifact.measurement)
        for model in models.values()
        for artifact in model.artifacts
        if artifact.measurement is not None
    }
    for measurement in measurements:
        if _identity(measurement) in known:
            continue
        known.add(_identity(measurement))
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
    """The model of a measurement: its name without the precision and the runtime at its end."""
    name = measurement.name
    endings = [
        f"{separator}{word}"
        for separator in "-_ "
        for word in (measurement.precision, measurement.runtime)
        if word
    ]
    while ending := next((e for e in endings if name.endswith(e) and len(name) > len(e)), None):
        name = name[: -len(ending)]
    return name


def _identity(measurement: Measurement) -> tuple[str, str, str, str, str, int]:
    m = measurement
    return (m.artifact_sha256, m.session, m.started_at, m.device, m.name, len(m.latency_s))


def _is_measurement(file: Path) -> bool:
    """Whether the schema is that of a measurement.

    Reports and cost tables in the same folder are skipped. Broken JSON counts as a measurement, so
    that loading it raises the error.
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
            f"{path}: expected a list of branches, found {type(data).__name__}; "
            "write it again with `vitrim run`"
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
                # A killed run may have written part of its last line; the epochs before it are
                # valid.
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
        reason = f"{key + ': ' if key else ''}{reason[:1].lower() + reason[1:]}"
        raise InputError(f"{where}: {reason}; correct it, or run the step again") from None


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
