"""`vitrim export`: from a saved model to an artifact that a runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError
from ..core.storage import require_empty
from .model_data import CARD, model_data, read_card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..compress.data.preprocessing import Preprocessing
    from ..compress.network.modules.model import CompactModel

# Of measuring, with --runtime all.
ALL_LIMIT_S = 30.0


def export(
    model: Annotated[
        Path,
        typer.Argument(
            help="A folder that vitrim saved, or an .onnx file; with --verify, an artifact."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the artifact.")] = None,
    target: Annotated[
        str,
        typer.Option("--target", help="A target's name (vitrim targets list), or a target TOML."),
    ] = "x86-64",
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            help="The runtime that will run it, or `all`: every one that is here, measured in turns.",
        ),
    ] = "onnxruntime",
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, int8, and what else the target takes.")
    ] = "fp32",
    batch: Annotated[str, typer.Option("--batch", help="Images a run, or `dynamic`.")] = "1",
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="SIZE",
            help="Resize the model first: 160, or 160x192 for height x width. Positions are resampled, nothing is trained: measure the accuracy there.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data set for parity and calibration. Absent: the one of the run that the model lies in.",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, help="How many of its validation images.")
    ] = 64,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="How int8-static finds ranges on the images: min-max, percentile, entropy, or `best` of the three.",
        ),
    ] = "min-max",
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="A graph form's name, or `plain`. Absent: the best known one of the target.",
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", help="Version of ONNX's operators. Absent: what the form needs."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Build every graph form, measure them here, and keep the fastest that passes parity.",
        ),
    ] = False,
    ort_format: Annotated[
        bool,
        typer.Option(
            "--ort-format",
            help="Also write model.ort and required_operators.config, for a build of ONNX Runtime that holds no more.",
        ),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="A setting of the runtime's own; may be repeated."
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Threads to compile, tune and measure for.")
    ] = 1,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Also write a C++ bundle of the artifact to this folder."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check an artifact byte for byte against its manifest, and write nothing.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in --out and --bundle.")
    ] = False,
) -> None:
    """Write the runnable file and its manifest, and prove at every stage that the answers did not
    move.

    [bold]Examples[/bold]

      vitrim export runs/quickstart/compact --out small-int8 --precision int8

      vitrim export small --out small-any --batch dynamic --data imagefolder:photos

      vitrim export small --out small-160 --image-size 160

      vitrim export runs/quickstart/compact --out small --bundle small-cpp

      vitrim export model.onnx --out small --data imagefolder:photos

      vitrim export runs/quickstart/compact --out everywhere --runtime all

      vitrim export --verify small-int8
    """
    if verify:
        from ..export.artifact import verify as checked

        typer.echo(checked(model))
        return
    if out is None:
        raise InputError("--out is missing: name the folder for the artifact")
    for folder in (out, bundle):
        if folder is not None:
            require_empty(folder, overwrite=overwrite)
    if batch != "dynamic" and not (batch.isdecimal() and int(batch) > 0):
        raise InputError(f"--batch {batch}: give a whole number of at least 1, or `dynamic`")
    network, graph = (None, _graph(model)) if model.suffix == ".onnx" else (_network(model), None)
    image = network.architecture.image if network is not None else graph
    assert image is not None
    if image_size is not None:
        image = _image_at(network, image_size, model)
    card = read_card(model.parent / CARD)
    preprocessing, labels, pictures = _data(card, data, image, images)
    shared: dict[str, Any] = {
        "target": target,
        "precision": precision,
        "preprocessing": preprocessing,
        "labels": labels,
        "images": pictures,
        "batch": "dynamic" if batch == "dynamic" else int(batch),
        "calibration": calibration,
        "form": form,
        "tune": tune,
        "ort_format": ort_format,
        "overwrite": overwrite,
        "threads": threads,
    }
    settings = _settings(option or [])
    if network is None:
        from ..export.graphs.given_graph import export_graph

        if runtime != "onnxruntime" or opset is not None or settings:
            raise InputError(
                f"{model}: a graph that was given goes to onnxruntime in its own opset; leave --runtime, --opset and --option out"
            )
        artifact = export_graph(model, out, **shared)
    elif runtime == "all":
        from .export_everywhere import export_everywhere

        if settings or bundle is not None:
            raise InputError(
                "--runtime all takes no --option and no --bundle, which are one runtime's own; name the runtime"
            )
        export_everywhere(
            network, out, time_limit_s=ALL_LIMIT_S, opset=opset, image_size=image_size, **shared
        )
        return
    else:
        from ..export.exporter import export as write

        if runtime == "tvm" and bundle is not None:
            # The bundle links the model into the program.
            settings.setdefault("static", "yes")
        artifact = write(
            network,
            out,
            runtime=runtime,
            opset=opset,
            image_size=image_size,
            options=settings,
            **shared,
        )
    for stage in artifact.manifest.parity:
        typer.echo(
            f"{stage.stage} against {stage.reference}: largest relative error {stage.max_relative_error:.1e}, "
            f"same answer on {100 * stage.top1_agreement:.1f} % of {stage.images} {stage.input_kind}"
        )
    for note in artifact.manifest.notes:
        typer.echo(note)
    typer.echo(f"saved: {out} ({artifact.bytes / 1e6:.2f} MB)")
    if bundle is not None:
        from ..export.bundle import bundle as write_bundle

        typer.echo(f"bundle: {write_bundle(artifact, bundle, overwrite=overwrite)}")


def _network(folder: Path) -> CompactModel:
    from ..compress.network.files import load

    return load(folder)


def _graph(path: Path) -> tuple[int, int, int]:
    """(channels, height, width) of a graph's input."""
    from ..export.graphs.given_graph import image_of, read_graph

    return image_of(read_graph(path), path)


def _image_at(network: CompactModel | None, image_size: str, model: Path) -> tuple[int, int, int]:
    """(channels, height, width) after resizing, refused before anything is read or written for
    it.
    """
    from ..compress.surgery.image_size import at_image_size
    from ..export.resized_model import require_memory

    if network is None:
        raise InputError(
            f"{model}: a graph that was given has its image size built in; export it again at {image_size}, or give the saved model"
        )
    architecture = at_image_size(network.architecture, image_size)
    require_memory(architecture)
    return architecture.image


def _settings(given: list[str]) -> dict[str, str]:
    found = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        if not key or not equals:
            raise InputError(f"--option {entry}: write KEY=VALUE")
        found[key] = value
    return found


def _data(
    card: dict[str, Any] | None, named: str | None, image: tuple[int, int, int], count: int
) -> tuple[Preprocessing | None, list[str] | None, NDArray[Any] | None]:
    """How pictures become inputs, the words for the answers, and real images; None where nothing is
    known of them.
    """
    from ..compress.data.loading import open_dataset
    from ..pipeline.shipping_steps import stratified_sample

    found = model_data(card, named, image)
    if found is None:
        typer.echo(
            "no data set is known for this model (--data NAME): parity is proven on noise, and the manifest holds no preprocessing",
            err=True,
        )
        return None, None, None
    # A run's own preprocessing makes images of the size that it trained at.
    preprocessing = found.preprocessing.model_copy(update={"height": image[1], "width": image[2]})
    opened = open_dataset(found.name, preprocessing=preprocessing, **found.division)
    pictures, _ = stratified_sample(opened.val, count).arrays()
    return preprocessing, list(opened.labels), pictures
