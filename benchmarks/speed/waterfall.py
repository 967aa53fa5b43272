"""What each step of the stack brought, from torch eager to a compact int8 file, as a picture.

    python -m benchmarks.speed.waterfall --run runs/quickstart
    python -m benchmarks.speed.waterfall --model DENSE --compact COMPACT [--data NAME]
        [--runtime tvm] [--int8 int8] [--threads 1] [--limit-s 60] [--test-images 1000]
        [--work FOLDER] [--out FILE]
    python -m benchmarks.speed.waterfall --model benchmarks/checkpoints/cifar10_small
        --data parquet:../shared/data/cifar10-jpeg --share 0.3    # cut here, without training

Steps: the dense model in torch eager (fp32), in ONNX Runtime, in `--runtime` (our kernels); then in
`--runtime` the compact model's widths, its depth, its tokens, and int8. Models in between have the
compact model's sizes and random weights: latency depends on sizes only, so they have no top-1. All
files are timed in turns, in one session, each in a process of its own. Without --compact, the model
is cut without training to `--share` of the dense one's estimated latency, from images of --data.
With --run, waterfall.json is also written there, and `vitrim report RUN` shows it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import vitrim
from torch import Tensor
from vitrim.bench.local.environment import read_machine
from vitrim.bench.local.measure import measure_interleaved
from vitrim.bench.report.waterfall import (
    COLUMNS,
    WATERFALL_FILE,
    Waterfall,
    WaterfallStep,
    cells,
    waterfall_picture,
)
from vitrim.bench.results.measurement import Measurement
from vitrim.compress.data.loading import open_dataset
from vitrim.compress.data.named_datasets import default_preprocessing
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import DataSplits
from vitrim.compress.latency.cut import LatencyCuts
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.masks.groups import SHARED
from vitrim.compress.masks.mask import StructuredMask
from vitrim.compress.network.architecture import Architecture, AttentionSpec, BranchSpec
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.surgery.plan import plan
from vitrim.core.errors import InputError
from vitrim.core.storage import replace_file
from vitrim.export.exporter import export
from vitrim.pipeline.latency_table import TableRequest
from vitrim.pipeline.run import DATA
from vitrim.pipeline.source_model import with_last_queries

from ..results_file import RESULTS, markdown_head, markdown_row

RUNTIMES = {"torch": "torch eager", "onnxruntime": "ONNX Runtime", "tvm": "TVM, our kernels"}
CALIBRATION_IMAGES, CUT_IMAGES = 64, 256


@dataclass(frozen=True)
class Row:
    """One file to measure.

    Attributes:
        name: What the step adds.
        model: The network.
        runtime: Of the file.
        precision: Of the file.
        trained: Whether the weights are those of a trained model, so that it has a top-1.
    """

    name: str
    model: CompactModel
    runtime: str
    precision: str
    trained: bool


def cut_steps(dense: Architecture, small: Architecture) -> dict[str, Architecture]:
    """The networks between a dense one and its compact one: {"widths", "depth", "tokens"}.

    A step that changes nothing is left out; the last one is the compact network.

    Args:
        dense: The dense network.
        small: Its compact network, of one width of the stream.

    Raises:
        InputError: The compact network is not a cut of the dense one.
    """
    known = {branch.name for branch in dense.branches}
    if not {branch.name for branch in small.branches} <= known:
        raise InputError("the compact model has sub-layers that the dense one does not have")
    if any(branch.reads or branch.writes for branch in small.branches):
        raise InputError(
            "the compact model has a stream of its own for each sub-layer; sharing = "
            '"residual" has one'
        )
    keep = torch.arange(dense.embed) < small.embed
    narrow = plan(dense, StructuredMask({"embed": {SHARED: keep}})).architecture
    sized = {branch.name: _with_all_tokens(branch, dense) for branch in small.branches}
    whole = {"order": None, "selects": (), "last_queries": small.last_queries}
    fields = small.model_copy(update=whole)
    widths = tuple(
        tuple(sized.get(branch.name, branch) for branch in step) for step in narrow.steps
    )
    kept = tuple(tuple(branch for branch in step if branch.name in sized) for step in widths)
    depth = tuple(step for step in kept if step)
    steps = {
        "widths": _valid(fields, widths),
        "depth": _valid(fields, depth),
        "tokens": small,
    }
    found: dict[str, Architecture] = {}
    before = network_shape(dense)
    for name, architecture in steps.items():
        shape = network_shape(architecture)
        if shape != before:
            found[name] = architecture
        before = shape
    if not found:
        raise InputError("the compact model has the sizes of the dense one; nothing to show")
    last = list(found)[-1]
    return {**found, last: small}


def _with_all_tokens(branch: BranchSpec, dense: Architecture) -> BranchSpec:
    """A sub-layer of the compact network that reads and computes every token."""
    core = branch.core
    if isinstance(core, AttentionSpec):
        if core.rope is not None:
            rope = core.rope.model_copy(update={"tokens": dense.patches})
            core = core.model_copy(update={"rope": rope})
        if core.bias is not None:
            core = core.model_copy(update={"bias": core.bias.model_copy(update={"order": None})})
    return branch.model_copy(update={"tokens": None, "core": core})


def _valid(fields: Architecture, steps: tuple[tuple[BranchSpec, ...], ...]) -> Architecture:
    changed = fields.model_copy(update={"steps": steps})
    return Architecture.model_validate(changed.model_dump(by_alias=True))


def random_model(architecture: Architecture) -> CompactModel:
    """A network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CompactModel(architecture).eval()


