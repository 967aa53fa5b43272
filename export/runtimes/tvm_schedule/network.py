"""A compact network as a program of our kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....compress.architecture import Architecture, AttentionSpec, BranchSpec, ConstantSpec, FfnSpec, NormSpec
from ....compress.vit.model import CompactModel
from ....compress.vit.relative_bias import offsets
from .attention import Attend, attend
from .dense import Dense, Rows, dense
from .head_norm import HeadNorm, norm_heads
from .keys import Heads, pack_keys, packed_size
from .lanes import Lanes
from .norm import Normalise, normalise
from .packing import Array, padded, padded_heads, panels
from .patches import Patches, cut_patches
from .program import Program, Value
from .rope import Turn, turn_heads
from .rows import add_constant, first_columns, first_rows, mean_rows
from .schedule import Schedule

if TYPE_CHECKING:
    from tvm import IRModule

State = dict[str, Array]


@dataclass(frozen=True)
class Matrix:
    """x W + b as numbers: weight (K, N), bias (N,) or None."""

    weight: Array
    bias: Array | None


@dataclass(frozen=True)
class Stream:
    """A value of `rows` rows for each image, `width` columns in a row, of which the first `used` mean something."""

    value: Value
    rows: int
    width: int
    used: int

    @property
    def place(self) -> Rows:
        """Where its rows lie."""
        return Rows(self.rows, self.width)


def write_program(compact: CompactModel, lanes: Lanes, schedule: Schedule, batch: int) -> IRModule:
    """The network as a module with one function `main`: images (batch, C, H, W) -> logits (batch, classes). What `coverage` refuses must not come here."""
    return _Writer(compact, lanes, schedule, batch).module()


def kernel_specs(compact: CompactModel, lanes: Lanes, schedule: Schedule, batch: int) -> list[Dense | Attend]:
    """The products that the network's program consists of, in order, equal ones as often as they come."""
    writer = _Writer(compact, lanes, schedule, batch)
    writer.module()
    return [key for key in writer.program.keys if isinstance(key, Dense | Attend)]


