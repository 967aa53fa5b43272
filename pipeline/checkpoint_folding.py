"""Plain tensors from the entries that torch's reparametrizations write in a checkpoint.

`torch.nn.utils.prune`, `weight_norm` and `spectral_norm` (as hooks and as `parametrize`) save the
parts of a tensor instead of the tensor. As in evaluation mode, nothing is updated here.

References:
    Salimans and Kingma 2016, "Weight Normalization", eq. 2.
    Miyato et al. 2018, "Spectral Normalization for GANs", eq. 7 and 8.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping

from torch import Tensor
from torch.linalg import vector_norm

from ..compress.surgery.dead_weight import fold_prune_masks
from ..core.errors import InputError

_HOOKED = re.compile(r"(?P<base>.+)_(?P<part>orig|mask|g|v|u)")
_PARAMETRIZED = re.compile(
    r"(?P<owner>.+\.)?parametrizations\.(?P<name>[^.]+)\.(?P<part>original\d*|\d+\..+)"
)
_HOOKED_PARTS = {"orig", "mask", "g", "v", "u"}
_REMOVE = "call torch.nn.utils.parametrize.remove_parametrizations before saving"


def plain_name(name: str, names: Collection[str]) -> str:
    """Return the name of the tensor that an entry is a part of.

    Args:
        name: The name of an entry.
        names: The names that the model has.

    Returns:
        The name of a tensor of the model, or `name` where it is not a part of one.
    """
    base, _ = ("", "") if name in names else _part(name)
    return base if base in names else name


def fold_reparametrized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the tensors of a checkpoint whose parts were saved.

    Args:
        state: A state dict.

    Returns:
        A state dict of the model without reparametrizations.

    Raises:
        InputError: A part is missing, has another shape, belongs to a parametrization that is not
            known, or the tensor exists in both forms; the message names the entry.
    """
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name in state:
        base, part = _part(name)
        if part:
            groups[base][part] = name
    result = dict(state)
    for base, parts in groups.items():
        folded = _fold(base, {part: state[name] for part, name in parts.items()}, parts)
        if folded is None:
            continue
        if base in state:
            raise InputError(f"checkpoint has both {base!r} and {min(parts.values())!r}; keep one")
        for name in parts.values():
            del result[name]
        result[base] = folded
    return fold_prune_masks(result)


def _part(name: str) -> tuple[str, str]:
    """The name of the tensor and which part of it an entry is; empty for a plain tensor."""
    found = _PARAMETRIZED.fullmatch(name)
    if found is not None:
        return (found["owner"] or "") + found["name"], found["part"]
    found = _HOOKED.fullmatch(name)
    return (found["base"], found["part"]) if found is not None else ("", "")


def _fold(base: str, parts: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensor | None:
    """The tensor, or None where the parts are none of weight norm or spectral norm."""
    kinds = set(parts)
    if {"g", "v"} <= kinds and "u" not in kinds:
        return _weight_norm(base, parts["g"], parts["v"])
    if kinds == {"original0", "original1"}:
        return _weight_norm(base, parts["original0"], parts["original1"])
    if {"orig", "u"} <= kinds:
        return _spectral_norm(base, parts["orig"], parts["u"], parts.get("v"))
    if kinds == {"original", "0._u", "0._v"}:
        return _spectral_norm(base, parts["original"], parts["0._u"], parts["0._v"])
    if not kinds <= _HOOKED_PARTS:
        raise InputError(
            f"checkpoint entry {min(names.values())!r} belongs to a parametrization that vitrim "
            f"does not know; {_REMOVE}"
        )
    return None


def _weight_norm(base: str, magnitude: Tensor, direction: Tensor) -> Tensor:
    """Direction times magnitude over norm; the magnitude has one value along the normed axes."""
    whole = magnitude.numel() == 1
    shape = tuple(magnitude.shape)
    if not whole and not (
        len(shape) == direction.ndim
        and all(size in (1, other) for size, other in zip(shape, direction.shape, strict=True))
    ):
        raise InputError(
            f"the parts of {base!r} (weight norm) do not fit: magnitude {list(shape)}, direction "
            f"{list(direction.shape)}; {_REMOVE}"
        )
    over = None if whole else tuple(axis for axis, size in enumerate(shape) if size == 1)
    if over == ():
        return magnitude * direction.sign()
    norm = vector_norm(direction, dim=over, keepdim=not whole)
    scale: Tensor = magnitude / norm
    return direction * scale


def _spectral_norm(base: str, weight: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """W / (u^T W v), with the singular vectors that the training left."""
    matrix = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    if right is None or left.shape != matrix.shape[:1] or right.shape != matrix.shape[1:]:
        raise InputError(
            f"the parts of {base!r} (spectral norm) are incomplete or do not fit a weight of shape "
            f"{list(weight.shape)}; {_REMOVE}"
        )
    norm: Tensor = left @ (matrix @ right)
    return weight / norm
