"""The options of `vitrim compact --without-training`: the budget, the front, and the check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import InputError
from .compact_options import Output, Selection

if TYPE_CHECKING:
    from ..compress.oneshot.budgets import Kind

MOST_SIZES = 50
LARGEST_SHARE, SMALLEST_SHARE = 0.9, 0.3

WithoutTraining = Annotated[
    bool,
    typer.Option(
        "--without-training",
        help="Choose widths and refit weights in closed form from unlabeled images of --data, for "
        "a budget of --macs, --params, --file-mb or --latency-ms, which select it, too. Takes "
        "minutes, and needs no labels.",
    ),
]
Macs = Annotated[
    float | None,
    typer.Option(
        "--macs",
        help="Without training: share of the multiply-adds to keep, e.g. 0.7.",
        show_default=False,
    ),
]
Params = Annotated[
    float | None,
    typer.Option(
        "--params",
        help="Without training: share of the parameters to keep, instead of --macs.",
        show_default=False,
    ),
]
FileMb = Annotated[
    float | None,
    typer.Option(
        "--file-mb",
        help="Without training: size of a file with the weights in MB (10^6 bytes), "
        "computed for --file-precision.",
        show_default=False,
    ),
]
FilePrecision = Annotated[
    str | None,
    typer.Option(
        "--file-precision",
        help="Weights in the file of --file-mb and in --peak-memory-mb: fp32, fp16 or int8. By "
        "default that of --cost-table, and fp32 without a latency.",
        show_default=False,
    ),
]
LatencyMs = Annotated[
    float | None,
    typer.Option(
        "--latency-ms",
        help="Without training: latency in ms of an inference, as --cost-table predicts it. "
        "Tokens, widths and depth are chosen at once. Without a table for --target it is an "
        "estimate.",
        show_default=False,
    ),
]
CostTableFile = Annotated[
    Path | None,
    typer.Option(
        "--cost-table",
        help="The device's cost table, measured by `vitrim bench --cost-table`. Without one, a "
        "table that ships for --target, or the operator costs of `vitrim targets check`.",
        show_default=False,
    ),
]
CostTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="With --latency-ms or --verify: the device, a name of `vitrim targets list` or the "
        "path of a target TOML; by default that of --cost-table, or this machine. A table of a "
        "device that `vitrim targets list` lacks needs its TOML where files are exported.",
        show_default=False,
    ),
]
CostRuntime = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        help="With --latency-ms or --verify: the runtime of the device; by default that of "
        "--cost-table, or the one that the target prefers.",
        show_default=False,
    ),
]
KeepTokens = Annotated[
    bool,
    typer.Option(
        "--keep-tokens", help="With --latency-ms: no patch leaves the network; cut widths only."
    ),
]
Candidates = Annotated[
    int,
    typer.Option(
        "--candidates",
        min=0,
        help="With --latency-ms: cut this many varied solutions, and keep the one that is nearest "
        "to the dense network on held-out images, e.g. 24. Takes that much longer.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="With --latency-ms: export the cut, measure the file here, and correct the budget, at "
        "most three times, until the measured latency is within it. With --front: measure the file "
        "of each size, whatever the budget is of.",
    ),
]
VerifyOn = Annotated[
    str,
    typer.Option(
        "--verify-on",
        metavar="ADDRESS",
        help="With --verify: measure on a device, as `vitrim bench --on`: ssh://user@host, "
        "adb://SERIAL or tvm-rpc://tracker:port/key.",
    ),
]
PeakMemoryMb = Annotated[
    float | None,
    typer.Option(
        "--peak-memory-mb",
        help="With --latency-ms, too: largest memory of weights and activations in MB, of a batch "
        "of --cost-table.",
        show_default=False,
    ),
]
EnergyMj = Annotated[
    float | None,
    typer.Option(
        "--energy-mj",
        help="With --latency-ms, too: largest energy of an inference in mJ, at the power that the "
        "networks of --cost-table were measured with.",
        show_default=False,
    ),
]
FrontSizes = Annotated[
    int | None,
    typer.Option(
        "--front",
        help="Without training: this many sizes from one pass over the images, from 90 % "
        "down to the budget, 30 % of the multiply-adds by default. Each is saved in a folder of "
        "--out, beside a table and a picture.",
        show_default=False,
    ),
]
CheckImages = Annotated[
    int,
    typer.Option(
        "--check-images",
        min=0,
        help="Without training, where the data have labels: this many training and validation "
        "images measure top-1, nearest neighbours and a linear probe of the features. 0 leaves it "
        "out.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted cut without training to the same --out.",
    ),
]


@dataclass(frozen=True)
class Untrained:
    """A cut without training: its budget, and what is reported."""

    without_training: WithoutTraining = False
    macs: Macs = None
    params: Params = None
    file_mb: FileMb = None
    file_precision: FilePrecision = None
    latency_ms: LatencyMs = None
    cost_table: CostTableFile = None
    target: CostTarget = None
    runtime: CostRuntime = None
    keep_tokens: KeepTokens = False
    candidates: Candidates = 0
    verify: Verify = False
    verify_on: VerifyOn = "host"
    peak_memory_mb: PeakMemoryMb = None
    energy_mj: EnergyMj = None
    front: FrontSizes = None
    check_images: CheckImages = 500
    resume: Resume = False

    @property
    def selected(self) -> bool:
        """Whether the cut is one without training: the flag, a budget or a front selects it."""
        return self.without_training or bool(self.budgets) or self.front is not None

    @property
    def device(self) -> str | None:
        """The target of the files; None: that of `--cost-table`."""
        return self.target or ("host" if self.cost_table is None else None)

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that were given, by option."""
        found = {
            "--macs": self.macs,
            "--params": self.params,
            "--file-mb": self.file_mb,
            "--latency-ms": self.latency_ms,
        }
        return {option: value for option, value in found.items() if value is not None}

    @property
    def budget(self) -> tuple[str, Kind, float]:
        """The option of the budget, its kind, and its amount in the unit of `trim`."""
        if not self.budgets:
            return "--macs", "macs", SMALLEST_SHARE
        budgets = self.budgets
        option = "--latency-ms" if "--latency-ms" in budgets else next(iter(budgets))
        value = budgets[option]
        kinds: dict[str, Kind] = {
            "--macs": "macs",
            "--params": "params",
            "--file-mb": "file",
            "--latency-ms": "cost",
        }
        return option, kinds[option], value * 1e6 if option == "--file-mb" else value

    def __post_init__(self) -> None:
        self._check_latency()
        if not self.selected:
            for option, given in (("--cost-table", self.cost_table), ("--resume", self.resume)):
                if given:
                    raise InputError(
                        f"{option} belongs to --without-training and its budget; add e.g. "
                        "--macs 0.7"
                    )
            return
        alone = [option for option in self.budgets if option != "--file-mb"]
        both = len(self.budgets) > 1 and alone != ["--latency-ms"]
        if (self.front is None and not self.budgets) or both:
            raise InputError(
                "--without-training needs one budget: --macs or --params, the share to keep, "
                "e.g. --macs 0.7; or --file-mb, or --latency-ms"
            )
        self._check_amount()
        if self.front is not None and not 2 <= self.front <= MOST_SIZES:
            raise InputError(f"--front {self.front}: give 2 to {MOST_SIZES} sizes")
        if self.cost_table is not None and self.latency_ms is None:
            raise InputError("--cost-table belongs to --latency-ms; add e.g. --latency-ms 2.0")

    def _check_latency(self) -> None:
        """Check the options that only a latency has."""
        if self.verify_on != "host" and not self.verify:
            raise InputError(f"--verify-on {self.verify_on} belongs to --verify; add it")
        if self.latency_ms is not None:
            beside = {"--peak-memory-mb": self.peak_memory_mb, "--energy-mj": self.energy_mj}
            for option, value in beside.items():
                if value is not None and not value > 0:
                    raise InputError(f"{option} {value:g}: give a number above 0")
            return
        if self.verify and self.front is None:
            raise InputError(
                "--verify belongs to --latency-ms or --front; add e.g. --latency-ms 2.0"
            )
        for option, given in (
            ("--keep-tokens", self.keep_tokens),
            ("--candidates", self.candidates),
            ("--peak-memory-mb", self.peak_memory_mb is not None),
            ("--energy-mj", self.energy_mj is not None),
            ("--target", self.target is not None and not self.verify),
            ("--runtime", self.runtime is not None and not self.verify),
        ):
            if given:
                raise InputError(f"{option} belongs to --latency-ms; add e.g. --latency-ms 2.0")

    def _check_amount(self) -> None:
        option, kind, amount = self.budget
        given = self.budgets.get(option, amount)
        if kind in ("macs", "params"):
            most = 1.0 if self.front is None else LARGEST_SHARE
            if not 0 < amount < most:
                raise InputError(
                    f"{option} {given:g}: give the share to keep, between 0 and {most:g}"
                )
        elif not amount > 0:
            raise InputError(f"{option} {given:g}: give a number above 0")
        if self.file_precision not in (None, "fp32", "fp16", "int8"):
            raise InputError(f"--file-precision {self.file_precision}: choose fp32, fp16 or int8")


def check_options(
    selection: Selection, untrained: Untrained, output: Output, *, uses_images: bool = False
) -> None:
    """Check options that exclude each other, before anything is read.

    Args:
        selection: What is kept.
        untrained: A cut without training.
        output: What is saved.
        uses_images: Whether another option uses the images of --data.

    Raises:
        InputError: Two options both select what is kept, or one needs another.
    """
    uses_images = uses_images or selection.uses_images or untrained.selected
    if selection.data is not None and not uses_images:
        raise InputError(
            f"--data {selection.data}: only --saliency taylor, fisher and head use images, "
            "--without-training, and --tokens; add one of them, or leave --data out"
        )
    if not untrained.selected:
        return
    choices = {
        "--mask": selection.mask,
        "--keep-ratio": selection.keep_ratio,
        "--saliency": selection.saliency,
    }
    for option, value in choices.items():
        if value is not None:
            raise InputError(f"--without-training and {option} both select what is kept; keep one")
    if output.out is None and (untrained.front is not None or untrained.resume):
        option = "--front" if untrained.front is not None else "--resume"
        raise InputError(f"{option} needs --out, the folder that is written")
