"""How a network that chooses patches for each image is trained: its decisions, and its loss.

An objective belongs to one phase. It is attached to the network in training and detached for
validation, which runs the network as it is shipped: the best patches are gathered, the others are
gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import InputError
from ..network.architecture import Architecture, SelectSpec
from ..network.modules.model import CompactModel, with_all_queries
from ..network.modules.select import Select
from ..network.select_specs import select_inputs
from ..tokens.impact import image_impacts
from ..tokens.select import SelectMethod, stage_of
from .dense import Distillation, task_loss
from .policies import BestPolicy, SampledPolicy, TrainingPolicy
from .selection_losses import (
    SharedChannels,
    agreement_loss,
    impact_loss,
    ratio_loss,
    shared_channels,
    token_loss,
)

# DynamicViT: the rate of the other weights relative to that of the predictors, and the share of the
# steps before they are trained.
BACKBONE_RATE, FROZEN_SHARE = 0.01, 1.0 / 6.0
# EViT: the shares of the steps between which the keep rate falls (epochs 10 to 100 of 300).
WARMUP = (1.0 / 30.0, 1.0 / 3.0)
# Methods whose predictors need training.
PREDICTING: tuple[SelectMethod, ...] = ("dynamicvit", "dps")


@dataclass(frozen=True)
class SelectionSettings:
    """How selections are trained.

    Attributes:
        method: The method that added them.
        lr: The peak learning rate of predictors, which AdamW trains.
        alone: Whether the phase trains the selections of a network that is trained already. Then
            the other weights have 0.01 of `lr` and rest for the first sixth of the steps, and
            prefix tokens and positions are not trained ("dynamicvit"), or they all rest ("dps");
            and the keep rate falls slowly ("evit", "class-attention"), which have no predictors
            and no use of `lr`.
        ratio_weight: Of the loss on kept shares ("dynamicvit"): 2 for DeiT-S, 5 for DeiT-B.
        distill_weight: Of KL(teacher || student) ("dynamicvit").
        token_weight: Of the loss on the tokens behind the last norm ("dynamicvit").

    Raises:
        InputError: A number is out of range.

    References:
        Rao et al. 2021, "DynamicViT"; Liang et al. 2022, "Not All Patches Are What You Need"
        (EViT); Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers" (DPS).
    """

    method: SelectMethod
    lr: float = 1e-3
    alone: bool = False
    ratio_weight: float = 2.0
    distill_weight: float = 0.5
    token_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"selections: lr = {self.lr} must be above 0")
        for name in ("ratio_weight", "distill_weight", "token_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"selections: {name} = {getattr(self, name)} must not be negative")

    def backbone_lr(self, lr: float) -> float:
        """The peak learning rate of the other weights in a phase whose own one is `lr`."""
        return BACKBONE_RATE * self.lr if self.alone and self.method == "dynamicvit" else lr

    def frozen_steps(self, total_steps: int) -> int:
        """The number of steps before the other weights are trained."""
        frozen = self.alone and self.method == "dynamicvit"
        return round(FROZEN_SHARE * total_steps) if frozen else 0

    def rests(self, name: str) -> bool:
        """Whether a parameter is not trained in this phase."""
        if not self.alone or name.startswith("selects."):
            return False
        return self.method == "dps" or (
            self.method == "dynamicvit" and name in ("prefix", "position")
        )


class Objective:
    """Decisions as in inference, and the loss of ordinary training: for scores by attention.

    In a phase `alone` the number of kept patches falls from all to the target by a cosine.

    Args:
        settings: The method, and how it is trained.
        total_steps: The number of optimizer steps of the phase.
        label_smoothing: For class numbers as targets.
        teacher: The dense network.
        distillation: How its outputs are learned. None: they are not.
    """

    def __init__(
        self,
        settings: SelectionSettings,
        total_steps: int,
        label_smoothing: float,
        teacher: CompactModel,
        distillation: Distillation | None,
    ) -> None:
        self.settings, self.total_steps = settings, max(1, total_steps)
        self.label_smoothing, self.distillation = label_smoothing, distillation
        self.teacher = teacher
        self._network: CompactModel | None = None
        self._final: Architecture | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Set what a subclass has besides."""

    def place(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        if self.distillation is not None:
            self.distillation.teacher.to(device)

    def attach(self, network: CompactModel) -> None:
        """Train this network from here on; its architecture stays that of training until then."""
        self.detach()
        self._network, self._final = network, network.architecture
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not self.settings.rests(name))
        self._attached(network)

    def detach(self) -> None:
        """Give the network its policy, architecture and counts of inference again."""
        if self._network is not None and self._final is not None:
            network, architecture = self._network, self._final
            network.policy = network.observer = None
            _set_selects(network, architecture.selects)
            network.architecture = architecture
        self._network = None

    def release(self, network: nn.Module) -> None:
        """End the phase: every parameter of the network can be trained again."""
        self.detach()
        network.requires_grad_(True)

    def begin(self, step: int) -> None:
        """Prepare for a forward pass in a step, counted from 0 over the phase."""
        if self.settings.alone and self._network is not None and self._final is not None:
            selects = warm_selects(self._final, keep_rate(step, self.total_steps))
            _set_selects(self._network, selects)

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss of the forward pass since `begin`.

        Args:
            logits: (B, classes).
            targets: Class numbers (B,), or soft targets (B, classes).
            images: (B, C, H, W), the inputs of the teacher.

        Returns:
            A scalar.
        """
        return task_loss(logits, targets, images, self.label_smoothing, self.distillation)

    def metrics(self) -> dict[str, float]:
        """Figures of the last forward pass for the history."""
        return {}

    def _attached(self, network: CompactModel) -> None:
        """Set the policy of a network."""

    def _own_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)


class PolicyObjective(Objective):
    """Decisions by a policy, and a loss that compares with the teacher."""

    policy: TrainingPolicy

    def place(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        super().place(device)
        self.teacher.to(device)

    def begin(self, step: int) -> None:
        """Forget the decisions of the forward pass before."""
        del step
        self.policy.begin()

    def _attached(self, network: CompactModel) -> None:
        network.policy = self.policy


class SampledObjective(PolicyObjective):
    """Sampled decisions and the four losses of DynamicViT.

    CE + ratio_weight * ratio + distill_weight * KL(teacher || student) + token_weight * tokens;
    without a distillation, the first two. The target of a selection is the share that it keeps in
    inference, of the patches that have not left by place before it.

    References:
        Rao et al. 2021, "DynamicViT", eq. 11 to 15.
    """

    policy: SampledPolicy

    def _prepare(self) -> None:
        self.policy = SampledPolicy()
        # The last attention computes every patch: the token loss compares them.
        self.teacher = with_all_queries(self.teacher)
        self._channels: SharedChannels | None = None
        self._tokens: tuple[Tensor, Tensor | None] | None = None

    def begin(self, step: int) -> None:
        """Forget the decisions of the forward pass before."""
        super().begin(step)
        self._tokens = None

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss of the forward pass since `begin`, as `Objective.loss`."""
        settings = self.settings
        total = self._own_loss(logits, targets)
        total = total + settings.ratio_weight * ratio_loss(self.policy.shares, self.policy.targets)
        if self.distillation is None:
            return total
        with torch.no_grad():
            stream = self.teacher.eval().features(images)
            taught, tokens = self.teacher.classify(stream), self.teacher.normed(stream)
        total = total + settings.distill_weight * agreement_loss(logits, taught)
        if self._channels is None or self._tokens is None:
            return total
        prefix, (own, keep) = self.teacher.architecture.prefix, self._tokens
        assert keep is not None, "the network has a selection"
        found, wanted = own[:, prefix:], self._channels.of(tokens[:, prefix:])
        return total + settings.token_weight * token_loss(found, wanted, keep[:, prefix:])

    def metrics(self) -> dict[str, float]:
        """The mean kept share of each selection, in percent."""
        return {
            f"kept_percent_{number}": 100.0 * float(share.detach().mean())
            for number, share in enumerate(self.policy.shares)
        }

    def _attached(self, network: CompactModel) -> None:
        super()._attached(network)
        architecture = network.architecture
        self._channels = shared_channels(architecture, self.teacher.architecture)
        network.architecture = architecture.model_copy(update={"last_queries": False})
        network.observer = self._observe

    def _observe(self, tokens: Tensor, keep: Tensor | None) -> None:
        self._tokens = (tokens, keep)


