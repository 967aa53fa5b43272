"""Cut a network to milliseconds of a device from unlabeled images: tokens first, then widths.

One pass over the images gives what widths, tokens and a narrower stream lose, and the solver
chooses all of them at once. Tokens then leave, a second pass over the network without them gives
what widths lose there, and the solver chooses these again. What is lost with tokens is a prediction
that is worst where it matters, for most of the tokens: choices of fewer and of none are cut as
well, and the one whose outputs are nearest to the dense network's is kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ...targets.cost_table import CostTable
from ..masks.mask import StructuredMask
from ..network.modules.model import CompactModel
from ..oneshot.budgets import Budget
from ..oneshot.choice import Choice, stream_basis, true_errors
from ..oneshot.prediction import DEFAULTS, Prediction, Stage, TrimOptions, predict
from ..oneshot.sensitivity import features
from ..oneshot.stream_rotation import turned_stream
from ..oneshot.trim import Trimmed, carry_out, distance
from ..surgery.compactor import compact
from ..tokens.choose import TokenChoice, as_choice, whole_scores
from ..tokens.counts import settled
from ..tokens.impact import top_down
from ..tokens.leaving_errors import ERROR_IMAGES, leaving_errors
from ..tokens.streaming import working_copy
from .losses import Losses, predicted_losses
from .search import solve_architecture
from .shapes import latency_cost, network_shape
from .solution import Limits, Solution, SolveOptions

# Images on which a candidate is compensated, and on which it is compared with the dense network.
CANDIDATE_IMAGES = 64
# Deviation of the logarithm of the losses of a candidate.
JITTER = 0.35
# What is lost with tokens, times these; the last: no token leaves.
TOKEN_FACTORS = (1.0, 4.0, math.inf)


@dataclass(frozen=True)
class LatencyOptions:
    """How a network is cut to a latency.

    Attributes:
        tokens: Whether patches may leave the network, at the stem or on the way, where it allows
            that.
        candidates: Number of solutions with varied losses that are cut and compared with the dense
            network on held-out images; the best one is kept. 0: the solution of least predicted
            loss.
        seed: Of the variations.
        file_mb: Largest size of the weights in a file, in megabytes. None: no limit.
        peak_memory_mb: Largest memory of weights and activations, in megabytes. None: no limit.
    """

    tokens: bool = True
    candidates: int = 0
    seed: int = 0
    file_mb: float | None = None
    peak_memory_mb: float | None = None

    def __post_init__(self) -> None:
        if self.candidates < 0:
            raise InputError(f"candidates = {self.candidates}: give 0 or more")


@dataclass(frozen=True)
class LatencyCut:
    """A network that was cut to a latency.

    Attributes:
        trimmed: The cut of the widths, of the network without the dropped tokens.
        tokens: The tokens that stay; None if all do.
        latency_ms: The latency by the table.
        budget_ms: The largest latency.
    """

    trimmed: Trimmed
    tokens: TokenChoice | None
    latency_ms: float
    budget_ms: float

    @property
    def model(self) -> CompactModel:
        """The compact network."""
        return self.trimmed.model

    @property
    def mask(self) -> StructuredMask:
        """The dropped tokens and the cut widths as one mask."""
        widths = self.trimmed.mask
        if self.tokens is None:
            return widths
        return replace(
            widths,
            kept={**widths.kept, **self.tokens.mask.kept},
            note={**self.tokens.mask.note, **widths.note},
        )


class LatencyCuts:
    """Cuts of one network to any latency, from one set of unlabeled images.

    Args:
        model: A supported Vision Transformer; it is not modified.
        images: Unlabeled images, as for `vitrim.trim`.
        table: The cost table of the target, runtime and precision.
        options: How widths are chosen; its `cost` is not used.
        latency: How the network is cut.
        resume: As for `vitrim.trim`; the first pass over the images is saved.
        progress: As for `vitrim.trim`, with the stages "score" and "errors" of tokens, too.

    Raises:
        InputError: The images do not fit, or `resume` is the folder of another cut.
        UnsupportedModel: A module has no rule; the message names its path.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        table: CostTable,
        *,
        options: TrimOptions = DEFAULTS,
        latency: LatencyOptions | None = None,
        resume: Path | str | None = None,
        progress: Stage | None = None,
    ) -> None:
        self.table, self.options = table, options
        self.latency = latency or LatencyOptions()
        self.report: Stage = progress or (lambda stage, done, total: None)
        self.prediction = predict(
            model, images, options=options, resume=resume, progress=self.report
        )
        self.source = self.prediction.source
        self.images = self.prediction.fitting
        self._tokens: Mapping[int, Sequence[float]] | None = None

    def cut(self, latency_ms: float) -> LatencyCut:
        """Choose tokens and widths for a latency, cut them, and refit the output projections.

        Args:
            latency_ms: The largest latency by the table, in milliseconds.

        Returns:
            The cut; `LatencyCut.model` is the compact network.

        Raises:
            InputError: The budget cannot be met; the message has the smallest latency that can.
        """
        choices = self._token_choices(latency_ms)
        found: list[LatencyCut] = []
        for number, choice in enumerate(choices):
            try:
                found.append(self._cut_with(choice, latency_ms))
            except InputError:
                if not found and choice is choices[-1]:
                    raise
            self.report("compare", number + 1, len(choices))
        if len(found) == 1:
            return found[0]
        return min(found, key=lambda cut: self._distance(cut.model))

    def _token_choices(self, latency_ms: float) -> list[TokenChoice | None]:
        """The tokens that may stay: of the least predicted loss, and of larger losses of tokens."""
        losses = predicted_losses(self.prediction, self.token_losses())
        found: dict[tuple[int, ...], TokenChoice | None] = {}
        for factor in TOKEN_FACTORS:
            finite = math.isfinite(factor)
            given = losses.scaled({}, tokens=factor) if finite else replace(losses, tokens={})
            try:
                solved = self._solve(self.prediction, given, latency_ms)
            except InputError:
                if not found:
                    raise
                # Widths alone do not meet it.
                continue
            drops = self._drops(solved)
            counts = (solved.stem_tokens, *solved.counts) if drops else ()
            if counts not in found:
                found[counts] = self._chosen_tokens(counts) if drops else None
            if not drops:
                break
        return list(found.values())

    def _cut_with(self, choice: TokenChoice | None, latency_ms: float) -> LatencyCut:
        """Cut the widths of the network with these tokens; None: with all."""
        prediction = self.prediction
        if choice is not None:
            prediction = self._without_tokens(compact(self.source, choice.mask).eval())
        trimmed = self._trimmed(prediction, latency_ms)
        found = self.table.latency_ms(network_shape(trimmed.model.architecture))
        return LatencyCut(trimmed, choice, found, latency_ms)

    def _distance(self, model: CompactModel) -> float:
        """How far the outputs are from the dense network's on held-out images, as a share."""
        wanted = self._dense_outputs
        with torch.no_grad():
            found = model(self.prediction.checking).double()
        spread = (wanted - wanted.mean(dim=0)).square().sum().clamp(min=1e-12)
        return float((found - wanted).square().sum() / spread)

    @cached_property
    def _dense_outputs(self) -> Tensor:
        """Those of the held-out images, (images, classes), in double precision."""
        with torch.no_grad():
            found: Tensor = self.source(self.prediction.checking)
        return found.double()

    def token_losses(self) -> Mapping[int, Sequence[float]]:
        """What is lost with tokens by step and number, as a share of the features' variance.

        `STEM` has what is lost with patches that never enter.
        """
        if self._tokens is None:
            self._tokens = self._measured_tokens() if self._tokens_may_leave() else {}
        return self._tokens

    def _tokens_may_leave(self) -> bool:
        architecture = self.source.architecture
        return (
            self.latency.tokens
            and architecture.pool.kind != "none"
            and not architecture.selects
            and not architecture.inner
            and bool(architecture.attention_steps())
        )

    def _measured_tokens(self) -> Mapping[int, Sequence[float]]:
        network = working_copy(self.source)
        scores = whole_scores(network, "patch-slimming", self.images, self.report, stem=True)
        errors = leaving_errors(network, scores, self.images, self.report)
        # Errors are relative to the squared features, and those of widths to their variance.
        with torch.no_grad():
            found = features(network, network.features(self.images[:ERROR_IMAGES])).double()
        variance = found.var(dim=0, correction=0).sum().clamp(min=1e-12)
        factor = float(found.square().mean(dim=0).sum() / variance)
        return {step: [factor * error for error in row] for step, row in errors.items()}

    def _drops(self, solution: Solution) -> bool:
        """Whether patches leave at the stem, or before the last attention that is kept."""
        architecture = self.source.architecture
        if solution.stem_tokens < architecture.tokens:
            return True
        whole = architecture.step_tokens(last_queries=False)
        read = architecture.pooled_prefix
        return any(
            count < size and count != read
            for count, size in zip(solution.counts, whole, strict=True)
        )

    def _chosen_tokens(self, counts: Sequence[int]) -> TokenChoice:
        """The tokens that stay, by Patch Slimming, for the numbers at the stem and each step."""
        network, method = working_copy(self.source), "patch-slimming"
        architecture = network.architecture
        sets, scores = top_down(network, self.images, settled(architecture, counts), self.report)
        return as_choice(architecture, sets, scores, method, len(self.images), {})

    def _without_tokens(self, cut: CompactModel) -> Prediction:
        images = torch.cat([self.prediction.checking, self.prediction.fitting])
        return predict(cut, images, options=self.options, progress=self.report)

    def _solve(self, prediction: Prediction, losses: Losses, latency_ms: float) -> Solution:
        limits = Limits(latency_ms, self.latency.file_mb, self.latency.peak_memory_mb)
        options = SolveOptions(precision=self.options.precision)
        return solve_architecture(
            prediction.rotated.architecture, losses, limits, self.table, options
        )

    def _trimmed(self, prediction: Prediction, latency_ms: float) -> Trimmed:
        """The best cut of the widths by its distance to the dense network on held-out images."""
        losses = predicted_losses(prediction)
        solutions = [self._solve(prediction, losses, latency_ms)]
        if solutions[0].embed < prediction.rotated.architecture.embed:
            # The prediction of a narrower stream is rough, so it has to win when it is measured.
            whole = replace(losses, embed={})
            with contextlib.suppress(InputError):
                solutions.append(self._solve(prediction, whole, latency_ms))
        solutions += self._varied(prediction, losses, latency_ms)
        few = replace(prediction, fitting=prediction.fitting[:CANDIDATE_IMAGES])
        if len(solutions) > 1:
            distances = []
            for number, solution in enumerate(solutions):
                found = self._carried_out(few, solution, latency_ms, quiet=True)
                distances.append(distance(found.check))
                self.report("compare", number + 1, len(solutions))
            solutions = [solutions[int(np.argmin(distances))]]
        return self._carried_out(prediction, solutions[0], latency_ms, quiet=False)

    def _varied(self, prediction: Prediction, losses: Losses, latency_ms: float) -> list[Solution]:
        """Solutions for losses that are varied at random, each another choice of widths."""
        rng = np.random.default_rng(self.latency.seed)
        found: dict[str, Solution] = {}
        for _ in range(self.latency.candidates):
            factors = np.exp(JITTER * rng.standard_normal(len(losses.sublayers) + 1)).tolist()
            varied = losses.scaled(
                dict(zip(losses.sublayers, factors, strict=False)), embed=factors[-1]
            )
            solution = self._solve(prediction, varied, latency_ms)
            found[repr((solution.widths, solution.embed))] = solution
        return list(found.values())

    def _carried_out(
        self, prediction: Prediction, solution: Solution, latency_ms: float, *, quiet: bool
    ) -> Trimmed:
        budget = Budget("cost", latency_ms, latency_cost(self.table), self.options.precision)
        embed = solution.embed
        narrow = embed < prediction.rotated.architecture.embed
        turned = None
        if narrow:
            turned = turned_stream(prediction.rotated, stream_basis(prediction))
        choice = Choice(
            solution.options,
            true_errors(prediction.curves, solution.options),
            embed if narrow else None,
            solution.stream_loss,
            turned,
        )
        report: Stage = (lambda stage, done, total: None) if quiet else self.report
        return carry_out(prediction, choice, budget, report)
