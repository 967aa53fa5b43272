"""The bucket of an image: the first whose patches hold enough, or whose logits are predicted so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .activations import ACTIVATIONS
from .lanes import Buffer, Expr, Lanes, RowLayout, bind

# Below any share of the scores.
_NO_MASS = -1.0


@dataclass(frozen=True)
class ChooseBucket:
    """The place of the first count whose best patches hold `coverage` of the scores, or the last.

    Attributes:
        patches: Number of scores of the image.
        counts: The numbers of patches, increasing.
        coverage: The share of the scores.
        predicted: Whether scores are those of a predictor, which count as probabilities.
        source: Where the scores are: each is the first number of a row.
    """

    patches: int
    counts: tuple[int, ...]
    coverage: float
    predicted: bool
    source: RowLayout


def choose_bucket(spec: ChooseBucket, lanes: Lanes) -> Any:
    """The kernel: scores -> the bucket's place (1,), int32.

    Nothing is sorted. For each patch it counts how many scores are larger, and how many as large;
    a bucket holds the patches with fewer larger ones than its count, and of equal scores a part.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        scores = T.arg("scores", T.buffer((spec.source.size(1, spec.patches),), "float32"))
        out = T.arg("out", T.buffer((1,), "int32"))
        masses = T.alloc_buffer((lanes.up(spec.patches),), "float32", scope="local")
        counters = T.alloc_buffer((2 * lanes.count,), "int32", scope="local")
        # What each bucket but the last holds, and the sum of all.
        held = T.alloc_buffer((len(spec.counts),), "float32", scope="local")
        _read_masses(spec, lanes, scores, masses)
        for place in range(len(spec.counts)):
            T.buffer_store(held, T.float32(0), [place])
        with T.serial(0, spec.patches) as patch:
            mass = bind(masses[patch])
            above, reached = _ranks(lanes, masses, counters, mass, spec.patches)
            equal = bind(T.Cast("float32", reached - above))
            for place, count in enumerate(spec.counts[:-1]):
                inside = bind(T.max(T.min(count - above, reached - above), 0))
                part = mass * (T.Cast("float32", inside) / equal)
                T.buffer_store(held, held[place] + part, [place])
            last = len(spec.counts) - 1
            T.buffer_store(held, held[last] + mass, [last])
        least = bind(held[len(spec.counts) - 1] * T.float32(spec.coverage))
        T.buffer_store(out, T.int32(0), [0])
        for place in range(len(spec.counts) - 1):
            # What is no number holds too little.
            one = T.Select(held[place] >= least, T.int32(0), T.int32(1))
            T.buffer_store(out, out[0] + one, [0])
    return builder.get()


@dataclass(frozen=True)
class ChooseNear:
    """The place of the first bucket whose predicted divergence is small enough, or the last.

    Attributes:
        buckets: Number of buckets.
        width: Elements of a row of the stream, whole vectors.
        first: Whether the first row of the stream is read, beside the mean.
    """

    buckets: int
    width: int
    first: bool


def choose_near(spec: ChooseNear, lanes: Lanes) -> Any:
    """The kernel: (mean row, weights, most (buckets - 1,), [first row]) -> the place (1,), int32.

    The weights of a bucket are those of the first row, if it is read, and of the mean row.
    """
    count, width, parts = lanes.count, spec.width, 1 + spec.first
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        mean = T.arg("mean", T.buffer((width,), "float32"))
        weights = T.arg("weights", T.buffer(((spec.buckets - 1) * parts * width,), "float32"))
        most = T.arg("most", T.buffer((spec.buckets - 1,), "float32"))
        rows = [mean]
        if spec.first:
            rows.insert(0, T.arg("first", T.buffer((width,), "float32")))
        out = T.arg("out", T.buffer((1,), "int32"))
        total = T.alloc_buffer((count,), "float32", scope="local")
        T.buffer_store(out, T.int32(spec.buckets - 1), [0])
        for place in reversed(range(spec.buckets - 1)):
            lanes.store(total, 0, lanes.zero())
            for part, row in enumerate(rows):
                start = (place * parts + part) * width
                with T.serial(0, width // count) as vector:
                    value = lanes.load(row, vector * count)
                    factor = lanes.load(weights, start + vector * count)
                    lanes.store(total, 0, lanes.fma(value, factor, lanes.load(total, 0)))
            predicted = bind(lanes.total(bind(lanes.load(total, 0))))
            # What is no number is above any threshold.
            found = T.Select(predicted <= most[place], T.int32(place), out[0])
            T.buffer_store(out, found, [0])
    return builder.get()


def _read_masses(spec: ChooseBucket, lanes: Lanes, scores: Buffer, masses: Buffer) -> None:
    """Scores as masses; what fills the last vector is below all of them."""
    count = lanes.count
    with T.serial(0, spec.patches) as patch:
        T.buffer_store(masses, scores[spec.source.start(0, patch)], [patch])
    for patch in range(spec.patches, lanes.up(spec.patches)):
        T.buffer_store(masses, T.float32(0), [patch])
    act = ACTIVATIONS["sigmoid" if spec.predicted else "relu"]
    with T.serial(0, lanes.up(spec.patches) // count) as vector:
        value = bind(lanes.load(masses, vector * count))
        lanes.store(masses, vector * count, act(lanes, value))
    for patch in range(spec.patches, lanes.up(spec.patches)):
        T.buffer_store(masses, T.float32(_NO_MASS), [patch])


def _ranks(
    lanes: Lanes, masses: Buffer, counters: Buffer, mass: Expr, patches: int
) -> tuple[Expr, Expr]:
    """How many masses are larger than one, and how many at least as large."""
    count = lanes.count
    bound = bind(lanes.splat(mass))
    for start in (0, count):
        lanes.store(counters, start, lanes.splat_int(0))
    with T.serial(0, lanes.up(patches) // count) as vector:
        value = bind(lanes.load(masses, vector * count))
        for start, found in ((0, value > bound), (count, value >= bound)):
            one = T.Select(found, lanes.splat_int(1), lanes.splat_int(0))
            lanes.store(counters, start, lanes.load(counters, start) + one)
    above, reached = (bind(lanes.total(bind(lanes.load(counters, start)))) for start in (0, count))
    return above, reached
