"""Points of top-1 lost by cuts without training: criteria, scopes and repairs, and Torch-Pruning.

    python -m benchmarks.accuracy.oneshot [--data quickstart|fashion-mnist|cifar10:FOLDER]
        [--model embedded|FOLDER] [--images 64 256 1024] [--seeds 0 1 2] [--test-images 2000]

Every row cuts the same trained model to a share of its multiply-adds and measures top-1 on the same
test images; no row trains. The criteria rank units, in a scope; their ratio is bisected until the
share is met. A repair then changes what remains: `mean` adds the mean error of each sub-layer to
its bias, `least squares` refits output projections (`vitrim.compensate`). With `rotation` the
network is first turned by `vitrim.rotate`. `closed form` is `vitrim compact --without-training`.
Torch-Pruning prunes the timm model of the same weights. Finished rows are kept, so that an
interrupted benchmark continues; the first seed of everything comes first.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vitrim
from torch import Tensor, nn
from vitrim.bench.local.environment import read_machine
from vitrim.compress.data.loading import open_dataset
from vitrim.compress.data.splits import DataSplits, stratified_indices
from vitrim.compress.masks.magnitude import unit_costs
from vitrim.compress.masks.ranking import rank
from vitrim.compress.masks.saliency import USUAL, saliency
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.compensation import with_output_biases
from vitrim.compress.oneshot.stream import Stream, has_output_projection, output_projection
from vitrim.compress.oneshot.trim import Prediction, TrimOptions, predict, trim_to
from vitrim.compress.surgery.plan import plan
from vitrim.compress.train.evaluate import evaluate
from vitrim.pipeline.recipe_sections import ModelSection
from vitrim.pipeline.shipping_steps import stratified_sample
from vitrim.pipeline.source_model import image_of, preprocessing_of, source_model, with_last_queries

from ..results_file import RESULTS, earlier_rows, save_result
from .oneshot_cases import FROM_IMAGES, IMAGES, Case, cases, key_of, table

BISECTIONS = 16
BATCH = 64
ROUND_TO = 8


class Bench:
    """The model, the images and what several rows share."""

    def __init__(self, data: DataSplits, model: CompactModel, source: nn.Module) -> None:
        self.data, self.model, self.source = data, model, source
        self.dense_top1 = evaluate(model, data.test)
        self.dense_macs = count_macs(model.architecture)

    @functools.cached_property
    def timm_model(self) -> nn.Module | None:
        """The timm model of the same weights, for Torch-Pruning; None without one."""
        if not isinstance(self.source, CompactModel):
            return self.source
        from .oneshot_torch_pruning import timm_twin

        return timm_twin(self.model)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def images(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Training images (count, channels, height, width) and their labels, which Taylor reads."""
        rows = stratified_indices(self.data.train.targets, count, seed)[0]
        # In random order: the check of the closed form holds the first ones out.
        rows = np.random.default_rng(seed).permutation(rows)
        return self.data.train.floats(rows), torch.from_numpy(self.data.train.targets[rows])

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def rotated(self, count: int, seed: int) -> CompactModel:
        """The model, rotated on these images."""
        return vitrim.rotate(self.model, self.images(count, seed)[0])

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def prediction(self, count: int, seed: int) -> Prediction:
        """The error curves of the closed form, which serve all budgets."""
        options = TrimOptions(round_to=ROUND_TO)
        return predict(self.model, self.images(count, seed)[0], options=options)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def scores(self, criterion: str, rotated: bool, count: int, seed: int) -> Any:
        """The scores of all units, which serve all scopes and budgets."""
        source = self.rotated(count, seed) if rotated else self.model
        batches = None
        if criterion in FROM_IMAGES:
            images, targets = self.images(count, seed)
            batches = list(zip(images.split(BATCH), targets.split(BATCH), strict=True))
        return saliency(source, criterion, data=batches)  # type: ignore[arg-type]

    def cut(self, case: Case) -> CompactModel | float:
        """The network of a row; of Torch-Pruning its top-1 and share are measured elsewhere."""
        method, images = case.method, self.images(case.images, case.seed)[0]
        if method.criterion == "closed form":
            return self._closed_form(case)
        source = self.rotated(case.images, case.seed) if method.rotated else self.model
        scores = self.scores(method.criterion, method.rotated, case.images, case.seed)
        mask = mask_of_share(source, scores, method.scope, case.share)
        small = with_last_queries(vitrim.compact(source, mask))
        if method.repair == "nothing":
            return small
        if method.repair == "mean":
            return compensate_means(small, source, images, mask)
        return vitrim.compensate(small, source, images, mask=mask)[0]

    def _closed_form(self, case: Case) -> CompactModel:
        prediction = self.prediction(case.images, case.seed)
        found = trim_to(prediction, macs=case.share)
        if case.method.repair == "least squares":
            return found.model
        small = with_last_queries(vitrim.compact(found.rotated, found.mask))
        if case.method.repair == "nothing":
            return small
        return compensate_means(small, found.rotated, prediction.fitting, found.mask)

    def row(self, case: Case) -> dict[str, Any]:
        """Cut, repair and measure."""
        started = time.process_time()
        if case.method.tool == "vitrim":
            small = self.cut(case)
            assert isinstance(small, CompactModel)
            cpu_s = time.process_time() - started
            share, top1 = count_macs(small.architecture) / self.dense_macs, self._top1(small)
        else:
            from .oneshot_torch_pruning import BrokenModel, prune_to

            assert self.timm_model is not None
            images, targets = self.images(case.images, case.seed)
            dense = self.model.architecture
            try:
                pruned, share = prune_to(
                    self.timm_model, case.method, case.share, images, targets, dense
                )
            except BrokenModel:
                return {**asdict(case), "points_lost": None}
            cpu_s, top1 = time.process_time() - started, self._top1(pruned)
        return {
            **asdict(case),
            "macs_share": share,
            "top1_percent": top1,
            "points_lost": self.dense_top1 - top1,
            "cpu_s": cpu_s,
        }

    def _top1(self, model: nn.Module) -> float:
        return evaluate(model, self.data.test)


