"""Top-1 of widths alone, patches chosen for each image alone, and both, at equal cost.

    python -m benchmarks.accuracy.dynamic_tokens [--data quickstart|fashion-mnist|cifar10:FOLDER]
        [--model embedded|FOLDER] [--shares 0.5 0.33 0.25] [--methods dynamicvit evit dps]
        [--seeds 7 13 42] [--epochs 4] [--finetune-epochs 4] [--ratio 0.7] [--work FOLDER]
    python -m benchmarks.accuracy.dynamic_tokens --speedups 2 3 4 --methods dynamicvit
        [--kinds widths tokens both] [--orders together] [--autocast bf16]

Every row is a run of the chain (`vitrim run`) from the same trained dense network. Rows of one
share have the same budget of multiply-adds, predictors and scores included, and the same number of
epochs: where patches and widths are learned in turn, each phase has half of them. `widths` are
learned heads, widths and sub-layers; `tokens` keep all widths, at the largest ratio that meets the
budget, where one does; `both` keep the patches of `--ratio` and learn widths in the three orders;
`static tokens` keep one set of patches for all images and all widths, and `static tokens and
widths` choose both: learned, or patches by Patch Slimming before the widths are learned. Without
methods (`--methods` alone) there are `widths` and static rows only. With `--speedups` the budget is
a latency, that of the dense file over each factor: masks are learned for it (`masks.latency`, by a
cost table with selections that is measured once in `--work`, corrected by measurements), and the
ratio of `tokens` is the largest one within it by the same table. Top-1 and the latency at batch
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
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe import Recipe
from vitrim.pipeline.run import prepare, run
from vitrim.pipeline.selection_step import with_selections
from vitrim.targets.cost_table import CostTable

from ..cost_tables import table_of
from ..results_file import RESULTS, earlier_rows, markdown_head, markdown_row, save_result, spread
from .short_runs import ShortRuns

SHARES, SEEDS = (0.5, 0.33, 0.25), (7, 13, 42)
METHODS = ("dynamicvit", "evit", "dps", "class-attention")
ORDERS = ("together", "tokens-first", "widths-first")
STATIC, STATIC_TOO = "static tokens", "static tokens and widths"
KINDS = ("widths", STATIC, STATIC_TOO, "tokens", "both")
CHOSEN = "patch-slimming"
WIDTHS = ("head", "embed", "ffn", "qk", "v")
BISECTIONS = 12
TABLE_S = 240.0
# Ratios are given with as many digits.
DIGITS = 3


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        kind: "widths", "tokens", "both", "static tokens" or "static tokens and widths".
        method: How patches are chosen; "" without a choice.
        order: The order of patches and widths; "" where there is one phase.
        share: The share of the budget.
        seed: Of the training.
        budget: "macs" or "latency".
    """

    kind: str
    method: str
    order: str
    share: float
    seed: int
    budget: str = "macs"

    @property
    def key(self) -> str:
        """Identifies the row in the result file, and its run folder."""
        of = "" if self.budget == "macs" else self.budget
        parts = (self.kind, self.method, self.order, of, f"{self.share:.3g}", str(self.seed))
        return "-".join(part.replace(" ", "-") for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Plan(ShortRuns):
    """What all rows share.

    Attributes:
        ratio: The share of patches of the first stage in rows of both.
    """

    ratio: float

    def measured_table(self, dense: CompactModel, work: Path) -> Path:
        """The cost table of the machine, with selections, measured once."""
        path = work / "table-fp32.json"
        keys = {"params": 1.0, "tokens": METHODS[0], "token_ratio": self.ratio}
        selecting = with_selections(dense, self.recipe(keys, 0).masks, 0)
        table_of(selecting, path, limit_s=TABLE_S, precision="fp32", threads=1)
        return path.resolve()

    def recipe(self, masks: dict[str, Any], seed: int) -> Recipe:
        """The recipe of a row with these keys of `[masks]`."""
        chosen = masks.get("tokens") == CHOSEN and masks.get("params") == 1.0
        # Nothing is learned before the fine-tuning, which then has all epochs.
        epochs = self.finetune_epochs + chosen * self.epochs
        plan = replace(self, finetune_epochs=epochs)
        return plan.short_recipe("dynamic_tokens", masks, seed)

    def masks(self, case: Case, dense: CompactModel, table: Path | None) -> dict[str, Any]:
        """The keys of `[masks]` of a row.

        Args:
            case: The row.
            dense: The dense network.
            table: The cost table of a latency.

        Raises:
            InputError: No ratio meets the share.
        """
        half = max(1, self.epochs // 2)
        budget: dict[str, Any] = {case.budget: case.share}
        if case.budget == "latency":
            budget["cost_table"] = str(table)
        if case.kind == "widths":
            return budget
        if case.kind == STATIC and case.method == CHOSEN:
            return {"params": 1.0, "tokens": CHOSEN, "token_macs": case.share}
        if case.kind == STATIC:
            # Sub-layers stay, too: an overhead of 0 removes none.
            kept = {"attention_overhead_macs": 0.0, "ffn_overhead_macs": 0.0}
            return {**budget, "tokens": "learned", "fixed": WIDTHS, **kept}
        if case.kind == STATIC_TOO and case.method == CHOSEN:
            # As much of the budget by tokens as by widths.
            return {**budget, "tokens": CHOSEN, "token_macs": case.share**0.5}
        if case.kind == STATIC_TOO:
            return {**budget, "tokens": "learned"}
        if case.kind == "tokens":
            ratio = largest_ratio(dense, case, self, table)
            return {
                "params": 1.0,
                "tokens": case.method,
                "token_ratio": ratio,
                "token_epochs": self.epochs,
            }
        keys = {**budget, "tokens": case.method, "token_ratio": self.ratio}
        keys["token_order"] = case.order
        if case.order != "together":
            keys |= {"epochs": max(1, self.epochs - half), "token_epochs": half}
        return keys


def largest_ratio(dense: CompactModel, case: Case, plan: Plan, table: Path | None) -> float:
    """The largest ratio with which the method of a case is within its budget.

    Args:
        dense: The dense network.
        case: The row.
        plan: The settings.
        table: The cost table of a latency.

    Raises:
        InputError: None is.
    """
    costs = None if table is None else CostTable.load(table)

    def cost(network: Architecture) -> float:
        if case.budget == "macs" or costs is None:
            return float(count_macs(network))
        return costs.latency_ms(network_shape(network))

    budget = case.share * cost(dense.architecture)

    def cost_of(ratio: float) -> float:
        keys = {"params": 1.0, "tokens": case.method, "token_ratio": ratio}
        section = plan.recipe(keys, 0).masks
        try:
            return cost(with_selections(dense, section, 0).architecture)
        except InputError:
            # No patch is left, or none is dropped.
            return float("inf") if ratio > 0.5 else 0.0

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(middle) <= budget else (low, middle)
    found: float = int(low * 10**DIGITS) / 10**DIGITS
    if not 0 < cost_of(found) <= budget:
        raise InputError(f"{case.method}: no ratio leaves {case.share:g} of the {case.budget}")
    return found


def cases(
    methods: Sequence[str],
    shares: Sequence[float],
    seeds: Sequence[int],
    budget: str = "macs",
    *,
    orders: Sequence[str] = ORDERS,
    kinds: Sequence[str] = KINDS,
) -> list[Case]:
    """All rows, seed by seed.

    Args:
        methods: That choose patches for each image.
        shares: Of the budget.
        seeds: Of the trainings.
        budget: "macs" or "latency".
        orders: Of patches and widths.
        kinds: Of the rows.
    """
    found = []
    for seed in seeds:
        for share in shares:
            found += [Case("widths", "", "", share, seed, budget)]
            found += [
                Case(kind, method, "", share, seed, budget)
                for kind in (STATIC, STATIC_TOO)
                for method in ("learned", CHOSEN)
                # Patch Slimming alone has counts of a share of the multiply-adds.
                if (kind, method, budget) != (STATIC, CHOSEN, "latency")
            ]
            found += [Case("tokens", method, "", share, seed, budget) for method in methods]
            found += [
                Case("both", method, order, share, seed, budget)
                for method in methods
                for order in orders
            ]
    return [case for case in found if case.kind in kinds]


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
    budgets = {}
    for row in rows:
        budgets[row["share"]] = (
            f"{1 / row['share']:g}x faster"
            if row.get("budget") == "latency"
            else f"{row['share']:g} of the MACs"
        )
        grouped.setdefault((row["share"], row["kind"], row["method"], row["order"]), []).append(row)
    titles = ("budget", "what is learned", "choice", "order", "seeds")
    columns = ("MACs", "parameters", "top-1", "points lost", "faster")
    lines = markdown_head(*titles, *columns, numbers=len(columns) + 1)
    ranked = sorted(grouped.items(), key=lambda item: _key(*item))
    for (share, kind, method, order), found in ranked:
        ran = [row for row in found if "compact" in row]
        if not ran:
            cells = ["out of reach", *"----"]
            lines.append(markdown_row(budgets[share], kind, method, order, 0, *cells))
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
        lines.append(markdown_row(budgets[share], kind, method, order, len(ran), *cells))
    return "\n".join(lines)


def _key(place: tuple[float, str, str, str], rows: Sequence[dict[str, Any]]) -> Any:
    lost = [row["compact"]["top1_percent"] for row in rows if "compact" in row]
    return -place[0], -statistics.mean(lost) if lost else 0.0, place


def row_of(
    case: Case, plan: Plan, dense: CompactModel, work: Path, table: Path | None
) -> dict[str, Any]:
    """Run a case in its folder, continuing an earlier attempt.

    Args:
        case: The row.
        plan: The settings.
        dense: The dense network.
        work: Where the run folders are.
        table: The cost table of a latency.
    """
    try:
        recipe = plan.recipe(plan.masks(case, dense, table), case.seed)
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
    parser.add_argument("--speedups", nargs="+", type=float, help="latencies, in place of shares")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS[:3]))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=int, default=4, help="of masks and predictors")
    parser.add_argument("--finetune-epochs", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.7, help="of the rows of both")
    parser.add_argument("--test-images", type=int, default=0, help="for top-1; 0: all")
    parser.add_argument("--limit", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--autocast", default="fp32", help="bf16 where the processor has it")
    parser.add_argument("--work", type=Path, default=Path("runs/dynamic-tokens"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/dynamic_tokens_DATA")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in Plan.__dataclass_fields__}
    plan = Plan(**{**given, "data": options.data.replace("cifar10:", "parquet:")})
    short = options.data.partition(":")[0]
    by = "latency" if options.speedups else "macs"
    shares = [1.0 / factor for factor in options.speedups or ()] or options.shares
    name = "dynamic_tokens_latency" if options.speedups else "dynamic_tokens"
    out = options.out or RESULTS / f"{name}_{short.replace('-', '_')}"
    dense = prepare(plan.recipe({"macs": 0.9}, 0), quiet=True).dense
    head = {**plan.head(), "data": short, "dense_macs": count_macs(dense.architecture)}
    rows = earlier_rows(out, head)
    fields = Case.__dataclass_fields__
    done = {Case(**{name: row[name] for name in fields if name in row}).key for row in rows}
    wanted = cases(
        options.methods, shares, options.seeds, by, orders=options.orders, kinds=options.kinds
    )
    work = options.work / short
    cost_table = plan.measured_table(dense, work) if options.speedups else None
    for case in wanted:
        if case.key in done:
            continue
        rows.append(row_of(case, plan, dense, work, cost_table))
        print(json.dumps(rows[-1]), flush=True)
        text = (
            f"`python -m benchmarks.accuracy.dynamic_tokens --data {short}`: the "
            f"{Path(plan.model).name} model; {plan.epochs} epochs of masks and predictors, "
            f"{plan.finetune_epochs} of fine-tuning; mean and standard deviation over the seeds. "
            "`faster`: median latency of the dense artifact over that of the row, measured "
            "interleaved (fp32, ONNX Runtime, batch 1, one thread)."
        )
        result = {"head": head, "machine": read_machine(), "rows": rows}
        save_result(out, result, f"{text}\n\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
