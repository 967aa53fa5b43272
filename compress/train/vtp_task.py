"""Control coefficients on the inputs of projections as a task of the training loop.

The objective is task_loss + sparsity * sum of the coefficients. Afterwards the units with the
largest coefficients that fit in the budget are kept.

References:
    Zhu, Tang, Han 2021, "Vision Transformer Pruning" (VTP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from ..masks.budget import dense_cost, require_feasible
from ..masks.coefficients import Coefficients, scaled_projections
from ..masks.mask import StructuredMask
from ..network.cost import live_cost, live_macs, live_params
from ..network.modules.model import CompactModel, build
from ..surgery.compactor import compact
from ..surgery.rounding import snap
from .dense import Distillation, task_loss
from .devices import Placement, tensors_to_cpu
from .mask_settings import MaskSettings
from .optimizers import add_vectors, make_optimizer
from .task import EpochEnd

# Weight of the coefficients in the loss.
SPARSITY = 1e-4


class VtpTask:
    """Learn which units of a network to keep, by control coefficients.

    Args:
        model: The dense network, changed in place.
        settings: A budget, and how weights and coefficients are trained (`score_lr`).
        sparsity: The weight of the sum of the coefficients in the loss.
        distillation: The teacher (default: none).

    Raises:
        InputError: No mask meets the budget, everything is fixed, or the masks are unshared.
    """

    phase = "masks"

    def __init__(
        self,
        model: CompactModel,
        settings: MaskSettings,
        sparsity: float = SPARSITY,
        *,
        distillation: Distillation | None = None,
    ) -> None:
        assert settings.budget is not None
        self.model, self.settings, self.sparsity = model, settings, sparsity
        self.distillation, self.budget = distillation, settings.budget
        self.dense = model.architecture
        self.coefficients = Coefficients(self.dense, settings.sharing, settings.fixed)
        require_feasible(self.dense, self.coefficients, self.budget)
        self.dense_cost = dense_cost(self.dense, self.budget.counted)
        self._placement = Placement()

    def place(self, placement: Placement) -> None:
        """Move the network, the coefficients and the teacher to a device; nothing is compiled."""
        self._placement = placement
        self.model.to(placement.device)
        self.coefficients.to(placement.device)
        if self.distillation is not None:
            self.distillation.teacher.to(placement.device)

    def trained(self) -> nn.Module:
        """The network and the coefficients."""
        return nn.ModuleList([self.model, self.coefficients])

    def observed(self) -> Sequence[nn.Parameter]:
        """None: all gradients are those of the optimizer."""
        return ()

    def optimizer(self) -> Optimizer:
        """A new optimizer over the weights and the coefficients."""
        settings = self.settings
        made = make_optimizer(settings.optimizer, self.model, settings.lr, settings.weight_decay)
        groups = self.coefficients.parameter_groups(settings.score_lr)
        return add_vectors(made, settings.optimizer, groups)

    def train_mode(self) -> None:
        """Set the network to training mode."""
        self.model.train()

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch with the penalty, and its logits (B, classes)."""
        changed = self._scaled(dict(self.model.named_parameters()))
        logits: Tensor = functional_call(self.model, changed, (images,))
        smoothing = self.settings.label_smoothing
        loss = task_loss(logits, targets, images, smoothing, self.distillation)
        return loss + self.sparsity * self.coefficients.total(), logits

    def after_step(self, step: int) -> None:
        """Return the coefficients to their range."""
        del step
        self.coefficients.project()

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        """Report the size of a cut at the present coefficients."""
        del val_top1
        kept, threshold = self._kept()
        live = self.coefficients.counter(kept)
        metrics = {
            "params": float(live_params(self.dense, live)),
            "macs": float(live_macs(self.dense, live)),
            "threshold": threshold,
        }
        # Sparsity grows with every epoch, so the last state is the best one.
        return EpochEnd(metrics=metrics, score=float(epoch))

    def model_for_eval(self) -> nn.Module:
        """The whole network with its coefficients."""
        return self.folded().to(self._placement.device)

    def state(self) -> dict[str, Any]:
        """Weights and coefficients."""
        return {
            "model": tensors_to_cpu(dict(self.model.state_dict())),
            "scores": tensors_to_cpu(list(self.coefficients.scores)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for scores, saved in zip(self.coefficients.scores, state["scores"], strict=True):
                scores.copy_(saved)

    def finish(self) -> None:
        """Nothing is left to do."""

    def folded(self) -> CompactModel:
        """The whole network with the coefficients in its projections, on the CPU, in eval mode."""
        with torch.no_grad():
            changed = self._scaled(dict(self.model.named_parameters()))
        state: Any = tensors_to_cpu({**self.model.state_dict(), **changed})
        return build(self.dense, state).eval()

    def mask(self) -> StructuredMask:
        """What the threshold keeps of the network, rounded within the budget."""
        kept, threshold = self._kept()
        gates, budget = self.coefficients, self.budget
        found = replace(
            gates.mask(kept),
            scale="original",
            note={"method": "vtp", "threshold": f"{threshold:.6g}"},
        )
        if self.settings.round_to == 1:
            return found
        saliency: dict[str, dict[str, Tensor]] = {}
        for group, scores in zip(gates.groups, gates.scores, strict=True):
            saliency.setdefault(group.dimension, {})[group.site] = scores.detach().cpu()

        def cost(mask: StructuredMask) -> int:
            return int(live_cost(self.dense, gates.counter(gates.units(mask)), budget.counted))

        return snap(
            found,
            self.dense,
            self.settings.round_to,
            saliency=saliency,
            cost=cost,
            budget=self._limit,
        )

    def result(self, last_queries: bool = True) -> CompactModel:
        """The cut model with the present weights and coefficients, on the CPU, in eval mode."""
        return compact(self.folded(), self.mask(), last_queries=last_queries).eval()

    def reference(self) -> tuple[CompactModel, StructuredMask]:
        """The whole network and its mask, which `result` must equal."""
        return self.folded(), self.mask()

    @property
    def _limit(self) -> int:
        return int(self.budget.ratio * self.dense_cost)

    def _kept(self) -> tuple[list[Tensor], float]:
        return self.coefficients.kept_within(self.dense, self.budget.counted, self._limit)

    def _scaled(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        self.coefficients.begin()
        return scaled_projections(self.dense, parameters, self.coefficients.value)
