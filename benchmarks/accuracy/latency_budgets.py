"""Top-1 of a latency budget, a budget of multiply-adds and one of parameters, at equal latency.

    python -m benchmarks.accuracy.latency_budgets [--data quickstart|fashion-mnist|cifar10:FOLDER]
        [--model embedded|FOLDER] [--factors 2 3 4 6] [--seeds 0 1 2] [--kinds untrained trained]
        [--table FILE] [--precision fp32] [--epochs 4] [--finetune-epochs 4] [--attempts 2]
        [--work FOLDER]

Every row cuts the same trained network to one measured latency: that of the dense file over a
factor. A latency budget chooses tokens, widths and depth by a cost table; with `all tokens` no
patch leaves. The shares of multiply-adds and of parameters are the largest ones whose files are
within that latency: they are searched by the table, and corrected by the measurement. `untrained`
rows are cuts in closed form from unlabeled images (`vitrim compact`); the seed draws the images.
`trained` rows learn masks and fine-tune (`vitrim run`), the shares first as of the untrained rows,
and repeated with a corrected share while their latency is off by more than 5 %. The table shows the
measured latency of every row. The cost table is that of --table, or measured once in --work.
Finished rows are kept, and an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from vitrim.bench.local.environment import read_machine
from vitrim.compress.data.splits import stratified_indices
from vitrim.compress.latency.cut import LatencyCuts, LatencyOptions
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.budgets import read_budget
from vitrim.compress.oneshot.choice import choose, mask_of
from vitrim.compress.oneshot.prediction import Prediction, TrimOptions, predict
from vitrim.compress.oneshot.trim import trim_to
from vitrim.compress.surgery.plan import plan
from vitrim.compress.train.evaluate import evaluate
from vitrim.core.errors import InputError
from vitrim.pipeline.latency_loop import MARGIN, Measure, cut_to_latency
from vitrim.pipeline.recipe import Recipe
from vitrim.pipeline.run import Prepared, prepare, run
from vitrim.targets.cost_table import CostTable

from ..cost_tables import files_of, table_of
from ..results_file import RESULTS, earlier_rows, markdown_head, markdown_row, save_result, spread
from .short_runs import ShortRuns

FACTORS, SEEDS, KINDS = (2.0, 3.0, 4.0, 6.0), (0, 1, 2), ("untrained", "trained")
LATENCY, ALL_TOKENS, SHARES = "latency", "latency, all tokens", ("macs", "params")
BUDGETS = (LATENCY, ALL_TOKENS, *SHARES)
BISECTIONS, ROUNDS, ROUND_TO = 10, 3, 8
# A trained row whose latency is off by more is repeated with another share.
NEAR = 0.05
PARITY_IMAGES = 8


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        kind: "untrained" or "trained".
        budget: What is limited.
        factor: The dense latency over that of the row.
        seed: Of the images, or of the training.
    """

    kind: str
    budget: str
    factor: float
    seed: int

    @property
    def key(self) -> str:
        """Identifies the row, and its run folder."""
        parts = (self.kind, self.budget.replace(", ", "-").replace(" ", "-"))
        return "-".join([*parts, f"{self.factor:g}", str(self.seed)])


@dataclass(frozen=True, kw_only=True)
class Plan(ShortRuns):
    """What all rows share.

    Attributes:
        images: Unlabeled images of a cut without training.
        precision: Of the files.
        attempts: Largest number of trainings of a row.
    """

    images: int
    precision: str
    attempts: int

    def recipe(self, masks: dict[str, Any], seed: int) -> Recipe:
        """The recipe of a trained row with these keys of `[masks]`."""
        keys = {"round_to": ROUND_TO, **masks}
        return self.short_recipe("latency_budgets", keys, seed, self.precision)


def cases(kinds: Sequence[str], factors: Sequence[float], seeds: Sequence[int]) -> list[Case]:
    """All rows, the untrained ones of a seed first."""
    return [
        Case(kind, budget, factor, seed)
        for seed in seeds
        for kind in KINDS
        for factor in factors
        for budget in BUDGETS
        if kind in kinds
    ]