class ImpactObjective(PolicyObjective):
    """Decisions by the best scores, which learn the impact of each patch: the loss of DPS.

    The impact is that on the outputs of the teacher, without any dropped patch, after the block
    before the selection. In a phase `alone` only predictors are trained.

    References:
        Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers", eq. 6, section 3.4.
    """

    policy: BestPolicy

    def _prepare(self) -> None:
        self.policy = BestPolicy()
        self._steps: list[int] = []

    def loss(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss of the forward pass since `begin`, as `Objective.loss`."""
        impacts = image_impacts(self.teacher.eval(), images, self._steps)
        prefix = self.teacher.architecture.prefix
        policy = self.policy
        each = [
            impact_loss(scores, impacts[step][:, prefix:], present)
            for scores, present, step in zip(
                policy.scores, policy.present, self._steps, strict=True
            )
        ]
        regression = torch.stack(each).mean()
        if self.settings.alone:
            return regression
        return super().loss(logits, targets, images) + regression

    def _attached(self, network: CompactModel) -> None:
        super()._attached(network)
        self._steps = [
            impact_step(self.teacher.architecture, stage_of(each))
            for each in network.architecture.selects
        ]


def make_objective(
    settings: SelectionSettings,
    total_steps: int,
    teacher: CompactModel,
    *,
    label_smoothing: float = 0.1,
    distillation: Distillation | None = None,
) -> Objective:
    """The objective of a method.

    Args:
        settings: The method, and how it is trained.
        total_steps: The number of optimizer steps of the phase.
        teacher: The dense network that the selections were added to.
        label_smoothing: For class numbers as targets.
        distillation: How outputs of the teacher are learned (default: they are not).

    Returns:
        The objective, to be attached to the network.

    Raises:
        InputError: The impact of patches cannot be computed, since they leave the teacher by place.
    """
    classes: dict[str, type[Objective]] = {"dynamicvit": SampledObjective, "dps": ImpactObjective}
    found = classes.get(settings.method, Objective)
    if found is ImpactObjective and teacher.architecture.drops_tokens:
        raise InputError("dps: the dense network drops tokens by place; use one that does not")
    return found(settings, total_steps, label_smoothing, teacher, distillation)


def impact_step(teacher: Architecture, stage: int) -> int:
    """The last step with attention before a block; -1, the stem, if there is none."""
    start = teacher.block_ends[stage - 1] if stage else 0
    return max((step for step in teacher.attention_steps() if step < start), default=-1)


def keep_rate(step: int, total_steps: int, warmup: tuple[float, float] = WARMUP) -> float:
    """What is left of the way from all patches to the target: 1 at first, then a cosine, then 0.

    Args:
        step: Counted from 0.
        total_steps: The number of steps of the phase.
        warmup: The shares of the steps between which it falls.

    Returns:
        Between 0 and 1.

    References:
        Liang et al. 2022, "Not All Patches Are What You Need" (training strategies).
    """
    start, end = (share * total_steps for share in warmup)
    done = min(1.0, max(0.0, (step - start) / max(end - start, 1.0)))
    return 0.5 * (1.0 + math.cos(math.pi * done)) if done < 1.0 else 0.0


def warm_selects(architecture: Architecture, remaining: float) -> tuple[SelectSpec, ...]:
    """The selections of a network, keeping more patches: target + (1 - target) * remaining.

    Args:
        architecture: The network; its counts are the targets.
        remaining: 1: they keep all patches, 0: as many as in inference.

    Returns:
        One for each selection; one that keeps all fuses nothing.
    """
    counts = (architecture.tokens, *architecture.step_tokens(last_queries=False))
    found: list[SelectSpec] = []
    present = 0
    for spec, _, tokens in select_inputs(architecture, counts):
        there = tokens - architecture.prefix
        # Behind a selection that keeps more patches than in inference there are more.
        present = present or there
        share = spec.patches / there
        kept = math.ceil((share + (1.0 - share) * remaining) * present - 1e-9)
        fused = spec.fused and kept + 1 < present
        kept = kept if fused or not spec.fused else present
        found.append(spec.model_copy(update={"patches": min(kept, present), "fused": fused}))
        present = found[-1].left
    return tuple(found)


def _set_selects(network: CompactModel, selects: tuple[SelectSpec, ...]) -> None:
    network.architecture = network.architecture.model_copy(update={"selects": selects})
    for module, spec in zip(network.selects, selects, strict=True):
        cast("Select", module).spec = spec
