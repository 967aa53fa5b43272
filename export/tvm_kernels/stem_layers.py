"""The layers before the patches: convolutions as products over windows, and soft splits.

They compute in fp32 in any precision, as the patch projection does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...compress.network.architecture import (
    Architecture,
    AttentionSpec,
    ConvSpec,
    SoftSplitSpec,
)
from .emitter import Emitter, Epilogue
from .linear_attention import LinearAttention, random_features, summarize_values, weigh_values
from .matrices import (
    InputTransform,
    Matrix,
    ProductInput,
    State,
    Stream,
    SublayerOutput,
    affine,
    linear,
    sub_state,
)
from .packing import Array
from .precision import Float
from .sublayers import attention, ffn
from .windows import Windows, cut_windows

Pair = tuple[int, int]


class StemLayers:
    """Writes the layers before the patches, and the windows that the projection multiplies.

    Args:
        emitter: Receives the calls.
        architecture: The network.
        state: Its parameters.
    """

    def __init__(self, emitter: Emitter, architecture: Architecture, state: State) -> None:
        self.architecture, self.state = architecture, state
        self.emitter = Emitter(
            emitter.program, emitter.lanes, emitter.schedule, emitter.batch, Float()
        )

    def patches(self, prefix: int, gaps: tuple[int, ...]) -> Stream:
        """The pixels of each patch as a row, each with its channels.

        Args:
            prefix: Rows of zeros before the patches.
            gaps: For each row of zeros between the patches the number of patches before it.
        """
        architecture, stem = self.architecture, self.architecture.stem
        size, pixels = architecture.image[1:], None
        channels = architecture.image[0]
        for number, layer in enumerate(stem.before):
            part = sub_state(self.state, f"before.{number}")
            grid = layer.output_size(size)
            windows = self._windows(
                pixels, channels, size, grid, (layer.kernel, layer.stride, layer.padding)
            )
            write = _Layer(self.emitter, part, channels, layer.kernel, first=pixels is None)
            if isinstance(layer, SoftSplitSpec):
                pixels = write.soft_split(layer, windows)
            else:
                pixels = write.convolution(layer, windows)
            size, channels = grid, layer.channels
        geometry = (stem.patch, stem.stride or stem.patch, stem.padding)
        return self._windows(
            pixels, channels, size, architecture.grid, geometry, prefix, architecture.order, gaps
        )

    def _windows(
        self,
        pixels: Stream | None,
        channels: int,
        size: Pair,
        grid: Pair,
        geometry: tuple[Pair, Pair, Pair],
        prefix: int = 0,
        order: Sequence[int] | None = None,
        gaps: tuple[int, ...] = (),
    ) -> Stream:
        """Windows of rows, or of the network's input.

        Args:
            pixels: A row for each pixel; None: the network's input.
            channels: Channels of the source.
            size: Rows and columns of the source.
            grid: Windows down and across.
            geometry: Kernel, stride and padding.
            prefix: Rows of zeros before the windows of each image.
            order: The windows that are cut out, counted row by row in the grid; None: all.
            gaps: For each row of zeros between the windows the number of windows before it.
        """
        emitter, (kernel, stride, padding) = self.emitter, geometry
        spec = Windows(
            images=emitter.batch,
            channels=channels,
            size=size,
            row_width=None if pixels is None else pixels.width,
            grid=grid,
            kernel=kernel,
            stride=stride,
            padding=padding,
            prefix=prefix,
            listed=None if order is None else len(order),
            gaps=gaps,
        )
        operands = [emitter.program.input if pixels is None else pixels.value]
        if order is not None:
            places = np.stack(np.divmod(order, grid[1]), axis=1) * stride - np.array(padding)
            operands.append(emitter.constant(places.astype(np.int32).ravel()))
        value = emitter.program.call(
            "windows",
            spec,
            lambda: cut_windows(spec, emitter.lanes, emitter.schedule.threads),
            operands,
            (emitter.batch * spec.rows * spec.depth,),
        )
        return Stream(value, spec.rows, spec.depth, spec.depth)


class _Layer:
    """One layer before the patches, from the rows of its windows to the rows of its pixels."""

    def __init__(
        self, emitter: Emitter, state: State, channels: int, kernel: Pair, *, first: bool
    ) -> None:
        self.emitter, self.state = emitter, state
        self.channels, self.kernel, self.first = channels, kernel, first

    def convolution(self, spec: ConvSpec, windows: Stream) -> Stream:
        """act(windows W + b)."""
        weight = self.state["conv.weight"]
        matrix = Matrix(
            self._by_pixel(weight.reshape(len(weight), -1)).T, self.state.get("conv.bias")
        )
        return self.emitter.dense(windows, windows.rows, matrix, Epilogue(spec.act))

    def soft_split(self, spec: SoftSplitSpec, windows: Stream) -> Stream:
        """The attention among the windows, and the feed-forward layer."""
        emitter, state = self.emitter, self.state
        rows = windows.rows
        normed = emitter.norm(windows, spec.norm)
        norm_affine = [
            None if part is None else self._by_pixel(part) for part in affine(state, "norm")
        ]
        source = ProductInput(normed, InputTransform(*norm_affine))
        joined = self._projections(spec)
        v = emitter.dense(normed, rows, source.transform.fold_into(joined["v"]))
        output = SublayerOutput(linear(state, "out"), rows, v)
        if spec.features is None:
            y = self._softmax(spec, source, joined, output)
        else:
            q, k = (
                emitter.dense(normed, rows, source.transform.fold_into(joined[name]))
                for name in "qk"
            )
            found = self._linear_attention(spec, q, k, v)
            y = emitter.dense(found, rows, output.matrix, Epilogue(residual=v))
        inner = emitter.norm(y, spec.ffn_norm)
        reads = ProductInput(inner, InputTransform(*affine(state, "ffn_norm")))
        part = sub_state(state, "ffn")
        return ffn(emitter, reads, spec.ffn, part, SublayerOutput(linear(part, "fc2"), rows, y))

    def _projections(self, spec: SoftSplitSpec) -> dict[str, Matrix]:
        """Queries, keys and values."""
        weights = np.split(self._by_pixel(self.state["qkv.weight"]), 3)
        biases: list[Array | None] = [None] * 3
        if spec.qkv_bias:
            biases = list(np.split(self.state["qkv.bias"], 3))
        return {
            name: Matrix(weight.T, bias)
            for name, weight, bias in zip("qkv", weights, biases, strict=True)
        }

    def _softmax(
        self,
        spec: SoftSplitSpec,
        source: ProductInput,
        joined: dict[str, Matrix],
        output: SublayerOutput,
    ) -> Stream:
        assert spec.scale is not None
        width, bias = spec.channels, spec.qkv_bias
        core = AttentionSpec(
            heads=1, qk=width, v=width, scale=spec.scale, q_bias=bias, k_bias=bias, v_bias=bias
        )
        state: State = {}
        for name, matrix in joined.items():
            state[f"{name}.weight"] = matrix.weight.T
            if matrix.bias is not None:
                state[f"{name}.bias"] = matrix.bias
        found, _ = attention(self.emitter, source, core, state, output)
        return found

    def _linear_attention(self, spec: SoftSplitSpec, q: Stream, k: Stream, v: Stream) -> Stream:
        assert spec.features is not None
        emitter, lanes = self.emitter, self.emitter.lanes
        threads = emitter.schedule.threads
        sizes = LinearAttention(
            emitter.batch, v.rows, spec.channels, spec.features, spec.features_eps
        )
        query_features, key_features = (self._features(sizes, x) for x in (q, k))
        rows, width = emitter.batch * v.rows, lanes.up(spec.channels)
        summary = emitter.program.call(
            "summarize_values",
            ("summarize-values", sizes),
            lambda: summarize_values(sizes, lanes, threads),
            [key_features.value, v.value],
            (emitter.batch * spec.features * width,),
        )
        mean = emitter.mean(key_features, 0)
        value = emitter.program.call(
            "weigh_values",
            ("weigh-values", sizes),
            lambda: weigh_values(sizes, lanes, threads),
            [query_features.value, summary, mean.value],
            (rows * width,),
        )
        return replace(v, value=value)

    def _features(self, sizes: LinearAttention, x: Stream) -> Stream:
        emitter, lanes = self.emitter, self.emitter.lanes
        directions = Matrix(np.ascontiguousarray(self.state["features"].T), None)
        projected = emitter.dense(x, x.rows, directions)
        value = emitter.program.call(
            "random_features",
            ("random-features", sizes),
            lambda: random_features(sizes, lanes, emitter.schedule.threads),
            [x.value, projected.value],
            (emitter.batch * x.rows * projected.width,),
        )
        return Stream(value, x.rows, projected.width, sizes.features)

    def _by_pixel(self, columns: Array) -> Array:
        """Columns by channel and pixel of a window -> in the order of its rows."""
        if self.first:
            return columns
        return by_pixel(columns, self.channels)


def by_pixel(columns: Array, channels: int) -> Array:
    """(…, channels * pixels) -> (…, pixels * channels)."""
    lead = columns.shape[:-1]
    swapped = columns.reshape(*lead, channels, -1).swapaxes(-1, -2)
    return np.ascontiguousarray(swapped).reshape(*lead, math.prod(columns.shape[-1:]))
