"""Mask learning as a task of the training loop, with gates on the units of a network.

With a lambda, the objective is task_loss + lambda * cost. With a budget, the price is solved for at
each update (`masks/budget.py`), and the masks are rounded when they freeze (`freezing.py`). Units
that will not return are cut from the training graph.

References:
    L. Tredese 2023, "Structured Pruning of Vision Transformers at Training Time".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..masks.budget import DualSolver, dense_cost, ramp
from ..masks.gates import START, THRESHOLD, Gates
from ..masks.groups import SHARED, sites
from ..masks.mask import StructuredMask
from ..masks.masked_network import MaskedNetwork
from ..network.architecture import Architecture
from ..network.cost import live_macs, live_params, movement_cost
from ..network.count import count_macs
from ..network.live_latency import NS_PER_MS
from ..network.modules.model import CompactModel, build
from ..surgery.compactor import compact
from .dense import Distillation, task_loss
from .devices import Placement, tensors_to_cpu
from .graph_shrinking import shrink_graph
from .later_cost import LaterCost
from .mask_freeze import Freeze
from .mask_settings import MaskSettings
from .objectives import Objective
from .optimizers import adamw_lr, add_vectors, make_optimizer, split_rates
from .task import EpochEnd


@dataclass
class _Progress:
    """The progress of the phase, saved for a resumed run."""

    step: int = 0
    frozen: bool = False
    best_top1: float = -1.0
    smallest: float = float("inf")
    idle_epochs: int = 0
    # No sub-layer is removed as a whole before this step.
    pause_until: int = 0
    shrunk: list[float] = field(default_factory=list)


class MaskTask:
    """Learn which units of a network to keep.

    Args:
        model: The dense network, changed in place.
        settings: How masks are learned.
        total_steps: The number of optimizer steps of the phase.
        distillation: The teacher (default: none).
        objective: Of a network that chooses patches for each image; its loss replaces the task loss
            (default: none).
        later: What is added to the cut network under the same budget (default: nothing).

    Raises:
        InputError: No mask meets the budget, or everything is fixed.
    """

    phase = "masks"

    def __init__(
        self,
        model: CompactModel,
        settings: MaskSettings,
        total_steps: int,
        *,
        distillation: Distillation | None = None,
        objective: Objective | None = None,
        later: LaterCost | None = None,
    ) -> None:
        self.settings, self.distillation = settings, distillation
        self.objective, self._later = objective, later
        self.total_steps = max(1, total_steps)
        self.dense = model.architecture
        self._freeze = Freeze(settings)
        gates = self._gates(self.dense)
        if settings.budget is not None:
            counted = self._counted(self.dense)
            self.dense_cost = dense_cost(counted, self._freeze.cost)
            self._freeze.require_feasible(counted, gates, settings.budget, self.dense_cost)
            # In a budget of parameters, overheads are converted at the rate of the dense network.
            self.overhead = self._freeze.overhead(self.dense_cost / count_macs(counted))
        # For each unit of the current training graph, its index in the dense model.
        self.origin = [torch.arange(group.size) for group in gates.groups]
        self.progress = _Progress()
        self._optimizer: Optimizer | None = None
        self._placement = Placement()
        self._install(model, gates)
        if later is not None and settings.budget is not None:
            later.require_feasible(self.solver, settings.budget, self.dense_cost)

    def place(self, placement: Placement) -> None:
        """Move the network, the scores and the teacher to a device."""
        self._placement = placement
        self._install_on_device()
        if self.distillation is not None:
            self.distillation.teacher.to(placement.device)
        if self.objective is not None:
            self.objective.place(placement.device)

    def trained(self) -> nn.Module:
        """The network and the scores."""
        return nn.ModuleList([self.masked, self.gates])

    def observed(self) -> Sequence[nn.Parameter]:
        """With a budget, the scores, whose gradients are the saliencies."""
        return () if self.settings.lambda_ is not None else list(self.gates.scores)

    def optimizer(self) -> Optimizer:
        """A new optimizer over the weights and, with lambda, the scores."""
        name, lr = self.settings.optimizer, self.settings.lr
        network = self.masked.network
        self._optimizer = make_optimizer(name, network, lr, self.settings.weight_decay)
        if self.objective is not None:
            factor = self.objective.settings.lr / adamw_lr(name, lr)
            self._optimizer = split_rates(self._optimizer, network.selects.parameters(), factor)
        if self.settings.lambda_ is not None:
            groups = self.gates.parameter_groups(self.settings.score_lr)
            add_vectors(self._optimizer, name, groups)
        return self._optimizer

    def train_mode(self) -> None:
        """Set the network to training mode."""
        self.masked.train()
        if self.objective is not None:
            self.objective.attach(self.masked.network)

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, with lambda including the cost, and its logits (B, classes)."""
        self.gates.begin()
        if self.objective is not None:
            self.objective.begin(self.progress.step)
        logits: Tensor = self._forward(images, self.gates.value, "kept")
        if self.objective is None:
            smoothing = self.settings.label_smoothing
            loss = task_loss(logits, targets, images, smoothing, self.distillation)
        else:
            loss = self.objective.loss(logits, targets, images)
        if self.settings.lambda_:
            loss = loss + self.settings.lambda_ * movement_cost(
                self.masked.architecture, self.gates.live
            )
        return loss, logits

    def after_step(self, step: int) -> None:
        """Update saliencies and masks, until the masks freeze."""
        self.progress.step = step + 1
        if self.settings.lambda_ is not None:
            return
        if not self.progress.frozen:
            self.solver.observe([scores.grad for scores in self.gates.scores], self.gates.kept())
            # A phase shorter than two updates must also meet its budget at the freeze.
            freeze = step + 1 >= round(self.settings.ramp[2] * self.total_steps)
            if freeze or (step + 1) % self.settings.update_steps == 0:
                self._update(step + 1)
        for scores in self.gates.scores:
            # The loop clears only the gradients of parameters in the optimizer.
            scores.grad = None

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        """Report sizes, stop if nothing improves, and shrink the training graph if it pays."""
        params, macs = self.size()
        metrics = {"params": float(params), "macs": float(macs), "lambda": self.price}
        if self._freeze.rounding is not None:
            metrics["latency_ms"] = self.latency_ms()
        if self.objective is not None:
            metrics |= self.objective.metrics()
            # A cut reads the network of inference.
            self.objective.detach()
        stop = None
        if self.settings.budget is not None:
            # Before the budget is reached no epoch may be the best.
            score = val_top1 if self.progress.frozen else -float("inf")
        else:
            # The objective trades accuracy for size, so the last state is the best one.
            score, stop = float(epoch), self._idle(val_top1, params)
        return EpochEnd(metrics=metrics, score=score, stop=stop, optimizer=self._shrink())

    def model_for_eval(self) -> nn.Module:
        """The cut model, on the device of the training."""
        return self.result().to(self._placement.device)

    def state(self) -> dict[str, Any]:
        """Weights, scores, saliencies and progress."""
        return {
            "architecture": self.masked.architecture.model_dump_json(by_alias=True),
            "model": tensors_to_cpu(dict(self.masked.network.state_dict())),
            "scores": tensors_to_cpu(list(self.gates.scores)),
            "saliency": [saliency.clone() for saliency in self.solver.saliency],
            "price": self.solver.price,
            "origin": [index.clone() for index in self.origin],
            "progress": dict(vars(self.progress)),
            "gone": sorted(self.gates.removed),
            "worth": dict(self.solver.branch_saliency),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state, with its training graph."""
        architecture = Architecture.model_validate_json(state["architecture"])
        model = build(
            architecture, {name: tensor.clone() for name, tensor in state["model"].items()}
        )
        gates = self._gates(architecture)
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
        self._settle()

    def finish(self) -> None:
        """End the decisions of training; `result` cuts the model."""
        if self.objective is not None:
            self.objective.release(self.masked.network)

    def result(self, last_queries: bool = True) -> CompactModel:
        """The cut model on the CPU with the current masks and weights, in evaluation mode."""
        return compact(self._plain(), self.gates.mask(), last_queries=last_queries).eval()

    def reference(self) -> tuple[CompactModel, StructuredMask]:
        """The network of the current training graph and its mask, which `result` must equal."""
        return self._plain(), self.gates.mask()

    def mask(self) -> StructuredMask:
        """The current mask of the dense model with which the phase began."""
        entries: dict[str, dict[str, Tensor]] = {}
        for group, keep, origin in zip(
            self.gates.groups, self.gates.kept(), self.origin, strict=True
        ):
            if group.dimension == "token":
                continue
            if group.site in self.gates.removed:
                continue
            sizes = sites(self.dense, group.dimension)
            size = next(iter(sizes.values())) if group.site == SHARED else sizes[group.site]
            whole = torch.zeros(size, dtype=torch.bool)
            whole[origin[keep]] = True
            entries.setdefault(group.dimension, {})[group.site] = whole
        if self.gates.tokens:
            entries["token"] = self._token_entries()
        alive = {branch.name for branch in self.masked.architecture.branches} - self.gates.removed
        for branch in self.dense.branches:
            if branch.name not in alive:
                entries.setdefault("block", {})[branch.name] = torch.zeros(1, dtype=torch.bool)
        return StructuredMask(entries, scale="kept")

    def _token_entries(self) -> dict[str, Tensor]:
        """The token sets of the dense model with which the phase began."""
        prefix, sizes = self.dense.prefix, sites(self.dense, "token")
        # Where sub-layers were removed, a step may have the name of another branch now.
        names = {branch.name: step[0].name for step in self.dense.steps for branch in step}
        _, groups = self.gates.split(self.gates.groups)
        _, kept = self.gates.split(self.gates.kept())
        _, origins = self.gates.split(self.origin)
        entries: dict[str, Tensor] = {}
        for group, keep, origin in zip(groups, kept, origins, strict=True):
            site = names.get(group.site, group.site)
            entries[site] = torch.zeros(sizes[site], dtype=torch.bool)
            entries[site][:prefix] = True
            entries[site][prefix + origin[keep]] = True
        return entries

    def size(self) -> tuple[int, int]:
        """The parameters and multiply-adds of the cut model."""
        live = self.gates.counter(self.gates.kept())
        architecture = self._counted(self.masked.architecture)
        return int(live_params(architecture, live)), int(live_macs(architecture, live))

    def latency_ms(self) -> float:
        """The latency of the cut model by the cost table, in milliseconds."""
        return self.solver.cost(self.gates.kept()) / NS_PER_MS

    def tighten(self, latency_ms: float) -> None:
        """Round the frozen masks for a smaller latency; units only leave.

        Args:
            latency_ms: The latency by the table.

        Raises:
            InputError: It cannot be reached; the message has the smallest one.
        """
        kept = self.gates.kept()
        for values, keep in zip(self.solver.saliency, kept, strict=True):
            # What has left has no weights that fit the others.
            values[~keep] = 0.0
        self._keep(self._freeze.round(self.solver, kept, int(NS_PER_MS * latency_ms)))
        self._settle()

    @property
    def price(self) -> float:
        """The price of a unit of cost: lambda, or the price at which the budget is met."""
        return self.solver.price if self.settings.lambda_ is None else self.settings.lambda_

    def _gates(self, architecture: Architecture) -> Gates:
        settings = self.settings
        return Gates(architecture, settings.sharing, settings.fixed, settings.tokens)

    def _counted(self, architecture: Architecture) -> Architecture:
        """The architecture whose cost is counted.

        With tokens and under a latency it leaves to the last attention what the head reads, as
        `result` does: a price of tokens that are dropped there anyway would misguide the choice.
        """
        if not self.settings.tokens and self._freeze.rounding is None:
            return architecture
        return architecture.model_copy(update={"last_queries": True})

    def _settle(self) -> None:
        """Leave out the masks of tokens if every token of the graph stays to the end."""
        if self.progress.frozen:
            tokens = self.gates.split(self.gates.kept())[1]
            self.gates.settled = all(bool(keep.all()) for keep in tokens)

    def _install(self, model: CompactModel, gates: Gates) -> None:
        if self.objective is not None:
            self.objective.detach()
        self.gates = gates
        self.solver = DualSolver(self._counted(model.architecture), gates, self._freeze.cost)
        if self._later is not None:
            self.solver.pinned = self._later.pinned
        self.masked = MaskedNetwork(model)
        self._install_on_device()

    def _install_on_device(self) -> None:
        self.masked.to(self._placement.device)
        self.gates.to(self._placement.device)
        self._forward: Callable[..., Tensor] = self.masked
        if self._placement.compile and self.objective is None:
            self._forward = torch.compile(self.masked)

    def _plain(self) -> CompactModel:
        state: Any = tensors_to_cpu(dict(self.masked.network.state_dict()))
        return build(self.masked.architecture, state)

    def _update(self, step: int) -> None:
        budget = self.settings.budget
        assert budget is not None
        start, end, freeze = (round(share * self.total_steps) for share in self.settings.ramp)
        target = int(ramp(step, start, end, budget.ratio) * self.dense_cost)
        kept = self.gates.kept()
        if self._later is not None:
            target = self._later.widths_target(self.solver, kept, target)
        kept = self.solver.solve(kept, target)
        # One sub-layer at a time, and then a pause: without it the saliency of the others rises,
        # which the averages must follow.
        if step >= self.progress.pause_until and (
            name := self.solver.branch_to_remove(kept, self.overhead, target)
        ):
            self.gates.remove_branch(name)
            self.progress.pause_until = step + self.solver.memory_steps
            kept = self.solver.solve(kept, target)
        if step >= freeze:
            limit = int(budget.ratio * self.dense_cost)
            if self._later is None:
                kept = self._freeze.round(self.solver, kept, limit)
            else:
                kept = self._later.rounded(self.solver, kept, limit, self._freeze.round)
            self.progress.frozen = True
        self._keep(kept)

    def _keep(self, kept: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for scores, keep in zip(self.gates.scores, kept, strict=True):
                scores.copy_(torch.where(keep, START, THRESHOLD - (START - THRESHOLD)))

    def _shrink(self) -> Optimizer | None:
        """Remove units that will not return from the training graph, if that pays."""
        if self.settings.sharing == "unshared":
            # Index lists would make every step of the smaller graph slower.
            return None
        keep = self._staying()
        counted = self._counted(self.masked.architecture)
        macs, left = count_macs(counted), live_macs(counted, self.gates.counter(keep))
        # Once tokens are frozen, one cut makes every later attention one without a mask.
        settles = self.progress.frozen and self.gates.tokens and not self.gates.settled
        if left > (1.0 - self.settings.shrink_gain) * macs and not settles:
            return None
        smaller = shrink_graph(self.masked.network, self.gates, keep, self._optimizer)
        before = self.solver
        self.origin = [
            self.origin[number][index]
            for number, index in zip(smaller.groups, smaller.keep, strict=True)
        ]
        self._install(smaller.model, smaller.gates)
        self.solver.saliency = [
            before.saliency[number][index]
            for number, index in zip(smaller.groups, smaller.keep, strict=True)
        ]
        self.solver.price = before.price
        for name in self.solver.branch_saliency:
            self.solver.branch_saliency[name] = before.branch_saliency[name]
        self._settle()
        self.progress.shrunk.append(left / macs)
        optimizer = self.optimizer()
        smaller.restore_moments(optimizer, self.masked.network)
        return optimizer

    def _staying(self) -> list[Tensor]:
        kept = self.gates.kept()
        if self.progress.frozen:
            return kept
        if self.settings.lambda_ is not None:
            # A score this far below the threshold needs many steps to return.
            return [
                keep | (scores.detach().cpu() > THRESHOLD - 0.2)
                for keep, scores in zip(kept, self.gates.scores, strict=True)
            ]
        return [~dead for dead in self.solver.removable(kept)]

    def _idle(self, val_top1: float, params: int) -> str | None:
        """The reason to stop if neither accuracy nor size has improved for long, or None."""
        progress = self.progress
        if val_top1 > progress.best_top1 or params < progress.smallest:
            progress.idle_epochs = 0
        else:
            progress.idle_epochs += 1
        progress.best_top1 = max(progress.best_top1, val_top1)
        progress.smallest = min(progress.smallest, float(params))
        patience = self.settings.size_patience_epochs
        if progress.idle_epochs < patience:
            return None
        return f"no better accuracy and no smaller size for {patience} epochs"