def rows_of(dense: CompactModel, small: CompactModel, runtime: str, int8: str | None) -> list[Row]:
    """The files to measure, in the order of the steps.

    Args:
        dense: The dense model.
        small: The compact model.
        runtime: Of all files behind ONNX Runtime's.
        int8: The last precision, int8 or int8-static; None without one.
    """
    dense = with_last_queries(dense).eval()
    rows = [Row("dense", dense, "torch", "fp32", trained=True)]
    rows.append(Row("+ ONNX Runtime", dense, "onnxruntime", "fp32", trained=True))
    if runtime != "onnxruntime":
        rows.append(Row("+ our kernels", dense, runtime, "fp32", trained=True))
    steps = cut_steps(dense.architecture, small.architecture)
    for name, architecture in steps.items():
        last = name == list(steps)[-1]
        model = small if last else random_model(architecture)
        rows.append(Row(f"+ {name}", model, runtime, "fp32", trained=last))
    if int8 is not None:
        rows.append(Row(f"+ {int8}", small, runtime, int8, trained=True))
    return rows


def written(rows: list[Row], work: Path, threads: int, images: Tensor | None) -> dict[str, Path]:
    """Export the files: {step: folder}.

    Args:
        rows: What is exported.
        work: Where the files are written.
        threads: Of the runtime.
        images: Normalized images for parity and calibration.
    """
    found = {}
    for number, row in enumerate(rows):
        folder = work / f"{number}-{row.runtime}-{row.precision}"
        print(f"exporting {folder.name}: {row.name}", flush=True)
        export(
            row.model,
            folder,
            runtime=row.runtime,
            precision=row.precision,  # type: ignore[arg-type]
            threads=threads,
            images=images,
            overwrite=True,
        )
        found[row.name] = folder
    return found


def waterfall_of(
    rows: list[Row], measured: Mapping[str, Measurement], title: str, images: int
) -> Waterfall:
    """The steps with their measurements.

    Args:
        rows: The files.
        measured: Their measurements by step.
        title: Name of the model.
        images: Test images of top-1.
    """
    steps = []
    for row in rows:
        found = measured[row.name]
        low, _, high = statistics.quantiles([1e3 * each for each in found.latency_s], n=4)
        how = f"{RUNTIMES.get(row.runtime, row.runtime)}, {row.precision}"
        steps.append(
            WaterfallStep(
                name=row.name,
                how=how,
                latency_ms=1e3 * found.summary().p50_s,
                quartiles_ms=(low, high),
                samples=len(found.latency_s),
                top1=found.top1 if row.trained else None,
            )
        )
    first = measured[rows[0].name]
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    machine = f"{read_machine()['cpu_model']}, {threads}, batch 1"
    return Waterfall(title=title, machine=machine, images=images, steps=tuple(steps))


def markdown(found: Waterfall, command: str) -> str:
    """The table.

    Args:
        found: The steps.
        command: The command that measures them.
    """
    images = f" Top-1 of {found.images} test images." if found.images else ""
    lines = [f"`{command}` on {found.machine}: {found.title}.{images}", ""]
    lines += markdown_head(*COLUMNS, numbers=len(COLUMNS) - 2)
    lines += [markdown_row(*row) for row in cells(found)]
    return "\n".join(lines) + "\n"


