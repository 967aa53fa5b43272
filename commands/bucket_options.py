"""The options of `vitrim compact --buckets`: how many patches an image keeps depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.console import show, unit_count
from ..core.errors import InputError
from .compact_options import Output, Selection
from .compact_source import Source, data_of, unlabeled_images
from .token_options import TokenOptions, whole_numbers
from .untrained_options import Untrained

if TYPE_CHECKING:
    from torch import Tensor

    from ..compress.tokens.buckets import BucketedModel

EXAMPLE = "60,98,137"

Buckets = Annotated[
    str | None,
    typer.Option(
        "--buckets",
        metavar="N,N,...",
        help="Let the last selection (of the model, or of --select) keep one of these numbers of "
        "patches, which depends on the image; the largest bounds the latency of any image. Needs "
        "--mean-patches or --coverage.",
        show_default=False,
    ),
]
MeanPatches = Annotated[
    float | None,
    typer.Option(
        "--mean-patches",
        help="With --buckets: the mean number of patches that the images of --data keep.",
        show_default=False,
    ),
]
Coverage = Annotated[
    float | None,
    typer.Option(
        "--coverage",
        help="With --buckets: an image keeps the smallest number whose best patches hold this "
        "share of its scores.",
        show_default=False,
    ),
]


BucketRule = Annotated[
    str | None,
    typer.Option(
        "--bucket-rule",
        metavar="RULE",
        help="With --mean-patches: divergence (the default; an image keeps the smallest number "
        "with which the logits are predicted to be near those of the largest, learned from the "
        "images without labels) or coverage (see --coverage).",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class BucketOptions:
    """The numbers of patches of which each image keeps one, and how it is chosen."""

    buckets: Buckets = None
    mean_patches: MeanPatches = None
    coverage: Coverage = None
    bucket_rule: BucketRule = None

    @property
    def selected(self) -> bool:
        """Whether the model gets buckets."""
        return self.buckets is not None

    def __post_init__(self) -> None:
        given = {
            "--mean-patches": self.mean_patches,
            "--coverage": self.coverage,
            "--bucket-rule": self.bucket_rule,
        }
        named = [option for option, value in given.items() if value is not None]
        if not self.selected:
            if named:
                raise InputError(f"{named[0]} belongs to --buckets; add --buckets {EXAMPLE}")
            return
        if {"--bucket-rule", "--coverage"} <= set(named):
            raise InputError(
                "--bucket-rule and --coverage: a coverage is a rule of its own; keep one of them"
            )
        if len(set(named) - {"--bucket-rule"}) != 1:
            raise InputError("--buckets needs one of --mean-patches (with --data) and --coverage")
        self.counts()

    def check(self, selection: Selection, tokens: TokenOptions, untrained: Untrained) -> None:
        """Check options of other groups that exclude buckets.

        Raises:
            InputError: Widths or tokens are cut in the same call.
        """
        others = {
            "--tokens": tokens.selected,
            "--front": untrained.front is not None,
            "--without-training": untrained.selected,
            "--mask": selection.mask is not None,
            "--keep-ratio": selection.keep_ratio is not None,
            "--saliency": selection.saliency is not None,
            "--round-to": selection.round_to is not None,
        }
        for option, given in others.items():
            if self.selected and given:
                raise InputError(
                    f"--buckets and {option}: cut the model first, then give the result buckets in "
                    "a second call"
                )

    def counts(self) -> list[int]:
        """The numbers of patches; InputError if they are not whole numbers."""
        return whole_numbers("--buckets", self.buckets, EXAMPLE) or []


def make_buckets(
    source: Source, selection: Selection, options: BucketOptions, output: Output
) -> None:
    """Calibrate the buckets of a model, show them, and save it in `--out`.

    Args:
        source: The model, with selections.
        selection: The data set, the number of images and the seed.
        options: The numbers of patches.
        output: The folder, and whether it may be replaced.

    Raises:
        InputError: A number does not fit the model, or images are needed and there are none.
    """
    from ..compress.tokens.bucket_rules import RULES
    from ..compress.tokens.buckets import bucketed
    from ..pipeline.trim_step import StageBars

    # Before images are decoded.
    if options.bucket_rule not in (None, *RULES):
        raise InputError(f"--bucket-rule {options.bucket_rule}: choose {' or '.join(RULES)}")
    bucketed(source.model, options.counts(), coverage=1.0)
    images = _images(source, selection, options)
    with StageBars(quiet=False) as bars:
        model = bucketed(
            source.model,
            options.counts(),
            coverage=options.coverage,
            images=images,
            mean_patches=options.mean_patches,
            rule=options.bucket_rule,
            progress=bars,
        )
    _show(model)
    if output.out is not None:
        model.save(output.out, overwrite=output.overwrite)
        show(f"saved: {output.out}")


def _images(source: Source, selection: Selection, options: BucketOptions) -> Tensor | None:
    if options.mean_patches is None and selection.data is None:
        return None
    data = data_of(source, selection, "--mean-patches")
    images = unlabeled_images(data, selection)
    show(f"buckets of {len(images)} images of {data.name}, without labels")
    return images


def _show(model: BucketedModel) -> None:
    buckets, macs = model.buckets, model.macs
    for place, (count, cost) in enumerate(zip(buckets.counts, macs, strict=True)):
        share = "" if buckets.shares is None else f", {100 * buckets.shares[place]:.1f} % of images"
        show(f"{count} patches at {model.selection.spec.name}: {unit_count(cost)} MACs{share}")
    calibration = model.calibration
    if calibration is not None:
        mean = unit_count(round(calibration.mean_macs))
        show(f"mean: {mean} MACs; at most {unit_count(calibration.worst_macs)}")
    show(f"rule: {buckets.described}")
