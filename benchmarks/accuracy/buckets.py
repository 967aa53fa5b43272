"""Budgets per image against one number of patches for all: top-1, mean latency and its bound.

    python -m benchmarks.accuracy.buckets [--data quickstart|fashion-mnist|cifar10:FOLDER]
        [--model embedded|FOLDER] [--method class-attention] [--stage 1] [--counts 6 12 24]
        [--means 0.4 0.6 0.8] [--images 512] [--test-images 2000] [--inferences 2000]
        [--precision fp32|int8] [--time-limit 60] [--rules divergence coverage]

The model gets one selection behind `--stage`, or keeps those that it has. For every rule and mean
(a share of the way from the smallest to the largest count) the threshold is calibrated on
`--images` training images, without their labels. The artifact with buckets then stands beside the
artifact with one number of patches: the smallest one that classifies at least as many of the test
images correctly. All buckets and that artifact are measured interleaved (batch 1, one thread); the
mean latency is that of each bucket, weighted with the shares of the test images.

`above` counts inferences of real images, each in its own bucket, that take longer than the bound
(the p50 of the slowest bucket) plus the machine's own spread. That is what as many inferences of
the slowest bucket, which all do the same work, take longer than their own p50, at most and at
99.9 %; the two kinds alternate image by image. Finished rows are kept.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import vitrim
from numpy.typing import NDArray
from vitrim.bench.local.artifact_facts import artifact_facts
from vitrim.bench.local.environment import read_machine
from vitrim.bench.local.measure import measure_interleaved
from vitrim.bench.results.buckets import bucket_tables
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.bucket_rules import RULES, Rule
from vitrim.compress.tokens.select import SelectMethod
from vitrim.compress.train.evaluate import evaluate
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.pipeline.shipping_steps import write_dataset
from vitrim.runtimes import open_engine

from ..results_file import RESULTS, earlier_rows, markdown_head, markdown_row, save_result
from .oneshot import Bench, open_bench

MEANS = (0.4, 0.6, 0.8)
# The counts of a selection that is added, as shares of the patches that it chooses from.
SHARES = (0.25, 0.5, 0.75)
PERCENTILE = 99.9
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What all rows share.

    Attributes:
        counts: Number of patches of each bucket.
        images: Training images for the calibration.
        inferences: Inferences that are held against the bound.
        precision: Of both artifacts.
        time_limit_s: Of the measurement of a row.
        seed: Of the calibration images.
    """

    counts: tuple[int, ...]
    images: int
    inferences: int
    precision: str
    time_limit_s: float
    seed: int


