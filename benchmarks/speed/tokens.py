"""Latency saved by static token masks: `python -m benchmarks.speed.tokens`.

(latency speed-up) / (MAC reduction) of Vision Transformers with token masks against the dense one,
in ONNX Runtime fp32 (the form that `vitrim.export` chooses) and in our TVM kernels fp32, one
thread, batch 1 and 8: 1.0 where time fell exactly as the multiply-adds did. Two cuts: tokens alone
at 57 % of the multiply-adds (a twentieth of the patches is never embedded, the others leave
linearly from the third block on, those far from the centre first), and tokens and widths together
at half of them. The last attention computes the queries that the head reads only, in the dense
model too, and MACs count that.

The models of a row take turns in one process; the processor time of the computing thread is
measured, which other programs do not lengthen. Each row is measured several times, at different
moments: a ratio is the median over turns, each of which divides two neighbours in time, and in
brackets the smallest and largest of the passes. Weights are random.

    python -m benchmarks.speed.tokens [--model deit_small_patch16_224 ...] [--batch 1 8]
        [--runtime onnxruntime tvm] [--passes 3] [--limit-s 20] [--work FOLDER] [--out FILE]

Artifacts stay in the work folder, and a later run uses them again. Writes `results/tokens.json` and
`tokens.md`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vitrim
from torch import Tensor
from vitrim.bench.local.environment import read_machine
from vitrim.compress.masks.groups import token_sites
from vitrim.compress.network.architecture import Architecture, AttentionSpec
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.storage import replace_file
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export
from vitrim.targets.catalog import load_target

from ..models import computed_macs, lifted
from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from ..turns import Turn, in_turns, until
from .avx2 import opened

MODELS = ("deit_small_patch16_224", "deit_tiny_patch16_224")
RUNTIMES = {"onnxruntime": "ONNX Runtime", "tvm": "TVM, our kernels"}
TOKENS, BOTH = "tokens", "tokens and widths"
# The share of the multiply-adds that a cut keeps; of the second one, tokens alone would keep 0.7.
SHARES = {TOKENS: 0.57, BOTH: 0.5}
BOTH_TOKENS = 0.7
# The share of the patches that the stem embeds, and the blocks that compute all of these.
EMBEDDED, WHOLE_BLOCKS = 0.95, 2
GOAL = 0.97
SCHEMA = "vitrim.benchmark-tokens/1"


def patch_counts(architecture: Architecture, least: int) -> list[int]:
    """The patches that the stream carries after the stem, and after each attention but the last.

    Args:
        architecture: The dense network.
        least: How many the last attention reads.
    """
    first = round(EMBEDDED * architecture.patches)
    attentions = len(attention_sites(architecture))
    falling = attentions - 1 - WHOLE_BLOCKS
    rest = [round(first - (first - least) * (n + 1) / falling) for n in range(falling)]
    return [first] * (1 + WHOLE_BLOCKS) + rest


def attention_sites(architecture: Architecture) -> list[str]:
    """The site of each step with an attention."""
    sites = list(token_sites(architecture))[1:]
    return [
        site
        for site, step in zip(sites, architecture.steps, strict=True)
        if any(isinstance(branch.core, AttentionSpec) for branch in step)
    ]


def nested_sets(architecture: Architecture, counts: Iterable[int]) -> dict[str, Tensor]:
    """Entries of a mask: the patches nearest to the centre of the image at each site.

    Args:
        architecture: The dense network.
        counts: As of `patch_counts`.
    """
    (down, across), prefix = architecture.grid, architecture.prefix
    rows, columns = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
    distance = (rows - (down - 1) / 2) ** 2 + (columns - (across - 1) / 2) ** 2
    order = torch.argsort(distance.flatten(), stable=True)
    sites = [next(iter(token_sites(architecture))), *attention_sites(architecture)]
    entries = {}
    for site, count in zip(sites, counts, strict=False):
        entries[site] = torch.zeros(architecture.tokens, dtype=torch.bool)
        entries[site][:prefix] = True
        entries[site][prefix + order[:count]] = True
    return entries


def with_tokens(dense: CompactModel, share: float) -> dict[str, Tensor]:
    """The entries of a token mask that keeps this share of the multiply-adds, or slightly less."""
    architecture = dense.architecture
    few, many = 1, round(EMBEDDED * architecture.patches)
    while many - few > 1:
        middle = (few + many) // 2
        entries = nested_sets(architecture, patch_counts(architecture, middle))
        kept = computed_macs(vitrim.compact(dense, vitrim.StructuredMask({"token": entries})))
        few, many = (few, middle) if kept > share * computed_macs(dense) else (middle, many)
    return nested_sets(architecture, patch_counts(architecture, few))


def with_widths(dense: CompactModel, tokens: dict[str, Tensor], round_to: int) -> CompactModel:
    """Tokens, one head less, and as many FFN units as leave half of the multiply-adds."""
    attention, ffn = dense.architecture.steps[0][0].core, dense.architecture.steps[1][0].core
    heads, hidden = attention.heads, ffn.hidden  # type: ignore[union-attr]

    def cut(units: int) -> CompactModel:
        ratios = {"head": (heads - 1) / heads, "ffn": units / hidden}
        widths = vitrim.StructuredMask.random(dense, ratios)
        return vitrim.compact(dense, vitrim.StructuredMask({**widths.kept, "token": tokens})).eval()

    few, many = computed_macs(cut(round_to)), computed_macs(cut(hidden))
    wanted = SHARES[BOTH] * computed_macs(dense)
    # Multiply-adds are linear in the FFN's width.
    units = round_to + (wanted - few) / (many - few) * (hidden - round_to)
    return cut(round_to * round(units / round_to))


@dataclass(frozen=True)
class Models:
    """The dense model of a name, and its cuts."""

    name: str

    @cached_property
    def all(self) -> dict[str, CompactModel]:
        """{"dense" or cut: model}."""
        dense = lifted(self.name)
        mask = vitrim.StructuredMask({"token": with_tokens(dense, SHARES[TOKENS])})
        both = with_widths(dense, with_tokens(dense, BOTH_TOKENS), load_target("host").round_to)
        return {"dense": dense, TOKENS: vitrim.compact(dense, mask).eval(), BOTH: both}


def written(
    models: Models, runtime: str, batch: int, work: Path, *, again: bool
) -> tuple[dict[str, Path], dict[str, str]]:
    """Export the models, unless the folder has them.

    Args:
        models: The models.
        runtime: The runtime.
        batch: Batch size.
        work: Where the artifacts are.
        again: Replace those that are there.

    Returns:
        The folder of each model; and for the others why the export refused it.
    """
    folders, absent = {}, {}
    for cut in ("dense", TOKENS, BOTH):
        folder = work / f"{models.name}-{cut.replace(' ', '-')}-{runtime}-batch-{batch}"
        if again or not (folder / "manifest.json").is_file():
            print(f"exporting {folder.name}", file=sys.stderr, flush=True)
            try:
                export(models.all[cut], folder, runtime=runtime, batch=batch, overwrite=True)
            except vitrim.InputError as error:
                absent[f"{models.name}, {cut}, {RUNTIMES[runtime]}, batch {batch}"] = str(error)
                continue
            replace_file(macs_file(folder), f"{computed_macs(models.all[cut])}\n")
        folders[cut] = folder
    return folders, absent


def macs_file(folder: Path) -> Path:
    """The file with the multiply-adds of an artifact's model, beside its folder."""
    return folder.with_name(f"{folder.name}.macs")


