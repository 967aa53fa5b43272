"""The choice of a static token mask: one interface for all methods, so that they can be compared.

A method ranks tokens, and the counts state how many are kept at each site; with equal counts all
methods give networks of equal cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..masks.groups import token_sites
from ..masks.mask import StructuredMask
from ..network.architecture import Architecture
from ..network.modules.model import CompactModel
from .allocation import allocate_tokens, dropped_shares
from .attention_scores import SCORES, bottom_up, by_fixed_scores, with_stem
from .counts import (
    STEM,
    attention_steps,
    counts_for_macs,
    macs_share,
    read_counts,
    require_reach,
    whole_counts,
)
from .counts import Schedule as Curve
from .impact import impacts, top_down
from .knockoff import knockoff_scores
from .leaving_errors import leaving_errors
from .streaming import DenseStreams, Progress, require_images, silent, working_copy

Method = Literal[
    "patch-slimming",
    "class-attention",
    "column-attention",
    "power-bert",
    "scop",
    "radial",
    "random",
]
METHODS: tuple[Method, ...] = get_args(Method)
Schedule = Literal["error", "importance", "uniform", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
# Methods that look at no image; they have no scores from which counts could follow.
WITHOUT_IMAGES = ("radial", "random")
SCHEMA = "vitrim.tokens/1"


@dataclass(frozen=True)
class TokenChoice:
    """Tokens that a method keeps.

    Attributes:
        mask: The mask, with entries of the dimension `token` only.
        method: The method.
        counts: Tokens that the stream carries after each site, prefix tokens included.
        scores: The score of each token by the site of its attention (`stem.out` for the stem),
            (tokens,); only where the method computed one.
        macs: The multiply-adds that are left, as a share of those of the network as it is
            exported (its last attention computes only what the head reads).
        images: Number of images that the scores come from.
    """

    mask: StructuredMask
    method: str
    counts: Mapping[str, int]
    scores: Mapping[str, Tensor]
    macs: float
    images: int = 0

    def record(self) -> dict[str, Any]:
        """The choice as plain data, as `tokens.json` beside a saved model has it."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "images": self.images,
            "macs_share": self.macs,
            "counts": dict(self.counts),
            "scores": {site: score.tolist() for site, score in self.scores.items()},
        }