class _Writer:
    def __init__(self, compact: CompactModel, lanes: Lanes, schedule: Schedule, batch: int) -> None:
        self.architecture: Architecture = compact.architecture
        self.state: State = {name: tensor.detach().cpu().float().numpy() for name, tensor in compact.state_dict().items()}
        self.lanes, self.schedule, self.batch = lanes, schedule, batch
        self.program = Program((batch, *self.architecture.image))

    def module(self) -> IRModule:
        return self.program.build(self.body)

    def body(self) -> Value:
        stream = self.stem()
        asked = self.architecture.pooled_prefix
        last = self._last_attention() if asked else None
        for number, step in enumerate(self.architecture.steps):
            parts = [under(self.state, f"steps.{number}.{position}") for position in range(len(step))]
            stream = self.last_step(stream, step, parts, asked) if number == last else self.step(stream, step, parts)
        return self.head(stream)

    def stem(self) -> Stream:
        """Patches times the convolution's weights, to which a table of prefix tokens, positions and bias is added."""
        architecture, state, lanes = self.architecture, self.state, self.lanes
        tokens, prefix = architecture.tokens, architecture.prefix
        weight = state["stem.weight"]
        flat = weight.reshape(len(weight), -1).T
        depth = flat.shape[0]
        spec = architecture.stem
        cut = Patches(self.batch, architecture.image, architecture.grid, spec.patch, spec.stride or spec.patch, spec.padding, prefix, depth)
        rows = self.program.call(
            "patches", cut, lambda: cut_patches(cut, self.schedule.threads), [self.program.input], (self.batch * tokens * depth,)
        )
        table = np.zeros((tokens, flat.shape[1]), np.float32)
        if prefix:
            table[:prefix] = state["prefix"]
        if "position" in state:
            table[prefix:] += state["position"]
        if "stem.bias" in state:
            table[prefix:] += state["stem.bias"]
        if architecture.stem_writes is not None:
            flat, table = _widen(flat, architecture.stem_writes, architecture.embed), _widen(table, architecture.stem_writes, architecture.embed)
        table = np.pad(table, ((0, 0), (0, lanes.up(table.shape[1]) - table.shape[1])))
        shared = Stream(self.program.constant(table.ravel()), 0, table.shape[1], architecture.embed)
        stream = self.dense(Stream(rows, tokens, depth, depth), tokens, Matrix(flat, None), residual=shared)
        if architecture.stem_norm is None:
            return stream
        return self.normed(stream, architecture.stem_norm, affine=(state.get("stem_norm.weight"), state.get("stem_norm.bias")))

    def step(self, stream: Stream, step: tuple[BranchSpec, ...], parts: list[State]) -> Stream:
        """All branches read the stream as it was before the step."""
        written = stream
        for branch, part in zip(step, parts, strict=True):
            written = self.branch(stream, written, branch, part, stream.rows)
        return written

    def last_step(self, stream: Stream, step: tuple[BranchSpec, ...], parts: list[State], asked: int) -> Stream:
        """The step after which only the first tokens are wanted."""
        written = self.kept(stream, asked)
        few = written
        for branch, part in zip(step, parts, strict=True):
            reads = stream if isinstance(branch.core, AttentionSpec) else few
            written = self.branch(reads, written, branch, part, asked)
        return written

    def branch(self, reads: Stream, written: Stream, branch: BranchSpec, part: State, asked: int) -> Stream:
        """written + what the branch makes of `reads`, for the first `asked` tokens."""
        inner, core, embed = under(part, "core"), branch.core, self.architecture.embed
        scale = part.get("layer_scale")
        if isinstance(core, ConstantSpec):
            vector = inner["value"] if scale is None else inner["value"] * scale
            if branch.writes is not None:
                vector = _widen(vector[None], branch.writes, embed)[0]
            return self.constant_added(written, vector)
        out = _out(inner["out.weight"] if isinstance(core, AttentionSpec) else inner["fc2.weight"], inner.get("out.bias", inner.get("fc2.bias")))
        if scale is not None:
            out = Matrix(out.weight * scale, None if out.bias is None else out.bias * scale)
        if branch.writes is not None:
            bias = None if out.bias is None else _widen(out.bias[None], branch.writes, embed)[0]
            out = Matrix(_widen(out.weight, branch.writes, embed), bias)
        x, entering = self.read(reads, branch, part)
        if isinstance(core, AttentionSpec):
            return self.attention(x, entering, core, inner, out, written, asked)
        return self.ffn(x, entering, core, inner, out, written)

    def read(self, stream: Stream, branch: BranchSpec, part: State) -> tuple[Stream, _Entering]:
        """What the branch's first products read: the norm without its weights, which go into theirs."""
        if branch.norm is None:
            if branch.reads is None:
                return stream, _Entering(None, None)
            selection = np.zeros((self.architecture.embed, len(branch.reads)), np.float32)
            selection[list(branch.reads), range(len(branch.reads))] = 1
            return stream, _Entering(None, None, selection)
        x = self.normed(stream, branch.norm, columns=branch.reads)
        return x, _Entering(part.get("norm.weight"), part.get("norm.bias"))

    def attention(self, x: Stream, entering: _Entering, core: AttentionSpec, state: State, out: Matrix, written: Stream, asked: int) -> Stream:
        """Projections, keys and values turned into packed form, attention, output projection onto the stream."""
        lanes, heads, tokens = self.lanes, core.heads, x.rows
        wide = lanes.up(core.v)
        # Softmax by powers of two: the scale and the logarithm are in the queries, or in the norm behind their projection.
        scale = core.scale * math.log2(math.e)
        q, k, v = (_out(state[f"{name}.weight"], state.get(f"{name}.bias")) for name in "qkv")
        if core.kv_of is not None:
            # Each head gets keys and values of its own; a copy of weights costs less than a kernel that looks up whose they are.
            k, v = _heads_chosen(k, core.kv_of, core.qk), _heads_chosen(v, core.kv_of, core.v)
        if core.q_norm is None:
            q = Matrix(q.weight * np.float32(scale), None if q.bias is None else q.bias * np.float32(scale))
        v = Matrix(padded_heads(v.weight, heads, wide), None if v.bias is None else padded_heads(v.bias[None], heads, wide)[0])
        if asked == tokens:
            joined = self.dense(x, tokens, entering.into(_beside([q, k, v])))
            at = (0, heads * core.qk, 2 * heads * core.qk)
            asking, answering = joined, joined
        else:
            asking = self.dense(x, asked, entering.into(q))
            answering = self.dense(x, tokens, entering.into(_beside([k, v])))
            at = (0, 0, heads * core.qk)
        if core.q_norm is not None:
            spec = HeadNorm(self.batch * asking.rows, asking.width, at[0], heads, core.q_norm, core.qk_norm_per_head)
            asking_new = self.heads_normed(asking, spec, state, "q_norm", scale)
            answering = asking_new if answering is asking else answering
            asking = asking_new
        if core.k_norm is not None:
            spec = HeadNorm(self.batch * answering.rows, answering.width, at[1], heads, core.k_norm, core.qk_norm_per_head)
            answering_new = self.heads_normed(answering, spec, state, "k_norm", 1.0, core.kv_of)
            asking = answering_new if asking is answering else asking
            answering = answering_new
        if core.rope is not None:
            asking_new = self.turned(asking, at[0], core, state)
            answering = asking_new if answering is asking else answering
            asking = asking_new
            answering_new = self.turned(answering, at[1], core, state)
            asking = answering_new if asking is answering else asking
            answering = answering_new
        queries, keys, values = Heads(asking.width, at[0], core.qk), Heads(answering.width, at[1], core.qk), Heads(answering.width, at[2], wide)
        spec_attend = Attend(self.batch, heads, tokens, asked, asking.place, queries, keys, values, core.bias is not None)
        tile = self.schedule.tile(spec_attend.shape)
        key = ("keys", heads, tokens, keys, values, tile.vectors)
        size = self.batch * heads * packed_size(tokens, keys, values, lanes)
        threads = self.schedule.threads
        packed = self.program.call(
            "keys", key, lambda: pack_keys(self.batch, heads, tokens, keys, values, lanes, tile, threads), [answering.value], (size,)
        )
        operands = [asking.value, packed]
        if core.bias is not None:
            operands.append(self.program.constant(_relative(core, state, asked, lanes).ravel()))
        shape = (self.batch * asked * heads * wide,)
        mixed = self.program.call("attend", spec_attend, lambda: attend(spec_attend, lanes, self.schedule), operands, shape)
        found = Stream(mixed, asked, heads * wide, heads * wide)
        weight = padded_heads(out.weight.T, heads, wide).T
        gate = None if not core.gated else _out(state["gate.weight"], state.get("gate.bias"))
        if gate is not None and (core.out_norm is None or wide == core.v):
            gate = Matrix(padded_heads(gate.weight, heads, wide), None if gate.bias is None else padded_heads(gate.bias[None], heads, wide)[0])
        if core.out_norm is not None:
            chosen = None
            if wide != core.v:
                chosen, weight = tuple(head * wide + column for head in range(heads) for column in range(core.v)), out.weight
            affine = (state.get("out_norm.weight"), state.get("out_norm.bias"))
            # Through a gate the norm's weights cannot be folded.
            found = self.normed(found, core.out_norm, columns=chosen, affine=affine if gate is not None else None)
            if gate is None:
                out = _Entering(*affine).into(Matrix(weight, out.bias))
                weight = out.weight
        if gate is not None:
            found = self.dense(x, asked, entering.into(gate), act="sigmoid", factor=found)
        return self.dense(found, asked, Matrix(weight, out.bias), residual=written)

    def turned(self, x: Stream, first: int, core: AttentionSpec, state: State) -> Stream:
        """Queries or keys turned by their positions, the other columns as they are."""
        rope = core.rope
        assert rope is not None
        table = state["rope.table"]
        spec = Turn(self.batch, x.rows, x.width, first, core.heads, core.qk, rope.prefix, rope.tokens, len(table), rope.layout)
        operands = [x.value, self.program.constant(np.ascontiguousarray(table).ravel())]
        value = self.program.call("turn", spec, lambda: turn_heads(spec, self.schedule.threads), operands, (self.batch * x.rows * x.width,))
        return Stream(value, x.rows, x.width, x.used)

    def heads_normed(self, x: Stream, spec: HeadNorm, state: State, name: str, scale: float, chosen: tuple[int, ...] | None = None) -> Stream:
        """Queries or keys normalised head by head, the other columns as they are."""
        shape = (spec.heads, spec.norm.width)
        weight, bias = state.get(f"{name}.weight", np.ones(1, np.float32)), state.get(f"{name}.bias", np.zeros(1, np.float32))
        if spec.per_head and chosen is not None:
            weight, bias = (part[list(chosen)] if part.ndim == 2 else part for part in (weight, bias))
        weight, bias = np.broadcast_to(weight, shape) * np.float32(scale), np.broadcast_to(bias, shape) * np.float32(scale)
        operands = [x.value, self.program.constant(weight.astype(np.float32).ravel()), self.program.constant(bias.astype(np.float32).ravel())]
        value = self.program.call("head_norm", spec, lambda: norm_heads(spec, self.schedule.threads), operands, (spec.rows * spec.width,))
        return Stream(value, x.rows, x.width, x.used)

    def ffn(self, x: Stream, entering: _Entering, core: FfnSpec, state: State, out: Matrix, written: Stream) -> Stream:
        """Up, activation, perhaps times the other half, down onto the stream."""
        first = entering.into(_out(state["fc1.weight"], state.get("fc1.bias")))
        rows = written.rows
        if core.gated:
            plain = self.dense(x, rows, first)
            gate = entering.into(_out(state["gate.weight"], state.get("gate.bias")))
            hidden = self.dense(x, rows, gate, act=core.act, factor=plain)
        else:
            hidden = self.dense(x, rows, first, act=core.act)
        if core.norm is not None:
            hidden = self.normed(hidden, core.norm)
            out = _Entering(state.get("norm.weight"), state.get("norm.bias")).into(out)
        return self.dense(hidden, rows, out, residual=written)

    def head(self, stream: Stream) -> Value:
        """Norm, pooling, classifier."""
        architecture, state = self.architecture, self.state
        kind, asked = architecture.pool.kind, architecture.pooled_prefix
        if asked and stream.rows != asked:
            stream = self.kept(stream, asked)
        entering = _Entering(None, None)
        # Weights of the norm go through a mean, but not through another norm.
        foldable = architecture.pool_norm is None
        weights = (state.get("norm.weight"), state.get("norm.bias"))
        if architecture.norm is not None:
            if foldable:
                stream, entering = self.normed(stream, architecture.norm, columns=architecture.head_reads), _Entering(*weights)
            else:
                stream = self.normed(stream, architecture.norm, columns=architecture.head_reads, affine=weights)
        elif architecture.head_reads is not None and foldable:
            selection = np.zeros((architecture.embed, len(architecture.head_reads)), np.float32)
            selection[list(architecture.head_reads), range(len(architecture.head_reads))] = 1
            entering = _Entering(None, None, selection)
        if kind in ("mean", "mean_all"):
            skipped = architecture.prefix if kind == "mean" else 0
            place, rows = Rows(stream.rows, stream.width, skipped), stream.rows - skipped
            value = self.program.call(
                "mean", place, lambda: mean_rows(self.batch, rows, place, self.lanes), [stream.value], (self.batch * stream.width,)
            )
            stream = Stream(value, 1, stream.width, stream.used)
        if architecture.pool_norm is not None:
            affine = (state.get("pool_norm.weight"), state.get("pool_norm.bias"))
            columns = architecture.head_reads if architecture.norm is None else None  # the first norm there is picks the columns
            stream, entering = self.normed(stream, architecture.pool_norm, columns=columns), _Entering(*affine)
        return self.classify(stream, entering, distilled=kind == "distilled")

    def classify(self, stream: Stream, entering: _Entering, *, distilled: bool) -> Value:
        """Logits (batch, classes) of pooled rows."""
        spec, state = self.architecture.head, self.state
        assert spec is not None
        if "pre_head.weight" in state:
            before = entering.into(Matrix(state["pre_head.weight"].T, state.get("pre_head.bias")))
            stream = self.dense(stream, stream.rows, before, act=spec.hidden_act)
            entering = _Entering(None, None)
        answer = entering.into(Matrix(state["head.weight"].T, state.get("head.bias")))
        if distilled:
            # The mean of two classifiers on two rows is one classifier on the rows side by side.
            other = entering.into(Matrix(state["head_dist.weight"].T, state.get("head_dist.bias")))
            gap = np.zeros((stream.width - len(answer.weight), spec.classes), np.float32)
            weight = np.concatenate([answer.weight, gap, other.weight, gap]) * np.float32(0.5)
            bias = None if answer.bias is None or other.bias is None else (answer.bias + other.bias) * np.float32(0.5)
            stream, answer = Stream(stream.value, 1, 2 * stream.width, 2 * stream.width), Matrix(weight, bias)
        logits = self.dense(stream, 1, answer, act=spec.act)
        key = ("columns", logits.width)
        return self.program.call(
            "logits", key, lambda: first_columns(self.batch, logits.width, spec.classes), [logits.value], (self.batch, spec.classes)
        )

    def dense(
        self, x: Stream, rows: int, matrix: Matrix, *, act: str = "identity", factor: Stream | None = None, residual: Stream | None = None
    ) -> Stream:
        """The first `rows` rows of x times a matrix, and what comes behind it."""
        depth, used = matrix.weight.shape
        width = self.lanes.up(used)
        spec = Dense(
            self.batch,
            rows,
            depth,
            width,
            x.place,
            matrix.bias is not None,
            act,
            None if factor is None else factor.place,
            None if residual is None else residual.place,
        )
        weight = panels(matrix.weight, spec.panels(self.lanes, self.schedule), self.lanes.count)
        operands = [x.value, self.program.constant(weight)]
        if matrix.bias is not None:
            operands.append(self.program.constant(padded(matrix.bias, width)))
        operands += [other.value for other in (factor, residual) if other is not None]
        value = self.program.call("dense", spec, lambda: dense(spec, self.lanes, self.schedule), operands, (self.batch * rows * width,))
        return Stream(value, rows, width, used)

    def normed(
        self, x: Stream, norm: NormSpec, *, columns: tuple[int, ...] | None = None, affine: tuple[Array | None, Array | None] | None = None
    ) -> Stream:
        """Rows normalised over the columns named, or over all that mean something."""
        spec = Normalise(
            self.batch, x.rows, norm.width, x.place, norm.kind == "layer", norm.eps, affine is not None, columns is not None
        )
        width = self.lanes.up(norm.width)
        operands = [x.value]
        if columns is not None:
            operands.append(self.program.constant(np.array(columns, np.int32)))
        if affine is not None:
            weight, bias = affine
            operands.append(self.program.constant(padded(np.ones(norm.width, np.float32) if weight is None else weight, width)))
            operands.append(self.program.constant(padded(np.zeros(norm.width, np.float32) if bias is None else bias, width)))
        value = self.program.call(
            "norm", spec, lambda: normalise(spec, self.lanes, self.schedule.threads), operands, (self.batch * x.rows * width,)
        )
        return Stream(value, x.rows, width, norm.width)

    def kept(self, x: Stream, rows: int) -> Stream:
        """The first rows of each image."""
        value = self.program.call("first", (x.place, rows), lambda: first_rows(self.batch, rows, x.place), [x.value], (self.batch * rows * x.width,))
        return Stream(value, rows, x.width, x.used)

    def constant_added(self, x: Stream, vector: Array) -> Stream:
        """The same numbers added to every row."""
        rows = self.batch * x.rows
        operands = [x.value, self.program.constant(padded(vector, x.width))]
        value = self.program.call("add", ("add", rows, x.width), lambda: add_constant(rows, x.width, self.lanes), operands, (rows * x.width,))
        return Stream(value, x.rows, x.width, x.used)

    def _last_attention(self) -> int | None:
        found = [number for number, step in enumerate(self.architecture.steps) if any(isinstance(branch.core, AttentionSpec) for branch in step)]
        return found[-1] if found else None


