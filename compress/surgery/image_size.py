"""The same network for another image size.

Positions are resampled, rotary tables are recomputed, and nothing else changes. The results equal
those of timm's `set_input_size`: bicubic with antialiasing for positions, geometrically spaced
offsets for relative biases (Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers").

Where patches leave the stream by a mask, the map of where each leaves is resampled like a picture
and the counts are scaled, which is approximate: `Architecture.tokens_resampled` records it.
"""

from __future__ import annotations

import math

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import InputError
from ..lift import lift, read
from ..network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    Indices,
    Order,
    RelativeBiasSpec,
)
from ..network.modules.model import CompactModel, build
from ..network.modules.relative_bias import bias_table
from ..network.modules.rope import rope_table, stream_table
from ..network.patch_grid import (
    Size,
    format_image_size,
    parse_image_size,
    require_few_tokens,
    require_whole_patches,
)
from ..network.token_order import grid_places


def resized(model: nn.Module, image_size: int | str | Size) -> CompactModel:
    """The network for images of another height and width.

    The accuracy differs from that at the trained size. A token mask is resampled, approximately.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`. It is not changed.
        image_size: (height, width) in pixels, one number for both, or text such as "160x192".

    Returns:
        A network with weights of its own, in the mode of `model`; `lift(model)` if the size is the
        same. Shapes: (batch, channels, height, width) -> (batch, classes).

    Raises:
        InputError: The size does not make whole patches, or a part of the network cannot be
            resized; the message names the nearest possible sizes, or the part.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        timm, `VisionTransformer.set_input_size`.
    """
    source = read(model)
    old, new = source.spec, at_image_size(source.spec, image_size)
    if new.image == old.image:
        return lift(model)
    old.require_no_selects("resized")
    with torch.no_grad():
        state = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in source.tensors.items()
        }
        if "position" in state:
            table = _positions(whole_grid(state["position"], old), old, new)
            state["position"] = table[list(grid_places(new))]
        for number, step in enumerate(new.steps):
            for position, branch in enumerate(step):
                prefix, before = f"steps.{number}.{position}.core.", old.steps[number][position]
                _resize(state, prefix, branch, before, new)
    return build(new, state).train(model.training)


def at_image_size(architecture: Architecture, image_size: int | str | Size) -> Architecture:
    """The architecture for another image size, without weights.

    Raises:
        InputError: As for `resized`.
    """
    size = parse_image_size(image_size)
    if size == architecture.image[1:]:
        return architecture
    require_whole_patches(architecture, size)
    require_few_tokens(architecture, size)
    grid = architecture.stem.sizes(*size)[-1]
    if architecture.position and architecture.position_resize is None and grid != architecture.grid:
        reason = (
            "the positions were resampled when the model was read, from a table that is not kept"
        )
        raise _not_resizable(size, "position", reason)
    order = _resampled_order(architecture, grid)
    inner = _resampled_inner(architecture, grid)
    steps = tuple(
        tuple(_at_grid(branch, grid, (order, inner), architecture, size) for branch in step)
        for step in architecture.steps
    )
    resampled = architecture.drops_tokens and grid != architecture.grid
    update = {
        "image": (architecture.image[0], *size),
        "steps": steps,
        "order": order,
        "inner": inner,
        "tokens_resampled": architecture.tokens_resampled or resampled,
    }
    data = architecture.model_copy(update=update).model_dump(by_alias=True)
    return Architecture.model_validate(data)


def exit_depths(architecture: Architecture, steps: int | None = None) -> Tensor:
    """The number of sites at which the stream carries each patch, (rows, columns).

    Sites are the stem and each step; 0 for a patch that is never embedded.

    Args:
        architecture: The network.
        steps: Counts the stem and the first steps alone. None: all.
    """
    depths = torch.zeros(math.prod(architecture.grid))
    for count in (architecture.tokens, *architecture.step_tokens(last_queries=False)[:steps]):
        depths[list(grid_places(architecture, count))] += 1
    return depths.view(architecture.grid)


def _resampled_order(architecture: Architecture, grid: Size) -> Order | None:
    """The order of the patches at another grid, by the resampled depths."""
    if grid == architecture.grid or not architecture.drops_tokens:
        return architecture.order
    depths = F.interpolate(
        exit_depths(architecture)[None, None], size=grid, mode="bilinear", align_corners=False
    )
    count = _scaled(architecture.tokens, grid, architecture) - architecture.learned_tokens
    ranked = torch.argsort(depths.flatten(), descending=True, stable=True)[:count]
    return tuple(ranked.tolist())


def _scaled(tokens: int, grid: Size, architecture: Architecture) -> int:
    """The number of tokens at another grid, of which the same share are patches."""
    share = math.prod(grid) / math.prod(architecture.grid)
    patches = len(grid_places(architecture, tokens))
    return tokens - patches + max(1, round(patches * share)) if patches else tokens