class Bench:
    """The model, the table, and what several rows share.

    Args:
        plan: What all rows share.
        prepared: The data and the dense model.
        table: The cost table.
        table_file: Its file.
        measure: Returns the latency of a network's file in milliseconds.
        work: The run folders.
    """

    def __init__(
        self,
        plan: Plan,
        prepared: Prepared,
        table: CostTable,
        table_file: Path,
        measure: Measure,
        work: Path,
    ) -> None:
        self.plan, self.table, self.table_file = plan, table, table_file
        self.data, self.dense = prepared.data, prepared.dense.eval()
        self.work, self.measure = work, measure

    @functools.cached_property
    def dense_row(self) -> dict[str, Any]:
        """The figures of the dense network."""
        return self._figures(self.dense, self.measure(self.dense))

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def images(self, seed: int) -> Tensor:
        """Unlabeled training images in random order, (count, channels, height, width)."""
        targets = self.data.train.targets
        rows = stratified_indices(targets, min(self.plan.images, len(targets)), seed)[0]
        return self.data.train.floats(np.random.default_rng(seed).permutation(rows))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def cuts(self, seed: int, tokens: bool) -> LatencyCuts:
        """Cuts to latencies, from one pass over the images."""
        options = TrimOptions(round_to=ROUND_TO)
        latency = LatencyOptions(tokens=tokens)
        return LatencyCuts(
            self.dense, self.images(seed), self.table, options=options, latency=latency
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def prediction(self, seed: int) -> Prediction:
        """The error curves of cuts to shares."""
        return predict(self.dense, self.images(seed), options=TrimOptions(round_to=ROUND_TO))

    def row(self, case: Case, known: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The figures of a case, or why there are none.

        Args:
            case: The case.
            known: The rows so far, whose shares trained rows start from.
        """
        target_ms = self.dense_row["measured_ms"] / case.factor
        base = {**asdict(case), "target_ms": target_ms}
        try:
            if case.kind == "untrained":
                return {**base, **self._untrained(case, target_ms)}
            return {**base, **self._trained(case, target_ms, known)}
        except InputError as error:
            return {**base, "out_of_reach": str(error)}

    def _untrained(self, case: Case, target_ms: float) -> dict[str, Any]:
        if case.budget in (LATENCY, ALL_TOKENS):
            cuts = self.cuts(case.seed, case.budget == LATENCY)
            found, record = cut_to_latency(cuts, target_ms, self.measure, ROUNDS)
            assert record.measured_ms is not None
            return self._figures(found.model, record.measured_ms)
        kept: tuple[bool, float, dict[str, Any]] | None = None
        by_table = target_ms
        for _ in range(ROUNDS):
            share = self.largest_share(case.seed, case.budget, by_table)
            budget: dict[str, Any] = {case.budget: share}
            model = trim_to(self.prediction(case.seed), **budget).model
            measured = self.measure(model)
            within = measured <= target_ms
            # Of files within the latency the slowest, else the fastest.
            rank = (within, measured if within else -measured)
            if kept is None or rank > kept[:2]:
                kept = (*rank, {"share": share, **self._figures(model, measured)})
            if target_ms * (1 - NEAR) <= measured <= target_ms:
                break
            by_table *= MARGIN * target_ms / measured
        assert kept is not None
        return kept[2]

    def largest_share(self, seed: int, kind: str, latency_ms: float) -> float:
        """The largest share whose cut has at most this latency by the table.

        Args:
            seed: Of the images.
            kind: macs or params.
            latency_ms: The latency.

        Raises:
            InputError: Even the smallest cut takes longer.
        """
        prediction = self.prediction(seed)

        def predicted_ms(share: float) -> float:
            given = {"macs": None, "params": None, "budget": None, kind: share}
            choice = choose(prediction, read_budget(given, None, None, "fp32"))
            network = (choice.turned or prediction.rotated).architecture
            mask = mask_of(prediction.curves, choice, network.embed)
            return self.table.latency_ms(network_shape(plan(network, mask).architecture))

        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            try:
                smaller = predicted_ms(middle) <= latency_ms
            except InputError:
                # Below what is never cut.
                smaller = True
            low, high = (middle, high) if smaller else (low, middle)
        if not 0 < low < 1 or predicted_ms(low) > latency_ms:
            raise InputError(f"{kind}: no share has {latency_ms:.3g} ms")
        return low

    def _trained(
        self, case: Case, target_ms: float, known: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        if case.budget in (LATENCY, ALL_TOKENS):
            masks = {"latency_ms": target_ms, "cost_table": str(self.table_file)}
            return self._run(case, masks, case.budget == LATENCY, 0)
        share = self._first_share(case, known)
        found: dict[str, Any] = {}
        for attempt in range(self.plan.attempts):
            masks = {case.budget: share}
            tried = self._run(case, masks, case.budget == "macs", attempt)
            off = abs(tried["measured_ms"] / target_ms - 1)
            if not found or off < abs(found["measured_ms"] / target_ms - 1):
                found = {"share": share, **tried}
            if off <= NEAR:
                break
            share = min(0.99, share * target_ms / tried["measured_ms"])
        return found

    def _first_share(self, case: Case, known: Sequence[dict[str, Any]]) -> float:
        """The share of the untrained row; else that of the latency."""
        for row in known:
            same = (row["budget"], row["factor"]) == (case.budget, case.factor)
            if same and row["kind"] == "untrained" and "share" in row:
                return float(row["share"])
        return 1.0 / case.factor

    def _run(self, case: Case, masks: dict[str, Any], tokens: bool, attempt: int) -> dict[str, Any]:
        if tokens:
            masks = {**masks, "tokens": "learned"}
        recipe = self.plan.recipe(masks, case.seed)
        name = case.key if not attempt else f"{case.key}-again-{attempt}"
        folder = run(recipe, self.work / name, resume=True, quiet=True).path
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        entry = report["models"]["compact"]
        # Of the artifact; the baseline's of the same session takes out what the machine did.
        seconds = {
            model: statistics.median(found["artifacts"][0]["measurement"]["latency_s"])
            for model, found in report["models"].items()
        }
        ratio = seconds["compact"] / seconds["baseline"]
        return {
            "params": entry["params"],
            "macs": entry["macs"],
            "top1_percent": 100.0 * entry["top1"],
            "measured_ms": ratio * self.dense_row["measured_ms"],
            "session_ms": 1e3 * seconds["compact"],
        }

    def _figures(self, model: CompactModel, measured_ms: float) -> dict[str, Any]:
        architecture = model.architecture
        return {
            "params": count_params(architecture),
            "macs": count_macs(architecture),
            "predicted_ms": self.table.latency_ms(network_shape(architecture)),
            "measured_ms": measured_ms,
            "top1_percent": float(evaluate(model, self._test)),
        }

    @functools.cached_property
    def _test(self) -> Any:
        count = self.plan.test_images or len(self.data.test)
        return self.data.test.select(np.arange(min(count, len(self.data.test))))


def table(rows: Iterable[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, a line for each kind, factor and budget.

    Args:
        rows: The rows.
        dense: The figures of the dense network.
    """
    grouped: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["kind"], row["factor"], row["budget"]), []).append(row)
    titles = ("rows", "wanted", "budget", "seeds")
    columns = ("measured", "within", "MACs", "parameters", "top-1", "points lost")
    lines = markdown_head(*titles, *columns, numbers=len(columns) + 1)
    order = sorted(grouped, key=lambda key: (KINDS.index(key[0]), key[1], BUDGETS.index(key[2])))
    for kind, factor, budget in order:
        found = grouped[kind, factor, budget]
        ran = [row for row in found if "top1_percent" in row]
        head = (kind, f"{factor:g}x faster", budget, len(ran))
        if not ran:
            lines.append(markdown_row(*head, "out of reach", *"-----"))
            continue
        within = sum(row["measured_ms"] <= row["target_ms"] * 1.01 for row in ran)
        lost = [dense["top1_percent"] - row["top1_percent"] for row in ran]
        cells = [
            spread([dense["measured_ms"] / row["measured_ms"] for row in ran], 2) + "x",
            f"{within} of {len(ran)}",
            spread([row["macs"] / dense["macs"] for row in ran], 3),
            spread([row["params"] / dense["params"] for row in ran], 3),
            spread([row["top1_percent"] for row in ran], 2),
            spread(lost, 2),
        ]
        lines.append(markdown_row(*head, *cells))
    return "\n".join(lines)


