"""A compact network as a program of our kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ....compress.architecture import Architecture, AttentionSpec, BranchSpec, ConstantSpec, FfnSpec, NormSpec
from ....compress.vit.model import CompactModel
from ....compress.vit.relative_bias import offsets
from .attention import Attend, attend
from .codes import Coding, Encode, Range, encode_rows
from .dense import Dense, dense
from .head_norm import HeadNorm, norm_heads
from .keys import Heads, pack_keys, packed_size
from .lanes import Lanes
from .matrices import Entering, Matrix, State, Stream, beside, from_torch, heads_chosen, under, widen
from .norm import Normalise, normalise
from .packing import Array, in_eight_bits, padded, padded_heads, panels
from .patches import Patches, cut_patches
from .place import Rows
from .precision import Float, Observed, Precision
from .program import Program, Value
from .rope import Turn, turn_heads
from .rows import add_constant, first_columns, first_rows, mean_rows
from .schedule import Schedule

if TYPE_CHECKING:
    from tvm import IRModule


def write_program(compact: CompactModel, lanes: Lanes, schedule: Schedule, batch: int, precision: Precision | None = None) -> IRModule:
    """The network as a module with one function `main`: images (batch, C, H, W) -> logits (batch, classes). What `coverage` refuses must not come here."""
    return _Writer(compact, lanes, schedule, batch, precision or Float()).module()


def write_observed(compact: CompactModel, lanes: Lanes, schedule: Schedule) -> tuple[IRModule, list[Stream]]:
    """The network for one image, and the rows that its products read: `main` gives the logits and then those rows, each flat."""
    observed = Observed()
    return _Writer(compact, lanes, schedule, 1, observed).module(observed), observed.rows


def kernel_specs(
    compact: CompactModel, lanes: Lanes, schedule: Schedule, batch: int, precision: Precision | None = None
) -> list[Dense | Attend]:
    """The products that the network's program consists of, in order, equal ones as often as they come."""
    writer = _Writer(compact, lanes, schedule, batch, precision or Float())
    writer.module()
    return [key for key in writer.program.keys if isinstance(key, Dense | Attend)]


