"""The options of `vitrim compact --select`: patches that are chosen for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.console import show
from ..core.errors import InputError
from .token_options import TokenOptions, whole_numbers
from .untrained_options import Untrained

if TYPE_CHECKING:
    from ..compress.network.modules.model import CompactModel
    from ..compress.tokens.select import SelectRequest

# Methods whose scores need no training.
UNTRAINED = ("class-attention", "evit", "column-attention", "random")

Select = Annotated[
    str | None,
    typer.Option(
        "--select",
        help="Keep a constant number of patches, chosen for each image while the network runs, "
        "without training: class-attention (those that the class token attends to), evit (the "
        "same, with a token that sums the dropped ones), column-attention (those that all tokens "
        "attend to), or random (for comparison). Widths are cut in the same call by --mask, "
        "--keep-ratio or --saliency.",
        show_default=False,
    ),
]
SelectRatio = Annotated[
    float | None,
    typer.Option(
        "--select-ratio",
        help="With --select: the share of the patches that the first stage keeps; the second keeps "
        "its square, the third its cube.  [default: 0.7]",
        show_default=False,
    ),
]
SelectRule = Annotated[
    str | None,
    typer.Option(
        "--select-rule",
        help="With --select-ratio: how the share goes on, geometric (0.7, 0.49, 0.343) or "
        "subtractive (0.7, 0.5, 0.3). Not for evit, whose stages all keep the same share of the "
        "tokens that are there.  [default: geometric]",
        show_default=False,
    ),
]
SelectStages = Annotated[
    str | None,
    typer.Option(
        "--select-stages",
        metavar="N,N,...",
        help="With --select: the blocks, counted from 0, in which patches are chosen.  "
        "[default: after each quarter of the depth]",
        show_default=False,
    ),
]
SelectCounts = Annotated[
    str | None,
    typer.Option(
        "--select-counts",
        metavar="N,N,...",
        help="With --select: the number of patches that each stage keeps, instead of "
        "--select-ratio.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class SelectOptions:
    """Which patches are chosen for each image, and how many."""

    select: Select = None
    select_ratio: SelectRatio = None
    select_stages: SelectStages = None
    select_counts: SelectCounts = None
    select_rule: SelectRule = None

    @property
    def selected(self) -> bool:
        """Whether patches are chosen for each image."""
        return self.select is not None

    def __post_init__(self) -> None:
        given = {
            "--select-ratio": self.select_ratio,
            "--select-stages": self.select_stages,
            "--select-counts": self.select_counts,
            "--select-rule": self.select_rule,
        }
        named = [option for option, value in given.items() if value is not None]
        if not self.selected:
            if named:
                raise InputError(f"{named[0]} belongs to --select; add --select class-attention")
            return
        if self.select in ("dynamicvit", "dps"):
            raise InputError(
                f"--select {self.select}: its predictors need training; set masks.tokens = "
                f'"{self.select}" in a recipe of `vitrim run`'
            )
        if self.select not in UNTRAINED:
            raise InputError(f"--select {self.select}: choose one of {', '.join(UNTRAINED)}")
        if self.select_ratio is not None and self.select_counts is not None:
            raise InputError(
                "--select-ratio and --select-counts both state how many patches stay; keep one"
            )
        # Before a model is read.
        self.request()

    def check(self, tokens: TokenOptions, untrained: Untrained) -> None:
        """Check options of other groups that exclude a selection.

        Raises:
            InputError: Tokens are dropped by place, or widths are cut without training.
        """
        others = {
            "--tokens": tokens.selected,
            "--front": untrained.front is not None,
            "--without-training": untrained.selected,
        }
        for option, given in others.items():
            if self.selected and given:
                raise InputError(
                    f"--select and {option}: cut the model first, then add the selection to the "
                    "result in a second call"
                )

    def stages(self) -> list[int] | None:
        """The numbers of --select-stages; InputError if they are not whole numbers."""
        return whole_numbers("--select-stages", self.select_stages, "3,6,9")

    def counts(self) -> list[int] | None:
        """The numbers of --select-counts; InputError if they are not whole numbers."""
        return whole_numbers("--select-counts", self.select_counts, "137,96,67")

    def request(self, seed: int = 0) -> SelectRequest:
        """What is added to a model.

        Args:
            seed: Of --select random.

        Raises:
            InputError: An option has an unknown value, or no effect.
        """
        from ..compress.tokens.select import DEFAULT_RATIO, OptionNames, SelectRequest

        return SelectRequest(
            method=self.select,  # type: ignore[arg-type]
            ratio=DEFAULT_RATIO if self.select_ratio is None else self.select_ratio,
            stages=self.stages(),
            rule=self.select_rule,  # type: ignore[arg-type]
            counts=self.counts(),
            seed=seed,
            names=OptionNames(
                "--select {}",
                "--select-ratio",
                "--select-stages",
                "--select-rule",
                "--select-counts",
                instead="--select column-attention",
            ),
        )

    def applied(self, model: CompactModel, seed: int) -> CompactModel:
        """The model with selections, which are shown.

        Args:
            model: The model.
            seed: Of --select random.

        Raises:
            InputError: A stage or count does not fit the model.
        """
        from ..compress.tokens.select import with_selects

        result = with_selects(model, self.request(seed))
        architecture = result.architecture
        each = (f"{spec.left} ({spec.name})" for spec in architecture.selects)
        show(f"patches: {architecture.patches}, for each image {', '.join(each)}")
        return result
