"""Models to pick instead of a pruned DeiT: `python -m benchmarks.speed.other_models`.

Any timm name can be a row. A model is exported unchanged to ONNX Runtime fp32 and is never pruned.
Rows of fewer tokens are `tome:NAME:R`, `ppt:NAME:R`, `hvt:NAME[:EVERY]`, and `METHOD:NAME:RATIO`
for the methods of `vitrim.select_tokens`; a folder that vitrim saved is a row by its path. Vision
Transformers that vitrim lifts have its graph form, others have torch's own graph; the table names
which.

The rows take turns with the baseline in one process, one thread, batch 1; the processor time of the
computing thread is measured, which other programs do not lengthen. Each row is measured several
times, at different moments: a speed-up is the median over turns, each of which divides two
neighbors in time, and in brackets are the smallest and largest of the passes. Weights are random.
Parameters and multiply-adds are those of the torch module, by fvcore. Top-1 is what others
published (`other_models.toml`), never measured here.

    python -m benchmarks.speed.other_models [--model efficientformer_l1 mobilevitv2_100 ...]
        [--baseline deit_small_patch16_224] [--passes 3] [--limit-s 8] [--note TEXT]
        [--work FOLDER] [--out FILE]

Artifacts stay in the work folder, and a later run uses them again. Writes
`results/other_models.json` and `other_models.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import vitrim
from timm.data.config import resolve_model_data_config
from torch import nn
from vitrim.bench.local.environment import read_machine
from vitrim.compress.tokens.merging.hierarchical import hierarchical
from vitrim.compress.tokens.merging.merged import MERGING_METHODS
from vitrim.compress.tokens.select import SCORERS
from vitrim.core.errors import InputError
from vitrim.core.storage import replace_file
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export

from ..counting import count_macs, count_parameters
from ..results_file import RESULTS, markdown_head, markdown_row, publish
from ..turns import Turn, in_turns, until
from .avx2 import opened

BASELINE = "deit_small_patch16_224"
MODELS = (
    "deit_tiny_patch16_224",
    "tome:deit_small_patch16_224:13",
    "ppt:deit_small_patch16_224:50",
    "hvt:deit_small_patch16_224",
    "dynamicvit:deit_small_patch16_224:0.7",
    "evit:deit_small_patch16_224:0.7",
    "efficientformer_l1",
    "efficientformer_l3",
    "efficientformer_l7",
    "mobilevit_s",
    "mobilevitv2_050",
    "mobilevitv2_100",
    "mobilevitv2_150",
    "mobilevitv2_200",
)
PUBLISHED = Path(__file__).with_suffix(".toml")
SCHEMA = "vitrim.benchmark-other-models/1"


@dataclass(frozen=True)
class Facts:
    """What is known of a row without timing it.

    Attributes:
        parameters: Learnable numbers.
        macs: Multiply-adds of one image.
        uncounted: Operators that the count does not include, with the number of their calls.
        image: (channels, height, width).
    """

    parameters: int
    macs: int
    uncounted: Mapping[str, int]
    image: tuple[int, int, int]


def built(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The module of a row in eval mode, and the shape of its image.

    Args:
        name: As `--model`.

    Raises:
        InputError: There is no such model.
    """
    torch.manual_seed(0)
    if Path(name).is_dir():
        saved = vitrim.load(name).eval()
        return saved, saved.architecture.image
    method, source, number = _parsed(name)
    try:
        model = timm.create_model(source).eval()
    except RuntimeError as error:
        raise InputError(
            f"{name}: timm {timm.__version__} has no model {source!r}; see timm.list_models(), "
            "or give a folder that vitrim saved"
        ) from error
    image = resolve_model_data_config(model)["input_size"]
    if method == "hvt":
        model = hierarchical(model, None if number is None else int(number))
    elif method in MERGING_METHODS:
        model = vitrim.merged_tokens(model, method, None if number is None else int(number))
    elif method is not None:
        model = vitrim.select_tokens(model, method, ratio=0.7 if number is None else number)
    return model.eval(), image


