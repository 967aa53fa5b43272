"""The choice of patches of each image by their scores, and the rows that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .lanes import Buffer, Expr, Lanes, RowLayout, bind
from .loops import largest, over_threads, share_bounds, split_evenly

_LOWEST_KEY, _HIGHEST_KEY = -(2**31), 2**31 - 2
# Vectors of columns that the sum of the dropped rows takes at once.
_VECTORS = 4


@dataclass(frozen=True)
class Choose:
    """The places of the largest scores, increasing; of equal scores the first ones.

    Attributes:
        images: Batch size.
        patches: Number of scores of each image.
        kept: How many places are chosen.
        source: Where the scores are: each is the first number of a row.
    """

    images: int
    patches: int
    kept: int
    source: RowLayout


def choose_patches(spec: Choose, lanes: Lanes, threads: int) -> Any:
    """The kernel: scores -> places (images, kept), int32, flat.

    Nothing is sorted. A binary search over the bits of the scores finds the smallest one that
    stays, in 32 passes over the scores of an image, and one more pass collects the places in order.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        size = spec.source.size(spec.images, spec.patches)
        scores = T.arg("scores", T.buffer((size,), "float32"))
        out = T.arg("out", T.buffer((spec.images * spec.kept,), "int32"))

        def share(part: Expr, parts: int) -> None:
            writer = _Chooser(spec, lanes, scores, out)
            with T.serial(*share_bounds(spec.images, part, parts)) as image:
                writer.read_keys(image)
                writer.find_threshold()
                writer.collect(image)

        over_threads(share, threads)
    return builder.get()


