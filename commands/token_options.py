"""The options of `vitrim compact --tokens`: the method, and how many tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError
from .compact_options import Selection
from .untrained_options import Untrained

if TYPE_CHECKING:
    from ..compress.tokens.choose import TokenRequest
    from ..compress.tokens.patch_slimming import SlimmingOptions

Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        help="Drop patches on the way through the network, the same for every image, chosen by: "
        "patch-slimming (impact on the output), class-attention, column-attention, power-bert, "
        "scop, each from unlabeled images of --data; or radial (distance from the center), random. "
        "Widths are cut after it by --saliency or --keep-ratio.",
        show_default=False,
    ),
]
TokenCounts = Annotated[
    str | None,
    typer.Option(
        "--token-counts",
        metavar="N,N,...",
        help="With --tokens: how many tokens, class token included, each block keeps, e.g. "
        "197,160,120,1 for four blocks; or one number for the stem and each sub-layer. "
        "Instead of --macs.",
        show_default=False,
    ),
]
TokenSchedule = Annotated[
    str | None,
    typer.Option(
        "--token-schedule",
        help="With --tokens and --macs: error (the least measured error of the features; the "
        "default with images), importance (the least dropped share of the scores), uniform (each "
        "block keeps the same share of the patches that reach it; the default of radial and "
        "random), linear, or constant (all leave in the first block).",
        show_default=False,
    ),
]
TokenTolerance = Annotated[
    float | None,
    typer.Option(
        "--token-tolerance",
        help="With --tokens patch-slimming, instead of --macs: the counts follow from this "
        "relative error of the next block, e.g. 0.02, and each block is refitted from its inputs. "
        "Takes minutes.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class TokenOptions:
    """Which tokens are dropped, and how many."""

    tokens: Tokens = None
    token_counts: TokenCounts = None
    token_schedule: TokenSchedule = None
    token_tolerance: TokenTolerance = None

    @property
    def selected(self) -> bool:
        """Whether tokens are dropped."""
        return self.tokens is not None

    @property
    def uses_images(self) -> bool:
        """Whether the method or the counts depend on images."""
        from ..compress.tokens.choose import WITHOUT_IMAGES

        return self.selected and (
            self.tokens not in WITHOUT_IMAGES or self.token_schedule == "error"
        )

    def counts(self) -> list[int] | None:
        """The numbers of --token-counts.

        Raises:
            InputError: They are not whole numbers.
        """
        return whole_numbers("--token-counts", self.token_counts, "197,160,120,1")

    def __post_init__(self) -> None:
        given = {
            "--token-counts": self.token_counts,
            "--token-schedule": self.token_schedule,
            "--token-tolerance": self.token_tolerance,
        }
        named = [option for option, value in given.items() if value is not None]
        if not self.selected:
            if named:
                raise InputError(
                    f"{named[0]} belongs to --tokens; add e.g. --tokens patch-slimming"
                )
            return
        from ..compress.tokens.choose import METHODS

        if self.tokens not in METHODS:
            raise InputError(f"--tokens {self.tokens}: choose one of {', '.join(METHODS)}")
        if len(named) > 1:
            raise InputError(f"{named[0]} and {named[1]} both select the token counts; keep one")
        if self.token_tolerance is not None and self.tokens != "patch-slimming":
            raise InputError(
                f"--token-tolerance belongs to --tokens patch-slimming, not to {self.tokens}"
            )
        self.counts()

    def check(self, selection: Selection, untrained: Untrained) -> None:
        """Check options of other groups that exclude a choice of tokens.

        Raises:
            InputError: Another option selects what is kept, or nothing states how many tokens.
        """
        if not self.selected:
            return
        if selection.mask is not None:
            raise InputError("--tokens and --mask both select what is kept; keep one")
        if selection.round_to is not None and selection.only_dead:
            raise InputError(
                "--round-to rounds widths, and --tokens cuts none; add --keep-ratio or --saliency"
            )
        others = [option for option in untrained.budgets if option != "--macs"]
        for option, value in (
            ("--without-training", untrained.without_training),
            ("--front", untrained.front),
            ("--resume", untrained.resume),
            *((option, True) for option in others),
        ):
            if value:
                raise InputError(
                    f"--tokens and {option}: drop the tokens first with --macs, then cut widths of "
                    "the result in a second call"
                )
        chosen = {
            "--macs": untrained.macs,
            "--token-counts": self.token_counts,
            "--token-tolerance": self.token_tolerance,
        }
        named = [option for option, value in chosen.items() if value is not None]
        if not named:
            raise InputError(
                f"--tokens {self.tokens} needs the number of tokens: --macs, the share of the "
                "multiply-adds to keep, e.g. --macs 0.6, or --token-counts"
            )
        if len(named) > 1:
            raise InputError(f"{named[0]} and {named[1]} both select the token counts; keep one")
        if self.token_schedule is not None and untrained.macs is None:
            raise InputError(
                "--token-schedule needs --macs, the share of the multiply-adds to keep"
            )

    def request(self, macs: float | None, seed: int) -> TokenRequest:
        """What `token_choice` chooses."""
        from ..compress.tokens.choose import TokenNames, TokenRequest

        return TokenRequest(
            method=self.tokens,  # type: ignore[arg-type]
            counts=self.counts(),
            macs=macs,
            schedule=self.token_schedule,  # type: ignore[arg-type]
            seed=seed,
            names=TokenNames("--token-counts", "--macs", "--token-schedule"),
        )

    def slimming(self, seed: int) -> SlimmingOptions:
        """The options of a search by tolerance."""
        from ..compress.tokens.patch_slimming import SlimmingOptions

        assert self.token_tolerance is not None
        return SlimmingOptions(tolerance=self.token_tolerance, seed=seed)


def whole_numbers(option: str, text: str | None, example: str) -> list[int] | None:
    """The numbers of an option, with commas between them; None where it is not given.

    Raises:
        InputError: They are not whole numbers; the message has the example.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} {text}: give whole numbers with commas between them, e.g. {example}"
        ) from None