class _Writer:
    def __init__(self, compact: CompactModel, lanes: Lanes, schedule: Schedule, batch: int, precision: Precision) -> None:
        self.architecture: Architecture = compact.architecture
        self.state: State = {name: tensor.detach().cpu().float().numpy() for name, tensor in compact.state_dict().items()}
        self.lanes, self.schedule, self.batch, self.precision = lanes, schedule, batch, precision
        self.program = Program((batch, *self.architecture.image))
        # Rows that other kernels read in fp32 are turned into codes once, however many products read them.
        self.encoded: list[tuple[Stream, Stream]] = []

    def module(self, observed: Observed | None = None) -> IRModule:
        return self.program.build(self.body, aside=None if observed is None else lambda: [rows.value for rows in observed.rows])

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
            flat, table = widen(flat, architecture.stem_writes, architecture.embed), widen(table, architecture.stem_writes, architecture.embed)
        table = np.pad(table, ((0, 0), (0, lanes.up(table.shape[1]) - table.shape[1])))
        shared = Stream(self.program.constant(table.ravel()), 0, table.shape[1], architecture.embed)
        # Pixels keep their precision: eight bits cost most here, and this is one product of many.
        stream = self.dense(Stream(rows, tokens, depth, depth), tokens, Matrix(flat, None), residual=shared, exact=True)
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
                vector = widen(vector[None], branch.writes, embed)[0]
            return self.constant_added(written, vector)
        out = from_torch(inner["out.weight"] if isinstance(core, AttentionSpec) else inner["fc2.weight"], inner.get("out.bias", inner.get("fc2.bias")))
        if scale is not None:
            out = Matrix(out.weight * scale, None if out.bias is None else out.bias * scale)
        if branch.writes is not None:
            bias = None if out.bias is None else widen(out.bias[None], branch.writes, embed)[0]
            out = Matrix(widen(out.weight, branch.writes, embed), bias)
        x, entering = self.read(reads, branch, part)
        if isinstance(core, AttentionSpec):
            return self.attention(x, entering, core, inner, out, written, asked)
        return self.ffn(x, entering, core, inner, out, written)

    def read(self, stream: Stream, branch: BranchSpec, part: State) -> tuple[Stream, Entering]:
        """What the branch's first products read: the norm without its weights, which go into theirs."""
        if branch.norm is None:
            if branch.reads is None:
                return stream, Entering(None, None)
            selection = np.zeros((self.architecture.embed, len(branch.reads)), np.float32)
            selection[list(branch.reads), range(len(branch.reads))] = 1
            return stream, Entering(None, None, selection)
        x = self.normed(stream, branch.norm, columns=branch.reads, for_products=True)
        return x, Entering(part.get("norm.weight"), part.get("norm.bias"))

    def attention(self, x: Stream, entering: Entering, core: AttentionSpec, state: State, out: Matrix, written: Stream, asked: int) -> Stream:
        """Projections, keys and values turned into packed form, attention, output projection onto the stream."""
        lanes, heads, tokens = self.lanes, core.heads, x.rows
        wide = lanes.up(core.v)
        # Softmax by powers of two: the scale and the logarithm are in the queries, or in the norm behind their projection.
        scale = core.scale * math.log2(math.e)
        q, k, v = (from_torch(state[f"{name}.weight"], state.get(f"{name}.bias")) for name in "qkv")
        if core.kv_of is not None:
            # Each head gets keys and values of its own; a copy of weights costs less than a kernel that looks up whose they are.
            k, v = heads_chosen(k, core.kv_of, core.qk), heads_chosen(v, core.kv_of, core.v)
        if core.q_norm is None:
            q = Matrix(q.weight * np.float32(scale), None if q.bias is None else q.bias * np.float32(scale))
        v = Matrix(padded_heads(v.weight, heads, wide), None if v.bias is None else padded_heads(v.bias[None], heads, wide)[0])
        if asked == tokens:
            joined = self.dense(x, tokens, entering.into(beside([q, k, v])))
            at = (0, heads * core.qk, 2 * heads * core.qk)
            asking, answering = joined, joined
        else:
            asking = self.dense(x, asked, entering.into(q))
            answering = self.dense(x, tokens, entering.into(beside([k, v])))
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
        plain = not core.gated and core.out_norm is None
        writes, known = self.precision.for_products(whole_rows=False) if plain else (None, None)
        spec_attend = Attend(self.batch, heads, tokens, asked, asking.place, queries, keys, values, core.bias is not None, writes)
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
        operands += self.range_operand(writes, known)
        shape = (self.batch * asked * heads * wide,)
        mixed = self.program.call("attend", spec_attend, lambda: attend(spec_attend, lanes, self.schedule), operands, shape, _stored(writes))
        found = Stream(mixed, asked, heads * wide, heads * wide, writes, known)
        weight = padded_heads(out.weight.T, heads, wide).T
        gate = None if not core.gated else from_torch(state["gate.weight"], state.get("gate.bias"))
        if gate is not None and (core.out_norm is None or wide == core.v):
            gate = Matrix(padded_heads(gate.weight, heads, wide), None if gate.bias is None else padded_heads(gate.bias[None], heads, wide)[0])
        if core.out_norm is not None:
            chosen = None
            if wide != core.v:
                chosen, weight = tuple(head * wide + column for head in range(heads) for column in range(core.v)), out.weight
            affine = (state.get("out_norm.weight"), state.get("out_norm.bias"))
            # Through a gate the norm's weights cannot be folded.
            found = self.normed(found, core.out_norm, columns=chosen, affine=affine if gate is not None else None, for_products=gate is None)
            if gate is None:
                out = Entering(*affine).into(Matrix(weight, out.bias))
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

    def ffn(self, x: Stream, entering: Entering, core: FfnSpec, state: State, out: Matrix, written: Stream) -> Stream:
        """Up, activation, perhaps times the other half, down onto the stream."""
        first = entering.into(from_torch(state["fc1.weight"], state.get("fc1.bias")))
        rows = written.rows
        if core.gated:
            plain = self.dense(x, rows, first)
            gate = entering.into(from_torch(state["gate.weight"], state.get("gate.bias")))
            hidden = self.dense(x, rows, gate, act=core.act, factor=plain, for_products=core.norm is None)
        else:
            hidden = self.dense(x, rows, first, act=core.act, for_products=core.norm is None)
        if core.norm is not None:
            hidden = self.normed(hidden, core.norm, for_products=True)
            out = Entering(state.get("norm.weight"), state.get("norm.bias")).into(out)
        return self.dense(hidden, rows, out, residual=written)

    def head(self, stream: Stream) -> Value:
        """Norm, pooling, classifier."""
        architecture, state = self.architecture, self.state
        kind, asked = architecture.pool.kind, architecture.pooled_prefix
        if asked and stream.rows != asked:
            stream = self.kept(stream, asked)
        entering = Entering(None, None)
        # Weights of the norm go through a mean, but not through another norm.
        foldable = architecture.pool_norm is None
        weights = (state.get("norm.weight"), state.get("norm.bias"))
        if architecture.norm is not None:
            if foldable:
                stream, entering = self.normed(stream, architecture.norm, columns=architecture.head_reads), Entering(*weights)
            else:
                stream = self.normed(stream, architecture.norm, columns=architecture.head_reads, affine=weights)
        elif architecture.head_reads is not None and foldable:
            selection = np.zeros((architecture.embed, len(architecture.head_reads)), np.float32)
            selection[list(architecture.head_reads), range(len(architecture.head_reads))] = 1
            entering = Entering(None, None, selection)
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
            stream, entering = self.normed(stream, architecture.pool_norm, columns=columns), Entering(*affine)
        return self.classify(stream, entering, distilled=kind == "distilled")

    def classify(self, stream: Stream, entering: Entering, *, distilled: bool) -> Value:
        """Logits (batch, classes) of pooled rows."""
        spec, state = self.architecture.head, self.state
        assert spec is not None
        if "pre_head.weight" in state:
            before = entering.into(Matrix(state["pre_head.weight"].T, state.get("pre_head.bias")))
            stream = self.dense(stream, stream.rows, before, act=spec.hidden_act)
            entering = Entering(None, None)
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
        self,
        x: Stream,
        rows: int,
        matrix: Matrix,
        *,
        act: str = "identity",
        factor: Stream | None = None,
        residual: Stream | None = None,
        for_products: bool = False,
        exact: bool = False,
    ) -> Stream:
        """The first `rows` rows of x times a matrix, and what comes behind it. for_products: nothing else reads the result. exact: in fp32 in any precision."""
        x = x if exact else self.in_codes(x)
        depth, used = matrix.weight.shape
        width = self.lanes.up(used)
        weights, bias = self.weights(x, matrix)
        writes, known = self.precision.for_products(whole_rows=False) if for_products else (None, None)
        spec = Dense(
            self.batch,
            rows,
            depth,
            width,
            x.place,
            bias is not None,
            act,
            None if factor is None else factor.place,
            None if residual is None else residual.place,
            x.coding,
            writes,
        )
        group = 1 if x.coding is None else x.coding.dot.group
        packed = panels(weights[0], spec.panels(self.lanes, self.schedule), self.lanes.count, group)
        operands = [x.value, *(self.program.constant(part) for part in (packed, *(padded(part, width) for part in weights[1:])))]
        if bias is not None:
            operands.append(self.program.constant(padded(bias, width)))
        operands += [other.value for other in (factor, residual) if other is not None]
        operands += self.range_operand(writes, known)
        shape = (self.batch * rows * width,)
        value = self.program.call("dense", spec, lambda: dense(spec, self.lanes, self.schedule), operands, shape, _stored(writes))
        return Stream(value, rows, width, used, writes, known)

    def in_codes(self, x: Stream) -> Stream:
        """The rows as products read them in this precision."""
        if x.coding is not None:
            return x
        for known, found in self.encoded:
            if known.value.same_as(x.value):
                return found
        coding, span = self.precision.read(x)
        if coding is None:
            return x
        spec = Encode(self.batch, x.rows, x.used, x.place, coding)
        length = coding.row_length(x.used)
        operands = [x.value, *self.range_operand(coding, span)]
        shape = (self.batch * x.rows * length,)
        value = self.program.call("encode", spec, lambda: encode_rows(spec, self.schedule.threads), operands, shape, _stored(coding))
        found = Stream(value, x.rows, length, x.used, coding, span)
        self.encoded.append((x, found))
        return found

    def range_operand(self, coding: Coding | None, known: Range | None) -> list[Value]:
        """What a kernel needs that writes codes of a range known beforehand."""
        return [self.program.constant(known.operand(coding.dot))] if coding is not None and known is not None else []

    @staticmethod
    def weights(x: Stream, matrix: Matrix) -> tuple[tuple[NDArray[Any], ...], Array | None]:
        """((weights, [scales], [sums]), bias) of a product with rows as they are: what `Dense.operands` names."""
        if x.coding is None:
            return (matrix.weight,), matrix.bias
        codes, scales = in_eight_bits(matrix.weight)
        sums = (scales * codes.sum(axis=0, dtype=np.int64)).astype(np.float32)
        if x.range is None:
            return (codes, scales, sums), matrix.bias
        shift = np.float32(x.range.base(x.coding.dot)) * sums
        return (codes, scales * np.float32(x.range.step)), shift if matrix.bias is None else shift + matrix.bias

    def normed(
        self,
        x: Stream,
        norm: NormSpec,
        *,
        columns: tuple[int, ...] | None = None,
        affine: tuple[Array | None, Array | None] | None = None,
        for_products: bool = False,
    ) -> Stream:
        """Rows normalised over the columns named, or over all that mean something. for_products: nothing else reads them."""
        writes, known = self.precision.for_products(whole_rows=True) if for_products else (None, None)
        spec = Normalise(
            self.batch, x.rows, norm.width, x.place, norm.kind == "layer", norm.eps, affine is not None, columns is not None, writes
        )
        width = self.lanes.up(norm.width)
        operands = [x.value]
        if columns is not None:
            operands.append(self.program.constant(np.array(columns, np.int32)))
        if affine is not None:
            weight, bias = affine
            operands.append(self.program.constant(padded(np.ones(norm.width, np.float32) if weight is None else weight, width)))
            operands.append(self.program.constant(padded(np.zeros(norm.width, np.float32) if bias is None else bias, width)))
        operands += self.range_operand(writes, known)
        length = width if writes is None else writes.row_length(norm.width)
        shape = (self.batch * x.rows * length,)
        value = self.program.call("norm", spec, lambda: normalise(spec, self.lanes, self.schedule.threads), operands, shape, _stored(writes))
        return Stream(value, x.rows, length, norm.width, writes, known)

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


def _relative(core: AttentionSpec, state: State, asked: int, lanes: Lanes) -> Array:
    """(heads, asked, whole vectors of tokens), in the units of scores: times log2 e."""
    spec = core.bias
    assert spec is not None
    bias = state["bias.table"][offsets(spec).numpy()].transpose(2, 0, 1) * np.float32(math.log2(math.e))
    before = 0 if spec.prefix_rows else spec.prefix
    bias = np.pad(bias, ((0, 0), (before, 0), (before, 0)))[:, :asked]
    return np.pad(bias, ((0, 0), (0, 0), (0, lanes.up(bias.shape[2]) - bias.shape[2])))


def _stored(coding: Coding | None) -> str:
    return "float32" if coding is None else coding.dot.stored
