"""A compact network as a program of our kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...compress.network.architecture import Architecture, AttentionSpec, BranchSpec, ConstantSpec
from ...compress.network.modules.model import CompactModel
from .attention import Attend
from .dense import Dense
from .emitter import Emitter
from .head import head
from .lanes import Lanes
from .matrices import Entering, Matrix, State, Stream, from_torch, under, widen
from .patches import Patches, cut_patches
from .precision import Float, Observed, Precision
from .program import Program, Value
from .schedule import Schedule
from .sublayers import attention, ffn

if TYPE_CHECKING:
    from tvm import IRModule


def write_program(
    compact: CompactModel,
    lanes: Lanes,
    schedule: Schedule,
    batch: int,
    precision: Precision | None = None,
) -> IRModule:
    """The network as a module with one function `main`: images (batch, C, H, W) -> logits (batch,
    classes). What `coverage` refuses must not come here.
    """
    return _Writer(compact, lanes, schedule, batch, precision or Float()).module()


def write_observed(
    compact: CompactModel, lanes: Lanes, schedule: Schedule
) -> tuple[IRModule, list[Stream]]:
    """The network for one image, and the rows that its products read: `main` gives the logits and
    then those rows, each flat.
    """
    observed = Observed()
    return _Writer(compact, lanes, schedule, 1, observed).module(observed), observed.rows


def kernel_specs(
    compact: CompactModel,
    lanes: Lanes,
    schedule: Schedule,
    batch: int,
    precision: Precision | None = None,
) -> list[Dense | Attend]:
    """The products that the network's program consists of, in order, equal ones as often as they
    come.
    """
    writer = _Writer(compact, lanes, schedule, batch, precision or Float())
    writer.module()
    return [key for key in writer.program.keys if isinstance(key, Dense | Attend)]


class _Writer:
    def __init__(
        self,
        compact: CompactModel,
        lanes: Lanes,
        schedule: Schedule,
        batch: int,
        precision: Precision,
    ) -> None:
        self.architecture: Architecture = compact.architecture
        self.state: State = {
            name: tensor.detach().cpu().float().numpy()
            for name, tensor in compact.state_dict().items()
        }
        self.program = Program((batch, *self.architecture.image))
        self.emitter = Emitter(self.program, lanes, schedule, batch, precision)

    def module(self, observed: Observed | None = None) -> IRModule:
        return self.program.build(
            self.body,
            aside=None if observed is None else lambda: [rows.value for rows in observed.rows],
        )

    def body(self) -> Value:
        stream = self.stem()
        asked = self.architecture.pooled_prefix
        last = self._last_attention() if asked else None
        for number, step in enumerate(self.architecture.steps):
            parts = [
                under(self.state, f"steps.{number}.{position}") for position in range(len(step))
            ]
            stream = (
                self.last_step(stream, step, parts, asked)
                if number == last
                else self.step(stream, step, parts)
            )
        return head(self.emitter, self.architecture, self.state, stream)

    def stem(self) -> Stream:
        """Patches times the convolution's weights, to which a table of prefix tokens and positions
        is added.
        """
        architecture, state, emitter = self.architecture, self.state, self.emitter
        tokens, prefix, patch_norm = (
            architecture.tokens,
            architecture.prefix,
            architecture.patch_norm,
        )
        weight = state["stem.weight"]
        flat, bias = weight.reshape(len(weight), -1).T, state.get("stem.bias")
        table = np.zeros((tokens, flat.shape[1]), np.float32)
        if prefix:
            table[:prefix] = state["prefix"]
        if "position" in state:
            table[prefix:] += state["position"]
        if bias is not None and patch_norm is None:
            table[prefix:] += bias
        if architecture.stem_writes is not None:
            flat, table = (
                widen(flat, architecture.stem_writes, architecture.embed),
                widen(table, architecture.stem_writes, architecture.embed),
            )
        table = np.pad(table, ((0, 0), (0, emitter.lanes.up(table.shape[1]) - table.shape[1])))
        # Pixels keep their precision: eight bits cost most here, and this is one product of many.
        if patch_norm is not None:
            patches = emitter.dense(
                self.patches(0), tokens - prefix, Matrix(flat, bias), exact=True
            )
            affine = (state.get("patch_norm.weight"), state.get("patch_norm.bias"))
            stream = emitter.placed(emitter.normed(patches, patch_norm, affine=affine), table)
        else:
            shared = Stream(
                emitter.program.constant(table.ravel()), 0, table.shape[1], architecture.embed
            )
            stream = emitter.dense(
                self.patches(prefix), tokens, Matrix(flat, None), residual=shared, exact=True
            )
        if architecture.stem_norm is None:
            return stream
        return emitter.normed(
            stream,
            architecture.stem_norm,
            affine=(state.get("stem_norm.weight"), state.get("stem_norm.bias")),
        )

    def patches(self, prefix: int) -> Stream:
        """Each patch's pixels as a row, behind `prefix` rows of zeros."""
        architecture, emitter = self.architecture, self.emitter
        spec = architecture.stem
        rows = prefix + architecture.tokens - architecture.prefix
        depth = int(np.prod(self.state["stem.weight"].shape[1:]))
        cut = Patches(
            emitter.batch,
            architecture.image,
            architecture.grid,
            spec.patch,
            spec.stride or spec.patch,
            spec.padding,
            prefix,
            depth,
        )
        value = self.program.call(
            "patches",
            cut,
            lambda: cut_patches(cut, emitter.schedule.threads),
            [self.program.input],
            (emitter.batch * rows * depth,),
        )
        return Stream(value, rows, depth, depth)

    def step(self, stream: Stream, step: tuple[BranchSpec, ...], parts: list[State]) -> Stream:
        """All branches read the stream as it was before the step."""
        written = stream
        for branch, part in zip(step, parts, strict=True):
            written = self.branch(stream, written, branch, part, stream.rows)
        return written

    def last_step(
        self, stream: Stream, step: tuple[BranchSpec, ...], parts: list[State], asked: int
    ) -> Stream:
        """The step after which only the first tokens are wanted."""
        written = self.emitter.kept(stream, asked)
        few = written
        for branch, part in zip(step, parts, strict=True):
            reads = stream if isinstance(branch.core, AttentionSpec) else few
            written = self.branch(reads, written, branch, part, asked)
        return written

    def branch(
        self, reads: Stream, written: Stream, branch: BranchSpec, part: State, asked: int
    ) -> Stream:
        """written + what the branch makes of `reads`, for the first `asked` tokens."""
        inner, core, embed = under(part, "core"), branch.core, self.architecture.embed
        scale = part.get("layer_scale")
        if isinstance(core, ConstantSpec):
            vector = inner["value"] if scale is None else inner["value"] * scale
            if branch.writes is not None:
                vector = widen(vector[None], branch.writes, embed)[0]
            return self.emitter.constant_added(written, vector)
        out = from_torch(
            inner["out.weight"] if isinstance(core, AttentionSpec) else inner["fc2.weight"],
            inner.get("out.bias", inner.get("fc2.bias")),
        )
        onto: Stream | None = None
        if branch.post_norm is None:
            onto = written
            if scale is not None:
                out = Matrix(out.weight * scale, None if out.bias is None else out.bias * scale)
            if branch.writes is not None:
                bias = None if out.bias is None else widen(out.bias[None], branch.writes, embed)[0]
                out = Matrix(widen(out.weight, branch.writes, embed), bias)
        x, entering = self.read(reads, branch, part)
        if isinstance(core, AttentionSpec):
            found = attention(self.emitter, x, entering, core, inner, out, asked, onto)
        else:
            found = ffn(self.emitter, x, entering, core, inner, out, asked, onto)
        if branch.post_norm is None:
            return found
        weight, bias = part.get("post_norm.weight"), part.get("post_norm.bias")
        if scale is not None:
            weight, bias = (
                (scale if weight is None else weight * scale),
                (None if bias is None else bias * scale),
            )
        return self.emitter.added(
            written, self.emitter.normed(found, branch.post_norm, affine=(weight, bias))
        )

    def read(self, stream: Stream, branch: BranchSpec, part: State) -> tuple[Stream, Entering]:
        """What the branch's first products read: the norm without its weights, which go into
        theirs.
        """
        if branch.norm is None:
            if branch.reads is None:
                return stream, Entering(None, None)
            selection = np.zeros((self.architecture.embed, len(branch.reads)), np.float32)
            selection[list(branch.reads), range(len(branch.reads))] = 1
            return stream, Entering(None, None, selection)
        x = self.emitter.normed(stream, branch.norm, columns=branch.reads, for_products=True)
        return x, Entering(part.get("norm.weight"), part.get("norm.bias"))

    def _last_attention(self) -> int | None:
        found = [
            number
            for number, step in enumerate(self.architecture.steps)
            if any(isinstance(branch.core, AttentionSpec) for branch in step)
        ]
        return found[-1] if found else None
