"""Mask learning as a task of the training loop: gates beside the weights, a budget or a lambda, and
a training graph that shrinks.

Source: METHODS A (structured movement pruning at training time). With a budget the price of size is
solved for at each update (compress/masks/budget.py); with a lambda the source's objective task_loss
+ lambda * cost is followed as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.errors import InputError
from ..masks.budget import Budget, DualSolver, dense_cost, ramp, require_feasible
from ..masks.gates import START, THRESHOLD, Gates
from ..masks.groups import SHARED, Sharing, sites
from ..masks.mask import StructuredMask
from ..masks.masked_network import MaskedNetwork
from ..network.architecture import Architecture
from ..network.cost import live_macs, live_params, movement_cost
from ..network.count import count_macs
from ..network.modules.model import CompactModel, build
from ..surgery.compactor import compact, cut, cut_names
from ..surgery.plan import Plan, plan
from ..surgery.rounding import snap
from .dense import Distillation, task_loss
from .optimizers import OptimizerName, make_optimizer
from .task import EpochEnd

T = TypeVar("T")


@dataclass(frozen=True)
class MaskSettings:
    """How masks are learned. Exactly one of `budget` and `lambda_` is given.

    ramp: shares of the phase's steps at which the budget starts to fall, is reached, and the masks
    freeze (rounded to the target's multiples by then). update_steps: steps between two solutions of
    the dual problem. shrink_gain: remove dead units from the training graph when they are this
    share of its MACs. size_patience_epochs: with lambda, stop when accuracy has not improved and
    size has not fallen for so long.
    """

    budget: Budget | None = None
    lambda_: float | None = None
    sharing: Sharing = "residual"
    fixed: tuple[str, ...] = ()
    optimizer: OptimizerName = "adamw"
    lr: float = 5e-4
    score_lr: float = 5e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    ramp: tuple[float, float, float] = (0.02, 0.6, 0.7)
    update_steps: int = 10
    shrink_gain: float = 0.08
    size_patience_epochs: int = 20
    # Kept counts become multiples of this when the masks freeze (1: as they come).
    round_to: int = 1
    # What a sub-layer costs beside its units, as multiply-adds of the same time; with 0 none of the
    # kind goes as a whole.
    attention_overhead_macs: float = 0.0
    ffn_overhead_macs: float = 0.0

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.lambda_ is None):
            raise InputError(
                "masks: give either a budget (params = 0.3 or macs = 0.5) or lambda = 1e-7, not both and not neither"
            )
        if self.lambda_ is not None and self.lambda_ < 0:
            raise InputError(f"masks: lambda = {self.lambda_} must not be negative")
        if not 0 <= self.ramp[0] < self.ramp[1] <= self.ramp[2] <= 1:
            raise InputError(f"masks: ramp = {self.ramp} must rise within 0 and 1")
        for name in ("attention_overhead_macs", "ffn_overhead_macs"):
            if getattr(self, name) < 0:
                raise InputError(f"masks: {name} = {getattr(self, name)} must not be negative")


@dataclass
class _Progress:
    """What of the phase is done, for a resumed run."""

    step: int = 0
    frozen: bool = False
    best_top1: float = -1.0
    smallest: float = float("inf")
    idle_epochs: int = 0
    # No sub-layer goes as a whole before this step.
    pause_until: int = 0
    shrunk: list[float] = field(default_factory=list)


class MaskTask:
    """Learn what to keep of `model` (a dense `CompactModel`, changed in place) in `total_steps`
    optimizer steps.
    """

    phase = "masks"

    def __init__(
        self,
        model: CompactModel,
        settings: MaskSettings,
        total_steps: int,
        *,
        distillation: Distillation | None = None,
    ) -> None:
        self.settings, self.total_steps, self.distillation = (
            settings,
            max(1, total_steps),
            distillation,
        )
        self.dense = model.architecture
        gates = Gates(self.dense, settings.sharing, settings.fixed)
        if settings.budget is not None:
            require_feasible(self.dense, gates, settings.budget)
            self.dense_cost = dense_cost(self.dense, settings.budget.kind)
            # In a budget of parameters, a sub-layer's fixed time is turned into them at the dense
            # network's own rate.
            rate = self.dense_cost / count_macs(self.dense)
            self.overhead = {
                "attention": settings.attention_overhead_macs * rate,
                "ffn": settings.ffn_overhead_macs * rate,
            }
        # Which unit of the dense model each unit of the present training graph is.
        self.origin = [torch.arange(group.size) for group in gates.groups]
        self.progress = _Progress()
        self._optimizer: Optimizer | None = None
        self._install(model, gates)

    # What the loop asks for.

    def optimizer(self) -> Optimizer:
        self._optimizer = make_optimizer(
            self.settings.optimizer,
            self.masked.network,
            self.settings.lr,
            self.settings.weight_decay,
        )
        if self.settings.lambda_ is not None:
            for group in self.gates.parameter_groups(self.settings.score_lr):
                self._optimizer.add_param_group({**group, **_FALLBACK[self.settings.optimizer]})
        return self._optimizer

    def train_mode(self) -> None:
        self.masked.train()

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.gates.begin()
        logits: Tensor = self.masked(images, self.gates.value, "kept")
        loss = task_loss(logits, targets, images, self.settings.label_smoothing, self.distillation)
        if self.settings.lambda_:
            loss = loss + self.settings.lambda_ * movement_cost(
                self.masked.architecture, self.gates.live
            )
        return loss, logits

    def after_step(self, step: int) -> None:
        self.progress.step = step + 1
        if self.settings.lambda_ is not None:
            return
        if not self.progress.frozen:
            self.solver.observe([scores.grad for scores in self.gates.scores], self.gates.kept())
            # At the freeze in any case: a phase shorter than two updates must meet its budget too.
            if (step + 1) % self.settings.update_steps == 0 or step + 1 >= round(
                self.settings.ramp[2] * self.total_steps
            ):
                self._update(step + 1)
        for scores in self.gates.scores:
            # Not in the optimizer, so the loop does not clear them.
            scores.grad = None

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        params, macs = self.size()
        metrics = {"params": float(params), "macs": float(macs), "lambda": self.price}
        stop = None
        if self.settings.budget is not None:
            # Before the budget is reached no epoch may be the best.
            score = val_top1 if self.progress.frozen else -float("inf")
        else:
            # The objective trades accuracy for size, so the last state is the wanted one, not the
            # most accurate.
            score, stop = float(epoch), self._idle(val_top1, params)
        return EpochEnd(metrics=metrics, score=score, stop=stop, optimizer=self._shrink())

    def model_for_eval(self) -> nn.Module:
        return self.result()

    def state(self) -> dict[str, Any]:
        return {
            "architecture": self.masked.architecture.model_dump_json(by_alias=True),
            "model": {
                name: tensor.detach().clone()
                for name, tensor in self.masked.network.state_dict().items()
            },
            "scores": [scores.detach().clone() for scores in self.gates.scores],
            "saliency": [saliency.clone() for saliency in self.solver.saliency],
            "price": self.solver.price,
            "origin": [index.clone() for index in self.origin],
            "progress": dict(vars(self.progress)),
            "gone": sorted(self.gates.removed),
            "worth": dict(self.solver.branch_saliency),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        architecture = Architecture.model_validate_json(state["architecture"])
        model = build(
            architecture, {name: tensor.clone() for name, tensor in state["model"].items()}
        )
        gates = Gates(architecture, self.settings.sharing, self.settings.fixed)
        with torch.no_grad():
            for scores, saved in zip(gates.scores, state["scores"], strict=True):
                scores.copy_(saved)
        for name in state["gone"]:
            gates.remove_branch(name)
        self._install(model, gates)
        self.solver.saliency = [saliency.clone() for saliency in state["saliency"]]
        self.solver.price = float(state["price"])
        self.solver.branch_saliency.update(state["worth"])
        self.origin = [index.clone() for index in state["origin"]]
        self.progress = _Progress(**state["progress"])

    # What the phase leaves behind.

    def result(self, last_queries: bool = True) -> CompactModel:
        """The cut model as the masks stand, with the weights learned so far."""
        return compact(self._plain(), self.gates.mask(), last_queries=last_queries).eval()

    def reference(self) -> tuple[CompactModel, StructuredMask]:
        """The present network of full (training) size and its mask: what `result` must be equal
        to.
        """
        return self._plain(), self.gates.mask()

    def mask(self) -> StructuredMask:
        """What is kept of the dense model that the phase began with."""
        entries: dict[str, dict[str, Tensor]] = {}
        for group, keep, origin in zip(
            self.gates.groups, self.gates.kept(), self.origin, strict=True
        ):
            if group.site in self.gates.removed:
                continue
            size = (
                next(iter(sites(self.dense, group.dimension).values()))
                if group.site == SHARED
                else sites(self.dense, group.dimension)[group.site]
            )
            whole = torch.zeros(size, dtype=torch.bool)
            whole[origin[keep]] = True
            entries.setdefault(group.dimension, {})[group.site] = whole
        alive = {branch.name for branch in self.masked.architecture.branches} - self.gates.removed
        for branch in self.dense.branches:
            if branch.name not in alive:
                entries.setdefault("block", {})[branch.name] = torch.zeros(1, dtype=torch.bool)
        return StructuredMask(entries, scale="kept")

    def size(self) -> tuple[int, int]:
        """Live parameters and multiply-adds."""
        live, architecture = self.gates.counter(self.gates.kept()), self.masked.architecture
        return int(live_params(architecture, live)), int(live_macs(architecture, live))

    @property
    def price(self) -> float:
        """lambda: given, or the one that the budget has come to."""
        return self.solver.price if self.settings.lambda_ is None else self.settings.lambda_

    # How it works.

    def _install(self, model: CompactModel, gates: Gates) -> None:
        self.gates = gates
        self.solver = DualSolver(
            model.architecture,
            gates,
            self.settings.budget.kind if self.settings.budget else "params",
        )
        self.masked = MaskedNetwork(model)

    def _plain(self) -> CompactModel:
        return build(
            self.masked.architecture,
            {
                name: tensor.detach().clone()
                for name, tensor in self.masked.network.state_dict().items()
            },
        )

    def _update(self, step: int) -> None:
        budget = self.settings.budget
        assert budget is not None
        start, end, freeze = (round(share * self.total_steps) for share in self.settings.ramp)
        target = int(ramp(step, start, end, budget.ratio) * self.dense_cost)
        kept = self.solver.solve(self.gates.kept(), target)
        # One at a time, and then a pause: what one leaves undone makes the others worth more, which
        # their averages must have seen.
        if step >= self.progress.pause_until and (
            name := self.solver.branch_to_remove(kept, self.overhead, target)
        ):
            self.gates.remove_branch(name)
            self.progress.pause_until = step + self.solver.memory_steps
            kept = self.solver.solve(kept, target)
        if step >= freeze:
            kept = self._snapped(kept, int(budget.ratio * self.dense_cost))
            self.progress.frozen = True
        with torch.no_grad():
            for scores, keep in zip(self.gates.scores, kept, strict=True):
                scores.copy_(torch.where(keep, START, THRESHOLD - (START - THRESHOLD)))

    def _snapped(self, kept: list[Tensor], target: int) -> list[Tensor]:
        if self.settings.round_to == 1:
            return kept
        saliency: dict[str, dict[str, Tensor]] = {}
        for group, values in zip(self.gates.groups, self.solver.saliency, strict=True):
            saliency.setdefault(group.dimension, {})[group.site] = values

        def cost(mask: StructuredMask) -> int:
            return self.solver.cost(
                [mask.kept[group.dimension][group.site] for group in self.gates.groups]
            )

        mask = snap(
            self.gates.mask(kept),
            self.masked.architecture,
            self.settings.round_to,
            saliency=saliency,
            cost=cost,
            budget=target,
        )
        return [mask.kept[group.dimension][group.site] for group in self.gates.groups]

    def _shrink(self) -> Optimizer | None:
        """Cut what is surely dead out of the training graph, moments and all, when that pays."""
        if self.settings.sharing == "unshared":
            # Index lists would go into every step of a graph that is to become faster.
            return None
        keep = self._staying()
        macs = count_macs(self.masked.architecture)
        left = live_macs(self.masked.architecture, self.gates.counter(keep))
        if left > (1.0 - self.settings.shrink_gain) * macs:
            return None
        old, optimizer = self.masked.network, self._optimizer
        surgery = plan(self.masked.architecture, self.gates.mask(keep))
        moments = _moments(old, optimizer) if optimizer is not None else {}
        cut_moments = _cut_moments(surgery, moments)
        model = build(
            surgery.architecture,
            cut(surgery, {name: tensor.detach() for name, tensor in old.state_dict().items()}),
        )
        gates = Gates(model.architecture, self.settings.sharing, self.settings.fixed)
        price, worth = self.solver.price, self.solver.branch_saliency
        # Groups of sub-layers that have gone as a whole are not in the new graph.
        place = {
            (group.dimension, group.site): number for number, group in enumerate(self.gates.groups)
        }
        stays = [place[group.dimension, group.site] for group in gates.groups]
        saliency = _at(self.solver.select(keep), stays)
        score_moments = _at(_score_moments(self.gates, optimizer, keep), stays)
        with torch.no_grad():
            for new, scores, index in zip(
                gates.scores, _at(list(self.gates.scores), stays), _at(keep, stays), strict=True
            ):
                new.copy_(scores[index])
        self.origin = [
            origin[index]
            for origin, index in zip(_at(self.origin, stays), _at(keep, stays), strict=True)
        ]
        self._install(model, gates)
        self.solver.saliency, self.solver.price = saliency, price
        self.solver.branch_saliency.update(
            {name: worth[name] for name in self.solver.branch_saliency}
        )
        self.progress.shrunk.append(left / macs)
        rebuilt = self.optimizer()
        for name, parameter in self.masked.network.named_parameters():
            if name in cut_moments:
                rebuilt.state[parameter] = cut_moments[name]
        for scores, entry in zip(self.gates.scores, score_moments, strict=True):
            if entry:
                rebuilt.state[scores] = entry
        return rebuilt

    def _staying(self) -> list[Tensor]:
        kept = self.gates.kept()
        if self.progress.frozen:
            return kept
        if self.settings.lambda_ is not None:
            # A score this far under the threshold would need as many steps to come back as it took
            # to go.
            return [
                keep | (scores.detach() > THRESHOLD - 0.2)
                for keep, scores in zip(kept, self.gates.scores, strict=True)
            ]
        return [~dead for dead in self.solver.removable(kept)]

    def _idle(self, val_top1: float, params: int) -> str | None:
        progress = self.progress
        if val_top1 > progress.best_top1 or params < progress.smallest:
            progress.idle_epochs = 0
        else:
            progress.idle_epochs += 1
        progress.best_top1, progress.smallest = (
            max(progress.best_top1, val_top1),
            min(progress.smallest, float(params)),
        )
        patience = self.settings.size_patience_epochs
        return (
            f"no better accuracy and no smaller size for {patience} epochs"
            if progress.idle_epochs >= patience
            else None
        )


def _at(values: Sequence[T], places: Sequence[int]) -> list[T]:
    return [values[place] for place in places]


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {
        name: optimizer.state[parameter]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def _cut_moments(surgery: Plan, moments: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """An optimizer's memory of each weight, cut as the weight is: tensors of its shape are sliced,
    counters and flags copied.
    """
    keys = {key for entry in moments.values() for key in entry}
    shaped = {
        key: cut(
            surgery,
            {name: entry[key] for name, entry in moments.items() if _is_moment(entry.get(key))},
        )
        for key in keys
    }
    renamed = cut_names(surgery, moments)
    result: dict[str, dict[str, Any]] = {}
    for new, old in renamed.items():
        result[new] = {
            key: shaped[key][new]
            if _is_moment(value)
            else value.clone()
            if isinstance(value, Tensor)
            else value
            for key, value in moments[old].items()
        }
    return result


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _score_moments(
    gates: Gates, optimizer: Optimizer | None, keep: Sequence[Tensor]
) -> list[dict[str, Any]]:
    if optimizer is None:
        return [{} for _ in keep]
    return [
        {
            name: value[index].clone() if _is_moment(value) else value
            for name, value in optimizer.state.get(scores, {}).items()
        }
        for scores, index in zip(gates.scores, keep, strict=True)
    ]


# Scores are no matrices: beside Muon they go to its AdamW part.
_FALLBACK: dict[OptimizerName, dict[str, bool]] = {"adamw": {}, "muon": {"use_fallback": True}}