def _resampled_inner(architecture: Architecture, grid: Size) -> Indices | None:
    """The places of the learned tokens between the patches at another grid.

    Each stands in front of the patches that leave with it or before it.
    """
    if architecture.inner is None or grid == architecture.grid:
        return architecture.inner
    counts = (architecture.tokens, *architecture.step_tokens(last_queries=False))
    found: list[int] = []
    for learned, place in enumerate(architecture.inner, start=architecture.prefix):
        left = next(count for count in counts if count <= place)
        patches = _scaled(left, grid, architecture) - left + len(grid_places(architecture, left))
        found.append(learned + patches)
    return tuple(found)


def whole_grid(table: Tensor, architecture: Architecture) -> Tensor:
    """Positions of all patches, (patches of the grid, width), row by row.

    A patch that is not embedded gets that of the nearest one that is.
    """
    if architecture.order is None:
        return table
    rows, columns = architecture.grid
    places = torch.tensor(architecture.order)
    points = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    nearest = torch.cdist(points, points[places]).argmin(dim=1)
    return table[nearest.to(table.device)]


def _at_grid(
    branch: BranchSpec,
    grid: Size,
    places: tuple[Order | None, Indices | None],
    architecture: Architecture,
    size: Size,
) -> BranchSpec:
    """The spec of a sub-layer at another grid, with `order` and `inner` there."""
    core = branch.core
    if grid != architecture.grid and branch.tokens is not None:
        branch = branch.model_copy(update={"tokens": _scaled(branch.tokens, grid, architecture)})
    if not isinstance(core, AttentionSpec) or grid == architecture.grid:
        return branch
    rope, bias, (order, inner) = core.rope, core.bias, places
    if rope is not None:
        if rope.at is None:
            reason = "its rotary table is saved without the frequencies that it came from"
            raise _not_resizable(size, branch.name, reason)
        behind = (math.prod(grid) if order is None else len(order)) + len(inner or ())
        rope = rope.model_copy(update={"tokens": behind})
    if bias is not None:
        problem = _bias_problem(bias, grid)
        if problem:
            raise _not_resizable(size, branch.name, problem)
        bias = bias.model_copy(update={"grid": grid, "order": order, "inner": inner})
    return branch.model_copy(update={"core": core.model_copy(update={"rope": rope, "bias": bias})})


def _bias_problem(bias: RelativeBiasSpec, grid: Size) -> str | None:
    """Why a relative bias cannot be resized to a grid, or None."""
    old = format_image_size(bias.grid)
    if bias.resize is None:
        return (
            "its relative bias came from a function of the offset's share of the grid, "
            "which is not kept"
        )
    if bias.resize == "crop" and any(new > old for new, old in zip(grid, bias.grid, strict=True)):
        return (
            "its relative bias came from a function of the offset, which is not kept; "
            f"the table ends at {old} patches, smaller sizes work"
        )
    if bias.resize == "resample" and any(
        new > old == 1 for new, old in zip(grid, bias.grid, strict=True)
    ):
        return f"its relative bias table is for {old} patches, and one patch has no offsets"
    return None


def _not_resizable(size: Size, part: str, reason: str) -> InputError:
    wanted, (height, width) = format_image_size(size), size
    return InputError(
        f"image size {wanted}: {part}: {reason}; "
        f"lift the source model at {wanted} (timm: img_size=({height}, {width})) and cut that"
    )


def _positions(table: Tensor, old: Architecture, new: Architecture) -> Tensor:
    """(patches, width) -> (patches of the new grid, width)."""
    if old.grid == new.grid:
        return table
    if old.position_resize == "bicubic":
        # torch 2.15 misreads the layout of a single column, so there are always two.
        columns = table if table.shape[1] > 1 else table.repeat(1, 2)
        resampled: Tensor = resample_abs_pos_embed(
            columns[None], list(new.grid), list(old.grid), num_prefix_tokens=0
        )[0]
        return resampled[:, : table.shape[1]].contiguous()
    image = torch.unflatten(table.float(), 0, old.grid).permute(2, 0, 1)[None]
    scaled = F.interpolate(image, size=new.grid, mode="bilinear", align_corners=False)
    return scaled[0].flatten(1).T.to(table.dtype).contiguous()


def _resize(
    state: dict[str, Tensor], prefix: str, branch: BranchSpec, before: BranchSpec, new: Architecture
) -> None:
    """Recompute the rotary and relative bias tables of one attention."""
    core = branch.core
    if not isinstance(core, AttentionSpec) or branch == before:
        return
    assert isinstance(before.core, AttentionSpec)
    if core.rope is not None and core.rope.at is not None:
        frequencies = state[f"{prefix}rope.frequencies"]
        if frequencies.element_size() < 4:
            kind = str(frequencies.dtype).removeprefix("torch.")
            raise InputError(
                f"{branch.name}: rotary frequencies in {kind} are too coarse for another image "
                "size; use the model in float32"
            )
        table = rope_table(core.rope.at, frequencies, new.grid)
        state[f"{prefix}rope.table"] = stream_table(table, new)
    if core.bias is not None and before.core.bias is not None:
        state[f"{prefix}bias.table"] = bias_table(
            state[f"{prefix}bias.table"], before.core.bias, core.bias
        )