def _parsed(name: str) -> tuple[Any, str, float | None]:
    """Method, timm name and number of a row."""
    methods = "|".join(("hvt", *MERGING_METHODS, *SCORERS))
    found = re.fullmatch(rf"(?:({methods}):)?([\w.\-]+)(?::(\d+|0?\.\d+))?", name)
    if found is None or (found[3] and not found[1]):
        raise InputError(
            f"{name}: no row; give a timm name, METHOD:NAME:NUMBER with one of the methods "
            f"{methods.replace('|', ', ')}, or a folder"
        )
    return found[1], found[2], float(found[3]) if found[3] else None


def written(name: str, work: Path, *, again: bool) -> tuple[Path, Facts]:
    """Export a row, unless the folder has it.

    Args:
        name: As `--model`.
        work: Where the artifacts are.
        again: Replace what is there.

    Returns:
        The folder of the artifact, and the facts of the row.
    """
    folder = work / re.sub(r"[^\w.\-]", "-", name)
    facts_file = folder.with_name(f"{folder.name}.facts.json")
    if again or not (facts_file.is_file() and (folder / "manifest.json").is_file()):
        print(f"exporting {name}", file=sys.stderr, flush=True)
        model, image = built(name)
        facts = Facts(count_parameters(model), *count_macs(model, (1, *image)), image)
        export(model, folder, image=image, name=name, overwrite=True)
        replace_file(facts_file, json.dumps(asdict(facts)) + "\n")
    stored = json.loads(facts_file.read_text(encoding="utf-8"))
    return folder, Facts(**{**stored, "image": tuple(stored["image"])})


def published(name: str, image: Sequence[int], table: Mapping[str, Any]) -> dict[str, Any] | None:
    """The published accuracy of a row; None where there is none for its image size.

    Args:
        name: As `--model`; a timm name may end with a dot and the name of its weights.
        image: (channels, height, width).
        table: What `other_models.toml` contains.
    """
    found = table["models"].get(name) or table["models"].get(name.partition(".")[0])
    if found is None or tuple(image[1:]) != (found["image"],) * 2:
        return None
    return {**found, "source": table["sources"][found["source"]]}


