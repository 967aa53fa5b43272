"""Top-1 of widths alone, patches chosen for each image alone, and both, at equal multiply-adds.

    python -m benchmarks.accuracy.dynamic_tokens [--data quickstart|fashion-mnist|cifar10:FOLDER]
        [--model embedded|FOLDER] [--shares 0.5 0.33 0.25] [--methods dynamicvit evit dps]
        [--seeds 7 13 42] [--epochs 4] [--finetune-epochs 4] [--ratio 0.7] [--work FOLDER]

Every row is a run of the chain (`vitrim run`) from the same trained dense network. Rows of one
share have the same budget of multiply-adds, predictors and scores included, and the same number of
epochs: where patches and widths are learned in turn, each phase has half of them. `widths` are
learned heads, widths and sub-layers; `tokens` keep all widths, at the largest ratio that meets the
budget, where one does; `both` keep the patches of `--ratio` and learn widths in the three orders;
`static tokens` keep one set of patches for all images and all widths, and `static tokens and
widths` choose both: learned, or patches by Patch Slimming before the widths are learned. Without
methods (`--methods` alone) there are `widths` and static rows only. Top-1 and the latency at batch
1 (fp32, ONNX Runtime, one thread) are those of the artifact, `faster` compares with the dense
artifact of the same run. Finished rows are kept, and a run that was interrupted continues in
`--work`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vitrim.bench.local.environment import read_machine
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import Recipe
from vitrim.pipeline.run import prepare, run
from vitrim.pipeline.selection_step import with_selections

from ..results_file import RESULTS, earlier_rows, markdown_head, markdown_row, save_result, spread
from .short_runs import ShortRuns

SHARES, SEEDS = (0.5, 0.33, 0.25), (7, 13, 42)
METHODS = ("dynamicvit", "evit", "dps", "class-attention")
ORDERS = ("together", "tokens-first", "widths-first")
STATIC, STATIC_TOO = "static tokens", "static tokens and widths"
CHOSEN = "patch-slimming"
WIDTHS = ("head", "embed", "ffn", "qk", "v")
BISECTIONS = 12
# Ratios are given with as many digits.
DIGITS = 3


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        kind: "widths", "tokens", "both", "static tokens" or "static tokens and widths".
        method: How patches are chosen; "" without a choice.
        order: The order of patches and widths; "" where there is one phase.
        share: The share of the multiply-adds.
        seed: Of the training.
    """

    kind: str
    method: str
    order: str
    share: float
    seed: int

    @property
    def key(self) -> str:
        """Identifies the row in the result file, and its run folder."""
        parts = (self.kind, self.method, self.order, f"{self.share:g}", str(self.seed))
        return "-".join(part.replace(" ", "-") for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Plan(ShortRuns):
    """What all rows share.

    Attributes:
        ratio: The share of patches of the first stage in rows of both.
    """

    ratio: float

    def recipe(self, masks: dict[str, Any], seed: int) -> Recipe:
        """The recipe of a row with these keys of `[masks]`."""
        chosen = masks.get("tokens") == CHOSEN and masks.get("params") == 1.0
        # Nothing is learned before the fine-tuning, which then has all epochs.
        epochs = self.finetune_epochs + chosen * self.epochs
        plan = replace(self, finetune_epochs=epochs)
        return plan.short_recipe("dynamic_tokens", masks, seed)

    def masks(self, case: Case, dense: CompactModel) -> dict[str, Any]:
        """The keys of `[masks]` of a row.

        Raises:
            InputError: No ratio meets the share.
        """
        half = max(1, self.epochs // 2)
        if case.kind == "widths":
            return {"macs": case.share}
        if case.kind == STATIC and case.method == CHOSEN:
            return {"params": 1.0, "tokens": CHOSEN, "token_macs": case.share}
        if case.kind == STATIC:
            # Sub-layers stay, too: an overhead of 0 removes none.
            kept = {"attention_overhead_macs": 0.0, "ffn_overhead_macs": 0.0}
            return {"macs": case.share, "tokens": "learned", "fixed": WIDTHS, **kept}
        if case.kind == STATIC_TOO and case.method == CHOSEN:
            # As much of the budget by tokens as by widths.
            return {"macs": case.share, "tokens": CHOSEN, "token_macs": case.share**0.5}
        if case.kind == STATIC_TOO:
            return {"macs": case.share, "tokens": "learned"}
        if case.kind == "tokens":
            ratio = largest_ratio(dense, case.method, case.share, self)
            return {
                "params": 1.0,
                "tokens": case.method,
                "token_ratio": ratio,
                "token_epochs": self.epochs,
            }
        keys = {"macs": case.share, "tokens": case.method, "token_ratio": self.ratio}
        keys["token_order"] = case.order
        if case.order != "together":
            keys |= {"epochs": max(1, self.epochs - half), "token_epochs": half}
        return keys


def largest_ratio(dense: CompactModel, method: str, share: float, plan: Plan) -> float:
    """The largest ratio with which a method leaves at most a share of the multiply-adds.

    Raises:
        InputError: None does.
    """
    budget = share * count_macs(dense.architecture)

    def macs(ratio: float) -> float:
        keys = {"params": 1.0, "tokens": method, "token_ratio": ratio}
        section = plan.recipe(keys, 0).masks
        try:
            return float(count_macs(with_selections(dense, section, 0).architecture))
        except InputError:
            # No patch is left, or none is dropped.
            return float("inf") if ratio > 0.5 else 0.0

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) <= budget else (low, middle)
    found: float = int(low * 10**DIGITS) / 10**DIGITS
    if not 0 < macs(found) <= budget:
        raise InputError(f"{method}: no ratio leaves {share:g} of the multiply-adds")
    return found


def cases(methods: Sequence[str], shares: Sequence[float], seeds: Sequence[int]) -> list[Case]:
    """All rows, seed by seed."""
    found = []
    for seed in seeds:
        for share in shares:
            found += [Case("widths", "", "", share, seed)]
            found += [
                Case(kind, method, "", share, seed)
                for kind in (STATIC, STATIC_TOO)
                for method in ("learned", CHOSEN)
            ]
            found += [Case("tokens", method, "", share, seed) for method in methods]
            found += [
                Case("both", method, order, share, seed) for method in methods for order in ORDERS
            ]
    return found


def figures(folder: Path) -> dict[str, Any]:
    """The figures of a finished run, from report.json."""
    models = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"]
    found: dict[str, Any] = {}
    for name in ("baseline", "compact"):
        entry = models[name]
        samples = entry["artifacts"][0]["measurement"]["latency_s"]
        found[name] = {
            "params": entry["params"],
            "macs": entry["macs"],
            "top1_percent": 100.0 * entry["top1"],
            "p50_ms": 1e3 * statistics.median(samples),
        }
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, a line for each kind, method and share."""
    grouped: dict[tuple[float, str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["share"], row["kind"], row["method"], row["order"]), []).append(row)
    titles = ("MACs budget", "what is learned", "choice", "order", "seeds")
    columns = ("MACs", "parameters", "top-1", "points lost", "faster")
    lines = markdown_head(*titles, *columns, numbers=len(columns) + 1)
    ranked = sorted(grouped.items(), key=lambda item: _key(*item))
    for (share, kind, method, order), found in ranked:
        ran = [row for row in found if "compact" in row]
        if not ran:
            cells = ["out of reach", *"----"]
            lines.append(markdown_row(f"{share:g}", kind, method, order, 0, *cells))
            continue
        cells = [
            spread([row["compact"]["macs"] / row["baseline"]["macs"] for row in ran], 3),
            spread([row["compact"]["params"] / row["baseline"]["params"] for row in ran], 3),
            spread([row["compact"]["top1_percent"] for row in ran], 2),
            spread(
                [row["baseline"]["top1_percent"] - row["compact"]["top1_percent"] for row in ran], 2
            ),
            spread([row["baseline"]["p50_ms"] / row["compact"]["p50_ms"] for row in ran], 2),
        ]
        lines.append(markdown_row(f"{share:g}", kind, method, order, len(ran), *cells))
    return "\n".join(lines)


def _key(place: tuple[float, str, str, str], rows: Sequence[dict[str, Any]]) -> Any:
    lost = [row["compact"]["top1_percent"] for row in rows if "compact" in row]
    return -place[0], -statistics.mean(lost) if lost else 0.0, place


def row_of(case: Case, plan: Plan, dense: CompactModel, work: Path) -> dict[str, Any]:
    """Run a case in its folder, continuing an earlier attempt."""
    try:
        recipe = plan.recipe(plan.masks(case, dense), case.seed)
    except InputError as error:
        return {**asdict(case), "out_of_reach": str(error)}
    folder = run(recipe, work / case.key, resume=True, quiet=True).path
    ratio = recipe.masks.token_ratio
    return {**asdict(case), "ratio": ratio, **figures(folder)}


def main() -> None:
    """Run the missing rows and write both files after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--model", default="embedded", help="embedded, or a folder vitrim saved")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS[:3]))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=int, default=4, help="of masks and predictors")
    parser.add_argument("--finetune-epochs", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.7, help="of the rows of both")
    parser.add_argument("--test-images", type=int, default=0, help="for top-1; 0: all")
    parser.add_argument("--limit", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--work", type=Path, default=Path("runs/dynamic-tokens"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/dynamic_tokens_DATA")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in Plan.__dataclass_fields__}
    plan = Plan(**{**given, "data": options.data.replace("cifar10:", "parquet:")})
    short = options.data.partition(":")[0]
    out = options.out or RESULTS / f"dynamic_tokens_{short.replace('-', '_')}"
    dense = prepare(plan.recipe({"macs": 0.9}, 0), quiet=True).dense
    head = {**asdict(plan), "data": short, "dense_macs": count_macs(dense.architecture)}
    rows = earlier_rows(out, head)
    fields = Case.__dataclass_fields__
    done = {Case(**{name: row[name] for name in fields}).key for row in rows}
    for case in cases(options.methods, options.shares, options.seeds):
        if case.key in done:
            continue
        rows.append(row_of(case, plan, dense, options.work / short))
        print(json.dumps(rows[-1]), flush=True)
        text = (
            f"`python -m benchmarks.accuracy.dynamic_tokens --data {short}`: the {plan.model} "
            f"model; {plan.epochs} epochs of masks and predictors, {plan.finetune_epochs} of "
            "fine-tuning; mean and standard deviation over the seeds. `faster`: median latency of "
            "the dense artifact over that of the row, measured interleaved (fp32, ONNX Runtime, "
            "batch 1, one thread)."
        )
        result = {"head": head, "machine": read_machine(), "rows": rows}
        save_result(out, result, f"{text}\n\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
