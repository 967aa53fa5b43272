"""Optimizers: AdamW as in the papers, or Muon for short trainings of small models.

Muon orthogonalises the updates of the matrices inside the blocks and uses AdamW for everything
else; the implementation is timm's. On Fashion-MNIST, trained from scratch, it reaches after 12,800
images what AdamW reaches after 38,000.

References:
    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    Liu et al. 2025, "Muon is Scalable for LLM Training" (scaling of the updates).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.optim import muon
from torch import nn
from torch.optim import AdamW, Optimizer

from .regularization import rate_scales

OptimizerName = Literal["adamw", "muon"]
# The rate of AdamW for the other parameters, relative to that of Muon.
ADAMW_RATE_BESIDE_MUON = 0.2
# Of groups that Muon leaves to AdamW.
_FALLBACK: dict[OptimizerName, dict[str, bool]] = {"adamw": {}, "muon": {"use_fallback": True}}
# Tokens and position tables of timm's models and of ours, which have no weight decay.
TABLES = frozenset({"pos_embed", "cls_token", "reg_token", "dist_token", "prefix", "position"})


def make_optimizer(
    name: OptimizerName,
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> Optimizer:
    """Create an optimizer over the trainable parameters of a model.

    Args:
        name: "adamw" or "muon".
        model: The model.
        lr: The peak learning rate; with "muon" that of the matrices inside the blocks.
        weight_decay: For matrices and kernels.
        layer_decay: The rate of each block relative to the next one, see `rate_scales`.

    Returns:
        The optimizer; the `lr` of each group is its peak.
    """
    scales = rate_scales(model, layer_decay)
    if name == "adamw":
        return AdamW(_scaled_groups(model, decay_groups(model, weight_decay), lr, scales), lr=lr)
    matrices = {
        id(parameter)
        for key, parameter in model.named_parameters()
        if parameter.ndim == 2 and _in_blocks(key)
    }
    groups: list[dict[str, Any]] = []
    for group in decay_groups(model, weight_decay):
        inside = [parameter for parameter in group["params"] if id(parameter) in matrices]
        others = [parameter for parameter in group["params"] if id(parameter) not in matrices]
        if inside:
            groups.append({**group, "params": inside, "use_fallback": False})
        if others:
            rate = adamw_lr(name, lr)
            groups.append({**group, "params": others, "use_fallback": True, "lr": rate})
    return MuonForProcessor(_scaled_groups(model, groups, lr, scales), lr=lr)


def adamw_lr(name: OptimizerName, lr: float) -> float:
    """The peak learning rate of what AdamW trains, in an optimizer of the rate `lr`."""
    return lr * ADAMW_RATE_BESIDE_MUON if name == "muon" else lr


def split_rates(
    optimizer: Optimizer, own: Iterable[nn.Parameter], factor: float, frozen_steps: int = 0
) -> Optimizer:
    """Give some parameters of a new optimizer a learning rate of their own.

    Args:
        optimizer: One that has taken no step; its groups are divided.
        own: The parameters. Those that are not in the optimizer are ignored.
        factor: Their peak learning rate relative to that of their group, so that groups keep their
            proportions.
        frozen_steps: The steps before the other parameters are trained (default: none).

    Returns:
        The same optimizer. The first group is that of the largest rate.
    """
    inside = {id(parameter) for parameter in own}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in group["params"]:
            parts[id(parameter) in inside].append(parameter)
        if parts[0]:
            groups.append({**group, "params": parts[0], "frozen_steps": frozen_steps})
        if parts[1]:
            rate = factor * group["lr"]
            groups.append({**group, "params": parts[1], "lr": rate, "frozen_steps": 0})
    groups.sort(key=lambda group: group["lr"], reverse=True)
    optimizer.param_groups[:] = groups
    return optimizer


def add_vectors(
    optimizer: Optimizer, name: OptimizerName, groups: Iterable[dict[str, Any]]
) -> Optimizer:
    """Add groups of vectors, such as mask scores, which Muon leaves to AdamW.

    Args:
        optimizer: One that `make_optimizer` returned.
        name: Its name.
        groups: With `params`, `lr` and `weight_decay`.

    Returns:
        The same optimizer.
    """
    for group in groups:
        optimizer.add_param_group({**group, **_FALLBACK[name]})
    return optimizer


class MuonForProcessor(muon.Muon):
    """timm's Muon, with Newton-Schulz steps in the arithmetic that the device multiplies fast.

    timm computes them in bfloat16, which on a CPU without instructions for it takes 16 times as
    long as float32 (`python -m benchmarks.speed.newton_schulz`).
    """

    def step(self, closure: Any = None) -> Any:
        """One update, as `Muon.step`."""
        step: Any = super().step
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return step(closure)
        original = muon.zeropower_via_newtonschulz
        # `Muon` has no argument for it.
        muon.zeropower_via_newtonschulz = functools.partial(original, dtype=cpu_matrix_dtype())
        try:
            return step(closure)
        finally:
            muon.zeropower_via_newtonschulz = original


def cpu_matrix_dtype() -> torch.dtype:
    """bfloat16 if this processor has instructions for its products and torch uses them, else fp32.

    `get_cpu_capability` follows ATEN_CPU_CAPABILITY, so that older processors can be emulated.
    """
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and (
        torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups, with and without weight decay, by the convention of timm.

    Matrices and kernels have it; biases, norms, tokens and position tables do not.
    """
    named = getattr(model, "no_weight_decay", None)
    skip = TABLES | (set(named()) if callable(named) else set())
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = parameter.ndim <= 1 or name in skip or name.endswith(".bias")
            (others if other else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _scaled_groups(
    model: nn.Module, groups: list[dict[str, Any]], lr: float, scales: dict[str, float]
) -> list[dict[str, Any]]:
    """The groups, divided by the factors on their parameters' rates, the largest rate first."""
    factors = sorted(set(scales.values()), reverse=True)
    if len(factors) < 2:
        return groups
    of = {id(parameter): scales[name] for name, parameter in model.named_parameters()}
    divided = [
        {**group, "params": params, "lr": factor * group.get("lr", lr)}
        for factor in factors
        for group in groups
        if (params := [parameter for parameter in group["params"] if of[id(parameter)] == factor])
    ]
    return sorted(divided, key=lambda group: group["lr"], reverse=True)


def _in_blocks(name: str) -> bool:
    return name.startswith(("blocks.", "steps.")) or ".blocks." in name or ".steps." in name
