"""The latency of one transformer block on a target as a function of its widths.

It is measured at a few shapes and fitted; the error is that of shapes held out. The fit is a sum
over the block's parts (each linear map, both attention products, the norms, the softmax, the
activation, the weights read), each with a non-negative cost. Every part grows with every width, so
the fit is monotone: a smaller block is never predicted to be slower.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import InputError
from ...core.progress import Progress, progress_bar
from ...core.storage import replace_file
from ...core.written_kinds import json_kind
from ...targets.catalog import present_name
from ..results.measurement import Environment, Measurement
from .block_graph import BlockShape, block_model
from .measure import measure_here, target_features, target_name
from .options import MeasureOptions

COST_TABLE = json_kind("a cost table", "vitrim.cost-table/1")
COPIES = 4
BATCH_SHAPES = 6
PARTS = (
    *("block", "projections", "attention products", "output", "ffn"),
    *("norms", "softmax", "activation", "weights"),
)
Vector = NDArray[np.float64]
Measure = Callable[[dict[str, Path], MeasureOptions, Progress], dict[str, Measurement]]


class Point(BaseModel):
    """A measured shape, and the latency of one block in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: BlockShape
    latency_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    held_out: bool = False


class CostTable(BaseModel):
    """Measured points and the costs fitted to them.

    Attributes:
        target: Name of the device profile.
        target_features: See `Measurement`.
        threads: Threads of the runtime.
        runtime: The runtime and its version.
        points: Measured shapes; those `held_out` are no part of the fit.
        costs_s: Seconds per unit of each of `PARTS`.
        median_error: Median relative error of the held-out points; None without any.
        largest_error: Their largest relative error.
        environment: The machine while it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    schema_: Literal["vitrim.cost-table/1"] = Field("vitrim.cost-table/1", alias="schema")
    target: str
    target_features: tuple[str, ...] | None = None
    threads: int = Field(ge=1)
    runtime: str
    points: tuple[Point, ...] = Field(min_length=1)
    costs_s: dict[str, Annotated[float, Field(ge=0)]]
    median_error: float | None
    largest_error: float | None
    environment: Environment

    def latency_s(self, shape: BlockShape) -> float:
        """Return the predicted seconds of one block; monotone in every width."""
        return float(_parts(shape) @ np.array([self.costs_s[part] for part in PARTS]))

    def save(self, path: Path | str) -> None:
        """Write the table as JSON, atomically."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), indent=1)
        replace_file(path, text + "\n", COST_TABLE)

    @classmethod
    def load(cls, path: Path | str) -> CostTable:
        """Read a saved table; raises InputError with the file and the key."""
        try:
            table = cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); "
                "measure a table with `vitrim bench --cost-table`"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the table"
            raise InputError(f"{path}: {key}: {first['msg']}; measure the table again") from None
        if "target_features" in table.model_fields_set:
            return table
        return table.model_copy(update={"target": present_name(table.target)})


