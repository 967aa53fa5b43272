"""The log of a tuning: one line of JSON a measurement, from which later builds take tiles."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import InputError
from ...targets.catalog import present_name
from ...targets.vector import Kind as VectorKind
from ...targets.vector import VectorUnit
from .schedule import Kind, Shape, Tile

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Small = Annotated[int, Field(ge=1, le=64)]


class Trial(BaseModel):
    """The measurement of one tile for one shape.

    Attributes:
        target: The name of the profile.
        unit: Its vector instructions; None in lines of earlier versions, see `read_trials`.
        processor: The title of the machine's profile.
        latency_s: The lower quartile of the measured times.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    schema_: Literal["vitrim.tvm-trial/1"] = Field(default="vitrim.tvm-trial/1", alias="schema")
    target: Annotated[str, Field(max_length=100)]
    unit: VectorKind | None = None
    processor: Annotated[str, Field(max_length=200)]
    threads: Small
    kind: Kind
    sizes: Annotated[tuple[Count, ...], Field(min_length=3, max_length=4)]
    rows: Small
    vectors: Small
    steps: Small
    latency_s: Annotated[float, Field(gt=0)]

    @property
    def shape(self) -> Shape:
        """The shape that was measured."""
        return Shape(self.kind, self.sizes)

    @property
    def tile(self) -> Tile:
        """The tile that was measured."""
        return Tile(self.rows, self.vectors, self.steps)


def append_trials(path: Path, trials: Iterable[Trial]) -> None:
    """Append lines to a log, which is created if it does not exist."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(trial.model_dump_json(by_alias=True) + "\n" for trial in trials)


def read_trials(path: Path) -> list[Trial]:
    """All measurements of a log.

    Target names in lines of earlier versions, which have no unit, get their present form.

    Raises:
        InputError: The file cannot be read or is malformed; the message contains line and key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the log that the tuner wrote"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give the log that the tuner wrote") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            trial = Trial.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            key = f"{where}: " if where else ""
            raise InputError(
                f"{path}:{number}: {key}{first['msg']}; remove that line, or tune again"
            ) from None
        if trial.unit is None:
            trial = trial.model_copy(update={"target": present_name(trial.target)})
        found.append(trial)
    return found


def fastest_tiles(
    trials: Iterable[Trial], target: str, threads: int, unit: VectorUnit
) -> dict[Shape, Tile]:
    """The fastest measured tile of each shape.

    Args:
        trials: The measurements.
        target: Only those of this target count.
        threads: Only those with this number of threads count.
        unit: Only its tiles that fit its registers count.
    """
    best: dict[Shape, Trial] = {}
    for trial in trials:
        described = trial.target == target and trial.threads == threads
        if described and trial.unit in (None, unit.kind) and trial.tile.fits(unit):
            known = best.get(trial.shape)
            if known is None or trial.latency_s < known.latency_s:
                best[trial.shape] = trial
    return {shape: trial.tile for shape, trial in best.items()}
