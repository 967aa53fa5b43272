"""Description of a cut: for every tensor its shapes and masks, and the counts before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from ..lift import read
from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture
from ..network.axes import LEARNED, PATCHES, ROTATED, Axis, has_own_mask, parameter_axes
from ..network.count import (
    all_select_macs,
    branch_macs,
    branch_tokens,
    count_macs,
    count_params,
    stem_macs,
)
from ..network.modules.model import CompactModel
from .plan import Plan, plan

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorCut:
    """The cut of one parameter.

    Attributes:
        tensor: Its name inside the module.
        before: Its shape before.
        after: Its shape after, or None if it is removed.
        masks: The mask entries that cut it, as `dimension/site`.
    """

    tensor: str
    before: Shape
    after: Shape | None
    masks: tuple[str, ...]


@dataclass(frozen=True)
class ModuleCut:
    """The cut of a sub-layer, or of a part outside of them.

    Attributes:
        module: The name of the sub-layer, `stem` or `head`.
        status: "removed", "constant" (only its bias stays), or "".
        tensors: The cut of each of its parameters.
        params: The number of its parameters, (before, after).
        macs: The multiply-adds of one image, (before, after).
        tokens: The number of tokens that the stream carries after it, (before, after).
    """

    module: str
    status: str
    tensors: tuple[TensorCut, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Explanation:
    """All modules in order, and the totals, (before, after) each.

    A constant that `compact` folds into another bias is still counted.
    """

    modules: tuple[ModuleCut, ...]
    params: tuple[int, int]
    macs: tuple[int, int]

    def table(self, *, tensors: bool = True) -> Table:
        """A rich table with a line for each module and, with `tensors`, for each tensor cut."""
        table = Table(show_edge=False, pad_edge=False)
        for column in ("module", "from", "to", "cut by"):
            table.add_column(column, no_wrap=True)
        for column in ("parameters", "MACs"):
            table.add_column(column, justify="right", no_wrap=True)
        for module in self.modules:
            counts = _change(module.params), _change(module.macs)
            fewer = module.tokens[0] != module.tokens[1]
            before, after = (f"{count} tokens" if fewer else "" for count in module.tokens)
            table.add_row(module.module, before, module.status or after, "", *counts)
            for cut in module.tensors if tensors else ():
                if cut.after != cut.before:
                    before, after = _shape(cut.before), _shape(cut.after)
                    table.add_row(f"  {cut.tensor}", before, after, ", ".join(cut.masks))
        table.add_row("all", "", "", "", _change(self.params), _change(self.macs))
        return table


def explain(model: nn.Module | Architecture, mask: StructuredMask) -> Explanation:
    """Describe what `compact(model, mask)` cuts, without cutting.

    Raises:
        InputError: The mask does not fit the model.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    source = model if isinstance(model, Architecture) else read(model).spec
    surgery = plan(source, mask)
    after = surgery.architecture
    shapes, new_shapes = _shapes(source), _shapes(after)
    cuts = _tensor_cuts(surgery, mask, shapes, new_shapes)
    kinds = {branch.name: branch.core.kind for branch in after.branches}
    macs, new_macs = _macs(source), _macs(after)
    params, new_params = _params(source, shapes), _params(after, new_shapes)
    tokens, new_tokens = _tokens(source), _tokens(after)

    def module_cut(name: str, status: str) -> ModuleCut:
        return ModuleCut(
            name,
            status,
            tuple(cuts.get(name, ())),
            (params.get(name, 0), new_params.get(name, 0)),
            (macs.get(name, 0), new_macs.get(name, 0)),
            (tokens[name], new_tokens.get(name, tokens[name])),
        )

    modules = [module_cut("stem", "")]
    stays = {select.name for select in after.selects}
    for number, step in enumerate((*source.steps, ())):
        for select in source.selects:
            if select.at == number:
                status = "" if select.name in stays else "removed"
                modules.append(module_cut(select.name, status))
        for branch in step:
            kind = kinds.get(branch.name, "removed")
            modules.append(module_cut(branch.name, kind if kind in ("removed", "constant") else ""))
    modules.append(module_cut("head", ""))
    all_params = count_params(source), count_params(after)
    return Explanation(tuple(modules), all_params, (count_macs(source), count_macs(after)))


