"""The surgery: take out of a Vision Transformer what a mask says, so that its tensors are smaller
and its output is the masked model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..lift import read
from ..masks.mask import StructuredMask
from ..network.architecture import AttentionSpec, BranchSpec
from ..network.modules.model import CompactModel, build
from ..network.modules.layers import affine, normalize
from .folding import fold_constants
from .plan import BranchPlan, Plan, plan


def compact(
    model: nn.Module, mask: StructuredMask, *, last_queries: bool | None = None
) -> CompactModel:
    """A physically smaller model whose output equals `masked(model, mask)` (fp32, relative 1e-5).

    `model`: any supported Vision Transformer, or a `CompactModel`. `last_queries`: in the last
    block compute only the tokens that the head reads (exact); None leaves the architecture's own
    choice. Errors: UnsupportedModel with the module's path; InputError if the mask does not fit.
    """
    # The source's own tensors, not copies of them: what is kept is copied when it is cut out.
    source = read(model)
    surgery = plan(source.spec, mask)
    architecture = surgery.architecture
    if last_queries is not None:
        architecture = architecture.model_copy(update={"last_queries": last_queries})
    with torch.no_grad():
        state = cut(surgery, source.tensors)
    result = build(architecture, state)
    result.train(model.training)
    return fold_constants(result)


def cut(surgery: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slice every tensor of `state` (weights, or anything shaped like them, such as optimizer
    moments) as planned.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("steps."):
            result[name] = take(tensor, surgery.outer.get(name, ()))
    for number, row in enumerate(surgery.branches):
        for position, branch in enumerate(row):
            old, new = f"steps.{branch.step}.{branch.position}.", f"steps.{number}.{position}."
            inner = {
                name.removeprefix(old): tensor
                for name, tensor in state.items()
                if name.startswith(old)
            }
            if branch.constant:
                result[f"{new}core.value"] = constant_of(
                    surgery.source.steps[branch.step][branch.position], branch, inner
                )
                continue
            for name, tensor in inner.items():
                result[new + name] = take(tensor, branch.slices.get(name, ()))
    return result


def cut_names(surgery: Plan, names: Iterable[str]) -> dict[str, str]:
    """New name -> old name of every parameter that survives a cut as itself."""
    moved = {
        f"steps.{branch.step}.{branch.position}.": f"steps.{number}.{position}."
        for number, row in enumerate(surgery.branches)
        for position, branch in enumerate(row)
        if not branch.constant
    }
    found: dict[str, str] = {}
    for name in names:
        if not name.startswith("steps."):
            found[name] = name
            continue
        old = ".".join(name.split(".")[:3]) + "."
        if old in moved:
            found[moved[old] + name.removeprefix(old)] = name
    return found


def take(tensor: Tensor, indices: tuple[Tensor | None, ...]) -> Tensor:
    """Keep `indices[i]` along axis i (None = all); the result owns its memory.

    An index of shape (rows, kept), which only the last axis may have, keeps other entries in each
    row: rows run along the first axis, and a tensor without one (one weight for all heads) or with
    a single row is repeated.
    """
    source = tensor
    each = indices[-1] if indices and indices[-1] is not None and indices[-1].ndim == 2 else None
    for axis, index in enumerate(indices[:-1] if each is not None else indices):
        if index is not None and len(index) != tensor.shape[axis]:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    if each is not None:
        each = each.to(tensor.device)
        tensor = tensor[None] if tensor.ndim == 1 else tensor
        rows = tensor.expand(len(each), *tensor.shape[1:])
        shape = (len(each), *([1] * (tensor.ndim - 2)), each.shape[1])
        return rows.gather(-1, each.view(shape).expand(*rows.shape[:-1], -1))
    return tensor.clone(memory_format=torch.contiguous_format) if tensor is source else tensor


def constant_of(spec: BranchSpec, branch: BranchPlan, inner: Mapping[str, Tensor]) -> Tensor:
    """What a sub-layer without units still writes: layer_scale * post_norm(output bias)."""
    leaf = "core.out.bias" if isinstance(spec.core, AttentionSpec) else "core.fc2.bias"
    reference = next(iter(inner.values()))
    rows = branch.slices[leaf][0]
    assert rows is not None
    value = inner[leaf][rows] if leaf in inner else reference.new_zeros(len(rows))
    if spec.post_norm is not None:
        sized = spec.post_norm.model_copy(update={"width": len(rows)})
        parts = [
            inner[name][rows] if name in inner else None
            for name in ("post_norm.weight", "post_norm.bias")
        ]
        value = affine(normalize(value, sized), *parts)
    if "layer_scale" in inner:
        value = value * inner["layer_scale"][rows]
    return value
