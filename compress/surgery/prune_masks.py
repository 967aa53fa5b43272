"""Checkpoints written with `torch.nn.utils.prune` still applied: `X_orig` and `X_mask` folded into
`X`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...core.errors import InputError

_ORIGINAL, _MASK = "_orig", "_mask"


def fold_prune_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state with `weight_orig` times `weight_mask` as `weight` (and so for any tensor);
    without such entries, unchanged.

    Errors: InputError naming the entry whose partner is missing, of another shape, or there beside
    its result.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        base = name.removesuffix(_MASK)
        if name.endswith(_MASK) and f"{base}{_ORIGINAL}" in state:
            continue
        if not name.endswith(_ORIGINAL):
            result[name] = tensor
            continue
        base = name.removesuffix(_ORIGINAL)
        mask = state.get(f"{base}{_MASK}")
        if mask is None:
            raise InputError(
                f"checkpoint entry {name!r} has no {base + _MASK!r} beside it; call torch.nn.utils.prune.remove before saving"
            )
        if mask.shape != tensor.shape:
            raise InputError(
                f"checkpoint entry {base + _MASK!r} has shape {list(mask.shape)}, {name!r} has {list(tensor.shape)}"
            )
        if base in state:
            raise InputError(f"checkpoint has both {base!r} and {name!r}; keep one")
        result[base] = tensor * mask.to(tensor.dtype)
    return result
