"""Selections of tokens by content, added to a network: where, how many, and by which scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..network.architecture import Architecture, AttentionSpec, NormSpec, PredictorSpec, SelectSpec
from ..network.architecture_checks import pinned_tokens
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
DEFAULT_RATIO = 0.7
# Hidden units of the module of DPS-ViT.
_DPS_UNITS = 64
_INITIAL_STD = 0.02
_SUBTRACTED = 0.2


class OptionNames(NamedTuple):
    """What errors call the options of a selection.

    Attributes:
        method: With a place for the method.
        ratio: A share, like the others without its value.
        stages: The blocks.
        rule: How the share goes on.
        counts: The numbers of patches.
        instead: The methods that need no class token, in terms of the caller.
    """

    method: str = 'method = "{}"'
    ratio: str = "ratio"
    stages: str = "stages"
    rule: str = "rule"
    counts: str = "counts"
    instead: str = 'method = "column-attention" or "dynamicvit"'


@dataclass(frozen=True)
class SelectRequest:
    """What `select_tokens` adds to a network.

    Attributes:
        method: As for `select_tokens`, like the next five.
        ratio: The share of patches that the first stage keeps.
        stages: Blocks, counted from 0.
        rule: How the share goes on; None: "geometric", where a share is kept of all patches.
        counts: The number of patches that each stage keeps.
        seed: For the weights of predictors and for "random".
        names: What errors call them.
    """

    method: SelectMethod = "class-attention"
    ratio: float = DEFAULT_RATIO
    stages: Sequence[int] | None = None
    rule: RatioRule | None = None
    counts: Sequence[int] | None = None
    seed: int = 0
    names: OptionNames = field(default_factory=OptionNames)

    def __post_init__(self) -> None:
        if self.method not in SCORERS:
            raise InputError(f"{self.title}: choose one of {', '.join(SCORERS)}")
        if not 0 < self.ratio < 1:
            raise InputError(
                f"{self.names.ratio} = {self.ratio}: give a number above 0 and below 1"
            )
        if self.rule is None:
            return
        rule = f"{self.names.rule} = {self.rule!r}"
        if self.rule not in get_args(RatioRule):
            raise InputError(f"{rule}: choose one of {', '.join(get_args(RatioRule))}")
        if self.counts is not None:
            raise InputError(
                f"{rule}: {self.names.counts} state what every stage keeps; leave it out"
            )
        if self.method == "evit":
            raise InputError(
                f"{rule}: evit keeps the same share of the tokens that are there in each stage; "
                "leave it out"
            )

    @property
    def title(self) -> str:
        """The method with its name."""
        return self.names.method.format(self.method)

    def stages_of(self, architecture: Architecture) -> tuple[int, ...]:
        """The blocks of the stages, increasing.

        Raises:
            InputError: A block does not exist, they are not increasing, or none can be chosen for a
                network of few blocks.
        """
        depth, name = len(architecture.block_names), self.names.stages
        if self.stages is None:
            # One that scores by attention has no use of the last block.
            end = depth - 1 if SCORERS[self.method] in ATTENTION_SCORERS else depth
            found = sorted({max(1, depth * part // 4) for part in (1, 2, 3)} & set(range(1, end)))
            if not found:
                raise InputError(
                    f"{name}: none fits {depth} blocks; name the blocks where patches are chosen, "
                    "e.g. 0"
                )
            return tuple(found)
        given = list(self.stages)
        if not given or given != sorted(set(given)):
            raise InputError(f"{name} = {given}: give increasing numbers of blocks")
        for stage in given:
            if not 0 <= stage < depth:
                raise InputError(f"{name}: {stage}; the model has blocks 0 to {depth - 1}")
        return tuple(given)

    def kept_patches(self, architecture: Architecture, stages: Sequence[int]) -> tuple[int, ...]:
        """The number of patches that each stage keeps, decreasing.

        Of the patches of the stem, rounded down, as in DynamicViT; "evit" keeps a share of the
        tokens that are there, rounded up, a fused one among them.

        Raises:
            InputError: A count leaves no patch, or drops none.
        """
        if self.counts is not None:
            return self._given_counts(architecture, stages)
        rule = "" if self.method == "evit" else f" ({self.rule or 'geometric'})"
        ratio, found, present = self.ratio, list[int](), architecture.patches
        for number, stage in enumerate(stages):
            if self.method == "evit":
                kept = math.ceil(ratio * present - 1e-9)
            else:
                falling = self.rule == "subtractive"
                share = ratio - number * _SUBTRACTED if falling else ratio ** (number + 1)
                # 0.7 * 10 is 6.999...
                kept = math.floor(share * architecture.patches + 1e-9)
            if kept < 1:
                raise InputError(
                    f"{self.names.ratio} = {ratio}{rule}: no patch is left at block {stage}, the "
                    f"{number + 1}. of {len(stages)} stages; choose a larger ratio or fewer stages"
                )
            if kept + self.fused >= present:
                raise InputError(
                    f"{self.names.ratio} = {ratio}{rule}: block {stage} keeps {kept} of {present} "
                    f"patches{self._fused_too}, so nothing is dropped; choose a smaller ratio"
                )
            found.append(kept)
            present = kept + self.fused
        return tuple(found)

    @property
    def fused(self) -> bool:
        """Whether one more token follows the kept ones: the sum of the dropped ones."""
        return self.method == "evit"

    @property
    def _fused_too(self) -> str:
        return ", and one more for the fused token" if self.fused else ""

    def _given_counts(self, architecture: Architecture, stages: Sequence[int]) -> tuple[int, ...]:
        assert self.counts is not None
        name, counts = self.names.counts, tuple(self.counts)
        if len(counts) != len(stages):
            raise InputError(
                f"{name}: {len(counts)} numbers for {len(stages)} stages; give one for each"
            )
        present, where = architecture.patches, f"where {architecture.patches} are left"
        for stage, kept in zip(stages, counts, strict=True):
            if kept < 1:
                raise InputError(
                    f"{name}: {kept} patches at block {stage}; each stage needs one at least"
                )
            if kept + self.fused >= present:
                raise InputError(
                    f"{name}: {kept} patches at block {stage}, {where}{self._fused_too}; "
                    "give fewer, so that some are dropped"
                )
            present, where = kept + self.fused, f"after {kept} at block {stage}"
        return counts


def select_tokens(
    model: nn.Module,
    method: SelectMethod = "class-attention",
    *,
    ratio: float = DEFAULT_RATIO,
    stages: Sequence[int] | None = None,
    rule: RatioRule | None = None,
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
            "class-attention" and "evit" need a head that reads a class token.
        ratio: The share of patches to keep at the first stage, above 0 and below 1.
        stages: Blocks, counted from 0: predictors choose before them, attentions within them. None:
            three stages, after each quarter of the depth.
        rule: "geometric" (None): ratio, ratio², ratio³...; "subtractive": ratio, ratio - 0.2, ...
            "evit" has none: each stage keeps the share `ratio` of the tokens that are there.
        counts: The number of patches that each stage keeps, instead of `ratio` and `rule`.
        seed: For the weights of predictors and for "random".

    Returns:
        A network with selections, in the mode of `model`. Shapes: (batch, channels, height, width)
        -> (batch, classes).

    Raises:
        InputError: A stage does not exist, its count leaves no patch or drops none, the rule has no
            effect, or the network has no class token, or positions that a fused token lacks.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Rao et al. 2021, "DynamicViT: Efficient Vision Transformers with Dynamic Token
        Sparsification"; Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers"
        (DPS); Liang et al. 2022, "Not All Patches Are What You Need" (EViT).
    """
    return with_selects(model, SelectRequest(method, ratio, stages, rule, counts, seed))