class BucketBench:
    """The network with a selection, its test images, and top-1 of every single count."""

    def __init__(self, bench: Bench, network: CompactModel, plan: Plan) -> None:
        self.bench, self.network, self.plan = bench, network, plan
        self.folder = tempfile.TemporaryDirectory(prefix="vitrim-buckets-")
        self.dataset = Path(self.folder.name) / "test.npz"
        self.dataset = write_dataset(bench.data, self.dataset, len(bench.data.test))
        self.images = bench.images(plan.images, plan.seed)[0]
        self.top1: dict[int, float] = {}

    def single_top1(self, count: int) -> float:
        """Top-1 in percent if every image keeps `count` patches."""
        if count not in self.top1:
            self.top1[count] = evaluate(self.fixed(count), self.bench.data.test)
        return self.top1[count]

    def fixed(self, count: int) -> CompactModel:
        """The network in which every image keeps `count` patches."""
        first, last = self.plan.counts[0], self.plan.counts[-1]
        pair = sorted((count, first if count == last else last))
        return vitrim.bucketed(self.network, pair, coverage=0.5).fixed(count)

    def single_count(self, least_top1: float) -> int:
        """The smallest number of patches with at least this top-1, else the largest bucket's."""
        counts = range(self.plan.counts[0], self.plan.counts[-1])
        # Not a bisection: top-1 need not grow with every patch.
        return next(
            (count for count in counts if self.single_top1(count) >= least_top1),
            self.plan.counts[-1],
        )

    def row(self, rule: Rule, mean: float) -> dict[str, Any]:
        """Calibrate, export, and measure at one mean number of patches."""
        counts, plan = self.plan.counts, self.plan
        wanted = counts[0] + mean * (counts[-1] - counts[0])
        model = vitrim.bucketed(
            self.network, counts, images=self.images, mean_patches=wanted, rule=rule
        )
        single = self.single_count(evaluate(model, self.bench.data.test))
        folder = Path(self.folder.name) / f"{rule}-{mean:g}"
        options: Any = {
            "precision": plan.precision,
            "images": self.images[:64].numpy(),
            "preprocessing": self.bench.data.preprocessing,
        }
        artifacts = {
            "buckets": vitrim.export(model, folder / "buckets", **options),
            "single": vitrim.export(self.fixed(single), folder / "single", **options),
        }
        measured = measure_interleaved(
            artifacts, dataset=self.dataset, time_limit_s=plan.time_limit_s, quiet=True
        )
        (table,) = bucket_tables(measured.values())
        correct, total = table.counted or (0, 1)
        alone = measured["single"]
        return {
            "rule": rule,
            "mean": mean,
            "threshold": model.buckets.threshold,
            "calibration_shares": model.buckets.shares,
            "shares": table.shares,
            "mean_patches": table.mean_patches,
            "p50_s": [each.summary().p50_s for each in table.measurements],
            "top1_of_bucket": [each.top1 for each in table.measurements],
            "top1_percent": 100 * correct / total,
            "mean_s": table.mean_s,
            "bound_s": table.guarantee_s,
            "single_patches": single,
            "single_top1_percent": 100 * (alone.top1 or 0.0),
            "single_s": alone.summary().p50_s,
            **self.held_to_the_bound(artifacts["buckets"], counts[-1], table.guarantee_s),
        }

    def held_to_the_bound(self, artifact: Artifact, slowest: int, bound_s: float) -> dict[str, Any]:
        """Count inferences above the bound, of real images and of the slowest bucket.

        Args:
            artifact: The artifact with buckets.
            slowest: Number of patches of its slowest bucket.
            bound_s: The stated bound in seconds.
        """
        test = self.bench.data.test
        images = test.floats(slice(0, min(len(test), self.plan.inferences))).numpy()
        own, same = timed_alternately(artifact, slowest, images, self.plan.inferences)
        return {"inferences": len(own), **excess(own, same, bound_s)}


def timed_alternately(
    artifact: Artifact, slowest: int, images: NDArray[Any], count: int
) -> tuple[Array, Array]:
    """Seconds of inferences of real images in their own buckets, and of the slowest bucket.

    Args:
        artifact: The artifact with buckets.
        slowest: The number of patches that every second inference keeps.
        images: float32 (images, channels, height, width), used in turn.
        count: Number of inferences of each kind.
    """
    facts = artifact_facts(artifact)
    engines = []
    for inputs in ({}, {"bucket": slowest}):
        job = {"model": str(facts.model), "session": facts.session, "inputs": inputs}
        engine = open_engine({**job, "runtime": facts.runtime, "input": facts.input})
        engine.load()
        engines.append(engine)
    for engine in engines:
        for number in range(20):
            engine.infer(np.ascontiguousarray(images[number % len(images)][None]))
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(count):
        image = np.ascontiguousarray(images[number % len(images)][None], np.float32)
        # The first of two has the colder caches: each kind is first as often.
        for kind in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            engines[kind].infer(image)
            found[kind].append(time.perf_counter() - start)
    return np.array(found[0]), np.array(found[1])


def excess(own: Array, same: Array, bound_s: float) -> dict[str, Any]:
    """How many inferences are above the bound, and above it plus the machine's own spread.

    Args:
        own: Seconds of inferences of real images in their own buckets.
        same: Seconds of as many inferences of the slowest bucket.
        bound_s: The stated bound in seconds.
    """
    middle = float(np.median(same))
    most, often = float(same.max()) - middle, float(np.percentile(same, PERCENTILE)) - middle
    return {
        "own_mean_s": float(own.mean()),
        "own_p50_s": float(np.median(own)),
        "own_max_s": float(own.max()),
        "same_p50_s": middle,
        "spread_most_s": most,
        "spread_often_s": often,
        "above_bound": int((own > bound_s).sum()),
        "above_often": int((own > bound_s + often).sum()),
        "above_most": int((own > bound_s + most).sum()),
        "same_above_bound": int((same > bound_s).sum()),
        "same_above_often": int((same > bound_s + often).sum()),
    }


