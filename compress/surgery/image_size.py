"""The same network for another image size: positions are resampled, rotary tables computed anew,
and nothing else changes.

Sources: timm's `set_input_size` (bicubic with antialias for positions, Bao et al.'s geometric
spacing for relative biases), with which the results agree.
"""

from __future__ import annotations

import math

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import InputError
from ..lift import lift, read
from ..network.architecture import Architecture, AttentionSpec, BranchSpec, RelativeBiasSpec
from ..network.modules.model import CompactModel, build
from ..network.modules.relative_bias import bias_table
from ..network.modules.rope import rope_table
from ..network.patch_grid import (
    Size,
    format_image_size,
    parse_image_size,
    require_few_tokens,
    require_whole_patches,
)


def resized(model: nn.Module, image_size: int | str | Size) -> CompactModel:
    """The network for images of another height and width; the weights are copied, and the source
    stays. Of its own size it is returned as `lift` gives it.

    `image_size`: (height, width) in pixels, one number for both, or text such as "160x192". The
    accuracy at another size is not that of the trained one. Errors: InputError naming the size and
    the nearest that work, or the part of the network that stands in the way; UnsupportedModel as
    `lift`.
    """
    source = read(model)
    old, new = source.spec, at_image_size(source.spec, image_size)
    if new.image == old.image:
        return lift(model)
    with torch.no_grad():
        state = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in source.tensors.items()
        }
        if "position" in state:
            state["position"] = _positions(state["position"], old, new)
        for number, step in enumerate(new.steps):
            for place, branch in enumerate(step):
                _resize(
                    state,
                    f"steps.{number}.{place}.core.",
                    branch,
                    old.steps[number][place],
                    new.grid,
                )
    return build(new, state).train(model.training)


def at_image_size(architecture: Architecture, image_size: int | str | Size) -> Architecture:
    """The architecture for another image size, without any weights. Errors: InputError as
    `resized`.
    """
    size = parse_image_size(image_size)
    if size == architecture.image[1:]:
        return architecture
    require_whole_patches(architecture, size)
    require_few_tokens(architecture, size)
    grid = architecture.stem.sizes(*size)[-1]
    if architecture.position and architecture.position_resize is None and grid != architecture.grid:
        raise InputError(
            f"image size {format_image_size(size)}: position: the positions were resampled when the model was read, from a table that is not kept; {_way_out(size)}"
        )
    steps = tuple(
        tuple(_at_grid(branch, grid, architecture, size) for branch in step)
        for step in architecture.steps
    )
    data = architecture.model_copy(
        update={"image": (architecture.image[0], *size), "steps": steps}
    ).model_dump(by_alias=True)
    return Architecture.model_validate(data)


def _at_grid(branch: BranchSpec, grid: Size, architecture: Architecture, size: Size) -> BranchSpec:
    """The sub-layer's spec at another grid, or a refusal that names it."""
    core = branch.core
    if not isinstance(core, AttentionSpec) or grid == architecture.grid:
        return branch
    rope, bias = core.rope, core.bias
    if rope is not None:
        if rope.at is None:
            raise InputError(
                f"image size {format_image_size(size)}: {branch.name}: its rotary table is saved without the frequencies that it came from; {_way_out(size)}"
            )
        rope = rope.model_copy(update={"tokens": math.prod(grid)})
    if bias is not None:
        reason = _bias_in_the_way(bias, grid)
        if reason:
            raise InputError(f"image size {format_image_size(size)}: {branch.name}: {reason}; {_way_out(size)}")
        bias = bias.model_copy(update={"grid": grid})
    return branch.model_copy(update={"core": core.model_copy(update={"rope": rope, "bias": bias})})


def _bias_in_the_way(bias: RelativeBiasSpec, grid: Size) -> str | None:
    larger = any(new > old for new, old in zip(grid, bias.grid, strict=True))
    if bias.resize is None:
        return "its relative bias came from a function of the offset's share of the grid, which is not kept"
    if bias.resize == "crop" and larger:
        return f"its relative bias came from a function of the offset, which is not kept; the table ends at {format_image_size(bias.grid)} patches, smaller sizes work"
    if bias.resize == "resample" and any(
        new > old == 1 for new, old in zip(grid, bias.grid, strict=True)
    ):
        return f"its relative bias table is for {format_image_size(bias.grid)} patches, and one patch knows no offsets to start from"
    return None


def _way_out(size: Size) -> str:
    return f"lift the source model at {format_image_size(size)} (timm: img_size=({size[0]}, {size[1]})) and cut that"


def _positions(table: Tensor, old: Architecture, new: Architecture) -> Tensor:
    """(patches, width) -> the same of another grid."""
    if old.grid == new.grid:
        return table
    if old.position_resize == "bicubic":
        resampled: Tensor = resample_abs_pos_embed(
            table[None], list(new.grid), list(old.grid), num_prefix_tokens=0
        )[0]
        return resampled.contiguous()
    picture = torch.unflatten(table.float(), 0, old.grid).permute(2, 0, 1)[None]
    scaled = F.interpolate(picture, size=new.grid, mode="bilinear", align_corners=False)
    return scaled[0].flatten(1).T.to(table.dtype).contiguous()


def _resize(
    state: dict[str, Tensor], prefix: str, branch: BranchSpec, before: BranchSpec, grid: Size
) -> None:
    """The tables of one attention, written anew."""
    core = branch.core
    if not isinstance(core, AttentionSpec) or branch == before:
        return
    assert isinstance(before.core, AttentionSpec)
    if core.rope is not None and core.rope.at is not None:
        frequencies = state[f"{prefix}rope.frequencies"]
        if frequencies.element_size() < 4:
            kind = str(frequencies.dtype).removeprefix("torch.")
            raise InputError(
                f"{branch.name}: rotary frequencies in {kind} are too coarse for another image size; take the model in float32"
            )
        state[f"{prefix}rope.table"] = rope_table(core.rope.at, frequencies, grid)
    if core.bias is not None and before.core.bias is not None:
        state[f"{prefix}bias.table"] = bias_table(
            state[f"{prefix}bias.table"], before.core.bias, core.bias
        )
