"""How much of the removed arithmetic becomes time: `python -m benchmarks.speed.proportionality`.

(latency speed-up) / (MAC reduction) between a dense Vision Transformer and cut ones, both written
by `vitrim.export`'s forms, in ONNX Runtime fp32 at batch 1. 1.0 means that time fell exactly as the
multiply-adds did. Sessions run interleaved in one process, in turning order; medians, quartiles,
and the ratio's own quartiles over rounds (each round divides two neighbours in time, so that a busy
machine cancels out). MACs count what the form computes: the last block's queries only for the
tokens that the head reads, in the dense model as in the cut ones.

    python -m benchmarks.speed.proportionality [--run runs/quickstart ...] [--model
    demo|deit_small_patch16_224|...] [--form NAME|all] [--threads 1] [--limit-s 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import vitrim
from vitrim.bench.local.environment import read_machine, read_state
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import FORMS, Form, form_named, write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.sessions import open_session

DEMO = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}
# What is kept of each dimension, uniform over blocks. Heads go whole and widths stay multiples of
# 16.
CUTS: dict[str, dict[str, dict[str, float]]] = {
    "demo": {
        "half of FFN and heads": {"head": 0.5, "ffn": 0.5},
        "a quarter of FFN, half of heads": {"head": 0.5, "ffn": 0.25},
        "three quarters of embed, half of heads, 3/8 of FFN": {
            "embed": 0.75,
            "head": 0.5,
            "ffn": 0.375,
        },
        "half of everything": {"embed": 0.5, "head": 0.5, "ffn": 0.5},
    },
    "": {
        "half of FFN and heads": {"head": 0.5, "ffn": 0.5},
        "5/6 of embed, 2/3 of heads, half of FFN": {"embed": 0.8334, "head": 0.6667, "ffn": 0.5},
        "2/3 of embed and heads, 3/4 of FFN": {"embed": 0.6667, "head": 0.6667, "ffn": 0.75},
    },
}
GOALS = {"demo": 0.8, "deit_small_patch16_224": 0.9}


@dataclass(frozen=True)
class Row:
    """One cut in one form against the dense model in the same form."""

    model: str
    cut: str
    form: str
    params: int
    macs: int
    mac_reduction: float
    latency_s: float
    latency_quartiles_s: tuple[float, float]
    speed_up: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def computed_macs(model: CompactModel) -> int:
    """Multiply-adds as the forms compute them."""
    return count_macs(model.architecture.model_copy(update={"last_queries": True}))


def models_of(name: str) -> dict[str, CompactModel]:
    """The dense model and its cuts, with random weights: only shapes matter for time."""
    torch.manual_seed(0)
    source = (
        timm.create_model("vit_tiny_patch16_224", **DEMO)
        if name == "demo"
        else timm.create_model(name)
    )
    dense = vitrim.lift(source.eval())
    found = {"dense": dense}
    for title, keep in CUTS.get(name, CUTS[""]).items():
        found[title] = vitrim.compact(
            dense, vitrim.StructuredMask.random(dense, keep_ratio=keep)
        ).eval()
    return found


def models_of_runs(folders: list[Path]) -> dict[str, CompactModel]:
    """The baseline of the first run folder, and what each run learned to keep of it. Errors:
    InputError where a folder is none of a run.
    """
    found = {"dense": vitrim.load(folders[0] / "baseline")}
    for folder in folders:
        if vitrim.load(folder / "baseline").architecture != found["dense"].architecture:
            raise vitrim.InputError(
                f"{folder}: its baseline is not that of {folders[0]}; compare runs that start from one model"
            )
        found[f"learned: {folder.name}"] = vitrim.load(folder / "compact")
    return found


def run(
    name: str, models: dict[str, CompactModel], forms: list[Form], threads: int, limit_s: float
) -> list[Row]:
    """Measure all cuts in all forms, interleaved."""
    image = np.random.default_rng(0).standard_normal(
        (1, *models["dense"].architecture.image), dtype=np.float32
    )
    sessions = {
        (title, form.name): open_session(
            write_network(model, form).SerializeToString(), threads=threads
        )
        for title, model in models.items()
        for form in forms
    }
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in sessions}
    keys, start, rounds = list(sessions), time.perf_counter(), 0
    while rounds < 10 or time.perf_counter() - start < limit_s:
        turn = rounds % len(keys)
        for key in keys[turn:] + keys[:turn]:
            session = sessions[key]
            session.run(None, {"images": image})
            timed = []
            # Short runs are repeated within a turn; the smallest of three is what the machine did
            # undisturbed.
            for _ in range(3):
                before = time.perf_counter()
                session.run(None, {"images": image})
                timed.append(time.perf_counter() - before)
            samples[key].append(min(timed))
        rounds += 1
    rows = []
    dense_macs = computed_macs(models["dense"])
    for (title, form), values in samples.items():
        dense = samples["dense", form]
        reduction = dense_macs / computed_macs(models[title])
        ratios = [one / other / reduction for one, other in zip(dense, values, strict=True)]
        low, _, high = statistics.quantiles(values, n=4)
        ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4)
        speed_up = statistics.median(dense) / statistics.median(values)
        rows.append(
            Row(
                model=name,
                cut=title,
                form=form,
                params=count_params(models[title].architecture),
                macs=computed_macs(models[title]),
                mac_reduction=reduction,
                latency_s=statistics.median(values),
                latency_quartiles_s=(low, high),
                speed_up=speed_up,
                ratio=speed_up / reduction,
                ratio_quartiles=(ratio_low, ratio_high),
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run",
        action="append",
        type=Path,
        help="a run folder: measure its learned model too; may be repeated",
    )
    parser.add_argument(
        "--model",
        action="append",
        help="demo (the default, with deit_small_patch16_224) or a timm name; may be repeated",
    )
    parser.add_argument(
        "--form", default=None, help="a form's name, or all; without it the best known one"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    forms = (
        list(FORMS)
        if options.form == "all"
        else [form_named(options.form) if options.form else best_form("x86-64", 1)[0]]
    )
    machine, state = read_machine(), read_state()
    print(
        f"{machine.get('cpu_model')}, {machine.get('cores')} cores, busy beside us {state.get('busy_cores')}, onnxruntime {onnxruntime.__version__}"
    )
    rows: list[Row] = []
    names = options.model or ([] if options.run else ["demo", "deit_small_patch16_224"])
    work = [("demo", models_of_runs(options.run))] if options.run else []
    for name, models in [*work, *((name, models_of(name)) for name in names)]:
        found = run(name, models, forms, options.threads, options.limit_s)
        rows += found
        print(f"\n{name}, {options.threads} thread(s)")
        for row in found:
            low, high = (1e3 * value for value in row.latency_quartiles_s)
            line = f"  {row.cut:52s} {row.params / 1e6:7.3f} M params {row.macs / 1e6:8.1f} M MACs  {1e3 * row.latency_s:8.3f} ms ({low:.3f} - {high:.3f})"
            if row.cut != "dense":
                spread = f"({row.ratio_quartiles[0]:.2f} - {row.ratio_quartiles[1]:.2f})"
                line += (
                    f"  {row.speed_up:.2f}x of {row.mac_reduction:.2f}x = {row.ratio:.3f} {spread}"
                )
            print(line + (f"  {row.form}" if len(forms) > 1 else ""))
        cuts = [row.ratio for row in found if row.cut != "dense"]
        # Of uniform cuts one good one is wanted, of learned ones each.
        told, ratio = (
            ("worst", min(cuts)) if found[1].cut.startswith("learned") else ("best", max(cuts))
        )
        goal = GOALS.get(name)
        if goal is not None:
            print(
                f"  {told} ratio {ratio:.3f}, goal {goal}: {'reached' if ratio >= goal else 'not reached'}"
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
