"""The points of a cost table while it is measured: a file beside it, which grows by groups."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from ..core.errors import InputError
from ..targets.cost_parts import Plain
from ..targets.cost_table import MeasuredNetwork
from .cost_networks import CostSizes

SCHEMA = "vitrim.cost-points/1"
# Networks that are measured interleaved: so many for the fit, and so many held out.
FITTED, HELD_OUT = 4, 2
BATCH = FITTED + HELD_OUT
# Networks before the first fit.
FIRST = 12
# How many networks are measured, which points do not depend on: a larger number continues.
_COUNTS = ("most_points", "checks")


@dataclass(frozen=True)
class CostRequest:
    """What a cost table is measured for.

    Attributes:
        sizes: The dense network.
        target: Name of the device profile.
        runtime: The runtime of the artifacts.
        precision: Their precision.
        threads: Threads of the runtime.
        batch: Images in an inference.
        most_points: Largest number of networks for the fit and its error.
        checks: Number of random compact networks that check the sums, and of the solver's.
        seed: Of the random networks.
    """

    sizes: CostSizes = field(default_factory=CostSizes)
    target: str = "host"
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    threads: int = 1
    batch: int = 1
    most_points: int = 72
    checks: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most_points < FIRST + BATCH:
            raise InputError(
                f"{self.most_points} networks: a fit and its error need at least {FIRST + BATCH}"
            )


class About(Plain):
    """What is known beside the points: the runtime, the machine, and the power of each network."""

    runtime_version: str = ""
    environment: dict[str, Any] = Field(default_factory=dict)
    powers_w: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()


def points_file(table: Path) -> Path:
    """The file beside a table that has the points measured so far."""
    return table.with_name(f"{table.name}.points")


def _record(request: CostRequest) -> dict[str, Any]:
    """The request as the first line of a file of points has it: what the points are of."""
    found = {key: value for key, value in asdict(request).items() if key not in _COUNTS}
    if not request.sizes.selects:
        del found["sizes"]["selects"]
    return found


def append_points(
    file: Path, request: CostRequest, points: Sequence[MeasuredNetwork], about: About
) -> None:
    """Append measured points to a file; a new file begins with the request.

    Args:
        file: The file.
        request: What is measured.
        points: The points.
        about: What is known beside all points so far.
    """
    lines = [] if file.exists() else [{"schema": SCHEMA, "request": _record(request)}]
    record: list[Any] = [*lines, *(point.model_dump(mode="json") for point in points)]
    record.append({"about": about.model_dump(mode="json")})
    text = "".join(json.dumps(line) + "\n" for line in record)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read_points(file: Path, request: CostRequest) -> tuple[list[MeasuredNetwork], About]:
    """Read the points of an interrupted measurement, and what is known beside them.

    Args:
        file: The file; without it there are none.
        request: What is measured.

    Returns:
        The points of complete batches, and the last `about`; a batch that a kill cut off is
        removed from the file.

    Raises:
        InputError: The file is of another request.
    """
    if not file.exists():
        return [], About()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    points: list[MeasuredNetwork] = []
    batch: list[MeasuredNetwork] = []
    about = About()
    whole = 1
    try:
        head = json.loads(lines[0]) if lines else {}
    except ValueError:
        head = {}
    if not isinstance(head, dict) or head.get("schema") != SCHEMA:
        raise InputError(f"{file}: not the points of a cost table; name another table")
    earlier = head.get("request")
    if isinstance(earlier, dict):
        # Earlier versions wrote the counts, too.
        earlier = {key: value for key, value in earlier.items() if key not in _COUNTS}
    if earlier != json.loads(json.dumps(_record(request))):
        raise InputError(
            f"{file}: the points of another cost table; continue it with the same options, "
            "or delete the file"
        )
    for number, line in enumerate(lines[1:], start=2):
        try:
            data = json.loads(line)
            if "about" in data:
                about = About.model_validate(data["about"])
                points, batch, whole = [*points, *batch], [], number
            else:
                batch.append(MeasuredNetwork.model_validate_json(line))
        except (ValueError, ValidationError, TypeError):
            break
    if whole < len(lines):
        file.write_text("".join(f"{line}\n" for line in lines[:whole]), encoding="utf-8")
    return points, about