def choose_tokens(
    model: nn.Module,
    method: Method = "patch-slimming",
    counts: Sequence[int] | None = None,
    images: Tensor | None = None,
    *,
    macs: float | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> StructuredMask:
    """Choose which tokens a network keeps how deep, without training it.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`; it is not changed.
        method: "patch-slimming" (default), the impact on the output by eq. (6), from the last
            block down; "class-attention", the attention of the class token, or of all tokens
            without one; "column-attention", the attention of all tokens times the norm of the
            value; "power-bert", the mean rank of the attention of other tokens; "scop", trained
            gates between a patch and that of another image; "radial", the distance from the
            center of the grid; "random".
        counts: The number of tokens, prefix tokens included, after each block; or after the stem
            and each sub-layer. None: `macs` chooses them.
        images: Unlabeled images, (images, channels, height, width), normalized as the model
            expects; some hundred. "radial" and "random" need none.
        macs: The share of the multiply-adds to keep, between 0 and 1; instead of `counts`.
        schedule: How `macs` distributes the counts: "error" (default with images), the least
            measured error of the features, by dynamic programming; "importance", the least dropped
            share of the scores; "uniform" (default without images), each block keeps the same
            share of the patches that reach it; "linear", equal steps; "constant", all in the first
            block.
        seed: For "random", and for the pairs of "scop".
        progress: Called with a stage ("score", "gates", "errors"), the steps done, and the steps in
            all. None: it is not.

    Returns:
        A mask with entries of the dimension `token`, nested along the depth. Its note has the
        method and the counts.

    Raises:
        InputError: The method is unknown, it needs images, the counts do not fit the model, or the
            budget is out of reach.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers", eq. 6.
        Liang et al. 2022, "Not All Patches are What You Need".
        Goyal et al. 2020, "PoWER-BERT".
        Tang et al. 2020, "SCOP: Scientific Control for Reliable Neural Network Pruning".
        Haurum et al. 2023, "Which Tokens to Use?" (radial).
    """
    request = TokenRequest(method, counts, macs, schedule, seed)
    return token_choice(model, request, images, progress or silent).mask


class TokenNames(NamedTuple):
    """What errors call the numbers of tokens and how they are set."""

    counts: str = "counts"
    macs: str = "macs"
    schedule: str = "schedule"


@dataclass(frozen=True)
class TokenRequest:
    """What `choose_tokens` chooses.

    Attributes:
        method: As for `choose_tokens`, like the next four.
        counts: The number of tokens after each block or site.
        macs: The share of the multiply-adds to keep.
        schedule: How `macs` distributes the counts.
        seed: For "random" and "scop".
        names: What errors call `counts`, `macs` and `schedule`.
    """

    method: Method = "patch-slimming"
    counts: Sequence[int] | None = None
    macs: float | None = None
    schedule: Schedule | None = None
    seed: int = 0
    names: TokenNames = field(default_factory=TokenNames)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"tokens = {self.method!r}: choose one of {', '.join(METHODS)}")
        if (self.counts is None) == (self.macs is None):
            raise InputError(
                "tokens: give the counts, or macs, the share of the multiply-adds to keep; one of "
                "them"
            )
        if self.counts is not None and self.schedule is not None:
            raise InputError("tokens: counts are a schedule; give counts or schedule, not both")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise InputError(
                f"{self.names.schedule} = {self.schedule!r}: choose one of {', '.join(SCHEDULES)}"
            )
        if self.schedule == "importance" and self.method in WITHOUT_IMAGES:
            raise InputError(
                f"{self.names.schedule} = 'importance': {self.method} has no importance; choose "
                "another schedule"
            )

    @property
    def uses_images(self) -> bool:
        """Whether the scores or the counts come from images."""
        return self.method not in WITHOUT_IMAGES or self.schedule == "error"

    def check(self, architecture: Architecture) -> list[int] | None:
        """Validate the request for a network, before any image is read.

        Args:
            architecture: The network.

        Returns:
            The counts by site; None where they follow from scores.

        Raises:
            InputError: The counts do not fit the network, or the budget is out of reach.
        """
        if self.counts is not None:
            return read_counts(architecture, self.counts, self.names.counts)
        assert self.macs is not None
        searched = self.schedule in ("error", "importance") or (
            self.schedule is None and self.method not in WITHOUT_IMAGES
        )
        if searched:
            require_reach(architecture, self.macs, self.names.macs)
            return None
        curve = cast("Curve", self.schedule or "uniform")
        return counts_for_macs(architecture, curve, self.macs, self.names.macs)


def token_choice(
    model: nn.Module,
    request: TokenRequest,
    images: Tensor | None = None,
    progress: Progress = silent,
) -> TokenChoice:
    """Do what `choose_tokens` does, and return the counts and the scores, too.

    Args:
        model: As for `choose_tokens`.
        request: Its other arguments.
        images: As for `choose_tokens`.
        progress: As for `choose_tokens`.

    Returns:
        The choice.

    Raises:
        InputError: As for `choose_tokens`.
        UnsupportedModel: As for `choose_tokens`.
    """
    method = request.method
    network = working_copy(model)
    architecture = network.architecture
    if request.uses_images:
        images = require_images(images, method)
    counts = request.check(architecture)
    fixed = _fixed_scores(network, request, images, progress)
    if counts is None:
        if fixed is None:
            whole = whole_scores(network, method, images, progress, stem=True)
        else:
            whole = with_stem(architecture, fixed)
        counts = _searched_counts(network, request, whole, images, progress)
    scores: Mapping[int, Tensor]
    if fixed is not None:
        sets, scores = by_fixed_scores(architecture, fixed, counts), fixed
    else:
        assert images is not None
        sets, scores = _chosen(network, method, images, counts, progress)
    used = 0 if images is None or not request.uses_images else len(images)
    return as_choice(architecture, sets, scores, method, used, {"seed": str(request.seed)})


def _searched_counts(
    model: CompactModel,
    request: TokenRequest,
    scores: Mapping[int, Tensor],
    images: Tensor | None,
    progress: Progress,
) -> list[int]:
    """The counts of least loss for the budget of a request."""
    assert request.macs is not None
    architecture = model.architecture
    if request.schedule == "importance":
        losses = {
            step: dropped_shares(score, architecture.prefix, range(len(score) + 1))
            for step, score in scores.items()
        }
        return allocate_tokens(architecture, losses, request.macs, request.names.macs)
    images = require_images(images, request.method)
    errors = leaving_errors(model, scores, images, progress)
    return allocate_tokens(architecture, errors, request.macs, request.names.macs, once=True)


