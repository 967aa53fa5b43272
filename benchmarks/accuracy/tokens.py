"""Points of top-1 lost by static token masks: all choosers at equal counts, and after repairs.

    python -m benchmarks.accuracy.tokens [--data quickstart|fashion-mnist|cifar10:FOLDER]
        [--model embedded|FOLDER] [--shares 0.8 0.65 0.5] [--seeds 0 1 2] [--epochs 2]
        [--schedule uniform] [--images 256] [--train-images 10000] [--test-images 2000]
        [--methods patch-slimming random] [--equal-only] [--out FILE]

Every row keeps the same number of tokens after each sub-layer (the schedule that meets the share of
the multiply-adds), chosen by another method, and measures top-1 on the same test images: after the
cut; after `vitrim.compensate` has refitted the output projections to the dense stream, without
labels; and after `--epochs` of fine-tuning of the compensated network with distillation. In rows
`own counts` the counts follow from the importance by dynamic programming. Rows `each image` choose
as many tokens for each image: `tome` and `ppt` merge or drop them, others are selections
(`vitrim.select_tokens`), all between attention and FFN. They are not compensated, and their
multiply-adds (`macs_share`) are larger at equal counts, since the attention still computes the
tokens that leave. `--methods` keeps some of the choosers, `--equal-only` no rows of own counts.
Finished rows are kept, so that an interrupted benchmark continues.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import vitrim
from torch import Tensor, nn
from vitrim.bench.local.environment import read_machine
from vitrim.compress.data.splits import DataSplits, stratified_indices
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.choose import METHODS, WITHOUT_IMAGES, TokenRequest, token_choice
from vitrim.compress.tokens.counts import Schedule, counts_for_macs
from vitrim.compress.tokens.merging.merged import MERGING_METHODS, MergedModel, merged_tokens
from vitrim.compress.tokens.select import SelectMethod
from vitrim.compress.train.dense import DenseTask, Distillation
from vitrim.compress.train.evaluate import evaluate
from vitrim.compress.train.loop import fit
from vitrim.compress.train.settings import TrainSettings
from vitrim.pipeline.source_model import with_last_queries

from ..results_file import RESULTS, earlier_rows, markdown_head, markdown_row, save_result
from .oneshot import Bench, open_bench

SHARES = (0.8, 0.65, 0.5)
# Methods of `vitrim.select_tokens` that need no training, and what distinguishes their names from
# those of masks.
SELECTIONS, PER_IMAGE = ("class-attention", "column-attention", "evit"), "each image: "
DYNAMIC = (*MERGING_METHODS, *(f"{PER_IMAGE}{name}" for name in SELECTIONS))
STAGES = ("cut", "compensated", "fine-tuned")


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        method: A method of `vitrim.choose_tokens`, or one of `DYNAMIC`.
        share: The share of the multiply-adds.
        own_counts: Whether the counts follow from the importance, instead of the schedule.
        seed: Of the images and of the method.
    """

    method: str
    share: float
    own_counts: bool
    seed: int

    @property
    def key(self) -> str:
        """Identifies the row in the result file."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Training:
    """The fine-tuning of each row.

    Attributes:
        epochs: Their number.
        lr: The peak learning rate of Muon.
        images: Training images that are used.
    """

    epochs: int
    lr: float
    images: int


class TokenBench:
    """The dense model, the images, and what several rows share."""

    def __init__(self, bench: Bench, images: int, schedule: Schedule, training: Training) -> None:
        self.bench, self.count, self.schedule = bench, images, schedule
        self.training = training
        data = bench.data
        rows = stratified_indices(data.train.targets, min(training.images, len(data.train)), 0)[0]
        self.data = DataSplits(
            data.name, data.train.select(rows), data.val, data.test, data.labels, data.preprocessing
        )

    def row(self, case: Case) -> dict[str, Any]:
        """Choose, cut, compensate, fine-tune, and measure after each."""
        if case.method in DYNAMIC:
            return self._dynamic_row(case)
        bench, started = self.bench, time.process_time()
        images = bench.images(self.count, case.seed)[0]
        architecture = bench.model.architecture
        counts = None
        if not case.own_counts:
            counts = counts_for_macs(architecture, self.schedule, case.share)
        macs = case.share if case.own_counts else None
        request = TokenRequest(case.method, counts, macs, seed=case.seed)  # type: ignore[arg-type]
        choice = token_choice(bench.model, request, images)
        cut = with_last_queries(vitrim.compact(bench.model, choice.mask)).eval()
        choice_cpu_s = time.process_time() - started
        fitted = self._compensated(cut, images)
        top1 = [evaluate(each, bench.data.test) for each in (cut, fitted)]
        if self.training.epochs:
            top1.append(evaluate(self._fine_tuned(fitted, case.seed), bench.data.test))
        return {
            **asdict(case),
            "counts": list(choice.counts.values()),
            "macs_share": count_macs(cut.architecture) / bench.dense_macs,
            "points_lost": [bench.dense_top1 - each for each in top1],
            "choice_cpu_s": choice_cpu_s,
            "cpu_s": time.process_time() - started,
        }

    def _dynamic_row(self, case: Case) -> dict[str, Any]:
        """Choose tokens for each image, fine-tune, and measure after each."""
        bench, started = self.bench, time.process_time()
        counts = counts_for_macs(bench.model.architecture, self.schedule, case.share)
        dynamic, macs = per_image(copy.deepcopy(bench.model), case.method, counts)
        lost: list[float | None] = [bench.dense_top1 - evaluate(dynamic, bench.data.test), None]
        choice_cpu_s = time.process_time() - started
        if self.training.epochs:
            tuned = self._fine_tuned(dynamic, case.seed)
            lost.append(bench.dense_top1 - evaluate(tuned, bench.data.test))
        return {
            **asdict(case),
            "counts": list(counts),
            "macs_share": macs / bench.dense_macs,
            "points_lost": lost,
            "choice_cpu_s": choice_cpu_s,
            "cpu_s": time.process_time() - started,
        }

    def _compensated(self, cut: CompactModel, images: Tensor) -> CompactModel:
        fitted = vitrim.compensate(cut, self.bench.model, images)[0]
        return with_last_queries(fitted).eval()

    def _fine_tuned(self, model: nn.Module, seed: int) -> nn.Module:
        training = self.training
        task = DenseTask(
            model,
            phase="finetune",
            lr=training.lr,
            optimizer="muon",
            distillation=Distillation(self.bench.model, alpha=1.0),
        )
        settings = TrainSettings(
            training.epochs, 64, seed, matmul_precision="medium", threads=1, quiet=True
        )
        with tempfile.TemporaryDirectory(prefix="vitrim-tokens-") as folder:
            fit(task, self.data, settings, Path(folder))
        return model.eval()


def per_image(
    model: CompactModel, method: str, counts: Sequence[int]
) -> tuple[MergedModel | CompactModel, int]:
    """A network that chooses for each image as many tokens as a static mask leaves.

    Args:
        model: The dense network; the result shares weights with it.
        method: One of `DYNAMIC`.
        counts: Of the mask, after the stem and each sub-layer. What it drops before the first
            attention leaves behind that.

    Returns:
        The network, and its multiply-adds.
    """
    architecture = model.architecture
    steps = architecture.attention_steps()
    before = [architecture.tokens, *(counts[step] for step in steps[1:])]
    removed = [first - counts[step + 1] for first, step in zip(before, steps, strict=True)]
    if method in MERGING_METHODS:
        blocks = range(len(steps))
        merged = merged_tokens(model, method, removed, blocks=blocks)
        if list(merged.token_counts)[steps[0] :] != list(counts)[steps[0] + 1 :]:
            raise vitrim.InputError(
                f"{method} cannot leave {list(counts)} tokens, only {list(merged.token_counts)}; "
                "take a larger share or another schedule"
            )
        return merged, merged.macs
    # The last attention computes the class token only.
    stages = [block for block in range(len(steps) - 1) if removed[block]]
    name = cast("SelectMethod", method.removeprefix(PER_IMAGE))
    fused = name == "evit"
    kept = [counts[steps[block] + 1] - architecture.prefix - fused for block in stages]
    selecting = vitrim.select_tokens(model, name, stages=stages, counts=kept)
    return selecting.eval(), count_macs(selecting.architecture)


def cases(
    shares: Sequence[float],
    seeds: Sequence[int],
    *,
    trained: bool,
    methods: Sequence[str] = (*METHODS, *DYNAMIC),
    own_counts: bool = True,
) -> list[Case]:
    """All rows, seed by seed.

    Args:
        shares: Of the multiply-adds.
        seeds: Of images, methods and training.
        trained: Whether rows are fine-tuned. Else methods that see no image and draw nothing have
            one row.
        methods: The choosers.
        own_counts: Whether there are rows whose counts follow from the importance.
    """
    found = []
    for seed, share, method in itertools.product(seeds, shares, methods):
        if not trained and method in ("radial", *DYNAMIC) and seed != seeds[0]:
            continue
        found.append(Case(method, share, False, seed))
        if own_counts and method not in (*WITHOUT_IMAGES, *DYNAMIC):
            found.append(Case(method, share, True, seed))
    return found


def table(rows: Iterable[dict[str, Any]], stages: Sequence[str]) -> str:
    """Mean points lost over the seeds, with the spread: a line a method, a column a budget."""
    grouped: dict[tuple[str, bool], dict[float, list[list[float | None]]]] = {}
    for row in rows:
        found = grouped.setdefault((row["method"], row["own_counts"]), {})
        found.setdefault(row["share"], []).append(row["points_lost"])
    shares = sorted({share for group in grouped.values() for share in group}, reverse=True)
    columns = [f"{share:g} of the MACs, {stage}" for share in shares for stage in stages]
    lines = markdown_head("chooser", "counts", "seeds", *columns, numbers=len(columns) + 1)
    complete = {key: group for key, group in grouped.items() if len(group) == len(shares)}
    for (method, own), group in sorted(complete.items(), key=lambda item: _last(item[1])):
        seeds = max(len(found) for found in group.values())
        cells = [
            _spread([points[number] for points in group[share]])
            for share in shares
            for number in range(len(stages))
        ]
        lines.append(markdown_row(method, "own" if own else "equal", seeds, *cells))
    return "\n".join(lines)


def _dynamic_shares(rows: Iterable[dict[str, Any]]) -> str:
    """The multiply-adds of networks that choose for each image, as a sentence."""
    found: dict[float, list[float]] = {}
    names: dict[str, None] = {}
    for row in rows:
        if row["method"] in DYNAMIC:
            found.setdefault(row["share"], []).append(row["macs_share"])
            each = row["method"].startswith(PER_IMAGE)
            names["rows `each image`" if each else row["method"]] = None
    if not found:
        return ""
    ranges = [
        f"{min(found[share]):.2f} to {max(found[share]):.2f}"
        for share in sorted(found, reverse=True)
    ]
    return (
        f" Tokens are chosen for each image, and nothing is compensated, in {', '.join(names)}; "
        f"with as many tokens they compute {', '.join(ranges)} of the multiply-adds."
    )


def _last(group: dict[float, list[list[float | None]]]) -> float:
    """The mean of the points lost at the end, over all budgets, for the order of the table."""
    rows = [points for found in group.values() for points in found]
    return statistics.mean([each for each in row if each is not None][-1] for row in rows)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "".join(f"{value:.2f}" for value in known)
    return f"{statistics.mean(known):.2f} ± {statistics.stdev(known):.2f}"


def main() -> None:
    """Run the missing rows and write both files after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--model", default="embedded", help="embedded, or a folder vitrim saved")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--schedule", default="uniform", choices=["uniform", "linear", "constant"])
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning; 0: none")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=2000)
    known = (*METHODS, *DYNAMIC)
    parser.add_argument("--methods", nargs="+", choices=known, default=list(known))
    parser.add_argument("--equal-only", action="store_true", help="no rows of own counts")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/tokens_DATA")
    options = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="raise", under="ignore")
    bench = open_bench(options.data, options.model, options.test_images)
    training = Training(options.epochs, options.lr, options.train_images)
    tokens = TokenBench(bench, options.images, options.schedule, training)
    name = bench.data.name
    out = options.out or RESULTS / f"tokens_{name.replace('-', '_')}"
    head = {
        "data": name,
        "model": options.model,
        "schedule": options.schedule,
        "images": options.images,
        "training": asdict(training),
        "test_images": len(bench.data.test),
        "dense_top1_percent": bench.dense_top1,
        "dense_macs": bench.dense_macs,
    }
    stages = STAGES if options.epochs else STAGES[:2]
    rows = earlier_rows(out, head)
    fields = Case.__dataclass_fields__
    done = {Case(**{name: row[name] for name in fields}).key for row in rows}

    def save() -> None:
        text = (
            f"`python -m benchmarks.accuracy.tokens --data {name}`: the {options.model} model, "
            f"{bench.dense_top1:.2f} % top-1 on {len(bench.data.test)} test images; points lost, "
            f"mean and standard deviation over the seeds; {options.images} images without labels, "
            f"{options.schedule} schedule where counts are equal, fine-tuning of {options.epochs} "
            f"epochs on {len(tokens.data.train)} images.{_dynamic_shares(rows)}"
        )
        result = {"head": head, "machine": read_machine(), "rows": rows}
        save_result(out, result, f"{text}\n\n{table(rows, stages)}\n")

    wanted = cases(
        options.shares,
        options.seeds,
        trained=options.epochs > 0,
        methods=options.methods,
        own_counts=not options.equal_only,
    )
    for case in wanted:
        if case.key in done:
            continue
        try:
            rows.append(tokens.row(case))
        except vitrim.InputError as error:
            # Some methods need a class token.
            print(f"{case.method}: {error}", flush=True)
            continue
        print(json.dumps(rows[-1]), flush=True)
        save()
    save()
    print(table(rows, stages))


if __name__ == "__main__":
    main()
