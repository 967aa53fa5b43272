"""Options of dense training: averaged weights, rates by depth, and stochastic depth, by timm.

References:
    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization" (EMA).
    Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers" (layer-wise rate decay).
    Huang et al. 2016, "Deep Networks with Stochastic Depth" (drop-path).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers.drop import calculate_drop_path_rates, drop_path
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...core.errors import InputError
from ..network.modules.branch import Branch, Constant
from ..network.modules.model import CompactModel

# Parts in front of the first block.
_STEM = ("before", "stem", "prefix", "position", "patch_norm", "stem_norm", "stem_writes")


@dataclass(frozen=True)
class DenseOptions:
    """Options of a dense training.

    Attributes:
        ema: The decay of an exponential moving average of the weights in each step, e.g. 0.9999,
            which is validated and kept in place of the weights. It rises from 0 in the first steps.
            None: no average.
        layer_decay: The learning rate of each block relative to the next one; the head has 1.
        drop_path: The probability with which the last block's sub-layers are skipped for an image
            in training; it rises linearly from 0 at the first block.
        patch_drop: The share of patches of an image, drawn anew each time, that training leaves
            out behind the stem.

    Raises:
        InputError: A number is out of range.
    """

    ema: float | None = None
    layer_decay: float = 1.0
    drop_path: float = 0.0
    patch_drop: float = 0.0

    def __post_init__(self) -> None:
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise InputError(f"ema = {self.ema}: give a decay between 0 and 1, e.g. 0.9999")
        if not 0.0 < self.layer_decay <= 1.0:
            raise InputError(f"layer_decay = {self.layer_decay}: give a factor above 0, at most 1")
        if not 0.0 <= self.drop_path < 1.0:
            raise InputError(f"drop_path = {self.drop_path}: give a probability below 1")
        if not 0.0 <= self.patch_drop < 1.0:
            raise InputError(f"patch_drop = {self.patch_drop}: give a share below 1")


def add_drop_path(model: nn.Module, rate: float) -> list[RemovableHandle]:
    """Skip sub-layers at random while a model is in training mode.

    Args:
        model: A `CompactModel`; other models are not changed.
        rate: The probability at the last block, rising linearly from 0 at the first one.

    Returns:
        What removes it again.
    """
    if not rate or not isinstance(model, CompactModel):
        return []
    branches = [module for module in model.modules() if isinstance(module, Branch)]
    depths = block_numbers(model)
    rates = calculate_drop_path_rates(rate, max(depths.values(), default=0) + 1)
    handles = []
    for branch in branches:
        probability = float(rates[depths[branch.spec.name]])  # type: ignore[arg-type]
        if probability and not isinstance(branch.core, Constant):
            handles.append(branch.register_forward_hook(_dropping(probability)))
    return handles


def add_patch_drop(model: nn.Module, rate: float) -> None:
    """Leave out random patches behind the stem while a model is in training mode.

    Args:
        model: A `CompactModel`; other models are not changed. Set `model.patch_drop` to None to end
            it.
        rate: The share of the patches of an image that is left out, drawn anew for each image.

    Raises:
        InputError: The positions of patches enter the attention scores (rotary or relative
            positions), or patches leave the network by a mask.

    References:
        Li et al. 2023, "Scaling Language-Image Pre-training via Masking".
    """
    if not rate or not isinstance(model, CompactModel):
        return
    architecture = model.architecture
    positioned = [branch.name for branch in architecture.branches if branch.reads_positions]
    if positioned:
        raise InputError(
            f"patch_drop = {rate}: {positioned[0]} has rotary or relative positions, which need "
            "all patches in their places; leave patch_drop out"
        )
    if architecture.drops_tokens or architecture.pool.kind == "none":
        raise InputError(
            f"patch_drop = {rate}: the network has a token mask or returns every token; "
            "leave patch_drop out"
        )
    model.patch_drop = PatchDropout(rate, num_prefix_tokens=architecture.prefix)


def _dropping(probability: float) -> Any:
    def hook(module: nn.Module, inputs: Any, update: Tensor) -> Tensor:
        dropped: Tensor = drop_path(update, probability, module.training)
        return dropped

    return hook


def block_numbers(model: CompactModel) -> dict[str, int]:
    """The depth of each sub-layer's block by its name; sub-layers of a block have the same."""
    blocks = {name: number for number, name in enumerate(model.architecture.block_names)}
    return {
        branch.name: next(
            number for name, number in blocks.items() if branch.name.startswith(f"{name}.")
        )
        for branch in model.architecture.branches
    }


def rate_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The factor on the learning rate of each parameter by name.

    Args:
        model: A `CompactModel`; in other models every parameter has 1.
        layer_decay: The rate of each block relative to the next one.

    Returns:
        `layer_decay` ** (layers above), 1 for the head.
    """
    names = [name for name, _ in model.named_parameters()]
    if layer_decay == 1.0 or not isinstance(model, CompactModel):
        return dict.fromkeys(names, 1.0)
    depths, steps = block_numbers(model), model.architecture.steps
    top = max(depths.values(), default=-1) + 2

    def layer(name: str) -> int:
        first, *rest = name.split(".")
        if first in _STEM:
            return 0
        if first == "steps":
            return depths[steps[int(rest[0])][int(rest[1])].name] + 1
        return top

    return {name: layer_decay ** (top - layer(name)) for name in names}