@dataclass(frozen=True)
class _Entering:
    """What lies between a stream and a product and is linear: a norm's weights, or the choice of columns. It goes into the product's own weights."""

    weight: Array | None
    bias: Array | None
    selection: Array | None = None

    def into(self, matrix: Matrix) -> Matrix:
        """(x * weight + bias) W + b = x (weight W) + (bias W + b); with a selection S, x S W."""
        weight, bias = matrix.weight, matrix.bias
        if self.bias is not None:
            shift = (self.bias.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
            bias = shift if bias is None else bias + shift
        if self.weight is not None:
            weight = weight * self.weight[:, None]
        if self.selection is not None:
            weight = self.selection @ weight
        return Matrix(weight, bias)


def under(state: State, prefix: str) -> State:
    """The entries of `state` below `prefix`."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _out(weight: Array, bias: Array | None) -> Matrix:
    return Matrix(weight.T, bias)


def _beside(matrices: list[Matrix]) -> Matrix:
    weight = np.concatenate([matrix.weight for matrix in matrices], axis=1)
    if all(matrix.bias is None for matrix in matrices):
        return Matrix(weight, None)
    biases = [np.zeros(matrix.weight.shape[1], np.float32) if matrix.bias is None else matrix.bias for matrix in matrices]
    return Matrix(weight, np.concatenate(biases))


def _heads_chosen(matrix: Matrix, chosen: tuple[int, ...], width: int) -> Matrix:
    columns = np.concatenate([np.arange(head * width, (head + 1) * width) for head in chosen])
    return Matrix(matrix.weight[:, columns], None if matrix.bias is None else matrix.bias[columns])


def _relative(core: AttentionSpec, state: State, asked: int, lanes: Lanes) -> Array:
    """(heads, asked, whole vectors of tokens), in the units of scores: times log2 e."""
    spec = core.bias
    assert spec is not None
    bias = state["bias.table"][offsets(spec).numpy()].transpose(2, 0, 1) * np.float32(math.log2(math.e))
    before = 0 if spec.prefix_rows else spec.prefix
    bias = np.pad(bias, ((0, 0), (before, 0), (before, 0)))[:, :asked]
    return np.pad(bias, ((0, 0), (0, 0), (0, lanes.up(bias.shape[2]) - bias.shape[2])))


def _widen(matrix: Array, writes: tuple[int, ...], embed: int) -> Array:
    wide = np.zeros((matrix.shape[0], embed), np.float32)
    wide[:, list(writes)] = matrix
    return wide


