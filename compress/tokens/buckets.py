"""Budgets per image: the last selection keeps one of a few constant numbers of patches.

An image gets the smallest number, its *bucket*, that a rule of `bucket_rules` finds sufficient.
Every bucket has static shapes, so the largest one bounds the cost of any image, and the images
decide the mean. `buckets.json` beside a saved model (schema `vitrim.buckets/1`) holds the plain
data of `Buckets`; the model itself is saved with the largest number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ...core import strict_json
from ...core.errors import InputError
from ...core.storage import replace_file, replace_folder
from ..lift import lift
from ..network import files
from ..network.architecture import Architecture
from ..network.count import count_macs
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel, StepsRun, build
from ..network.modules.select import Select, first_places
from ..network.select_specs import select_inputs
from ..oneshot.stream import check_images
from .bucket_rules import (
    RULES,
    Buckets,
    BucketShares,
    Divergence,
    Rule,
    coverage_of,
    divergences,
    feature_count,
    features,
    first_enough,
    fit_divergence,
    shares_of,
    threshold_for,
)
from .streaming import Progress, batch_size, silent

# Far above the weights of any useful rule.
MAX_FILE_BYTES = 4_000_000


class BucketedModel(nn.Module):
    """A network whose last selection keeps a number of patches that depends on the image.

    Images (batch, channels, height, width) -> logits (batch, classes). An image in the bucket of
    k patches gets the logits of `fixed(k)`, which shares the weights.

    Args:
        model: A network with selections. Its weights are shared; the number of patches that its
            last selection keeps has no meaning here.
        buckets: The numbers of patches and the rule.

    Raises:
        InputError: The last selection has no scores of the image or fuses tokens, or a number does
            not fit.
    """

    def __init__(self, model: CompactModel, buckets: Buckets) -> None:
        super().__init__()
        self.buckets = buckets
        self.architectures = tuple(
            _with_count(model.architecture, count) for count in buckets.counts
        )
        self.network = _sharing(model, self.architectures[-1])
        wanted = feature_count(self.architecture.embed, self.architecture.prefix)
        if buckets.divergence is not None and len(buckets.divergence.weights[0]) != wanted:
            raise InputError(
                f"buckets: divergence: rows of {len(buckets.divergence.weights[0])} weights; the "
                f"stream before {self.selection.spec.name} has {wanted} features"
            )

    @property
    def architecture(self) -> Architecture:
        """The architecture with the largest bucket."""
        return self.architectures[-1]

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds of one image in each bucket; the last one bounds those of any image."""
        return tuple(count_macs(architecture) for architecture in self.architectures)

    @property
    def calibration(self) -> BucketShares | None:
        """How the calibration images are distributed, and what they cost; None without any."""
        if (found := self.buckets).shares is None:
            return None
        return BucketShares(found.counts, found.shares, self.macs, found.images)

    @property
    def selection(self) -> Select:
        """The last selection."""
        return cast(Select, self.network.selects[-1])

    @property
    def predicted(self) -> bool:
        """Whether its scores are those of a predictor, which count as probabilities."""
        return self.selection.spec.scorer == "predictor"

    @property
    def tokens_before(self) -> int:
        """Number of tokens before the last selection."""
        counts = (self.architecture.tokens, *self.architecture.step_tokens(last_queries=False))
        return int(select_inputs(self.architecture, counts)[-1][2])

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, each in its bucket.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, classes).
        """
        found, scores = self._scored(images)
        numbers = self._numbers(found, scores)
        rows = [(numbers == number).nonzero().flatten() for number in numbers.unique().tolist()]
        logits = [self._rest(int(numbers[part[0]]), found.of(part), scores[part]) for part in rows]
        return torch.cat(logits).index_select(0, torch.cat(rows).argsort())

    def fixed(self, count: int) -> CompactModel:
        """The network whose last selection keeps `count` patches of every image.

        Args:
            count: One of the buckets' numbers.

        Returns:
            A network in the mode of this one, whose parameters share its memory.

        Raises:
            InputError: There is no such bucket.
        """
        if count not in self.buckets.counts:
            known = ", ".join(map(str, self.buckets.counts))
            raise InputError(f"bucket {count}: there is none of {count} patches; choose {known}")
        return _sharing(self.network, self.architectures[self.buckets.counts.index(count)])

    def bucket_of(self, images: Tensor) -> Tensor:
        """The number of patches that each image keeps: (batch, …) -> int64 (batch,)."""
        with torch.inference_mode():
            numbers = self._numbers(*self._scored(images))
        return torch.tensor(self.buckets.counts, device=numbers.device)[numbers]

    def covered(self, images: Tensor, progress: Progress | None = None) -> Tensor:
        """The share of each image's scores that the best patches of each bucket hold.

        Args:
            images: (images, channels, height, width).
            progress: Called with "score", the images done, and the images in all.

        Returns:
            float64 (images, buckets), on the CPU.

        Raises:
            InputError: The images do not fit the model.
        """
        return self._of_images(images, lambda _, scores: self._covered(scores), progress)

    def shares(self, images: Tensor, progress: Progress | None = None) -> BucketShares:
        """How images are distributed over the buckets, and what they cost.

        Args:
            images: (images, channels, height, width).
            progress: As for `covered`.

        Returns:
            Shares and multiply-adds of each bucket.

        Raises:
            InputError: The images do not fit the model.
        """
        needs = self._of_images(images, self._needs, progress)
        found = shares_of(needs, self.buckets.threshold)
        return BucketShares(self.buckets.counts, found, self.macs, len(images))

    def learned(
        self, images: Tensor, progress: Progress | None = None
    ) -> tuple[Divergence, Tensor]:
        """Fit the prediction of how far each bucket's logits are from those of the last.

        Args:
            images: (images, channels, height, width), without labels.
            progress: Called with "learn", the images done, and the images in all.

        Returns:
            The prediction with a threshold of 0, and for each image what a fit to the others
            predicts, float64 (images, buckets - 1), on the CPU.

        Raises:
            InputError: The images do not fit the model, or there are fewer than two.
        """
        if len(images) < 2:
            raise InputError("buckets: a prediction is fitted to two images or more; give hundreds")
        width = feature_count(self.architecture.embed, self.architecture.prefix)

        def compared(before: StepsRun, scores: Tensor) -> Tensor:
            places = range(len(self.buckets.counts))
            logits = [self._rest(place, before, scores) for place in places]
            inputs = features(before.x, self.selection.prefix)
            return torch.cat([inputs, divergences(logits)], dim=1)

        found = self._of_images(images, compared, progress, "learn")
        return fit_divergence(found[:, :width], found[:, width:])

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Write the model with its largest bucket, and `buckets.json`, completely or not at all.

        Args:
            folder: The folder to write; created with its parents.
            overwrite: Whether to replace a folder that contains a saved model.

        Returns:
            The folder. `vitrim.load_bucketed` reads it; `vitrim.load` returns `fixed` of the
            largest bucket.

        Raises:
            InputError: The folder is not empty, or the disk is full.
        """
        with replace_folder(folder, files.MODEL, overwrite=overwrite) as temporary:
            files.save(self.network, temporary / "model")
            for path in sorted((temporary / "model").iterdir()):
                path.replace(temporary / path.name)
            (temporary / "model").rmdir()
            self.save_buckets(temporary)
        return Path(folder)

    def save_buckets(self, folder: Path | str) -> None:
        """Write `buckets.json` alone, beside a saved model that is `fixed` of the largest bucket.

        Raises:
            InputError: The disk is full.
        """
        text = json.dumps(self.buckets.model_dump(by_alias=True, mode="json"), indent=1)
        replace_file(Path(folder) / files.BUCKETS_FILE, text + "\n")

    def _scored(self, images: Tensor) -> tuple[StepsRun, Tensor]:
        """The stream before the last selection, and its scores (batch, patches)."""
        found = self.network.run_steps(self.network.embed(images), until=self.selection)
        return found, self.selection.scores(found.x, found.scored)

    def _covered(self, scores: Tensor) -> Tensor:
        """(batch, patches) -> (batch, buckets), float64."""
        scores = scores.double()
        masses = scores.sigmoid() if self.predicted else scores.clamp(min=0)
        held = masses.sort(dim=-1, descending=True).values.cumsum(-1)
        last = torch.tensor(self.buckets.counts, device=scores.device) - 1
        return held[:, last] / held[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)

    def _needs(self, before: StepsRun, scores: Tensor) -> Tensor:
        """What the rule compares with its threshold: (batch, buckets - 1)."""
        divergence = self.buckets.divergence
        if divergence is None:
            return -self._covered(scores)[:, :-1]
        weights = torch.tensor(divergence.weights, device=scores.device)
        bias = torch.tensor(divergence.bias, device=scores.device)
        return features(before.x, self.selection.prefix) @ weights.T + bias

    def _numbers(self, before: StepsRun, scores: Tensor) -> Tensor:
        """The number of each image's bucket: int64 (batch,)."""
        return first_enough(self._needs(before, scores), self.buckets.threshold)

    def _of_images(
        self,
        images: Tensor,
        compute: Callable[[StepsRun, Tensor], Tensor],
        progress: Progress | None,
        stage: str = "score",
    ) -> Tensor:
        """What is computed from the stream before the selection and its scores, on the CPU."""
        check_images(self.network, images)
        found: list[Tensor] = []
        parts = images.split(batch_size(self.network))
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            for number, part in enumerate(parts):
                (progress or silent)(stage, number * len(parts[0]), len(images))
                found.append(compute(*self._scored(part.to(device))).double().cpu())
        return torch.cat(found)

    def _rest(self, number: int, before: StepsRun, scores: Tensor) -> Tensor:
        """Run what follows the scores in one bucket: (batch, …) -> (batch, classes)."""
        network, select = self.network, self.selection
        kept = first_places(scores, self.buckets.counts[number])
        x, positions = select.gathered(before.x, kept, before.positions)
        counts = self.architectures[number].step_tokens()
        for step, count in list(zip(network.steps, counts, strict=True))[select.spec.at :]:
            x = network.run_step(cast("Sequence[Branch]", step), x, count, None, positions)
        return network.classify(x)


