"""`vitrim compact --tokens`: which patches a network drops, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..core.console import show
from .compact_options import Selection
from .compact_source import Source, data_of, unlabeled_images
from .token_options import TokenOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ..compress.masks.mask import StructuredMask
    from ..compress.network.architecture import Architecture
    from ..compress.tokens.choose import TokenChoice


@dataclass(frozen=True)
class TokenCut:
    """A choice of tokens for a model.

    Attributes:
        source: The model of full size, perhaps with refitted blocks.
        choice: The tokens that it keeps.
        errors: The relative error of each refitted block, by the site of its attention.
    """

    source: Source
    choice: TokenChoice
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def cut_source(self) -> Source:
        """The model without the dropped tokens, whose widths may be cut next."""
        from ..compress.surgery.compactor import compact

        return replace(self.source, model=compact(self.source.model, self.choice.mask))

    def with_widths(self, widths: StructuredMask) -> StructuredMask:
        """One mask with the dropped tokens and the cut widths; the two commute."""
        return replace(
            widths,
            kept={**widths.kept, **self.choice.mask.kept},
            note={**widths.note, **self.choice.mask.note},
        )

    def record(self) -> str:
        """The contents of tokens.json."""
        from ..pipeline.token_step import token_record

        return token_record(self.choice, self.errors)


def choose_tokens_of(
    source: Source, selection: Selection, tokens: TokenOptions, macs: float | None
) -> TokenCut:
    """Choose the tokens of the options, and show how many each block keeps.

    Args:
        source: The model, and the run or recipe section that it comes from.
        selection: The data set, the number of images and the seed.
        tokens: The method and the counts.
        macs: The share of the multiply-adds to keep.

    Returns:
        The choice. With a tolerance the model has refitted blocks.

    Raises:
        InputError: The method needs images and there are none, the counts do not fit the model, or
            the budget is out of reach.
    """
    from ..compress.tokens.choose import token_choice
    from ..compress.tokens.patch_slimming import slim_patches
    from ..pipeline.trim_step import StageBars

    request, errors = None, dict[str, float]()
    if tokens.token_tolerance is None:
        request = tokens.request(macs, selection.seed)
        # Before images are decoded.
        request.check(source.model.architecture)
    images = _images(source, selection, tokens) if tokens.uses_images else None
    with StageBars(quiet=False) as bars:
        if request is None:
            assert images is not None
            slimmed = slim_patches(
                source.model, images, tokens.slimming(selection.seed), progress=bars
            )
            source, choice = replace(source, model=slimmed.model), slimmed.choice
            errors = slimmed.errors
        else:
            choice = token_choice(source.model, request, images, bars)
    note = {} if images is None or selection.data is None else {"data": selection.data}
    mask = replace(choice.mask, note={**choice.mask.note, **note})
    _show_errors(source.model.architecture, errors)
    _show_counts(source.model.architecture, choice)
    return TokenCut(source, replace(choice, mask=mask), errors)


def _images(source: Source, selection: Selection, tokens: TokenOptions) -> Tensor:
    data = data_of(source, selection, f"--tokens {tokens.tokens}")
    images = unlabeled_images(data, selection)
    show(f"{tokens.tokens} on {len(images)} images of {data.name}, without labels")
    return images


def _show_errors(architecture: Architecture, errors: dict[str, float]) -> None:
    from ..compress.masks.groups import token_sites
    from ..compress.tokens.counts import attention_steps

    # Behind the last attention there is no next block.
    last = list(token_sites(architecture))[attention_steps(architecture)[-1] + 1]
    for site, error in errors.items():
        what = "the features" if site == last else "the next block"
        show(f"{site}: relative error {error:.4f} of {what}")


def _show_counts(architecture: Architecture, choice: TokenChoice) -> None:
    counts = list(choice.counts.values())
    after = [counts[end] for end in architecture.block_ends]
    show(
        f"tokens: {architecture.tokens} of the grid, {counts[0]} after the stem, after each block "
        f"{', '.join(map(str, after))}; {100 * choice.macs:.1f} % of the multiply-adds"
    )