def chosen_shapes(
    tokens: int = 50,
    embed: int = 128,
    heads: int = 4,
    head_width: int = 32,
    ffn: int = 512,
    count: int = 24,
    seed: int = 0,
) -> list[BlockShape]:
    """Choose the shapes to measure: a Latin hypercube of blocks up to a dense one.

    Args:
        tokens: Tokens of the dense block.
        embed: Width of its residual stream.
        heads: Its attention heads.
        head_width: Width of each head.
        ffn: Hidden width of its FFN.
        count: Number of shapes.
        seed: Seed of the hypercube.

    Returns:
        `count` shapes; the dense block and the smallest one are the first two.
    """
    rng = np.random.default_rng(seed)
    # One stratum per shape in every dimension, in random order: few points cover the whole range of
    # every width.
    strata = np.stack(
        [(rng.permutation(count) + rng.random(count)) / count for _ in range(7)], axis=1
    )
    dense = BlockShape(tokens, tokens, heads, head_width, head_width, ffn, embed)
    least, narrow = max(2, tokens // 4), max(1, head_width // 4)
    smallest = BlockShape(least, least, 1, narrow, narrow, ffn // 8, embed // 4)
    shapes = [dense, smallest]
    for row in strata[: max(0, count - 2)]:
        read = _between(row[0], tokens // 4, tokens, 1)
        shapes.append(
            BlockShape(
                tokens_in=read,
                # Most blocks pass on all of their tokens.
                tokens_out=read if row[1] < 0.6 else _between(row[1], 1, read, 1),
                heads=_between(row[2], 1, heads, 1),
                qk=_between(row[3], head_width // 4, head_width, 4),
                v=_between(row[4], head_width // 4, head_width, 4),
                ffn=_between(row[5], ffn // 8, ffn, 8),
                embed=_between(row[6], embed // 4, embed, 8),
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
    """Measure blocks of these shapes and fit a cost table.

    Args:
        shapes: The shapes; six at a time are measured, interleaved.
        target: Name of the device profile.
        threads: Threads of the runtime.
        held_out: The last so many shapes are no part of the fit; the table's error is theirs.
        time_limit_s: Time limit of all measurements in seconds.
        seed: Seed of the weights and of the order of turns.
        measure: Measures {name: model} with these options and progress; by default this machine.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.

    Returns:
        The fitted table, with the measured points.

    Raises:
        InputError: Too few shapes for the fit, or a failed measurement.
    """
    if len(shapes) - held_out < len(PARTS):
        raise InputError(
            f"{len(shapes)} shapes with {held_out} held out: at least {len(PARTS)} are needed for "
            "the fit; measure more shapes"
        )
    measure = measure or partial(_measure_here, target=target)
    share = BATCH_SHAPES / len(shapes)
    options = MeasureOptions(threads=threads, time_limit_s=time_limit_s * share, seed=seed)
    measured: list[Measurement] = []
    with progress_bar(quiet=quiet, replacement=progress) as report:
        for start in range(0, len(shapes), BATCH_SHAPES):
            part = _part_of(report, start / len(shapes), share)
            batch = shapes[start : start + BATCH_SHAPES]
            measured += _measure_batch(batch, options, measure, part)
    first_held_out = len(shapes) - held_out
    points = [
        Point(
            shape=shape,
            latency_s=found.summary().p50_s / COPIES,
            held_out=number >= first_held_out,
        )
        for number, (shape, found) in enumerate(zip(shapes, measured, strict=True))
    ]
    last = measured[-1]
    runtime = f"{last.runtime} {last.runtime_version}"
    return fit_cost_table(
        points,
        target=target_name(target),
        threads=threads,
        runtime=runtime,
        environment=last.environment,
    )


def _measure_here(
    files: dict[str, Path], options: MeasureOptions, progress: Progress, target: str
) -> dict[str, Measurement]:
    return measure_here(files, options, target=target, progress=progress)


def _measure_batch(
    shapes: Sequence[BlockShape], options: MeasureOptions, measure: Measure, progress: Progress
) -> list[Measurement]:
    with tempfile.TemporaryDirectory(prefix="vitrim-cost-") as folder:
        files = {str(number): Path(folder) / f"{number}.onnx" for number in range(len(shapes))}
        for shape, file in zip(shapes, files.values(), strict=True):
            file.write_bytes(block_model(shape, COPIES, options.seed))
        found = measure(files, options, progress)
    return [found[name] for name in files]


def _part_of(report: Progress, begun: float, part: float) -> Progress:
    return lambda share, text: report(begun + share * part, text)


def fit_cost_table(
    points: Sequence[Point], *, target: str, threads: int, runtime: str, environment: Environment
) -> CostTable:
    """Fit a table to measured points by least squares of the relative error.

    Args:
        points: The measured points; those held out only give the table's error.
        target: Name of the device profile.
        threads: Threads of the runtime.
        runtime: The runtime and its version.
        environment: The machine while it was measured.
    """
    fitted = [point for point in points if not point.held_out]
    # Dividing each row by its latency makes the errors relative.
    rows = np.stack([_parts(point.shape) / point.latency_s for point in fitted])
    costs = nonnegative_least_squares(rows, np.ones(len(fitted)))
    table = CostTable(
        target=target,
        target_features=target_features(target),
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
    """Return the x ≥ 0 that minimises ‖matrix · x − wanted‖.

    References:
        Lawson and Hanson 1974, "Solving Least Squares Problems", chapter 23.
    """
    # Columns of equal length give the stopping rule the same meaning for all.
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