def row_of(
    name: str, folder: Path, facts: Facts, passes: Sequence[Mapping[str, list[Turn]]], baseline: str
) -> dict[str, Any]:
    """One line of the table, in plain numbers with their units.

    Args:
        name: As `--model`.
        folder: Its artifact.
        facts: What is known of it.
        passes: The turns of each pass, of this row and of the baseline.
        baseline: The row that the others are compared with.
    """
    speed_ups = [
        [one.least_s / own.least_s for one, own in zip(found[baseline], found[name], strict=True)]
        for found in passes
    ]
    of_passes = [statistics.median(each) for each in speed_ups]
    times_s = [turn.least_s for found in passes for turn in found[name]]
    low_s, median_s, high_s = statistics.quantiles(times_s, n=4)
    artifact = Artifact.load(folder)
    return {
        "model": name,
        **asdict(facts),
        "form": artifact.manifest.form,
        "file_bytes": artifact.bytes,
        "median_s": median_s,
        "quartiles_s": [low_s, high_s],
        "turns": len(times_s),
        "speed_up": statistics.median(ratio for each in speed_ups for ratio in each),
        "speed_up_of_passes": [min(of_passes), max(of_passes)],
        "max_relative_error": artifact.manifest.parity[-1].max_relative_error,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    baseline = next(row for row in result["rows"] if row["model"] == result["baseline"])
    lines = [
        f"`python -m benchmarks.speed.other_models` on {result['machine']['cpu_model']}, ONNX "
        "Runtime fp32, one thread, batch 1, random weights: processor time, median with quartiles; "
        f"speed-up against {result['baseline']} in turns, with the smallest and largest of "
        f"{result['passes']} passes. Top-1 is published, not measured here.{_note(result)}",
        "",
        *markdown_head(
            *("model", "graph", "published top-1 (%)", "image", "M parameters", "G MACs"),
            *("time (ms)", "speed-up", "speed-up / MAC reduction"),
            numbers=7,
        ),
    ]
    for row in sorted(result["rows"], key=lambda row: float(row["median_s"])):
        low, high = (1e3 * value for value in row["quartiles_s"])
        worst, best = row["speed_up_of_passes"]
        figure = row["published"]
        lines.append(
            markdown_row(
                row["model"],
                "torch's" if row["form"] == "plain" else "vitrim's",
                f"{figure['top1_percent']:.1f}" if figure else "",
                row["image"][-1],
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['macs'] / 1e9:.2f}",
                f"{1e3 * row['median_s']:.1f} ({low:.1f} to {high:.1f})",
                f"{row['speed_up']:.2f}x ({worst:.2f} to {best:.2f})",
                f"{row['speed_up'] * row['macs'] / baseline['macs']:.2f}",
            )
        )
    figures = [row["published"] for row in result["rows"] if row["published"]]
    lines += ["", "Sources of the published figures:", ""]
    lines += [f"- {source}" for source in dict.fromkeys(each["source"] for each in figures)]
    trainings = dict.fromkeys(each["training"] for each in figures if "training" in each)
    for training in trainings:
        names = [row["model"] for row in result["rows"] if _training(row) == training]
        lines.append(f"- {training}: {', '.join(names)}")
    if result["absent"]:
        lines += ["", "Absent:", ""]
        lines += [f"- {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines) + "\n"


def _note(result: Mapping[str, Any]) -> str:
    return f" {result['note']}" if result["note"] else ""


def _training(row: Mapping[str, Any]) -> str | None:
    found: str | None = (row["published"] or {}).get("training")
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Export and time every row.

    Args:
        options: Of the command.

    Returns:
        The result, to be saved.
    """
    absent: dict[str, str] = {}
    found: dict[str, tuple[Path, Facts]] = {}
    for name in dict.fromkeys([options.baseline, *options.model]):
        try:
            found[name] = written(name, options.work, again=options.again)
        except InputError as error:
            if name == options.baseline:
                raise
            absent[name] = str(error).removeprefix(f"{name}: ")
            print(error, file=sys.stderr, flush=True)
    calls = {name: opened(folder) for name, (folder, _) in found.items()}
    passes: dict[str, list[dict[str, list[Turn]]]] = {name: [] for name in found}
    for number in range(options.passes):
        for name in found:
            print(f"pass {number + 1} of {options.passes}: {name}", file=sys.stderr, flush=True)
            pair = {each: calls[each] for each in dict.fromkeys([options.baseline, name])}
            rounds = until(options.limit_s, at_least=3)
            passes[name].append(in_turns(pair, rounds, clock=time.thread_time))
    table = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {
        "schema": SCHEMA,
        "machine": read_machine(),
        "note": options.note,
        "passes": options.passes,
        "baseline": options.baseline,
        "rows": [
            {
                **row_of(name, folder, facts, passes[name], options.baseline),
                "published": published(name, facts.image, table),
            }
            for name, (folder, facts) in found.items()
        ],
        "absent": absent,
    }


def main() -> int:
    """Export, measure, and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=list(MODELS),
        help="timm names, METHOD:NAME:NUMBER as described above, or folders that vitrim saved",
    )
    parser.add_argument("--baseline", default=BASELINE, help="the row to compare with")
    parser.add_argument("--passes", type=int, default=3, help="how often each row is measured")
    parser.add_argument("--limit-s", type=float, default=8.0, help="seconds of a row in a pass")
    parser.add_argument("--again", action="store_true", help="export again what is in the folder")
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-other-models"))
    parser.add_argument("--out", type=Path, default=RESULTS / "other_models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        result = measure(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    publish(options.out, result, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