def _tensor_cuts(
    surgery: Plan, mask: StructuredMask, shapes: dict[str, Shape], new_shapes: dict[str, Shape]
) -> dict[str, list[TensorCut]]:
    """The cut of every tensor, by module."""
    axes, new_prefixes = parameter_axes(surgery.source), dict(_renamed(surgery))
    modules = {
        f"steps.{number}.{position}.": branch.name
        for number, step in enumerate(surgery.source.steps)
        for position, branch in enumerate(step)
    }
    modules |= {
        f"selects.{number}.": select.name for number, select in enumerate(surgery.source.selects)
    }
    found: dict[str, list[TensorCut]] = {}
    for name, shape in shapes.items():
        prefix = next((prefix for prefix in modules if name.startswith(prefix)), "")
        module = modules.get(prefix) or _outside(name)
        new_prefix = new_prefixes.get(prefix) if prefix else ""
        leaf = name.removeprefix(prefix)
        new = None if new_prefix is None else new_shapes.get(new_prefix + leaf)
        entries = _entries(axes.get(name, ())[-len(shape) :], mask) if new != shape else ()
        if new is None and prefix:
            entries = _entries((Axis("block", module),), mask) or entries
        found.setdefault(module, []).append(TensorCut(leaf, shape, new, entries))
    return found


def _shapes(architecture: Architecture) -> dict[str, Shape]:
    with torch.device("meta"):
        return {
            name: tuple(parameter.shape)
            for name, parameter in CompactModel(architecture).named_parameters()
        }


def _renamed(surgery: Plan) -> Iterator[tuple[str, str]]:
    """The old and the new prefix of each sub-layer that stays."""
    for number, row in enumerate(surgery.branches):
        for position, branch in enumerate(row):
            yield f"steps.{branch.step}.{branch.position}.", f"steps.{number}.{position}."
    for number, select in enumerate(surgery.selects):
        yield f"selects.{select.number}.", f"selects.{number}."


def _outside(name: str) -> str:
    stem = ("before", "stem", "prefix", "position", "patch_norm", "stem_norm")
    return "stem" if name.split(".")[0] in stem else "head"


def _entries(axes: tuple[Axis, ...], mask: StructuredMask) -> tuple[str, ...]:
    """The mask entries that remove something from these axes."""
    found: dict[str, None] = {}
    for axis in axes:
        if axis in (PATCHES, LEARNED, ROTATED):
            found |= {f"token/{site}": None for site in mask.kept.get("token", {})}
            continue
        dimensions = axis.dimension.replace("kv", "head").replace("pair", "qk").split("*")
        # The parts of the first layer of a predictor are two names of one mask.
        dimensions = ["ffn" if name in ("local", "pooled") else name for name in dimensions]
        for dimension in dimensions:
            entries = mask.kept.get(dimension, {})
            site = axis.site if axis.site in entries or has_own_mask(axis.site) else SHARED
            if site in entries and not bool(entries[site].all()):
                found[f"{dimension}/{site}"] = None
    return tuple(found)


def _macs(architecture: Architecture) -> dict[str, int]:
    found = {
        branch.name: branch_macs(branch, architecture.embed, tokens, queries)
        for branch, tokens, queries in branch_tokens(architecture)
    }
    found |= all_select_macs(architecture)
    found["stem"] = stem_macs(architecture)
    # The rest is pooling and classifiers.
    return found | {"head": count_macs(architecture) - sum(found.values())}


def _tokens(architecture: Architecture) -> dict[str, int]:
    """The number of tokens that the stream carries after each module."""
    found = {"stem": architecture.tokens, "head": architecture.final_tokens}
    for step, count in zip(architecture.steps, architecture.step_tokens(), strict=True):
        found |= {branch.name: count for branch in step}
    prefix = architecture.prefix
    return found | {select.name: prefix + select.left for select in architecture.selects}


def _params(architecture: Architecture, shapes: dict[str, Shape]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        words = name.split(".")
        if words[0] == "steps":
            module = architecture.steps[int(words[1])][int(words[2])].name
        elif words[0] == "selects":
            module = architecture.selects[int(words[1])].name
        else:
            module = _outside(name)
        found[module] = found.get(module, 0) + math.prod(shape)
    return found


def _shape(shape: Shape | None) -> str:
    return "gone" if shape is None else " x ".join(str(size) for size in shape)


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
