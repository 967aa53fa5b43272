"""Speed-up over MAC reduction of cut models against the dense one, measured in turns.

The models of a row take turns in one process; the processor time of the computing thread is
measured, which other programs do not lengthen. Each row is measured several times, at different
moments: a ratio is the median over turns, each of which divides two neighbours in time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import vitrim
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.storage import replace_file
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export

from ..models import computed_macs
from ..turns import Turn, in_turns, until

MODELS = ("deit_small_patch16_224", "deit_tiny_patch16_224")
RUNTIMES = {"onnxruntime": "ONNX Runtime", "tvm": "TVM, our kernels"}
# Name of the model, runtime, batch size.
Key = tuple[str, str, int]


def command_line(doc: str | None, work: Path, out: Path) -> argparse.ArgumentParser:
    """The options that these benchmarks share.

    Args:
        doc: The description.
        work: Where artifacts stay by default.
        out: Where results are written by default, without a suffix.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="timm names, or demo")
    parser.add_argument("--runtime", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--passes", type=int, default=3, help="how often each row is measured")
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds of a row in a pass")
    parser.add_argument("--again", action="store_true", help="export again what is in the folder")
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--out", type=Path, default=out)
    return parser


def written(
    key: Key, cuts: Iterable[str], model_of: Callable[[str], CompactModel], options: Any
) -> tuple[dict[str, Path], dict[str, str]]:
    """Export models, unless the folder has them.

    Args:
        key: Name of the dense model, runtime, batch size.
        cuts: "dense", and the name of each cut.
        model_of: The model of a cut.
        options: Of the command line.

    Returns:
        The folder of each model; and for the others why the export refused it.
    """
    name, runtime, batch = key
    folders, absent = {}, {}
    for cut in cuts:
        folder = options.work / f"{name}-{cut.replace(' ', '-')}-{runtime}-batch-{batch}"
        if options.again or not (folder / "manifest.json").is_file():
            print(f"exporting {folder.name}", file=sys.stderr, flush=True)
            model = model_of(cut)
            try:
                export(model, folder, runtime=runtime, batch=batch, overwrite=True)
            except vitrim.InputError as error:
                absent[f"{name}, {cut}, {RUNTIMES[runtime]}, batch {batch}"] = str(error)
                continue
            replace_file(_macs_file(folder), f"{computed_macs(model)}\n")
        folders[cut] = folder
    return folders, absent


def measured_rows(
    options: Any,
    models_of: Callable[[str], tuple[Iterable[str], Callable[[str], CompactModel]]],
    opened: Callable[[Path], Callable[[], object]],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Export and time every row.

    Args:
        options: Of the command line.
        models_of: From a name to its cuts ("dense" is the first), and the model of each.
        opened: From the folder of an artifact to a call that runs it.

    Returns:
        The rows; and why others are absent.
    """
    folders: dict[Key, dict[str, Path]] = {}
    absent: dict[str, str] = {}
    for name in options.model:
        cuts, model_of = models_of(name)
        for runtime, batch in itertools.product(options.runtime, options.batch):
            key = (name, runtime, batch)
            folders[key], missing = written(key, cuts, model_of, options)
            absent |= missing
    measured = [key for key, found in folders.items() if "dense" in found and len(found) > 1]
    calls = {key: {cut: opened(folder) for cut, folder in folders[key].items()} for key in measured}
    passes: dict[Key, list[dict[str, list[Turn]]]] = {key: [] for key in measured}
    for number in range(options.passes):
        for key in measured:
            title = f"{key[0]}, {RUNTIMES[key[1]]}, batch {key[2]}"
            print(f"pass {number + 1} of {options.passes}: {title}", file=sys.stderr, flush=True)
            rounds = until(options.limit_s, at_least=3)
            passes[key].append(in_turns(calls[key], rounds, clock=time.thread_time))
    rows = [
        {
            **dict(zip(("model", "runtime", "batch"), key, strict=True)),
            **_row(folders[key], passes[key], cut),
        }
        for key in measured
        for cut in folders[key]
        if cut != "dense"
    ]
    return rows, absent


def quotient_cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row from its multiply-adds to the quotients of its passes."""
    low, high = row["quotient_of_passes"]
    return [
        f"{row['dense_macs'] / 1e9:.2f} to {row['macs'] / 1e9:.2f}",
        f"{row['dense_s'] * 1e3:.2f}",
        f"{row['cut_s'] * 1e3:.2f}",
        f"{row['speed_up']:.3f}x",
        f"{row['mac_reduction']:.3f}x",
        f"{row['quotient']:.3f}",
        f"{low:.3f} to {high:.3f}",
    ]


def _macs_file(folder: Path) -> Path:
    """The file with the multiply-adds of an artifact's model, beside its folder."""
    return folder.with_name(f"{folder.name}.macs")


def _row(folders: dict[str, Path], passes: list[dict[str, list[Turn]]], cut: str) -> dict[str, Any]:
    """One line of the table, in plain numbers with their units."""
    macs = {name: int(_macs_file(folders[name]).read_text()) for name in ("dense", cut)}
    reduction = macs["dense"] / macs[cut]
    speed_ups = [
        [one.least_s / other.least_s for one, other in zip(found["dense"], found[cut], strict=True)]
        for found in passes
    ]
    speed_up = statistics.median([ratio for found in speed_ups for ratio in found])
    of_passes = [statistics.median(found) / reduction for found in speed_ups]
    manifest = Artifact.load(folders[cut]).manifest
    parity = manifest.parity[-1]
    row = {
        "cut": cut,
        "form": manifest.form,
        "dense_macs": macs["dense"],
        "macs": macs[cut],
        "mac_reduction": reduction,
        **{
            f"{name}_s": statistics.median(turn.least_s for found in passes for turn in found[key])
            for name, key in (("dense", "dense"), ("cut", cut))
        },
        "speed_up": speed_up,
        "quotient": speed_up / reduction,
        "quotient_of_passes": [min(of_passes), max(of_passes)],
        "turns": sum(map(len, speed_ups)),
        "max_relative_error": parity.max_relative_error,
    }
    if parity.choices:
        row["kept"] = [choice.kept for choice in parity.choices]
        row["equal_choices"] = [choice.equal for choice in parity.choices]
    return row