def with_selects(model: nn.Module, request: SelectRequest) -> CompactModel:
    """Do what `select_tokens` does, with errors in the names of the request.

    Args:
        model: As for `select_tokens`.
        request: Its other arguments.

    Returns:
        A network with selections.

    Raises:
        InputError: As for `select_tokens`.
        UnsupportedModel: As for `select_tokens`.
    """
    source = lift(model)
    architecture, title = source.architecture, request.title
    architecture.require_no_selects(title)
    _require_class_token(architecture, request)
    places = request.stages_of(architecture)
    kept = request.kept_patches(architecture, places)
    selects = tuple(
        _select(architecture, request, stage, count)
        for stage, count in zip(places, kept, strict=True)
    )
    changed = architecture.model_copy(update={"selects": selects})
    try:
        changed = Architecture.model_validate(changed.model_dump(by_alias=True))
    except ValidationError as error:
        message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise InputError(f"{title}: {message}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        result = CompactModel(changed)
        _initialize(result)
    state = copy.deepcopy(source.state_dict())
    result.load_state_dict(state | _own_state(result), assign=True)
    return result.to(next(source.parameters()).device).train(model.training)


def _require_class_token(architecture: Architecture, request: SelectRequest) -> None:
    """Refuse scores by class attention where the first token is a register, or of no meaning.

    Which learned token is a class token is not saved; what the head reads by itself is one.
    """
    if SCORERS[request.method] != "class-attention" or pinned_tokens(architecture):
        return
    raise InputError(
        f"{request.title} scores patches by the attention of the class token, and the head reads "
        f'no class token (pool "{architecture.pool.kind}"); use {request.names.instead}'
    )


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
    architecture: Architecture, request: SelectRequest, stage: int, count: int
) -> SelectSpec:
    """The selection of a stage that keeps `count` patches."""
    method = request.method
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
            raise InputError(
                f"{request.names.stages}: {stage}; {block} has no attention left, choose another"
            )
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
        fused=request.fused,
        seed=request.seed + stage if scorer == "random" else 0,
    )


def _initialize(model: CompactModel) -> None:
    for module in model.selects.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=_INITIAL_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _own_state(model: CompactModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "selects." in name[:8]}
