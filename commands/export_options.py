"""The options of `vitrim export`: the artifact, its graph, its data and further files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.errors import InputError
from ..targets.catalog import load_target

Model = Annotated[
    Path,
    typer.Argument(
        help="A folder that vitrim or transformers saved, or an .onnx file; with --verify, an "
        "artifact."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the artifact.")]
Target = Annotated[
    str,
    typer.Option("--target", help="A target's name (vitrim targets list), or a target TOML."),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="The runtime of the artifact, or `all`: every installed one, measured interleaved.",
    ),
]
PrecisionName = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="fp32, int8, or another that the target supports. Absent: fp32; of an .onnx file, "
        "what it is in.",
        show_default=False,
    ),
]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        help="Images per inference, or `dynamic`. Absent: 1; of an .onnx file, its own batch.",
        show_default=False,
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="SIZE",
        help="Resize the model first: 160, or 160x192 for height x width. Position embeddings are "
        "resampled without training: measure the accuracy at that size.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Data set for parity and calibration. Absent: that of the model's run.",
    ),
]
Images = Annotated[
    int, typer.Option("--images", min=1, help="Number of its validation images to use.")
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Calibration of int8-static on the images: min-max, percentile, entropy, or `best` of "
        "the three.",
    ),
]
FormName = Annotated[
    str | None,
    typer.Option(
        "--form",
        help="A graph form's name, or `plain`. Absent: the fastest known one for the target.",
    ),
]
Opset = Annotated[
    int | None,
    typer.Option("--opset", help="Version of ONNX's operators. Absent: what the form needs."),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Build every graph form, measure them here, and keep the fastest that passes parity.",
    ),
]
OrtFormat = Annotated[
    bool,
    typer.Option(
        "--ort-format",
        help="Also write model.ort and required_operators.config, for a reduced build of ONNX "
        "Runtime.",
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        metavar="NAME",
        help="What the artifact returns; may be repeated: logits, features (what the classifier "
        "reads), patches (patch tokens after the final norm), tokens (with the prefix tokens), "
        "blocks.8 (patch tokens after block 8, from 0, before the norm). Absent: logits.",
        show_default=False,
    ),
]
RuntimeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="KEY=VALUE", help="A setting of the runtime; may be repeated."
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="Threads to compile, tune and measure for.")
]
Bundle = Annotated[
    Path | None,
    typer.Option("--bundle", help="Also write a C++ bundle of the artifact to this folder."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Check an artifact byte for byte against its manifest, and write nothing.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the contents of --out and --bundle.")
]


@dataclass(frozen=True)
class Variant:
    """Which artifact of the model is written."""

    target: Target = "host"
    runtime: Runtime = "onnxruntime"
    precision: PrecisionName = None
    batch: Batch = None
    image_size: ImageSize = None

    def __post_init__(self) -> None:
        load_target(self.target)
        if self.batch in (None, "dynamic"):
            return
        if not (self.batch.isdecimal() and int(self.batch) > 0):
            raise InputError(
                f"--batch {self.batch}: give a whole number of at least 1, or `dynamic`"
            )

    @property
    def batch_size(self) -> int | Literal["dynamic"] | None:
        """The value of `--batch`; None where it is absent."""
        if self.batch is None or self.batch == "dynamic":
            return "dynamic" if self.batch else None
        return int(self.batch)


@dataclass(frozen=True)
class DataOptions:
    """The images for parity and calibration."""

    data: Data = None
    images: Images = 64
    calibration: Calibration = "min-max"


@dataclass(frozen=True)
class GraphOptions:
    """How the graph is built."""

    form: FormName = None
    opset: Opset = None
    tune: Tune = False
    ort_format: OrtFormat = False
    option: RuntimeOption = None
    outputs: Outputs = None
    threads: Threads = 1

    def __post_init__(self) -> None:
        if self.outputs:
            from ..compress.network.named_outputs import require_output_names

            require_output_names(self.outputs, "--output")

    def runtime_options(self) -> dict[str, str]:
        """The settings of `--option`.

        Raises:
            InputError: One is not of the form KEY=VALUE.
        """
        found = {}
        for entry in self.option or ():
            key, equals, value = entry.partition("=")
            if not key or not equals:
                raise InputError(f"--option {entry}: write KEY=VALUE")
            found[key] = value
        return found


@dataclass(frozen=True)
class Output:
    """What is written besides the artifact."""

    bundle: Bundle = None
    verify: Verify = False
    overwrite: Overwrite = False
