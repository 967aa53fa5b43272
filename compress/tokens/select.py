"""Selections of tokens by content, added to a network: where, how many, and by which scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..network.architecture import Architecture, AttentionSpec, NormSpec, PredictorSpec, SelectSpec
from ..network.modules.model import CompactModel
from ..network.modules.select import Choices
from ..network.select_specs import ATTENTION_SCORERS, NAME_PREFIX, Scorer
from ..network.token_order import grid_places

SelectMethod = Literal["dynamicvit", "dps", "evit", "class-attention", "column-attention", "random"]
# How each method scores patches.
SCORERS: dict[SelectMethod, Scorer] = {
    "dynamicvit": "predictor",
    "dps": "predictor",
    "evit": "class-attention",
    "class-attention": "class-attention",
    "column-attention": "column-attention",
    "random": "random",
}
RatioRule = Literal["geometric", "subtractive"]
# Hidden units of the module of DPS-ViT.
_DPS_UNITS = 64
_INITIAL_STD = 0.02
_SUBTRACTED = 0.2


def select_tokens(
    model: nn.Module,
    method: SelectMethod = "class-attention",
    *,
    ratio: float = 0.7,
    stages: Sequence[int] | None = None,
    rule: RatioRule = "geometric",
    counts: Sequence[int] | None = None,
    seed: int = 0,
) -> CompactModel:
    """Add selections that keep a constant number of patches, chosen for each image.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`. It is not changed.
        method: "dynamicvit", a predictor before each stage; "dps", a smaller one; "class-attention"
            (default), "column-attention" and "evit", the attention of the stage itself, "evit" with
            a token that fuses the dropped ones; "random", the same places for all images.
            Predictors start with random weights and need training, the others none.
        ratio: The share of patches to keep at the first stage, above 0 and below 1.
        stages: Blocks, counted from 0: predictors choose before them, attentions within them. None:
            three stages, after each quarter of the depth.
        rule: "geometric": ratio, ratio², ratio³...; "subtractive": ratio, ratio - 0.2, ...
        counts: The number of patches that each stage keeps, instead of `ratio` and `rule`.
        seed: For the weights of predictors and for "random".

    Returns:
        A network with selections, in the mode of `model`. Shapes: (batch, channels, height, width)
        -> (batch, classes).

    Raises:
        InputError: A stage does not exist, or its count leaves no patch or drops none.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Rao et al. 2021, "DynamicViT: Efficient Vision Transformers with Dynamic Token
        Sparsification"; Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers"
        (DPS); Liang et al. 2022, "Not All Patches Are What You Need" (EViT).
    """
    if method not in SCORERS:
        raise InputError(f"method {method!r} is unknown; choose one of {', '.join(SCORERS)}")
    source = lift(model)
    architecture = source.architecture
    architecture.require_no_selects("select_tokens")
    places = stages_of(architecture, method, stages)
    kept = kept_patches(architecture, method, ratio, rule, places, counts)
    selects = tuple(
        _select(architecture, method, stage, count, seed)
        for stage, count in zip(places, kept, strict=True)
    )
    changed = architecture.model_copy(update={"selects": selects})
    try:
        changed = Architecture.model_validate(changed.model_dump(by_alias=True))
    except ValidationError as error:
        message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise InputError(f"select_tokens: {message}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = CompactModel(changed)
        _initialize(result)
    state = copy.deepcopy(source.state_dict())
    result.load_state_dict(state | _own_state(result), assign=True)
    return result.to(next(source.parameters()).device).train(model.training)


def stages_of(
    architecture: Architecture, method: SelectMethod, stages: Sequence[int] | None
) -> tuple[int, ...]:
    """The blocks of the stages, increasing.

    Args:
        architecture: The network.
        method: The method; one that scores by attention has no use of the last block.
        stages: Blocks, counted from 0. None: after each quarter of the depth.

    Raises:
        InputError: A block does not exist, or they are not increasing.
    """
    depth = len(architecture.block_names)
    if stages is None:
        end = depth - 1 if SCORERS[method] in ATTENTION_SCORERS else depth
        stages = sorted({max(1, depth * part // 4) for part in (1, 2, 3)} & set(range(1, end)))
    found = tuple(stages)
    if not found or list(found) != sorted(set(found)):
        raise InputError(f"token stages {list(found)}: give increasing numbers of blocks")
    for stage in found:
        if not 0 <= stage < depth:
            raise InputError(f"token stage {stage}: the model has blocks 0 to {depth - 1}")
    return found


def kept_patches(
    architecture: Architecture,
    method: SelectMethod,
    ratio: float,
    rule: RatioRule,
    stages: Sequence[int],
    counts: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The number of patches that each stage keeps.

    Of the patches of the stem, rounded down, as in DynamicViT; "evit" keeps a share of the tokens
    that are there, rounded up, a fused one among them.

    Args:
        architecture: The network.
        method: The method, as in `select_tokens`.
        ratio: The share that the first stage keeps, above 0 and below 1.
        rule: How the share goes on, as in `select_tokens`.
        stages: The blocks of the stages.
        counts: The numbers themselves, instead of `ratio` and `rule`.

    Returns:
        One number for each stage, decreasing.

    Raises:
        InputError: A count leaves no patch, or drops none.
    """
    if not 0 < ratio < 1:
        raise InputError(f"token ratio = {ratio}: give a number above 0 and below 1")
    if counts is not None and len(counts) != len(stages):
        raise InputError(f"token counts: {len(counts)} numbers for {len(stages)} stages")
    found: list[int] = []
    present = architecture.patches
    for number, stage in enumerate(stages):
        share = ratio ** (number + 1) if rule == "geometric" else ratio - number * _SUBTRACTED
        if counts is not None:
            kept = counts[number]
        elif method == "evit":
            kept = math.ceil(ratio * present - 1e-9)
        else:
            # 0.7 * 10 is 6.999...
            kept = math.floor(share * architecture.patches + 1e-9)
        fused = method == "evit"
        if kept < 1:
            raise InputError(
                f"token ratio = {ratio} ({rule}): no patch is left at block {stage}, the "
                f"{number + 1}. of {len(stages)} stages; choose a larger ratio or fewer stages"
            )
        if kept + fused >= present:
            raise InputError(
                f"token counts: block {stage} keeps {kept + fused} tokens of {present} patches, "
                "so nothing is dropped; choose a smaller ratio"
            )
        found.append(kept)
        present = kept + fused
    return tuple(found)


def stage_of(select: SelectSpec) -> int:
    """The block of the source model at which `select_tokens` placed a selection."""
    return int(select.name.removeprefix(NAME_PREFIX))


def chosen_tokens(model: CompactModel, images: Tensor) -> list[Tensor]:
    """The places in the grid of the patches that each selection keeps.

    Args:
        model: A network with selections.
        images: (batch, channels, height, width).

    Returns:
        For each selection a tensor (batch, kept), row by row from the top left; a fused token is
        -1.
    """
    choices = Choices()
    with torch.inference_mode():
        model(images, choices=choices)
    architecture = model.architecture
    places = torch.tensor(grid_places(architecture)).expand(len(images), -1)
    found: list[Tensor] = []
    for select, kept in zip(architecture.selects, choices.found, strict=True):
        places = places.gather(1, kept.cpu())
        if select.fused:
            places = torch.cat([places, places.new_full((len(places), 1), -1)], dim=1)
        found.append(places)
    return found


def _select(
    architecture: Architecture, method: SelectMethod, stage: int, count: int, seed: int
) -> SelectSpec:
    block = architecture.block_names[stage]
    end = architecture.block_ends[stage]
    start = architecture.block_ends[stage - 1] if stage else 0
    at, scorer = start, SCORERS[method]
    if scorer in ATTENTION_SCORERS:
        attentions = [
            number
            for number in range(start, end)
            if any(isinstance(b.core, AttentionSpec) for b in architecture.steps[number])
        ]
        if not attentions:
            raise InputError(f"token stage {stage}: {block} has no attention left; choose another")
        at = attentions[0] + 1
    width, predictor, norm = architecture.embed, None, None
    if scorer == "predictor":
        norm = NormSpec(width=width, eps=1e-5)
        if method == "dps":
            half = min(_DPS_UNITS, width) // 2
            predictor = PredictorSpec(local=half, pooled=half)
        else:
            hidden = (max(1, width // 2), max(1, width // 4))
            predictor = PredictorSpec(local=width - width // 2, pooled=width // 2, hidden=hidden)
    return SelectSpec(
        name=f"select.{stage}",
        at=at,
        patches=count,
        scorer=scorer,
        predictor=predictor,
        norm=norm,
        fused=method == "evit",
        seed=seed + stage if scorer == "random" else 0,
    )


def _initialize(model: CompactModel) -> None:
    for module in model.selects.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=_INITIAL_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _own_state(model: CompactModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "selects." in name[:8]}