def bucketed(
    model: nn.Module,
    counts: Sequence[int],
    *,
    coverage: float | None = None,
    images: Tensor | None = None,
    mean_patches: float | None = None,
    rule: Rule | None = None,
    progress: Progress | None = None,
) -> BucketedModel:
    """Let the last selection keep one of a few numbers of patches, which depends on the image.

    By divergence, an image gets the smallest number with which the logits are predicted to be near
    those of the largest; the prediction is learned from `images` without labels, in closed form. By
    coverage, it gets the smallest number whose best patches hold a share of the image's scores: of
    a predictor their probabilities to be kept, of an attention its weights.

    Args:
        model: A network with selections (`select_tokens`). Its weights are shared.
        counts: Numbers of patches, increasing; the largest one bounds the cost of any image.
        coverage: The share of an image's scores, above 0 and at most 1. None: `mean_patches`
            decides the threshold of the rule.
        images: (images, channels, height, width), normalized as the model expects: some hundred,
            on which `mean_patches` is met. With `coverage` they are only counted.
        mean_patches: The largest mean number of patches that `images` keep.
        rule: "divergence" or "coverage". None: by divergence, unless `coverage` is given.
        progress: Called with a stage ("score", "learn"), the images done, and the images in all.

    Returns:
        A network in the mode of `model`; its `buckets` have the rule and, given images, their share
        in each bucket. Shapes: (batch, channels, height, width) -> (batch, classes).

    Raises:
        InputError: A count does not fit, an argument is missing or out of range, or the last
            selection cannot have buckets.
        UnsupportedModel: A module has no rule; the message names its path.
    """
    if (coverage is None) == (mean_patches is None):
        raise InputError("bucketed: give coverage, or images and mean_patches, and not both")
    if mean_patches is not None and images is None:
        raise InputError(
            "bucketed: mean_patches needs images on which it is met; give some hundred"
        )
    if rule not in (None, *RULES):
        raise InputError(f"bucketed: rule = {rule!r}: choose {' or '.join(RULES)}")
    if rule == "divergence" and coverage is not None:
        raise InputError(
            "bucketed: coverage is the threshold of the other rule; give mean_patches, or leave "
            "rule out"
        )
    found = _buckets(counts, 1.0 if coverage is None else coverage)
    if mean_patches is not None and not found.counts[0] <= mean_patches <= found.counts[-1]:
        raise InputError(
            f"mean_patches = {mean_patches}: give a number from {found.counts[0]} to "
            f"{found.counts[-1]}, the smallest and the largest count"
        )
    result = BucketedModel(lift(model), found)
    if images is None:
        return result
    changed: dict[str, object] = {"images": len(images)}
    if mean_patches is None or rule == "coverage":
        needs = -result.covered(images, progress)[:, :-1]
        if mean_patches is not None:
            changed["coverage"] = coverage_of(threshold_for(needs, found.counts, mean_patches))
    else:
        learned, needs = result.learned(images, progress)
        threshold = {"threshold": threshold_for(needs, found.counts, mean_patches)}
        changed |= {"divergence": learned.model_copy(update=threshold), "coverage": None}
    found = found.model_copy(update=changed)
    result.buckets = found.model_copy(update={"shares": shares_of(needs, found.threshold)})
    return result