def main() -> None:
    """Run the missing rows and write both files after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--model", default="embedded", help="embedded, or a folder vitrim saved")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--images", type=int, default=256, help="of a cut without training")
    parser.add_argument("--epochs", type=int, default=4, help="of masks")
    parser.add_argument("--finetune-epochs", type=int, default=4)
    parser.add_argument("--attempts", type=int, default=2, help="trainings of a row at most")
    parser.add_argument("--test-images", type=int, default=0, help="for top-1; 0: all")
    parser.add_argument("--limit", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--autocast", default="fp32", help="bf16 where the processor has it")
    parser.add_argument("--table", type=Path, help="cost table; default: measured in --work")
    parser.add_argument("--points", type=int, default=72, help="networks of a new cost table")
    parser.add_argument("--checks", type=int, default=20, help="compact networks that check it")
    parser.add_argument("--limit-s", type=float, default=240.0, help="seconds of a new table")
    parser.add_argument("--file-limit-s", type=float, default=4.0, help="seconds of a file")
    parser.add_argument("--work", type=Path, default=Path("runs/latency-budgets"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/latency_budgets_DATA")
    options = parser.parse_args()
    short = options.data.partition(":")[0]
    given = {name: getattr(options, name) for name in Plan.__dataclass_fields__}
    settings = Plan(**{**given, "data": options.data.replace("cifar10:", "parquet:")})
    out = options.out or RESULTS / f"latency_budgets_{short.replace('-', '_')}"
    work = options.work / short
    prepared = prepare(settings.recipe({"macs": 0.9}, 0), quiet=True)
    path = options.table or work / f"table-{options.precision}.json"
    cost = table_of(
        prepared.dense,
        path,
        limit_s=options.limit_s,
        precision=options.precision,
        most_points=options.points,
        checks=options.checks,
    )
    images = prepared.data.val.floats(slice(0, PARITY_IMAGES))
    measure = files_of(cost, images, options.file_limit_s)
    bench = Bench(settings, prepared, cost, path, measure, work)
    head = {**settings.head(), "data": short, "table": cost.title}
    rows = earlier_rows(out, head)
    done = {Case(*(row[name] for name in Case.__dataclass_fields__)).key for row in rows}
    if rows:
        # The latencies that are wanted stay those of the rows so far.
        bench.dense_row = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["dense"]
    dense = bench.dense_row
    for case in cases(options.kinds, options.factors, options.seeds):
        if case.key in done:
            continue
        rows.append(bench.row(case, rows))
        print(json.dumps(rows[-1]), flush=True)
        text = (
            f"`python -m benchmarks.accuracy.latency_budgets --data {short}`: the "
            f"{Path(settings.model).name} model, dense top-1 {dense['top1_percent']:.2f} %, "
            f"{dense['measured_ms']:.3f} ms ({cost.title}); {settings.epochs} epochs of masks and "
            f"{settings.finetune_epochs} of fine-tuning in trained rows; mean and standard "
            "deviation over the seeds. `measured`: the dense latency over that of the row's file; "
            "`within`: files at most 1 % above the latency that is wanted."
        )
        result = {"head": head, "machine": read_machine(), "dense": dense, "rows": rows}
        save_result(out, result, f"{text}\n\n{table(rows, dense)}\n")
    print(table(rows, dense))


if __name__ == "__main__":
    main()
