"""What one transformer block costs on a target, as a function of its widths: measured at a few
shapes, fitted, and its error told.

The fit is a sum of the block's parts (each linear map, both attention products, the norms, the
softmax, the activation, the weights read), each with a cost that cannot be negative. Every part
grows with every width, so the fit is monotone: cutting never predicts a longer time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import InputError
from ...core.storage import replace_file
from ..results.measurement import Environment, Measurement
from .block_graph import BlockShape, block_model
from .measure import measure_here
from .options import MeasureOptions
from .progress import Progress, progress_bar

COPIES = 4
TOGETHER = 6
PARTS = (
    "block",
    "projections",
    "attention products",
    "output",
    "ffn",
    "norms",
    "softmax",
    "activation",
    "weights",
)
Vector = NDArray[np.float64]
Measure = Callable[[dict[str, Path], MeasureOptions, Progress], dict[str, Measurement]]


class Point(BaseModel):
    """A measured shape and its latency in seconds, of one block."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: BlockShape
    latency_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    held_out: bool = False


class CostTable(BaseModel):
    """Measured points, the fitted cost of each part in seconds a unit, and the error on the shapes
    that the fit did not see.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    schema_: Literal["vitrim.cost-table/1"] = Field("vitrim.cost-table/1", alias="schema")
    target: str
    threads: int = Field(ge=1)
    runtime: str
    points: tuple[Point, ...] = Field(min_length=1)
    costs_s: dict[str, Annotated[float, Field(ge=0)]]
    median_error: float | None
    largest_error: float | None
    environment: Environment

    def latency_s(self, shape: BlockShape) -> float:
        """Predicted seconds of one block; monotone in every width."""
        return float(_parts(shape) @ np.array([self.costs_s[part] for part in PARTS]))

    def save(self, path: Path | str) -> None:
        """Write JSON, whole or not at all."""
        replace_file(path, json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> CostTable:
        """Errors: InputError with the file and the key."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); measure a table with `vitrim bench --cost-table`"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the table"
            raise InputError(f"{path}: {key}: {first['msg']}; measure the table again") from None