def row_of(
    folders: dict[str, Path], passes: list[dict[str, list[Turn]]], cut: str, **where: Any
) -> dict[str, Any]:
    """One line of the table, in plain numbers with their units.

    Args:
        folders: The artifacts, "dense" and the cut among them.
        passes: The turns of each pass.
        cut: The cut.
        where: The model, runtime and batch.
    """
    macs = {name: int(macs_file(folders[name]).read_text()) for name in ("dense", cut)}
    reduction = macs["dense"] / macs[cut]
    speed_ups = [
        [one.least_s / other.least_s for one, other in zip(found["dense"], found[cut], strict=True)]
        for found in passes
    ]
    speed_up = statistics.median([ratio for found in speed_ups for ratio in found])
    of_passes = [statistics.median(found) / reduction for found in speed_ups]
    manifest = Artifact.load(folders[cut]).manifest
    return {
        **where,
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
        "max_relative_error": manifest.parity[-1].max_relative_error,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = result["rows"]
    reached = sum(row["quotient"] >= GOAL for row in rows)
    lines = [
        f"`python -m benchmarks.speed.tokens` on {result['machine']['cpu_model']}, one thread, the "
        "models of a row in turns: processor time, median; the quotient is speed-up over MAC "
        f"reduction, with the smallest and largest of {result['passes']} passes.",
        "",
        *markdown_head(
            *("model", "cut", "runtime", "batch", "G MACs", "dense (ms)", "cut (ms)"),
            *("speed-up", "MAC reduction", "quotient", "passes"),
            numbers=8,
        ),
    ]
    for row in rows:
        low, high = row["quotient_of_passes"]
        lines.append(
            markdown_row(
                row["model"],
                row["cut"],
                RUNTIMES[row["runtime"]],
                row["batch"],
                f"{row['dense_macs'] / 1e9:.2f} to {row['macs'] / 1e9:.2f}",
                f"{row['dense_s'] * 1e3:.2f}",
                f"{row['cut_s'] * 1e3:.2f}",
                f"{row['speed_up']:.3f}x",
                f"{row['mac_reduction']:.3f}x",
                f"{row['quotient']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
        )
    lines += ["", f"A quotient of at least {GOAL}: {reached} of {len(rows)} rows."]
    lines += [f"- {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines) + "\n"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Export and time every row.

    Args:
        options: Of the command.

    Returns:
        The result, to be saved.
    """
    keys = [
        (models, runtime, batch)
        for models in map(Models, options.model)
        for runtime in options.runtime
        for batch in options.batch
    ]
    absent: dict[str, str] = {}
    folders: dict[Any, dict[str, Path]] = {}
    for key in keys:
        folders[key], missing = written(*key, options.work, again=options.again)
        absent |= missing
    measured = [key for key in keys if "dense" in folders[key] and len(folders[key]) > 1]
    calls = {key: {cut: opened(folder) for cut, folder in folders[key].items()} for key in measured}
    passes: dict[Any, list[dict[str, list[Turn]]]] = {key: [] for key in measured}
    for number in range(options.passes):
        for key in measured:
            models, runtime, batch = key
            title = f"{models.name}, {RUNTIMES[runtime]}, batch {batch}"
            print(f"pass {number + 1} of {options.passes}: {title}", file=sys.stderr, flush=True)
            rounds = until(options.limit_s, at_least=3)
            passes[key].append(in_turns(calls[key], rounds, clock=time.thread_time))
    return {
        "schema": SCHEMA,
        "machine": read_machine(),
        "passes": options.passes,
        "goal": GOAL,
        "rows": [
            row_of(folders[key], passes[key], cut, model=key[0].name, runtime=key[1], batch=key[2])
            for key in measured
            for cut in folders[key]
            if cut != "dense"
        ],
        "absent": absent,
    }


def main() -> int:
    """Export, measure, and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="timm names")
    parser.add_argument("--runtime", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--passes", type=int, default=3, help="how often each row is measured")
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds of a row in a pass")
    parser.add_argument("--again", action="store_true", help="export again what is in the folder")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-tokens"))
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options)
    text = markdown(result)
    save_result(options.out, result, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
