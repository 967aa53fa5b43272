"""A compact network as a program of our kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from ...compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
)
from ...compress.network.modules.model import CompactModel
from ...compress.network.modules.select import Select
from ...compress.network.named_outputs import OutputSpec, needs_all_tokens, steps_needed
from ...compress.network.select_specs import (
    ATTENTION_SCORERS,
    reads_positions_behind,
    scoring_attention,
    scoring_branches,
)
from ...compress.network.token_order import patch_positions, patches_before, stem_runs
from .attention import Attend
from .dense import Dense
from .emitter import Emitter, Epilogue
from .head import head
from .lanes import Lanes
from .matrices import (
    Affine,
    Matrix,
    State,
    Stream,
    SublayerOutput,
    affine,
    linear,
    scatter_columns,
    sub_state,
)
from .outputs import write_output
from .packing import Array
from .patches import Patches, corners, cut_patches
from .precision import Float, Precision, RangeObserver
from .program import Program, Value
from .schedule import Schedule
from .selection import ScoringAttention, keep_rows, patch_scores
from .stem_layers import StemLayers
from .sublayers import Columns, attention, ffn, read_stream

if TYPE_CHECKING:
    from tvm import IRModule


def network_module(
    compact: CompactModel,
    lanes: Lanes,
    schedule: Schedule,
    batch: int,
    precision: Precision | None = None,
    outputs: Sequence[OutputSpec] = (),
) -> IRModule:
    """The network as a module with one function `main`.

    Args:
        compact: A network that `coverage` accepts.
        lanes: The target's vectors.
        schedule: Tiles and threads.
        batch: Batch size.
        precision: The format of the rows that products read, by default fp32.
        outputs: The named outputs; empty for the logits alone.

    Returns:
        `main`: images (batch, C, H, W) -> logits (batch, classes), or a tuple of the outputs.
    """
    settings = precision or Float()
    return NetworkWriter(compact, lanes, schedule, batch, settings, outputs).module()


def observed_module(
    compact: CompactModel,
    lanes: Lanes,
    schedule: Schedule,
    outputs: Sequence[OutputSpec] = (),
) -> tuple[IRModule, list[Stream]]:
    """The network for one image in fp32, and the rows that its products read.

    `main` returns the outputs and then those rows, each flat.

    Args:
        compact: A network that `coverage` accepts.
        lanes: The target's vectors.
        schedule: Tiles and threads.
        outputs: The named outputs; empty for the logits alone.
    """
    observer = RangeObserver()
    writer = NetworkWriter(compact, lanes, schedule, 1, observer, outputs)
    return writer.module(lambda: [rows.value for rows in observer.rows]), observer.rows


def choosing_module(
    compact: CompactModel,
    lanes: Lanes,
    schedule: Schedule,
    batch: int,
    precision: Precision | None = None,
) -> IRModule:
    """The network as `network_module` writes it, which also returns the choices of its selections.

    Args:
        compact: A network that `coverage` accepts.
        lanes: The target's vectors.
        schedule: Tiles and threads.
        batch: Batch size.
        precision: The format of the rows that products read, by default fp32.

    Returns:
        `main`: images (batch, C, H, W) -> (logits, places (batch * kept) int32 of each selection),
        a tuple. Places are increasing numbers of patches that the stream carries there.
    """
    writer = NetworkWriter(compact, lanes, schedule, batch, precision or Float(), ())
    return writer.module(lambda: writer.chosen)


def kernel_specs(
    compact: CompactModel,
    lanes: Lanes,
    schedule: Schedule,
    batch: int,
    precision: Precision | None = None,
    outputs: Sequence[OutputSpec] = (),
) -> list[Dense | Attend]:
    """The products of the network's program, in order, one entry a call.

    Args:
        compact: A network that `coverage` accepts.
        lanes: The target's vectors.
        schedule: Tiles and threads.
        batch: Batch size.
        precision: The format of the rows that products read, by default fp32.
        outputs: The named outputs; empty for the logits alone.
    """
    writer = NetworkWriter(compact, lanes, schedule, batch, precision or Float(), outputs)
    writer.module()
    return [key for key in writer.program.keys if isinstance(key, Dense | Attend)]


class NetworkWriter:
    """Writes a network, one step after the other; `body` returns its results.

    Args:
        compact: A network that `coverage` accepts.
        lanes: The target's vectors.
        schedule: Tiles and threads.
        batch: Batch size.
        precision: The format of the rows that products read.
        outputs: The named outputs; empty for the logits alone.
    """

    def __init__(
        self,
        compact: CompactModel,
        lanes: Lanes,
        schedule: Schedule,
        batch: int,
        precision: Precision,
        outputs: Sequence[OutputSpec],
    ) -> None:
        self.outputs = outputs
        self.architecture: Architecture = compact.architecture
        self.selects = cast("Sequence[Select]", compact.selects)
        # The choices of the selections, in order, and what the attentions keep for them.
        self.chosen: list[Value] = []
        self.columns: dict[str, Columns] = {}
        self.state: State = {
            name: tensor.detach().cpu().float().numpy()
            for name, tensor in compact.state_dict().items()
        }
        self.program = Program((batch, *self.architecture.image))
        self.emitter = Emitter(self.program, lanes, schedule, batch, precision)

    def module(self, extra: Callable[[], list[Value]] | None = None) -> IRModule:
        """The module with `main`; `extra` returns further results."""
        return self.program.build(self.body, extra)

    def body(self) -> list[Value]:
        """The logits, or the named outputs in their order."""
        stream = self.stem()
        found = self.block_outputs(stream, 0)
        architecture = self.architecture
        shorter = not needs_all_tokens(architecture, self.outputs)
        counts = architecture.step_tokens(last_queries=shorter)
        last = steps_needed(architecture, self.outputs)
        before = stream
        for number, step in enumerate(architecture.steps[:last]):
            stream = self.select(stream, before, number)
            before, stream = stream, self.step(stream, step, self.parts(number), counts[number])
            found |= self.block_outputs(stream, number + 1)
        if not self.outputs or len(found) < len(self.outputs):
            stream = self.select(stream, before, last)
            found |= head(self.emitter, self.architecture, self.state, stream, self.outputs)
        if not self.outputs:
            return [found["logits"]]
        return [found[output.name] for output in self.outputs]

    def parts(self, number: int) -> list[State]:
        """The parameters of a step's branches."""
        branches = range(len(self.architecture.steps[number]))
        return [sub_state(self.state, f"steps.{number}.{position}") for position in branches]

    def select(self, stream: Stream, before: Stream, count: int) -> Stream:
        """The stream after the selections that follow `count` steps.

        Args:
            stream: The stream after these steps.
            before: The stream before the last of them.
            count: Number of steps.
        """
        for number, select in enumerate(self.selects):
            if select.spec.at == count:
                state, scored = self.selection(number, before)
                scores = patch_scores(self.emitter, stream, select, state, scored)
                kept = select.spec.patches
                positioned = reads_positions_behind(self.architecture, count)
                stream, chosen = keep_rows(
                    self.emitter, stream, select, scores, kept, positioned=positioned
                )
                self.chosen.append(chosen)
        return stream

    def selection(self, number: int, before: Stream) -> tuple[State, ScoringAttention | None]:
        """The parameters of a selection, and the attention that scores its patches, if any.

        Args:
            number: The selection's number.
            before: The stream before the step that it follows.
        """
        spec, scored = self.architecture.selects[number], None
        if spec.scorer in ATTENTION_SCORERS:
            branch = scoring_attention(self.architecture, spec)
            place = self.architecture.steps[spec.at - 1].index(branch)
            part, columns = self.parts(spec.at - 1)[place], self.columns.get(branch.name)
            scored = ScoringAttention(branch, part, before, columns)
        return sub_state(self.state, f"selects.{number}"), scored

    def block_outputs(self, stream: Stream, count: int) -> dict[str, Value]:
        """The outputs that are read from the stream after `count` steps."""
        return {
            output.name: write_output(self.emitter, stream, output)
            for output in self.outputs
            if output.after == count
        }

    def stem(self) -> Stream:
        """Patches times the convolution's weights, plus a table of prefix tokens and positions."""
        architecture, state, emitter = self.architecture, self.state, self.emitter
        weight = state["stem.weight"]
        if architecture.stem.before:
            # Rows of layers before the patches have a pixel's channels side by side.
            weight = weight.transpose(0, 2, 3, 1)
        matrix = Matrix(weight.reshape(len(weight), -1).T, state.get("stem.bias"))
        patch_norm, writes = architecture.patch_norm, architecture.stem_writes
        table = self.token_table(None if patch_norm is not None else matrix.bias)
        if writes is not None:
            matrix = Matrix(scatter_columns(matrix.weight, writes, architecture.embed), matrix.bias)
            table = scatter_columns(table, writes, architecture.embed)
        table = np.pad(table, ((0, 0), (0, emitter.lanes.up(table.shape[1]) - table.shape[1])))
        # Pixels stay in fp32: eight bits cost most accuracy here, and this is one product of many.
        if patch_norm is not None:
            pixels = self.patches(0, ())
            patches = emitter.dense(pixels, architecture.patches, matrix, force_fp32=True)
            normed = emitter.norm(patches, patch_norm, affine=affine(state, "patch_norm"))
            stream = emitter.add_table(normed, table, stem_runs(architecture))
        else:
            constant = emitter.constant(table.ravel())
            shared = Stream(constant, 0, table.shape[1], architecture.embed)
            stream = emitter.dense(
                self.patches(architecture.prefix, patches_before(architecture)),
                architecture.tokens,
                Matrix(matrix.weight, None),
                Epilogue(residual=shared),
                force_fp32=True,
            )
        if architecture.stem_norm is None:
            return stream
        return emitter.norm(stream, architecture.stem_norm, affine=affine(state, "stem_norm"))

    def token_table(self, bias: Array | None) -> Array:
        """(tokens, stem channels): learned tokens, and positions plus the stem's bias."""
        architecture, state = self.architecture, self.state
        table = np.zeros((architecture.tokens, len(state["stem.weight"])), np.float32)
        patches = patch_positions(architecture)
        if architecture.learned_tokens:
            learned = np.ones(len(table), bool)
            learned[patches] = False
            table[learned] = state["prefix"]
        if "position" in state:
            table[patches] += state["position"]
        if bias is not None:
            table[patches] += bias
        return table

    def patches(self, prefix: int, gaps: tuple[int, ...]) -> Stream:
        """The pixels of each patch as a row.

        Args:
            prefix: Rows of zeros before the patches.
            gaps: For each row of zeros between the patches the number of patches before it.
        """
        architecture, emitter = self.architecture, self.emitter
        spec = architecture.stem
        if spec.before:
            return StemLayers(emitter, architecture, self.state).patches(prefix, gaps)
        depth = int(np.prod(self.state["stem.weight"].shape[1:]))
        cut = Patches(
            images=emitter.batch,
            image=architecture.image,
            grid=architecture.grid,
            patch=spec.patch,
            stride=spec.stride or spec.patch,
            padding=spec.padding,
            prefix=prefix,
            width_out=depth,
            listed=None if architecture.order is None else len(architecture.order),
            gaps=gaps,
        )
        operands = [self.program.input]
        if architecture.order is not None:
            operands.append(emitter.constant(corners(cut, architecture.order)))
        value = self.program.call(
            "patches",
            cut,
            lambda: cut_patches(cut, emitter.lanes, emitter.schedule.threads),
            operands,
            (emitter.batch * cut.tokens * depth,),
        )
        return Stream(value, cut.tokens, depth, depth)

    def step(
        self, stream: Stream, step: tuple[BranchSpec, ...], parts: list[State], rows: int
    ) -> Stream:
        """A step: all branches read the stream before it.

        Args:
            stream: The stream before the step.
            step: The branches.
            parts: Their parameters.
            rows: Rows of each image that the stream has afterwards, the first ones; attention reads
                keys and values of all rows, and nothing else reads the others.
        """
        first = written = stream.first_rows(rows)
        for branch, part in zip(step, parts, strict=True):
            reads = stream if isinstance(branch.core, AttentionSpec) else first
            written = self.branch(reads, written, branch, part, rows)
        return replace(written, positions=stream.positions)

    def branch(
        self, reads: Stream, written: Stream, branch: BranchSpec, part: State, rows: int
    ) -> Stream:
        """The stream `written` plus the branch of `reads`, for the first rows.

        Args:
            reads: What the branch reads.
            written: What it is added to.
            branch: The branch.
            part: Its parameters.
            rows: Rows of each image of the result.
        """
        inner, core = sub_state(part, "core"), branch.core
        scale = part.get("layer_scale")
        if isinstance(core, ConstantSpec):
            return self.add_constant(written, branch, inner["value"], scale)
        matrix = linear(inner, "out" if isinstance(core, AttentionSpec) else "fc2")
        normed = branch.post_norm is not None
        if not normed:
            if scale is not None:
                matrix = matrix.scaled(scale)
            if branch.writes is not None:
                matrix = matrix.scatter_columns(branch.writes, self.architecture.embed)
        source = read_stream(self.emitter, reads, branch, part, only_products=True)
        output = SublayerOutput(matrix, rows, None if normed else written)
        if isinstance(core, AttentionSpec):
            keeps = rows == reads.rows and self.scores_columns(branch)
            found, columns = attention(
                self.emitter, source, core, inner, output, keep_columns=keeps
            )
            if columns is not None:
                self.columns[branch.name] = columns
        else:
            found = ffn(self.emitter, source, core, inner, output)
        if branch.post_norm is None:
            return found
        parameters = _scaled(affine(part, "post_norm"), scale)
        return self.emitter.add(
            written, self.emitter.norm(found, branch.post_norm, affine=parameters)
        )

    def scores_columns(self, branch: BranchSpec) -> bool:
        """Whether a selection reads the maps of an attention in the precision of its products."""
        scoring = scoring_branches(self.architecture, ("column-attention",))
        return self.emitter.computes_fp32 and branch.name in scoring

    def add_constant(
        self, written: Stream, branch: BranchSpec, vector: Array, scale: Array | None
    ) -> Stream:
        """A branch that adds the same vector to every row.

        Args:
            written: What it is added to.
            branch: The branch.
            vector: The vector.
            scale: LayerScale, if there is one.
        """
        if scale is not None:
            vector = vector * scale
        if branch.writes is not None:
            vector = scatter_columns(vector[None], branch.writes, self.architecture.embed)[0]
        return self.emitter.add_constant(written, vector)


def _scaled(parameters: Affine, scale: Array | None) -> Affine:
    """Weight and bias of a norm, times LayerScale."""
    if scale is None:
        return parameters
    weight, bias = parameters
    return (scale if weight is None else weight * scale), (None if bias is None else bias * scale)
