"""Latency saved for the multiply-adds removed: `python -m benchmarks.speed.proportionality`.

(latency speed-up) / (MAC reduction) of cut Vision Transformers against the dense one, both written
in `vitrim.export`'s forms, in ONNX Runtime fp32 at batch 1: 1.0 where time fell exactly as the
multiply-adds did. Sessions run interleaved in one process, in rotating order; medians, quartiles,
and the quartiles of the ratio over rounds (each round divides two neighbours in time, so that other
work on the machine cancels out). MACs count what the form computes: the queries of the last block
only for the tokens that the head reads, in the dense model and in the cut ones.

    python -m benchmarks.speed.proportionality [--run runs/quickstart ...]
        [--model demo|deit_small_patch16_224|...] [--form NAME|all] [--limit-s 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime
import torch
import vitrim
from vitrim.bench.local.environment import read_machine, read_state
from vitrim.compress.network.count import count_params
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import FORMS, Form, form_named, write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.sessions import open_session

from ..models import computed_macs, lifted, noise, randomly_cut
from ..results_file import save_result
from ..turns import in_turns, least, until
from .graph_sessions import call_of

# Keep ratios, uniform over blocks. Heads go whole and widths stay multiples of 16.
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
    """One cut in one form, compared with the dense model in the same form."""

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

    def line(self, with_form: bool) -> str:
        """One line of the printed table."""
        low, high = (1e3 * value for value in self.latency_quartiles_s)
        text = (
            f"  {self.cut:52s} {self.params / 1e6:7.3f} M params {self.macs / 1e6:8.1f} M MACs"
            f"  {1e3 * self.latency_s:8.3f} ms ({low:.3f} - {high:.3f})"
        )
        if self.cut != "dense":
            low, high = self.ratio_quartiles
            text += f"  {self.speed_up:.2f}x of {self.mac_reduction:.2f}x"
            text += f" = {self.ratio:.3f} ({low:.2f} - {high:.2f})"
        return text + (f"  {self.form}" if with_form else "")


def models_of(name: str) -> dict[str, CompactModel]:
    """The dense model and its cuts, with random weights."""
    dense = lifted(name)
    cuts = {title: randomly_cut(dense, keep) for title, keep in CUTS.get(name, CUTS[""]).items()}
    return {"dense": dense, **cuts}


def models_of_runs(folders: list[Path]) -> dict[str, CompactModel]:
    """The baseline of the first run folder, and the compact model of each run.

    Raises:
        InputError: A folder is not of a run, or its baseline is another model.
    """
    found = {"dense": vitrim.load(folders[0] / "baseline")}
    for folder in folders:
        if vitrim.load(folder / "baseline").architecture != found["dense"].architecture:
            raise vitrim.InputError(
                f"{folder}: its baseline is not that of {folders[0]}; "
                "compare runs that start from one model"
            )
        found[f"learned: {folder.name}"] = vitrim.load(folder / "compact")
    return found


def run(
    name: str, models: dict[str, CompactModel], forms: list[Form], threads: int, limit_s: float
) -> list[Row]:
    """Measure all models in all forms, interleaved.

    Args:
        name: Name of the dense model.
        models: {cut: model}, the dense one among them.
        forms: Graph forms to write each model in.
        threads: Threads of the runtime.
        limit_s: Time limit of the rounds.

    Returns:
        One row for each model and form.
    """
    image = noise(models["dense"])
    calls = {}
    for title, model in models.items():
        for form in forms:
            content = write_network(model, form).SerializeToString()
            calls[title, form.name] = call_of(open_session(content, threads=threads), image)
    samples = least(in_turns(calls, until(limit_s)))
    dense_macs = computed_macs(models["dense"])
    rows = []
    for (title, form_name), latency_s in samples.items():
        dense_s, macs = samples["dense", form_name], computed_macs(models[title])
        reduction = dense_macs / macs
        ratios = [dense / cut / reduction for dense, cut in zip(dense_s, latency_s, strict=True)]
        low, median_s, high = statistics.quantiles(latency_s, n=4)
        ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4)
        speed_up = statistics.median(dense_s) / median_s
        rows.append(
            Row(
                model=name,
                cut=title,
                form=form_name,
                params=count_params(models[title].architecture),
                macs=macs,
                mac_reduction=reduction,
                latency_s=median_s,
                latency_quartiles_s=(low, high),
                speed_up=speed_up,
                ratio=speed_up / reduction,
                ratio_quartiles=(ratio_low, ratio_high),
            )
        )
    return rows


def verdict(name: str, rows: list[Row]) -> str | None:
    """Whether the goal of a model was reached: by the best uniform cut, or by every learned one."""
    goal = GOALS.get(name)
    if goal is None:
        return None
    ratios = [row.ratio for row in rows if row.cut != "dense"]
    learned = any(row.cut.startswith("learned") for row in rows)
    which, ratio = ("worst", min(ratios)) if learned else ("best", max(ratios))
    reached = "reached" if ratio >= goal else "not reached"
    return f"  {which} ratio {ratio:.3f}, goal {goal}: {reached}"


def main() -> int:
    """Measure, and print the table."""
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
        "--form", default=None, help="name of a form, or all; default: the best known one"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.form == "all":
        forms = list(FORMS)
    else:
        forms = [form_named(options.form) if options.form else best_form("x86-64-v4-vnni", 1)[0]]
    machine, state = read_machine(), read_state()
    print(
        f"{machine.get('cpu_model')}, {machine.get('cores')} cores, "
        f"{state.get('busy_cores')} busy with other work, onnxruntime {onnxruntime.__version__}"
    )
    rows: list[Row] = []
    names = options.model or ([] if options.run else ["demo", "deit_small_patch16_224"])
    work = [("demo", models_of_runs(options.run))] if options.run else []
    for name, models in [*work, *((name, models_of(name)) for name in names)]:
        found = run(name, models, forms, options.threads, options.limit_s)
        rows += found
        print(f"\n{name}, {options.threads} thread(s)")
        print("\n".join(row.line(len(forms) > 1) for row in found))
        if line := verdict(name, found):
            print(line)
    if options.json:
        save_result(options.json, [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