def load_bucketed(folder: Path | str) -> BucketedModel:
    """Load a model that `BucketedModel.save` wrote; all files are untrusted.

    Args:
        folder: The folder.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        InputError: A file is missing, malformed or does not fit the others; the message names it.
    """
    folder = Path(folder)
    network = files.load(folder)
    path = folder / files.BUCKETS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; vitrim.load reads a model without buckets")
    if path.resolve().parent != path.parent.resolve() or path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{path}: not a file of buckets; BucketedModel.save writes one")
    try:
        # Strict, so that "12" is not a number; from JSON text, where a list is a valid tuple.
        data = strict_json.parse(path.read_bytes())
        buckets = Buckets.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise InputError(f"{path}: {ascii(where)[1:-1]}: {_reason(error)}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    try:
        return BucketedModel(network, buckets).eval()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _buckets(counts: Sequence[int], coverage: float) -> Buckets:
    try:
        return Buckets(counts=tuple(counts), coverage=coverage)
    except ValidationError as error:
        where = error.errors()[0]["loc"] or ("counts",)
        raise InputError(f"buckets: {where[0]}: {_reason(error)}") from error


def _reason(error: ValidationError) -> str:
    """The first reason, in printable characters."""
    text = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return text.encode("ascii", "replace").decode()


def _with_count(architecture: Architecture, count: int) -> Architecture:
    """An architecture whose last selection keeps another number of patches."""
    if not architecture.selects:
        raise InputError(
            "buckets: this network selects no patches; call vitrim.select_tokens first"
        )
    last = architecture.selects[-1]
    if last.scorer == "random":
        raise InputError(
            f"{last.name}: scorer 'random' has no scores of an image, so all images would get the "
            "same bucket; use class attention or a predictor"
        )
    if last.fused:
        raise InputError(
            f"{last.name}: a fused token stands for the dropped patches, so their share of the "
            "scores is not lost; use buckets without it"
        )
    last = last.model_copy(update={"patches": count})
    changed = architecture.model_copy(update={"selects": (*architecture.selects[:-1], last)})
    try:
        return Architecture.model_validate(changed.model_dump(by_alias=True))
    except ValidationError as error:
        raise InputError(f"buckets: counts: {_reason(error)}") from error


def _sharing(model: CompactModel, architecture: Architecture) -> CompactModel:
    """A network of another count with the memory of the weights of `model`."""
    return build(architecture, model.state_dict()).train(model.training)
