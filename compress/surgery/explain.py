"""What the compactor does to a model, told: for every tensor which masks cut it, from what shape to
what; parameters and multiply-adds either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..lift import read
from ..masks.groups import SHARED
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture
from ..network.axes import POOL_SITES, Axis, parameter_axes
from ..network.count import branch_macs, branch_tokens, count_macs, count_params
from ..network.modules.model import CompactModel
from .plan import Plan, plan

if TYPE_CHECKING:
    from rich.table import Table

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorCut:
    """One parameter: its shape before and after (None: gone), and the mask entries,
    `dimension/site`, that cut it.
    """

    tensor: str
    before: Shape
    after: Shape | None
    masks: tuple[str, ...]


@dataclass(frozen=True)
class ModuleCut:
    """A sub-layer, or what is outside of them (`stem`, `head`): its tensors, and (before, after) of
    parameters and multiply-adds of one image.
    """

    module: str
    fate: str
    tensors: tuple[TensorCut, ...]
    params: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True)
class Explanation:
    """All modules in order, and the totals; a constant that folding moves elsewhere still counts
    here.
    """

    modules: tuple[ModuleCut, ...]
    params: tuple[int, int]
    macs: tuple[int, int]

    def table(self, *, tensors: bool = True) -> Table:
        """A rich table: one line a module, and with `tensors` one a tensor that was cut."""
        from rich.table import Table

        table = Table(show_edge=False, pad_edge=False)
        for column in ("module", "from", "to", "cut by", "parameters", "MACs"):
            table.add_column(
                column,
                justify="right" if column in ("parameters", "MACs") else "left",
                no_wrap=True,
            )
        for module in self.modules:
            table.add_row(
                module.module, "", module.fate, "", _change(module.params), _change(module.macs)
            )
            for cut in module.tensors if tensors else ():
                if cut.after != cut.before:
                    table.add_row(
                        f"  {cut.tensor}",
                        _shape(cut.before),
                        _shape(cut.after),
                        ", ".join(cut.masks),
                    )
        table.add_row("all", "", "", "", _change(self.params), _change(self.macs))
        return table


def explain(model: nn.Module | Architecture, mask: StructuredMask) -> Explanation:
    """What `compact(model, mask)` cuts, without cutting. Errors: as `compact`."""
    source = model if isinstance(model, Architecture) else read(model).spec
    surgery = plan(source, mask)
    after = surgery.architecture
    shapes, new_shapes = _shapes(source), _shapes(after)
    names = dict(_renamed(surgery))
    axes = parameter_axes(source)
    places = {
        f"steps.{number}.{position}.": (number, position)
        for number, step in enumerate(source.steps)
        for position in range(len(step))
    }
    grouped: dict[str, list[TensorCut]] = {}
    for name, shape in shapes.items():
        prefix = next((prefix for prefix in places if name.startswith(prefix)), None)
        module = (
            _outside(name)
            if prefix is None
            else source.steps[places[prefix][0]][places[prefix][1]].name
        )
        new = new_shapes.get(
            name if prefix is None else names.get(prefix, "gone.") + name.removeprefix(prefix)
        )
        entries = _entries(axes.get(name, ())[-len(shape) :], mask) if new != shape else ()
        if new is None and prefix is not None:
            block = _entries((Axis("block", module),), mask)
            entries = block or entries
        grouped.setdefault(module, []).append(
            TensorCut(name.removeprefix(prefix or ""), shape, new, entries)
        )
    fates = {branch.name: branch.core.kind for branch in after.branches}
    macs, new_macs = _macs(source), _macs(after)
    params, new_params = _params(source, shapes), _params(after, new_shapes)
    order = ["stem", *(branch.name for branch in source.branches), "head"]
    modules = tuple(
        ModuleCut(
            name,
            ""
            if name in ("stem", "head") or fates.get(name) not in (None, "constant")
            else fates.get(name, "removed"),
            tuple(grouped.get(name, ())),
            (params.get(name, 0), new_params.get(name, 0)),
            (macs.get(name, 0), new_macs.get(name, 0)),
        )
        for name in order
    )
    return Explanation(
        modules,
        (count_params(source), count_params(after)),
        (count_macs(source), count_macs(after)),
    )


def _shapes(architecture: Architecture) -> dict[str, Shape]:
    with torch.device("meta"):
        return {
            name: tuple(parameter.shape)
            for name, parameter in CompactModel(architecture).named_parameters()
        }


def _renamed(surgery: Plan) -> Iterator[tuple[str, str]]:
    """Prefixes of the sub-layers that survive, old and new."""
    for number, row in enumerate(surgery.branches):
        for position, branch in enumerate(row):
            yield f"steps.{branch.step}.{branch.position}.", f"steps.{number}.{position}."


def _outside(name: str) -> str:
    return (
        "stem"
        if name.split(".")[0] in ("before", "stem", "prefix", "position", "patch_norm", "stem_norm")
        else "head"
    )


def _entries(axes: tuple[Axis, ...], mask: StructuredMask) -> tuple[str, ...]:
    """The mask entries that say something about these axes."""
    found: dict[str, None] = {}
    for axis in axes:
        words = axis.dimension.replace("kv", "head").split("*")
        dimensions = (
            ["qk"] if axis.dimension == "pair" else [word for word in words if word in mask.kept]
        )
        for dimension in dimensions:
            entries = mask.kept.get(dimension, {})
            site = axis.site if axis.site in entries or axis.site in POOL_SITES else SHARED
            if site in entries and not bool(entries[site].all()):
                found[f"{dimension}/{site}"] = None
    return tuple(found)


def _macs(architecture: Architecture) -> dict[str, int]:
    found = {
        branch.name: branch_macs(branch, architecture.embed, seen, asked)
        for branch, seen, asked in branch_tokens(architecture)
    }
    sizes, stem = architecture.stem.sizes(*architecture.image[1:]), architecture.stem
    widths = [
        architecture.image[0],
        *(conv.channels for conv in stem.before),
        architecture.read_width(architecture.stem_writes),
    ]
    kernels = [*(conv.kernel for conv in stem.before), stem.patch]
    found["stem"] = sum(
        math.prod(size) * width * wider * math.prod(kernel)
        for size, width, wider, kernel in zip(sizes, widths[:-1], widths[1:], kernels, strict=True)
    )
    # Pooling and classifiers are all the rest.
    return found | {"head": count_macs(architecture) - sum(found.values())}


def _params(architecture: Architecture, shapes: dict[str, Shape]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        words = name.split(".")
        module = (
            architecture.steps[int(words[1])][int(words[2])].name
            if words[0] == "steps"
            else _outside(name)
        )
        found[module] = found.get(module, 0) + math.prod(shape)
    return found


def _shape(shape: Shape | None) -> str:
    return "gone" if shape is None else " x ".join(str(size) for size in shape)


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