def selecting_network(
    model: CompactModel, method: str, stage: int | None, counts: Sequence[int] | None
) -> tuple[CompactModel, tuple[int, ...]]:
    """The network whose last selection gets buckets, and the counts of these.

    Args:
        model: A network, with or without selections.
        method: The selection that is added where there is none.
        stage: The block that it follows. None: after a quarter of the blocks.
        counts: Number of patches of each bucket. None: from the patches that it chooses from.

    Raises:
        InputError: A count does not fit.
    """
    if not model.architecture.selects:
        blocks = len(model.architecture.attention_steps())
        place = max(0, blocks // 4 - 1) if stage is None else stage
        patches = model.architecture.patches
        most = max(counts) if counts else max(2, int(SHARES[-1] * patches))
        model = vitrim.select_tokens(
            copy.deepcopy(model), cast("SelectMethod", method), stages=[place], counts=[most]
        ).eval()
    elif stage is not None:
        raise InputError(f"--stage {stage}: the model has selections of its own; leave it out")
    kept = model.architecture.selects[-1].patches
    found = counts or [max(1, round(kept * share / SHARES[-1])) for share in SHARES]
    return model, tuple(sorted(set(found)))


def table(rows: Iterable[dict[str, Any]], counts: Sequence[int]) -> str:
    """A line for each mean: both artifacts, the shares, and the inferences above the bound."""
    columns = ("mean patches", "top-1", "mean ms", "single k", "top-1", "ms", "faster")
    shares = [f"{count} patches" for count in counts]
    above = ("bound ms", "inferences", "above", "above, 99.9 %")
    titles = (*columns, *shares, *above)
    lines = markdown_head("rule", *titles, numbers=len(titles))
    for row in rows:
        lines.append(
            markdown_row(
                row["rule"],
                f"{row['mean_patches']:.1f}",
                f"{row['top1_percent']:.2f}",
                f"{1e3 * row['mean_s']:.3f}",
                row["single_patches"],
                f"{row['single_top1_percent']:.2f}",
                f"{1e3 * row['single_s']:.3f}",
                f"{row['single_s'] / row['mean_s']:.3f}x",
                *(f"{100 * share:.0f} %" for share in row["shares"]),
                f"{1e3 * row['bound_s']:.3f}",
                row["inferences"],
                row["above_most"],
                f"{row['above_often']} (slowest bucket alone: {row['same_above_often']})",
            )
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the missing rows and write both files after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--model", default="embedded", help="embedded, or a folder vitrim saved")
    parser.add_argument("--method", default="class-attention", help="of a model without selections")
    parser.add_argument("--stage", type=int, help="the block before the selection that is added")
    parser.add_argument("--counts", nargs="+", type=int, help="patches of each bucket")
    parser.add_argument("--means", nargs="+", type=float, default=list(MEANS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--inferences", type=int, default=2000)
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds a row")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/buckets_DATA")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = open_bench(options.data, options.model, options.test_images)
    network, counts = selecting_network(bench.model, options.method, options.stage, options.counts)
    name, select = bench.data.name, network.architecture.selects[-1]
    plan = Plan(
        counts, options.images, options.inferences, options.precision, options.time_limit, seed=0
    )
    out = options.out or RESULTS / f"buckets_{name.replace('-', '_')}"
    head = {
        "data": name,
        "model": options.model,
        "selection": [select.scorer, select.at],
        "counts": list(counts),
        "precision": options.precision,
        "images": options.images,
        "test_images": len(bench.data.test),
        "dense_top1_percent": bench.dense_top1,
    }
    rows = earlier_rows(out, head)
    buckets = BucketBench(bench, network, plan)
    for rule, mean in itertools.product(options.rules, options.means):
        if any((row["rule"], row["mean"]) == (rule, mean) for row in rows):
            continue
        rows.append(buckets.row(rule, mean))
        print(json.dumps(rows[-1]), flush=True)
        rows.sort(key=lambda row: (RULES.index(row["rule"]), float(row["mean"])))
        text = (
            f"`python -m benchmarks.accuracy.buckets --data {name}`: the {options.model} model, "
            f"{bench.dense_top1:.2f} % top-1 on {len(bench.data.test)} test images; {select.scorer}"
            f" after step {select.at}, {options.precision}, ONNX Runtime, batch 1, one thread. "
            "`single k` is the smallest number of patches for all images with at least the top-1 "
            "of the buckets; shares are those of the test images. `above`: inferences of real "
            "images above the bound plus the largest excess of the slowest bucket alone.\n\n"
            f"{table(rows, counts)}\n"
        )
        save_result(out, {"head": head, "machine": read_machine(), "rows": rows}, text)
    print(table(rows, counts))


if __name__ == "__main__":
    main()