def test_file(data: DataSplits, count: int, work: Path) -> Path | None:
    """The test images as a data set of a measurement; None without images.

    Args:
        data: The data set.
        count: Largest number of images; 0: none.
        work: Where the file is written.
    """
    count = min(count, len(data.test))
    if not count:
        return None
    work.mkdir(parents=True, exist_ok=True)
    images = data.test.floats(slice(0, count)).numpy()
    path = work / "test.npz"
    np.savez(path, images=images, labels=data.test.targets[:count])
    return path


def data_of(name: str | None, run: Path | None, architecture: Architecture) -> DataSplits:
    """The images, prepared as those that the model was trained on.

    Args:
        name: The data set, as in a recipe; None: that of the run, or the quickstart's.
        run: A run folder.
        architecture: The dense model.
    """
    card = json.loads((run / DATA).read_text(encoding="utf-8")) if run is not None else {}
    if card and name in (None, card["name"]):
        preprocessing = Preprocessing.model_validate(card["preprocessing"])
        division = {key: card[key] for key in ("seed", "validation")}
        return open_dataset(card["name"], preprocessing=preprocessing, **division)
    preprocessing = default_preprocessing(name or "quickstart", architecture.image)
    if architecture.data is not None:
        stated = {"mean": architecture.data.mean, "std": architecture.data.std}
        preprocessing = preprocessing.model_copy(update=stated)
    return open_dataset(name or "quickstart", preprocessing=preprocessing)


def cut_here(dense: CompactModel, images: Tensor, share: float, runtime: str) -> CompactModel:
    """A compact model without training, for a share of the dense one's latency by a table.

    Args:
        dense: The dense model.
        images: Normalized images.
        share: The share.
        runtime: The runtime of the table.
    """
    table = TableRequest(runtime=runtime).table(dense.architecture, "--runtime")
    print(f"cutting by {table.title}", flush=True)
    latency_ms = share * table.latency_ms(network_shape(dense.architecture))
    return LatencyCuts(dense, images, table).cut(latency_ms).model


def main() -> int:
    """Export, measure, and write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run folder, with baseline/ and compact/")
    parser.add_argument("--model", type=Path, help="the dense model, a folder vitrim saved")
    parser.add_argument("--compact", type=Path, help="its compact model; absent: cut here")
    parser.add_argument("--share", type=float, default=0.3, help="of the latency, if cut here")
    parser.add_argument("--data", help="as in a recipe; default: that of --run, or quickstart")
    parser.add_argument("--runtime", default="tvm", help="of the steps behind ONNX Runtime")
    parser.add_argument("--int8", default="int8", help="int8, int8-static, or none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=60.0, help="seconds of the session")
    parser.add_argument("--test-images", type=int, default=1000, help="of top-1; 0: none")
    parser.add_argument("--title", help="default: the name of the model's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/waterfall"))
    parser.add_argument("--out", type=Path, default=RESULTS / "waterfall")
    options = parser.parse_args()
    if (options.run is None) == (options.model is None):
        parser.error("give --run, or --model")
    dense = vitrim.load(options.model or options.run / "baseline").eval()
    compact = options.compact or (None if options.run is None else options.run / "compact")
    data = data_of(options.data, options.run, dense.architecture)
    images = data.val.floats(slice(0, CALIBRATION_IMAGES))
    if compact is None:
        fitting = data.train.floats(slice(0, CUT_IMAGES))
        small = cut_here(dense, fitting, options.share, options.runtime).eval()
    else:
        small = vitrim.load(compact).eval()
    int8 = None if options.int8 == "none" else options.int8
    rows = rows_of(dense, small, options.runtime, int8)
    folders = written(rows, options.work, options.threads, images)
    tests = test_file(data, options.test_images, options.work)
    measured = measure_interleaved(
        folders, threads=options.threads, time_limit_s=options.limit_s, dataset=tests
    )
    count = min(options.test_images, len(data.test))
    title = options.title or (options.model or options.run).name
    found = waterfall_of(rows, measured, title, count)
    given = f"--run {options.run}" if options.run else f"--model {options.model}"
    if options.data:
        given += f" --data {options.data.partition(':')[0]}"
    text = markdown(found, f"python -m benchmarks.speed.waterfall {given}")
    print(text)
    found.save(options.out.with_suffix(".json"))
    replace_file(options.out.with_suffix(".md"), text)
    replace_file(options.out.with_suffix(".svg"), waterfall_picture(found))
    if options.run is not None:
        found.save(options.run / WATERFALL_FILE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
