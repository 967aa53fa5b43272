"""Compaction: a model with smaller tensors whose output equals that of the masked model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..lift import lift, read
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture, AttentionSpec, BranchSpec
from ..network.modules.layers import affine, normalize
from ..network.modules.model import CompactModel, build
from ..network.modules.rope import angle_zero
from ..network.modules.select import Choices
from .folding import fold_constants
from .plan import Plan, plan
from .plan_attention import Index
from .plan_tokens import BranchPlan


def compact(
    model: nn.Module,
    mask: StructuredMask,
    *,
    last_queries: bool | None = None,
    proof: bool = True,
) -> CompactModel:
    """Remove what `mask` does not keep.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`. It is not changed.
        mask: What to keep. Missing entries keep everything.
        last_queries: Whether the last block computes only the tokens that the head reads (exact).
            None, the default, leaves the choice of the architecture.
        proof: Whether to run `model` beside what was read from it, as in `lift`.

    Returns:
        A smaller module, equal to `masked(model, mask)` (fp32, relative 1e-5), in the mode of
        `model`. Shapes: (batch, channels, height, width) -> (batch, classes).

    Raises:
        InputError: The mask does not fit the model; the message names the entry.
        UnsupportedModel: A module has no rule, or computes something else than its weights and
            type describe; the message names its path.
    """
    # The source's own tensors, not copies; slicing copies what is kept.
    # A `CompactModel` in half precision is converted before.
    given = lift(model, proof=proof) if isinstance(model, CompactModel) else model
    source = read(given, proof=proof)
    surgery = plan(source.spec, mask)
    architecture = surgery.architecture
    if last_queries is not None:
        architecture = architecture.model_copy(update={"last_queries": last_queries})
    with torch.no_grad():
        state = cut(surgery, source.tensors)
    result = build(architecture, state)
    result.train(model.training)
    return fold_constants(result)


def output_error(reference: nn.Module, model: nn.Module, images: Tensor) -> float:
    """Largest difference of two networks' outputs, relative to the largest output of the first.

    Both are left in evaluation mode. Where both select the same patches at the same places, the
    second one gets the choices of the first: equal scores may differ in their last digits.
    """
    reference.eval()
    model.eval()
    first, second = _architecture_of(reference), _architecture_of(model)
    with torch.inference_mode():
        if first is None or second is None or not _comparable(first, second):
            wanted, found = reference(images), model(images)
        else:
            choices = Choices()
            wanted = reference(images, choices=choices)
            found = model(images, choices=Choices(given=choices.found))
    return float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))


def score_error(reference: nn.Module, model: nn.Module, images: Tensor) -> float:
    """Largest difference of the scores by which two networks choose the same number of patches.

    Relative to the largest score of each selection; 0 where `output_error` runs them freely. Both
    are left in evaluation mode, and the second one gets the choices of the first.
    """
    reference.eval()
    model.eval()
    first, second = _architecture_of(reference), _architecture_of(model)
    if first is None or second is None or not _comparable(first, second):
        return 0.0
    wanted = Choices(scores=[])
    with torch.inference_mode():
        reference(images, choices=wanted)
        found = Choices(given=wanted.found, scores=[])
        model(images, choices=found)
    assert wanted.scores is not None
    assert found.scores is not None
    return max(
        float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))
        for one, other in zip(wanted.scores, found.scores, strict=True)
    )


def _architecture_of(model: nn.Module) -> Architecture | None:
    network = getattr(model, "network", model)
    return network.architecture if isinstance(network, CompactModel) else None


def _comparable(first: Architecture, second: Architecture) -> bool:
    """Whether the choices of one network are places in the stream of the other."""
    names = [[select.name for select in each.selects] for each in (first, second)]
    return bool(first.selects) and names[0] == names[1] and first.order == second.order


def cut(surgery: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slice every tensor of `state` as planned.

    `state` has the weights by name, or tensors of their shapes, such as moments of an optimizer.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(("steps.", "selects.")) and not _left(surgery, name):
            result[name] = index_select_axes(tensor, surgery.outer.get(name, ()))
    for number, row in enumerate(surgery.branches):
        for position, branch in enumerate(row):
            old, new = f"steps.{branch.step}.{branch.position}.", f"steps.{number}.{position}."
            inner = {
                name.removeprefix(old): tensor
                for name, tensor in state.items()
                if name.startswith(old)
            }
            if branch.constant:
                spec = surgery.source.steps[branch.step][branch.position]
                result[f"{new}core.value"] = constant_of(spec, branch, inner)
                continue
            for name, tensor in inner.items():
                indices = branch.slices.get(name, ())
                if name == "core.rope.table":
                    tensor = _with_angle_zero(tensor, indices)
                result[new + name] = index_select_axes(tensor, indices)
    for number, select in enumerate(surgery.selects):
        old, new = f"selects.{select.number}.", f"selects.{number}."
        for name, tensor in state.items():
            slices = select.slices.get(name.removeprefix(old), ())
            empty = any(index is not None and not len(index) for index in slices)
            if name.startswith(old) and not empty:
                result[new + name.removeprefix(old)] = index_select_axes(tensor, slices)
    return result


def cut_names(surgery: Plan, names: Iterable[str]) -> dict[str, str]:
    """New name -> old name of every parameter that a cut keeps or slices."""
    moved = {
        f"steps.{branch.step}.{branch.position}.": f"steps.{number}.{position}."
        for number, row in enumerate(surgery.branches)
        for position, branch in enumerate(row)
        if not branch.constant
    }
    moved |= {
        f"selects.{select.number}.": f"selects.{number}."
        for number, select in enumerate(surgery.selects)
    }
    found: dict[str, str] = {}
    for name in names:
        if _left(surgery, name):
            continue
        parts = {"steps": 3, "selects": 2}.get(name.split(".")[0], 0)
        if not parts:
            found[name] = name
            continue
        old = ".".join(name.split(".")[:parts]) + "."
        if old in moved:
            found[moved[old] + name.removeprefix(old)] = name
    return found


def _left(surgery: Plan, name: str) -> bool:
    """Whether a parameter is that of the learned tokens, none of which is left."""
    return name == "prefix" and not surgery.architecture.learned_tokens


def _with_angle_zero(table: Tensor, indices: tuple[Index, ...]) -> Tensor:
    """A table of cosines and sines (heads or 1, 2, tokens, pairs) with a row that rotates nothing.

    It is that of learned tokens that move between the patches; it is appended where the indices
    name it.
    """
    rows = indices[2] if indices else None
    if rows is None or int(rows.max()) < table.shape[2]:
        return table
    return torch.cat([table, angle_zero(table)], dim=2)


def index_select_axes(tensor: Tensor, indices: tuple[Tensor | None, ...]) -> Tensor:
    """Select `indices[i]` along axis i (None = all); the result owns its memory.

    The last index may have the shape (rows, kept), with other entries for each row of the first
    axis. A tensor without that axis (one weight for all heads), or with a single row, is repeated.
    """
    source = tensor
    each = indices[-1] if indices and indices[-1] is not None and indices[-1].ndim == 2 else None
    for axis, index in enumerate(indices[:-1] if each is not None else indices):
        if index is not None and not _selects_all(index, tensor.shape[axis]):
            tensor = tensor.index_select(axis, index.to(tensor.device))
    if each is not None:
        each = each.to(tensor.device)
        tensor = tensor[None] if tensor.ndim == 1 else tensor
        rows = tensor.expand(len(each), *tensor.shape[1:])
        shape = (len(each), *([1] * (tensor.ndim - 2)), each.shape[1])
        return rows.gather(-1, each.view(shape).expand(*rows.shape[:-1], -1))
    return tensor.clone(memory_format=torch.contiguous_format) if tensor is source else tensor


def _selects_all(index: Tensor, size: int) -> bool:
    return len(index) == size and torch.equal(index, torch.arange(size, device=index.device))


def constant_of(spec: BranchSpec, branch: BranchPlan, inner: Mapping[str, Tensor]) -> Tensor:
    """The constant that a sub-layer without units writes: layer_scale * post_norm(output bias)."""
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
