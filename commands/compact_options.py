"""The options of `vitrim compact`: the model, the choice of what is kept, and the output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError

# Saliencies that need the gradients of the loss on images.
FROM_IMAGES = ("taylor", "fisher", "head")
# The best criteria of the benchmark of cuts without training, with labelled images and without.
WITH_LABELS, DEFAULT_SALIENCY, DEFAULT_KEEP_RATIO = "fisher", "l2", 0.5

Source = Annotated[
    Path | None,
    typer.Argument(
        help="A folder that vitrim or transformers saved, or a .safetensors or .pth file.",
        metavar="MODEL",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="The same as MODEL, as an option.", show_default=False),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", help="timm name of the model in a checkpoint file.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="KEY=VALUE",
        help="Keyword for timm.create_model, e.g. img_size=32. May be repeated.",
    ),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="timm's published weights instead of a checkpoint.")
]
Mask = Annotated[
    Path | None, typer.Option("--mask", help="A mask that vitrim saved.", show_default=False)
]
KeepRatio = Annotated[
    float | None,
    typer.Option(
        "--keep-ratio",
        help="Without a mask: keep this share of each dimension. With --saliency alone: 0.5.",
        show_default=False,
    ),
]
SaliencyName = Annotated[
    str | None,
    typer.Option(
        "--saliency",
        help="Criterion of what is kept. From the weights alone: l1, l2 (the default without "
        "--data), random. From images with labels: fisher (mean square of the first-order change "
        "of the loss without a unit, comparable between layers; the default with --data), taylor "
        "(that change itself), head (sensitivity of the loss to each attention head; cuts heads "
        "only).",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Images for taylor, fisher, head, --tokens and --without-training: fashion-mnist, "
        "cifar10, imagefolder:PATH, parquet:PATH, ... Without labels: images:FOLDER. Absent: those "
        "of the run that contains MODEL.",
        show_default=False,
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        min=1,
        help="Number of its training images, with the class proportions of the data set.",
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        "--scope",
        help="Where --keep-ratio compares units: layer, global or isomorphic. Absent: the best "
        "measured for the criterion, global for taylor and fisher, layer for the others.",
        show_default=False,
    ),
]
Sharing = Annotated[str, typer.Option("--sharing", help="residual, full or unshared.")]
RoundTo = Annotated[
    int | None,
    typer.Option(
        "--round-to", min=1, help="Round kept widths to multiples of this.", show_default=False
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        help="Seed of random choices (--saliency, --tokens and --select) and of the choice of "
        "images.",
    ),
]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Show for each module what was cut, from and to which size."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for the smaller model and its mask. Absent: nothing is saved.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the contents of --out.")]


@dataclass(frozen=True)
class ModelOptions:
    """The model to cut."""

    source: Source = None
    checkpoint: Checkpoint = None
    model: ModelName = None
    overrides: Overrides = None
    pretrained: Pretrained = False

    def __post_init__(self) -> None:
        if self.source is not None and self.checkpoint is not None:
            raise InputError(
                f"two models: {self.source} and --checkpoint {self.checkpoint}; name one"
            )


@dataclass(frozen=True)
class Selection:
    """What is kept: by a mask, by a saliency, or everything that is not dead."""

    mask: Mask = None
    keep_ratio: KeepRatio = None
    saliency: SaliencyName = None
    data: Data = None
    samples: Samples = 256
    scope: Scope = None
    sharing: Sharing = "residual"
    round_to: RoundTo = None
    seed: Seed = 0

    @property
    def only_dead(self) -> bool:
        """Whether only dead weight is removed."""
        return self.mask is None and self.keep_ratio is None and self.saliency is None

    @property
    def criterion(self) -> str:
        """The saliency, or the best measured one for what is given."""
        if self.saliency is not None:
            return self.saliency
        labelled = self.data is not None and not self.data.startswith("images:")
        return WITH_LABELS if labelled else DEFAULT_SALIENCY

    @property
    def uses_images(self) -> bool:
        """Whether units are ranked by a saliency that needs images."""
        ranked = self.saliency is not None or self.keep_ratio is not None
        return ranked and self.criterion in FROM_IMAGES

    def __post_init__(self) -> None:
        from ..compress.masks.saliency import require_criterion

        for option, value in (("--keep-ratio", self.keep_ratio), ("--saliency", self.saliency)):
            if self.mask is not None and value is not None:
                raise InputError(f"--mask and {option} both select what is kept; keep one")
        if self.saliency is not None:
            require_criterion(self.saliency)


@dataclass(frozen=True)
class Output:
    """What is printed and saved."""

    explain: Explain = False
    out: Out = None
    overwrite: Overwrite = False
