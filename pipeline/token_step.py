"""The choice of tokens before widths: `masks.tokens` with a method that needs no training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from ..compress.network.architecture import Architecture
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.allocation import network_cost
from ..compress.surgery.compactor import compact
from ..compress.tokens.choose import Method, TokenChoice, TokenNames, TokenRequest, token_choice
from ..compress.tokens.counts import attention_steps
from ..compress.tokens.patch_slimming import SlimmingOptions, slim_patches
from ..core.console import status
from .masks_section import MasksSection
from .trim_step import StageBars


@dataclass(frozen=True)
class CutTokens:
    """The network without the tokens that leave before widths are cut.

    Attributes:
        source: The network of full size: the baseline, or with refitted blocks.
        model: The same without the dropped tokens.
        choice: What it keeps.
        errors: The relative error of each refitted block, by the site of its attention.
    """

    source: CompactModel
    model: CompactModel
    choice: TokenChoice
    errors: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> str:
        """The contents of tokens.json."""
        return token_record(self.choice, self.errors)


def token_request(section: MasksSection, seed: int) -> TokenRequest:
    """What `[masks]` chooses before widths, for given counts or a given share."""
    assert section.chooses_tokens
    return TokenRequest(
        cast("Method", section.tokens),
        section.token_counts,
        section.token_macs,
        section.token_schedule,
        seed=seed,
        names=TokenNames("masks.token_counts", "masks.token_macs", "masks.token_schedule"),
    )


def require_tokens(architecture: Architecture, section: MasksSection) -> None:
    """Check the counts or the share of `[masks]` before any work.

    Raises:
        InputError: The counts do not fit the network, the share is out of reach, or no token can
            leave.
    """
    if not section.chooses_tokens:
        return
    if section.token_tolerance is not None:
        attention_steps(architecture)
    else:
        token_request(section, 0).check(architecture)


def cut_tokens(
    baseline: CompactModel,
    images: Tensor,
    section: MasksSection,
    seed: int,
    *,
    state: Path | None = None,
    quiet: bool,
) -> CutTokens:
    """Choose tokens and cut the baseline by them.

    Args:
        baseline: The dense model.
        images: Unlabeled images, (images, channels, height, width), normalized.
        section: The method, and the counts, the share of the multiply-adds or the tolerance.
        seed: Of methods that draw.
        state: With a tolerance: the folder from which an interrupted search continues.
        quiet: Print nothing.

    Returns:
        The network without the dropped tokens, and the choice.
    """
    source, errors = baseline, dict[str, float]()
    with StageBars(quiet=quiet) as bars:
        if section.token_tolerance is None:
            choice = token_choice(baseline, token_request(section, seed), images, bars)
        else:
            options = SlimmingOptions(tolerance=section.token_tolerance, seed=seed)
            found = slim_patches(baseline, images, options, progress=bars, resume=state)
            source, choice, errors = found.model, found.choice, found.errors
    cut = compact(source, choice.mask, last_queries=baseline.architecture.last_queries)
    counts = list(choice.counts.values())
    after = ", ".join(str(counts[end]) for end in baseline.architecture.block_ends)
    status(
        f"tokens by {choice.method}: {counts[0]} after the stem, after each block {after}; "
        f"{100 * choice.macs:.1f} % of the multiply-adds",
        quiet=quiet,
    )
    return CutTokens(source, cut.eval(), choice, errors)


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


def token_record(choice: TokenChoice, errors: Mapping[str, float] | None = None) -> str:
    """The contents of tokens.json, with the errors of refitted blocks."""
    more = {"errors": dict(errors)} if errors else {}
    return json.dumps({**choice.record(), **more}) + "\n"