def as_choice(
    architecture: Architecture,
    sets: Sequence[Tensor],
    scores: Mapping[int, Tensor],
    method: str,
    images: int,
    note: Mapping[str, str],
) -> TokenChoice:
    """Collect sets of tokens and their scores in a `TokenChoice`.

    Args:
        architecture: The network.
        sets: The kept tokens by site.
        scores: By step with attention; -1 is the stem.
        method: The method.
        images: Number of images.
        note: Further entries for the note of the mask.

    Returns:
        The choice, with a validated mask.
    """
    names = list(token_sites(architecture))
    counts = [int(keep.sum()) for keep in sets]
    text = ",".join(map(str, counts))
    about = {"tokens": method, "counts": text, "images": str(images), **note}
    mask = StructuredMask(token_entries(architecture, sets), scale="original", note=about)
    mask.check(architecture)
    return TokenChoice(
        mask=mask,
        method=method,
        counts=dict(zip(names, counts, strict=True)),
        scores={names[step + 1]: score for step, score in sorted(scores.items())},
        macs=macs_share(architecture, counts),
        images=images,
    )


def token_entries(
    architecture: Architecture, sets: Sequence[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The entries of a mask for the kept tokens by site; sites that drop nothing have none."""
    entries: dict[str, Tensor] = {}
    before = torch.ones(architecture.tokens, dtype=torch.bool)
    for (site, size), keep in zip(token_sites(architecture).items(), sets, strict=True):
        if not torch.equal(keep, before[:size]):
            entries[site] = keep
        before = keep
    return {"token": entries} if entries else {}


def whole_scores(
    model: CompactModel,
    method: Method,
    images: Tensor | None,
    progress: Progress = silent,
    *,
    stem: bool = False,
) -> dict[int, Tensor]:
    """The scores of a method on the whole network, with which counts for a budget are chosen.

    Args:
        model: A working copy.
        method: One that needs images.
        images: (images, channels, height, width).
        progress: As for `choose_tokens`.
        stem: Whether patches that never enter are scored, too.

    Returns:
        By step with attention, the score of each token after it, (tokens,); with `stem`, under
        `STEM`, of each token that the first attention reads.

    Raises:
        InputError: The images do not fit, or the method has no scores.
    """
    images = require_images(images, method)
    architecture = model.architecture
    mixing = attention_steps(architecture)
    if method == "scop":
        scores = knockoff_scores(model, images, progress)
    elif method in SCORES:
        scores = bottom_up(model, images, None, SCORES[method], progress)[1]
    else:
        sizes = list(token_sites(architecture).values())
        sets = [
            torch.arange(size) < count
            for size, count in zip(sizes, whole_counts(architecture), strict=True)
        ]
        steps = [STEM, *mixing] if stem else mixing
        streams = DenseStreams(model, images, ())
        scores = impacts(model, streams, sets, steps, mixing[0], progress)
    return with_stem(architecture, scores) if stem else {step: scores[step] for step in mixing}


def _fixed_scores(
    model: CompactModel, request: TokenRequest, images: Tensor | None, progress: Progress
) -> dict[int, Tensor] | None:
    """Scores that do not depend on what is kept elsewhere; None for the other methods."""
    if request.method in WITHOUT_IMAGES:
        return scores_without_images(model.architecture, request.method, request.seed)
    if request.method == "scop":
        assert images is not None
        return knockoff_scores(model, images, progress, seed=request.seed)
    return None


def scores_without_images(
    architecture: Architecture, method: Method, seed: int
) -> dict[int, Tensor]:
    """The scores of "radial" or "random", (tokens,), the same after each step with attention."""
    if method == "radial":
        score = radial_scores(architecture)
    else:
        score = torch.rand(architecture.tokens, generator=torch.Generator().manual_seed(seed))
    return dict.fromkeys(attention_steps(architecture), score)


def radial_scores(architecture: Architecture) -> Tensor:
    """Minus the distance of each patch from the center of the grid, in patches.

    Args:
        architecture: The network.

    Returns:
        (tokens,), 0 for prefix tokens.
    """
    rows, columns = architecture.grid
    places = torch.tensor(architecture.order or range(architecture.patches))
    down = places // columns - (rows - 1) / 2
    across = places % columns - (columns - 1) / 2
    distance = torch.hypot(down, across)
    return torch.cat([torch.zeros(architecture.prefix), -distance])


def _chosen(
    model: CompactModel, method: str, images: Tensor, counts: Sequence[int], progress: Progress
) -> tuple[list[Tensor], dict[int, Tensor]]:
    if method == "patch-slimming":
        return top_down(model, images, counts, progress)
    return bottom_up(model, images, counts, SCORES[method], progress)
