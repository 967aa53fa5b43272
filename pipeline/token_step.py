"""The choice of tokens before widths: `masks.tokens` with a method that needs no training."""

from __future__ import annotations

import json
from typing import cast

from torch import Tensor

from ..compress.network.architecture import Architecture
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.allocation import network_cost
from ..compress.surgery.compactor import compact
from ..compress.tokens.choose import Method, TokenChoice, TokenRequest, token_choice
from ..core.console import status
from .masks_section import MasksSection
from .trim_step import StageBars


def token_request(section: MasksSection, seed: int) -> TokenRequest:
    """What `[masks]` chooses before widths."""
    assert section.chooses_tokens
    return TokenRequest(
        cast("Method", section.tokens),
        section.token_counts,
        section.token_macs,
        seed=seed,
        names=("masks.token_counts", "masks.token_macs"),
    )


def require_tokens(architecture: Architecture, section: MasksSection) -> None:
    """Check the counts or the share of `[masks]` before any work.

    Raises:
        InputError: The counts do not fit the network, or the share is out of reach.
    """
    if section.chooses_tokens:
        token_request(section, 0).check(architecture)


def cut_tokens(
    baseline: CompactModel, images: Tensor, section: MasksSection, seed: int, *, quiet: bool
) -> tuple[CompactModel, TokenChoice]:
    """Choose tokens and cut the baseline by them.

    Args:
        baseline: The dense model.
        images: Unlabeled images, (images, channels, height, width), normalized.
        section: The method, and the counts or the share of the multiply-adds.
        seed: Of methods that draw.
        quiet: Print nothing.

    Returns:
        The network without the dropped tokens, and the choice.
    """
    with StageBars(quiet=quiet) as bars:
        choice = token_choice(baseline, token_request(section, seed), images, bars)
    cut = compact(baseline, choice.mask, last_queries=baseline.architecture.last_queries)
    counts = list(choice.counts.values())
    after = ", ".join(str(counts[end]) for end in baseline.architecture.block_ends)
    status(
        f"tokens by {choice.method}: {counts[0]} after the stem, after each block {after}; "
        f"{100 * choice.macs:.1f} % of the multiply-adds",
        quiet=quiet,
    )
    return cut.eval(), choice


def width_section(section: MasksSection, baseline: CompactModel, cut: CompactModel) -> MasksSection:
    """The budget of the widths of a network without the dropped tokens.

    Shares in the recipe are those of the baseline; at most 1 is left.
    """
    update = {}
    for kind, share in (("params", section.params), ("macs", section.macs)):
        if share is not None:
            sizes = [network_cost(model.architecture, kind) for model in (baseline, cut)]
            update[kind] = min(1.0, share * sizes[0] / sizes[1])
    return section.model_copy(update=update)


def token_record(choice: TokenChoice) -> str:
    """The contents of tokens.json."""
    return json.dumps(choice.record()) + "\n"
