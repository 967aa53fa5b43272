"""A network with buckets as one program: a common part, and a branch of calls for each bucket.

The common part ends with the choice of the image's bucket. Branches are planned for the same
memory, one after the other, and only that of the chosen bucket runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from ...compress.network.modules.select import Select
from ...compress.network.named_outputs import needs_all_tokens
from ...compress.network.select_specs import reads_positions_behind
from ...compress.tokens.bucket_rules import Divergence
from ...compress.tokens.buckets import BucketedModel
from .bucket_choice import ChooseBucket, ChooseNear, choose_bucket, choose_near
from .execution_plan import Branches
from .head import head
from .lanes import Lanes
from .matrices import Stream
from .network import NetworkWriter
from .precision import Precision
from .program import Value
from .schedule import Schedule
from .selection import keep_rows, patch_scores

if TYPE_CHECKING:
    from tvm import IRModule


def bucket_module(
    model: BucketedModel, lanes: Lanes, schedule: Schedule, precision: Precision
) -> tuple[IRModule, Branches]:
    """The network as a module with one function `main`, for one image.

    Args:
        model: A network that `coverage` accepts.
        lanes: The target's vectors.
        schedule: Tiles and threads.
        precision: The format of the rows that products read; without static ranges.

    Returns:
        `main`: images (1, C, H, W) -> (logits (1, classes) of each bucket, the place of the image's
        bucket (1,) int32); and which of its calls belong to which bucket.
    """
    writer = _BucketWriter(model, lanes, schedule, precision)
    module = writer.module()
    return module, Branches(model.buckets.counts, tuple(writer.ends))


class _BucketWriter(NetworkWriter):
    def __init__(
        self, model: BucketedModel, lanes: Lanes, schedule: Schedule, precision: Precision
    ) -> None:
        super().__init__(model.network, lanes, schedule, 1, precision, ())
        self.model = model
        # The last one keeps another number of patches in each bucket.
        *others, last = cast("Sequence[Select]", model.network.selects)
        self.selects, self.last = others, last
        # Number of calls after the common part, and after each branch.
        self.ends: list[int] = []

    def body(self) -> list[Value]:
        """The logits of each bucket, and the place of the image's."""
        architecture, at = self.architecture, self.last.spec.at
        counts = architecture.step_tokens(last_queries=not needs_all_tokens(architecture, ()))
        before = stream = self.stem()
        for number in range(at):
            stream = self.select(stream, before, number)
            parts = self.parts(number)
            before, stream = (
                stream,
                self.step(stream, architecture.steps[number], parts, counts[number]),
            )
        stream = self.select(stream, before, at)
        state, scored = self.selection(len(self.selects), before)
        scores = patch_scores(self.emitter, stream, self.last, state, scored)
        assert scores is not None, "buckets need scores of the image"
        place = self.choose(stream, scores)
        self.ends.append(len(self.program.keys))
        return [*(self.branch_logits(number, stream, scores) for number in self.places), place]

    @property
    def places(self) -> range:
        """The numbers of the buckets."""
        return range(len(self.model.buckets.counts))

    def choose(self, stream: Stream, scores: Stream) -> Value:
        """The place of the image's bucket."""
        buckets = self.model.buckets
        if buckets.divergence is not None:
            return self._nearest(stream, buckets.divergence)
        assert buckets.coverage is not None
        spec = ChooseBucket(
            patches=stream.rows - self.last.prefix,
            counts=buckets.counts,
            coverage=buckets.coverage,
            predicted=self.model.predicted,
            source=scores.layout,
        )
        return self.program.call(
            "choose_bucket",
            spec,
            lambda: choose_bucket(spec, self.emitter.lanes),
            [scores.value],
            (1,),
            "int32",
        )

    def _nearest(self, stream: Stream, divergence: Divergence) -> Value:
        prefix, embed = self.last.prefix, self.architecture.embed
        spec = ChooseNear(len(self.places), stream.width, first=bool(prefix))
        weights = divergence.centred_weights(embed).reshape(-1, embed)
        most = np.float32(divergence.threshold) - np.array(divergence.bias, np.float32)
        operands = [
            self.emitter.mean(stream, prefix).value,
            self.emitter.constant(np.pad(weights, ((0, 0), (0, stream.width - embed))).ravel()),
            self.emitter.constant(most),
        ]
        if spec.first:
            operands.append(self.emitter.contiguous(stream.first_rows(1)).value)
        return self.program.call(
            "choose_near",
            spec,
            lambda: choose_near(spec, self.emitter.lanes),
            operands,
            (1,),
            "int32",
        )

    def branch_logits(self, number: int, stream: Stream, scores: Stream) -> Value:
        """The logits of one bucket, from the stream before the last selection."""
        architecture = self.model.architectures[number]
        counts = architecture.step_tokens(last_queries=not needs_all_tokens(architecture, ()))
        with self.program.branch(), self.emitter.branch():
            count = self.model.buckets.counts[number]
            positioned = reads_positions_behind(architecture, self.last.spec.at)
            stream, _ = keep_rows(
                self.emitter, stream, self.last, scores, count, positioned=positioned
            )
            for step in range(self.last.spec.at, len(architecture.steps)):
                parts = self.parts(step)
                stream = self.step(stream, architecture.steps[step], parts, counts[step])
            logits = head(self.emitter, architecture, self.state, stream)["logits"]
        self.ends.append(len(self.program.keys))
        return logits