def mask_of_share(
    model: CompactModel, scores: Any, scope: str, share: float
) -> vitrim.StructuredMask:
    """The mask of the largest ratio, equal for all dimensions, that meets a share of the MACs."""
    architecture = model.architecture
    costs = unit_costs(architecture, dict(model.named_parameters()), "residual")

    def mask(ratio: float) -> vitrim.StructuredMask:
        ratios = dict.fromkeys(USUAL, ratio)
        kept = rank(architecture, scores, costs, ratios, scope)  # type: ignore[arg-type]
        return vitrim.StructuredMask(kept, scale="original")

    low, high = 0.02, 1.0
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        if _macs_of(architecture, mask(ratio)) <= share * count_macs(architecture):
            low = ratio
        else:
            high = ratio
    return mask(low)


def _macs_of(architecture: Architecture, mask: vitrim.StructuredMask) -> int:
    after = plan(architecture, mask).architecture
    return count_macs(after.model_copy(update={"last_queries": architecture.last_queries}))


def compensate_means(
    compact: CompactModel, dense: CompactModel, images: Tensor, mask: vitrim.StructuredMask
) -> CompactModel:
    """Add the mean error of the stream behind each sub-layer to the sub-layer's output bias.

    Args:
        compact: The network after the cut.
        dense: The network that it was cut from.
        images: (images, channels, height, width), normalized.
        mask: The mask of the cut.

    Returns:
        The compensated network.
    """
    result = with_output_biases(compact).eval()
    channels = plan(dense.architecture, mask).channels
    wanted, found = Stream(dense, images), Stream(_all_tokens(result), images)
    names = {
        branch.name: number
        for number, step in enumerate(dense.architecture.steps)
        for branch in step
    }
    for number, step in enumerate(result.architecture.steps):
        following = result.architecture.steps[number + 1 :]
        depth = names[following[0][0].name] if following else len(dense.steps)
        while wanted.position < depth:
            wanted.advance()
        for branch in found.step:
            if not has_output_projection(branch) or len(step) > 1:
                continue
            error, rows = torch.zeros(result.architecture.embed), 0
            for batch, (x, _, update) in enumerate(found.inner(branch)):
                target = wanted.batches[batch].index_select(-1, channels)
                error += (target - branch.add(x, update)).sum(dim=(0, 1))
                rows += x.shape[0] * x.shape[1]
            scale = branch.layer_scale if branch.layer_scale is not None else torch.ones(())
            with torch.no_grad():
                output_projection(branch).bias.add_(error / rows / scale)
        found.advance()
    return result


def _all_tokens(model: CompactModel) -> CompactModel:
    """The same modules, computing every token of the last block."""
    result = copy.copy(model)
    result.architecture = model.architecture.model_copy(update={"last_queries": False})
    return result


def open_bench(data: str, model: str, test_images: int) -> Bench:
    """Open the data set and the model.

    Args:
        data: quickstart, fashion-mnist, or cifar10:FOLDER of parquet files.
        model: embedded, or a folder that vitrim saved.
        test_images: Largest number of test images.

    Returns:
        Both, with the top-1 of the dense model.
    """
    name = data.replace("cifar10:", "parquet:")
    section = ModelSection(checkpoint=model)
    splits = open_dataset(name, preprocessing=preprocessing_of(section, name, image_of(section)))
    test = stratified_sample(splits.test, test_images)
    splits = replace(splits, name=data.partition(":")[0], test=test)
    source = source_model(section, splits.classes)
    return Bench(splits, with_last_queries(vitrim.lift(source)).eval(), source)


def run(
    bench: Bench, wanted: Sequence[Case], out: Path, head: dict[str, Any], title: Callable[[], str]
) -> list[dict[str, Any]]:
    """Measure the rows that the result file does not have yet; it is written after each."""
    rows = earlier_rows(out, head)
    done = {key_of(row) for row in rows}
    for case in wanted:
        if case.key in done:
            continue
        rows.append(bench.row(case))
        print(json.dumps(rows[-1]), flush=True)
        result = {"head": head, "machine": read_machine(), "rows": rows}
        save_result(out, result, f"{title()}\n\n{table(rows, IMAGES)}\n")
    return rows


def main() -> None:
    """Run all rows and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--model", default="embedded", help="embedded, or a folder vitrim saved")
    parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/oneshot_DATA")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = open_bench(options.data, options.model, options.test_images)
    name = bench.data.name
    out = options.out or RESULTS / f"oneshot_{name.replace('-', '_')}"
    wanted = cases(options.images, options.seeds, torch_pruning=bench.timm_model is not None)
    head = {
        "data": name,
        "model": options.model,
        "test_images": len(bench.data.test),
        "dense_top1_percent": bench.dense_top1,
        "dense_macs": bench.dense_macs,
    }
    title = (
        f"`python -m benchmarks.accuracy.oneshot --data {name}`: the {options.model} model, "
        f"{bench.dense_top1:.2f} % top-1 on {len(bench.data.test)} test images; points lost, mean "
        "and standard deviation over the draws of the images."
    )
    rows = run(bench, wanted, out, head, lambda: title)
    print(table(rows, options.images))


if __name__ == "__main__":
    main()
