"""Folding of constant sub-layers into existing biases, where they cost nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn

from ..network.architecture import AttentionSpec, ConstantSpec, FfnSpec
from ..network.modules.attention import Attention
from ..network.modules.branch import Branch, Constant
from ..network.modules.layers import Ffn
from ..network.modules.model import CompactModel
from ..network.modules.select import Select


def fold_constants(model: CompactModel) -> CompactModel:
    """Fold each constant sub-layer into the bias that is written just before it.

    A constant without such a bias stays as it is. The output does not change. `model` is modified.
    """
    architecture = model.architecture
    if not any(isinstance(branch.core, ConstantSpec) for branch in architecture.branches):
        return model
    steps: list[list[Branch]] = []
    # The number of steps that stay before each old one.
    starts: list[int] = []
    reading = {select.at for select in architecture.selects}
    with torch.no_grad():
        for number, branches in enumerate(cast("Iterable[Sequence[Branch]]", model.steps)):
            starts.append(len(steps))
            kept = [branch for branch in branches if not isinstance(branch.core, Constant)]
            # Nothing may read the stream between the bias and the constant: it must belong to a
            # branch of the same step, else to the step before, or to the stem.
            siblings = list(kept)
            for branch in branches:
                if not isinstance(branch.core, Constant):
                    continue
                # A selection reads the stream between the step before and this one.
                alone = number in reading and not siblings
                if alone or not _fold(model, branch, siblings, steps):
                    kept.append(branch)
            if kept:
                steps.append(kept)
    model.steps = nn.ModuleList(nn.ModuleList(row) for row in steps)
    starts.append(len(steps))
    selects = [s.model_copy(update={"at": starts[s.at]}) for s in architecture.selects]
    for module, spec in zip(cast("Iterable[Select]", model.selects), selects, strict=True):
        module.spec = spec
    specs = tuple(tuple(branch.spec for branch in row) for row in steps)
    model.architecture = architecture.model_copy(update={"steps": specs, "selects": tuple(selects)})
    return model


def _fold(
    model: CompactModel, constant: Branch, siblings: list[Branch], steps: list[list[Branch]]
) -> bool:
    if siblings:
        return _into_step(constant, siblings)
    if constant.spec.tokens is not None:
        # Tokens leave with it.
        return False
    # The stream at the end of a block is an output, too.
    block = _block_of(model, constant)
    if not steps:
        return block == 0 and _into_stem(model, constant)
    return block == _block_of(model, steps[-1][0]) and _into_step(constant, steps[-1])


def _block_of(model: CompactModel, branch: Branch) -> int:
    blocks = enumerate(model.architecture.block_names)
    name = branch.spec.name
    return next((number for number, block in blocks if name.startswith(f"{block}.")), -1)


def _into_step(constant: Branch, row: list[Branch]) -> bool:
    for branch in row:
        if branch.spec.writes != constant.spec.writes or branch.post_norm is not None:
            continue
        bias = _out_bias(branch)
        if bias is None:
            continue
        value = _value(constant)
        if branch.layer_scale is not None:
            if bool((branch.layer_scale.abs() < 1e-3).any()):
                # Division by a tiny scale loses precision.
                continue
            value = value / branch.layer_scale
        bias += value
        return True
    return False


def _into_stem(model: CompactModel, constant: Branch) -> bool:
    if model.stem_norm is not None or model.architecture.stem_writes != constant.spec.writes:
        return False
    patches: torch.Tensor | None = model.position
    if patches is None and model.patch_norm is None:
        patches = model.stem.bias
    if patches is None:
        return False
    patches.add_(_value(constant))
    if model.prefix is not None:
        model.prefix.add_(_value(constant))
    return True


def _out_bias(branch: Branch) -> torch.Tensor | None:
    core = branch.core
    if isinstance(core, Attention) and isinstance(branch.spec.core, AttentionSpec):
        return core.out.bias
    if isinstance(core, Ffn) and isinstance(branch.spec.core, FfnSpec):
        return core.fc2.bias
    return core.value if isinstance(core, Constant) else None


def _value(constant: Branch) -> torch.Tensor:
    assert isinstance(constant.core, Constant)
    return constant.core.value