def chosen_shapes(
    tokens: int = 50,
    embed: int = 128,
    heads: int = 4,
    head_width: int = 32,
    ffn: int = 512,
    count: int = 24,
    seed: int = 0,
) -> list[BlockShape]:
    """`count` shapes up to a dense block's, spread by a low-discrepancy sequence; the dense block
    and the smallest one are the first two.
    """
    rng = np.random.default_rng(seed)
    # One stratum a shape in every dimension, shuffled against each other (a Latin hypercube): few
    # points see every width's whole range.
    strata = np.stack(
        [(rng.permutation(count) + rng.random(count)) / count for _ in range(7)], axis=1
    )
    shapes = [BlockShape(tokens, tokens, heads, head_width, head_width, ffn, embed)]
    shapes.append(
        BlockShape(
            max(2, tokens // 4),
            max(2, tokens // 4),
            1,
            max(1, head_width // 4),
            max(1, head_width // 4),
            ffn // 8,
            embed // 4,
        )
    )
    for row in strata[: max(0, count - 2)]:
        read = _between(row[0], tokens // 4, tokens, 1)
        # Most blocks pass on all of their tokens.
        kept = read if row[1] < 0.6 else _between(row[1], 1, read, 1)
        width, value = (
            _between(row[3], head_width // 4, head_width, 4),
            _between(row[4], head_width // 4, head_width, 4),
        )
        shapes.append(
            BlockShape(
                read,
                kept,
                _between(row[2], 1, heads, 1),
                width,
                value,
                _between(row[5], ffn // 8, ffn, 8),
                _between(row[6], embed // 4, embed, 8),
            )
        )
    return shapes


def measure_cost_table(
    shapes: Sequence[BlockShape],
    *,
    target: str = "host",
    threads: int = 1,
    held_out: int = 8,
    time_limit_s: float = 120.0,
    seed: int = 0,
    measure: Measure | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
) -> CostTable:
    """Time each shape, fit all but the last `held_out`, tell the error on those. Errors:
    InputError, one line.

    Shapes are measured six at a time, interleaved. time_limit_s is for all of them together.
    measure(files, options, progress): where, this machine by default.
    """
    if len(shapes) - held_out < len(PARTS):
        raise InputError(
            f"{len(shapes)} shapes with {held_out} held out: at least {len(PARTS)} are needed for the fit; measure more shapes"
        )
    points: list[Point] = []
    where, runtime = Environment(), ""
    share_s = time_limit_s * TOGETHER / len(shapes)
    with (
        progress_bar(quiet=quiet, replacement=progress) as tell,
        tempfile.TemporaryDirectory(prefix="vitrim-cost-") as name,
    ):
        for start in range(0, len(shapes), TOGETHER):
            batch = shapes[start : start + TOGETHER]
            files: dict[str, Path] = {}
            for number, shape in enumerate(batch):
                files[str(number)] = Path(name) / f"{number}.onnx"
                files[str(number)].write_bytes(block_model(shape, COPIES, seed))
            begun = start / len(shapes)

            def part(share: float, text: str, begun: float = begun) -> None:
                tell(begun + share * TOGETHER / len(shapes), text)

            options = MeasureOptions(threads=threads, time_limit_s=share_s, seed=seed)
            found = (
                measure(files, options, part)
                if measure
                else measure_here(files, options, target=target, progress=part)
            )
            for number, shape in enumerate(batch):
                measured = found[str(number)]
                is_held = start + number >= len(shapes) - held_out
                points.append(
                    Point(
                        shape=shape, latency_s=measured.summary().p50_s / COPIES, held_out=is_held
                    )
                )
                where, runtime = (
                    measured.environment,
                    f"{measured.runtime} {measured.runtime_version}",
                )
    return fit_cost_table(
        points, target=target, threads=threads, runtime=runtime, environment=where
    )


def fit_cost_table(
    points: Sequence[Point], *, target: str, threads: int, runtime: str, environment: Environment
) -> CostTable:
    """The table of measured points: fitted to those not held out, in relative error; the error is
    of those held out (None without any).
    """
    seen = [point for point in points if not point.held_out]
    # Relative errors count, so each row is divided by its latency.
    rows = np.stack([_parts(point.shape) / point.latency_s for point in seen])
    costs = nonnegative_least_squares(rows, np.ones(len(seen)))
    table = CostTable(
        target=target,
        threads=threads,
        runtime=runtime,
        points=tuple(points),
        costs_s=dict(zip(PARTS, costs.tolist(), strict=True)),
        median_error=None,
        largest_error=None,
        environment=environment,
    )
    errors = [
        abs(table.latency_s(point.shape) / point.latency_s - 1)
        for point in points
        if point.held_out
    ]
    if not errors:
        return table
    return table.model_copy(
        update={"median_error": float(np.median(errors)), "largest_error": max(errors)}
    )


def nonnegative_least_squares(matrix: Vector, wanted: Vector) -> Vector:
    """argmin ‖matrix · x − wanted‖ over x ≥ 0 (Lawson and Hanson, Solving Least Squares Problems,
    1974, chapter 23).
    """
    # Columns of equal length, so that the stopping rule means the same for all.
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1.0
    scaled = matrix / lengths
    count = scaled.shape[1]
    free = np.zeros(count, dtype=bool)
    solution = np.zeros(count)
    for _ in range(10 * count):
        slope = scaled.T @ (wanted - scaled @ solution)
        slope[free] = -np.inf
        if free.all() or slope.max() <= 1e-10:
            break
        free[int(slope.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(scaled[:, free], wanted, rcond=None)[0]
            bad = free & (trial <= 0)
            if not bad.any():
                solution = trial
                break
            step = float((solution[bad] / (solution[bad] - trial[bad])).min())
            solution = solution + step * (trial - solution)
            free &= solution > 1e-12
            solution[~free] = 0.0
    return np.asarray(solution / lengths)


def _parts(shape: BlockShape) -> Vector:
    n, m, h, d = shape.tokens_in, shape.tokens_out, shape.heads, shape.embed
    values: dict[str, Any] = {
        "block": 1,
        "projections": d * h * (m * shape.qk + n * shape.qk + n * shape.v),
        "attention products": n * m * h * (shape.qk + shape.v),
        "output": m * h * shape.v * d,
        "ffn": 2 * m * d * shape.ffn,
        "norms": (n + m) * d,
        "softmax": n * m * h,
        "activation": m * shape.ffn,
        "weights": d * h * (2 * shape.qk + 2 * shape.v) + 2 * d * shape.ffn,
    }
    return np.array([float(values[part]) for part in PARTS])


def _between(share: float, low: int, high: int, step: int) -> int:
    low = max(step, low)
    return min(high, low + round(share * (high - low) / step) * step)