class _Chooser:
    """Emits the choice for one image after the other, with the local buffers of one thread."""

    def __init__(self, spec: Choose, lanes: Lanes, scores: Buffer, out: Buffer) -> None:
        self.spec, self.lanes, self.scores, self.out = spec, lanes, scores, out
        self.padded = lanes.up(spec.patches)
        self.keys = T.alloc_buffer((self.padded,), "int32", scope="local")
        self.counts = T.alloc_buffer((lanes.count,), "int32", scope="local")
        # [0] is the threshold; [1] how many are chosen; [2] how many equal ones can still be.
        self.state = T.alloc_buffer((3,), "int32", scope="local")

    def read_keys(self, image: Expr) -> None:
        """Integers in the order of the scores; both zeros have the same key."""
        spec, lowest, highest = self.spec, T.int32(_LOWEST_KEY), T.int32(_HIGHEST_KEY)
        with T.serial(0, spec.patches) as patch:
            score = self.scores[spec.source.start(image, patch)]
            bits = bind(T.reinterpret("int32", score))
            key = T.Select(bits < 0, lowest - bits, T.min(bits, highest))
            T.buffer_store(self.keys, key, [patch])
        for patch in range(spec.patches, self.padded):
            T.buffer_store(self.keys, lowest, [patch])

    def find_threshold(self) -> None:
        """The largest number that at least `kept` keys reach, bit by bit from the highest."""
        T.buffer_store(self.state, T.int32(_LOWEST_KEY), [0])
        with T.serial(0, 32) as step:
            # The highest bit is the sign: flipped it is cleared, which makes the number larger.
            tried = bind(T.bitwise_xor(self.state[0], T.shift_left(T.int32(1), 31 - step)))
            enough = self.count(tried) >= self.spec.kept
            T.buffer_store(self.state, T.Select(enough, tried, self.state[0]), [0])

    def count(self, least: Expr) -> Expr:
        """How many keys are not below a number; those that fill the last vector are."""
        lanes, counts = self.lanes, self.counts
        bound = bind(lanes.splat(least))
        lanes.store(counts, 0, lanes.splat_int(0))
        with T.serial(0, self.padded // lanes.count) as vector:
            reached = lanes.load(self.keys, vector * lanes.count) >= bound
            one = T.Select(reached, lanes.splat_int(1), lanes.splat_int(0))
            lanes.store(counts, 0, lanes.load(counts, 0) + one)
        return bind(lanes.total(bind(lanes.load(counts, 0))))

    def collect(self, image: Expr) -> None:
        """Write the places of the keys above the threshold, and of the first equal ones."""
        spec, state = self.spec, self.state
        threshold = bind(state[0])
        above = self.count(threshold + 1)
        T.buffer_store(state, T.int32(0), [1])
        T.buffer_store(state, spec.kept - above, [2])
        with T.serial(0, spec.patches) as patch:
            key = bind(self.keys[patch])
            equal = T.And(key == threshold, state[2] > 0)
            with T.If(T.Or(key > threshold, equal)), T.Then():
                T.buffer_store(self.out, patch, [image * spec.kept + state[1]])
                T.buffer_store(state, state[1] + 1, [1])
                T.buffer_store(state, state[2] - T.Cast("int32", key == threshold), [2])


@dataclass(frozen=True)
class Gather:
    """The prefix rows, the chosen rows and perhaps a sum of the others, one after the other.

    Attributes:
        images: Batch size.
        prefix: The first rows of each image, which stay.
        patches: Rows behind them.
        kept: How many of these are chosen.
        source: Where x is.
        fused: Whether one more row is the sum of the rows that are not chosen, each times a weight.
    """

    images: int
    prefix: int
    patches: int
    kept: int
    source: RowLayout
    fused: bool = False

    @property
    def rows(self) -> int:
        """Rows of each image in the result."""
        return self.prefix + self.kept + self.fused


def gather_rows(spec: Gather, lanes: Lanes, threads: int) -> Any:
    """The kernel: (x, places (images, kept), [weights (images, patches)]) -> out, all flat.

    out has the shape (images, rows, width). Its rows follow each other, so that the products
    behind it run over the rows of all images at once, which a copy in place would not allow.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        width = spec.source.width
        size = spec.source.size(spec.images, spec.prefix + spec.patches)
        x = T.arg("x", T.buffer((size,), "float32"))
        places = T.arg("places", T.buffer((spec.images * spec.kept,), "int32"))
        weights = None
        if spec.fused:
            weights = T.arg("weights", T.buffer((spec.images * spec.patches,), "float32"))
        out = T.arg("out", T.buffer((spec.images * spec.rows * width,), "float32"))

        def share(part: Expr, parts: int) -> None:
            def copy(image: Expr, row: Expr, target: Expr) -> None:
                source = bind(spec.source.start(image, row))
                start = bind((image * spec.rows + target) * width)
                with T.serial(0, width // lanes.count) as vector:
                    value = lanes.load(x, source + vector * lanes.count)
                    lanes.store(out, start + vector * lanes.count, value)

            if spec.prefix:
                with T.serial(*share_bounds(spec.images * spec.prefix, part, parts)) as index:
                    row = bind(index % spec.prefix)
                    copy(bind(index // spec.prefix), row, row)
            with T.serial(*share_bounds(spec.images * spec.kept, part, parts)) as index:
                target = bind(spec.prefix + index % spec.kept)
                copy(bind(index // spec.kept), spec.prefix + places[index], target)
            if weights is not None:
                _fuse_dropped(spec, lanes, (x, places, weights, out), part, parts)

        over_threads(share, threads)
    return builder.get()


def _fuse_dropped(
    spec: Gather, lanes: Lanes, buffers: tuple[Buffer, ...], part: Expr, parts: int
) -> None:
    """The last row of each image; a thread computes some of the columns."""
    x, places, weights, out = buffers
    count, width = lanes.count, spec.source.width
    # The weights, and zero for the chosen rows.
    left = T.alloc_buffer((spec.patches,), "float32", scope="local")
    runs = split_evenly(width // count, _VECTORS)
    sums = T.alloc_buffer((largest(runs) * count,), "float32", scope="local")
    with T.serial(0, spec.images) as image:
        with T.serial(0, spec.patches) as patch:
            T.buffer_store(left, weights[image * spec.patches + patch], [patch])
        with T.serial(0, spec.kept) as number:
            T.buffer_store(left, T.float32(0), [places[image * spec.kept + number]])
        for run in runs:
            with T.serial(*share_bounds(run.count, part, parts)) as panel:
                column = bind((run.start + panel * run.size) * count)
                for vector in range(run.size):
                    lanes.store(sums, vector * count, lanes.zero())
                with T.serial(0, spec.patches) as patch:
                    weight = bind(lanes.splat(left[patch]))
                    start = bind(spec.source.start(image, spec.prefix + patch) + column)
                    for vector in range(run.size):
                        value = lanes.load(x, start + vector * count)
                        total = lanes.fma(weight, value, lanes.load(sums, vector * count))
                        lanes.store(sums, vector * count, total)
                target = bind((image * spec.rows + spec.rows - 1) * width + column)
                for vector in range(run.size):
                    lanes.store(out, target + vector * count, lanes.load(sums, vector * count))
