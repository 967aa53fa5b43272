"""Budgets per image: the last selection keeps one of a few constant numbers of patches.

An image gets the smallest number, its *bucket*, whose best patches hold a given share of the
image's scores. Every bucket has static shapes, so the largest one bounds the cost of any image,
and the images decide the mean. `buckets.json` beside a saved model (schema `vitrim.buckets/1`)
holds the plain data of `Buckets`; the model itself is saved with the largest number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from ...core import strict_json
from ...core.errors import InputError
from ...core.storage import replace_file, replace_folder
from ..lift import lift
from ..network import files
from ..network.architecture import Architecture
from ..network.branch_specs import Count, Spec, Width
from ..network.count import count_macs
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel, StepsRun, build
from ..network.modules.select import Select, first_places
from ..oneshot.stream import check_images
from .streaming import Progress, batch_size, silent

# Far above any useful number of buckets, and any file of them.
MOST_BUCKETS, MAX_FILE_BYTES = 16, 65536
_LEAST_COVERAGE = 1e-9
Share = Annotated[float, Field(ge=0, le=1)]


class Buckets(Spec):
    """The numbers of patches that images may keep at the last selection, and how one is chosen.

    Attributes:
        schema_: Version of the format; the key is `schema`.
        counts: Number of patches that each bucket keeps, increasing.
        coverage: An image gets the smallest bucket whose best patches hold this share of its
            scores; the last one if none does.
        shares: Share of the calibration images in each bucket; None where none were used.
        images: Number of calibration images.
    """

    schema_: Literal["vitrim.buckets/1"] = Field("vitrim.buckets/1", alias="schema")
    counts: tuple[Width, ...] = Field(min_length=2, max_length=MOST_BUCKETS)
    coverage: Annotated[float, Field(gt=0, le=1)]
    shares: tuple[Share, ...] | None = None
    images: Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> Buckets:
        if list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"counts {list(self.counts)} must be increasing")
        if self.shares is not None and len(self.shares) != len(self.counts):
            raise ValueError(f"{len(self.shares)} shares for {len(self.counts)} counts")
        if (self.shares is None) != (self.images == 0):
            raise ValueError("shares and the number of images need each other")
        return self


@dataclass(frozen=True)
class BucketShares:
    """How images are distributed over buckets, and what they cost.

    Attributes:
        counts: Number of patches that each bucket keeps, increasing.
        shares: Share of the images in each.
        macs: Multiply-adds of one image in each; the largest is the bound for any image.
        images: Number of images.
    """

    counts: tuple[int, ...]
    shares: tuple[float, ...]
    macs: tuple[int, ...]
    images: int

    @property
    def mean_patches(self) -> float:
        """Number of patches that an image keeps on average."""
        return sum(share * count for share, count in zip(self.shares, self.counts, strict=True))

    @property
    def mean_macs(self) -> float:
        """Number of multiply-adds of an image on average."""
        return sum(share * macs for share, macs in zip(self.shares, self.macs, strict=True))

    @property
    def worst_macs(self) -> int:
        """Number of multiply-adds that no image exceeds."""
        return max(self.macs)


class BucketedModel(nn.Module):
    """A network whose last selection keeps a number of patches that depends on the image.

    Images (batch, channels, height, width) -> logits (batch, classes). An image in the bucket of
    k patches gets the logits of `fixed(k)`, which shares the weights.

    Args:
        model: A network with selections. Its weights are shared; the number of patches that its
            last selection keeps has no meaning here.
        buckets: The numbers of patches and the coverage.

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

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, each in its bucket.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, classes).
        """
        found, scores = self._scored(images)
        numbers = self._numbers(scores)
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
            numbers = self._numbers(self._scored(images)[1])
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
        check_images(self.network, images)
        found: list[Tensor] = []
        parts = images.split(batch_size(self.network))
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            for number, part in enumerate(parts):
                (progress or silent)("score", number * len(parts[0]), len(images))
                found.append(self._covered(self._scored(part.to(device))[1]).cpu())
        return torch.cat(found)

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
        found = _shares(self.covered(images, progress), self.buckets.coverage)
        return BucketShares(self.buckets.counts, found, self.macs, len(images))

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
        predicted = self.selection.spec.scorer == "predictor"
        masses = scores.sigmoid() if predicted else scores.clamp(min=0)
        held = masses.sort(dim=-1, descending=True).values.cumsum(-1)
        last = torch.tensor(self.buckets.counts, device=scores.device) - 1
        return held[:, last] / held[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)

    def _numbers(self, scores: Tensor) -> Tensor:
        """The number of each image's bucket: (batch, patches) -> int64 (batch,)."""
        return _first_covering(self._covered(scores), self.buckets.coverage)

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
    progress: Progress | None = None,
) -> BucketedModel:
    """Let the last selection keep one of a few numbers of patches, which depends on the image.

    An image gets the smallest number whose best patches hold `coverage` of the image's scores: of
    a predictor their probabilities to be kept, of an attention its weights.

    Args:
        model: A network with selections (`select_tokens`). Its weights are shared.
        counts: Numbers of patches, increasing; the largest one bounds the cost of any image.
        coverage: The share of an image's scores, above 0 and at most 1. None: `mean_patches`
            decides it.
        images: (images, channels, height, width), normalized as the model expects: some hundred,
            on which `mean_patches` is met. With `coverage` they are only counted.
        mean_patches: The largest mean number of patches that `images` keep.
        progress: Called with a stage ("score"), the images done, and the images in all.

    Returns:
        A network in the mode of `model`; its `buckets` have the coverage and, given images, their
        share in each bucket. Shapes: (batch, channels, height, width) -> (batch, classes).

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
    found = _buckets(counts, 1.0 if coverage is None else coverage)
    if mean_patches is not None and not found.counts[0] <= mean_patches <= found.counts[-1]:
        raise InputError(
            f"mean_patches = {mean_patches}: give a number from {found.counts[0]} to "
            f"{found.counts[-1]}, the smallest and the largest count"
        )
    result = BucketedModel(lift(model), found)
    if images is None:
        return result
    covered = result.covered(images, progress)
    if mean_patches is not None:
        coverage = _coverage_for(covered, found.counts, mean_patches)
        found = _buckets(counts, coverage)
    shares = {"shares": _shares(covered, found.coverage), "images": len(images)}
    result.buckets = found.model_copy(update=shares)
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


def _first_covering(covered: Tensor, coverage: float) -> Tensor:
    """The number of the first bucket that holds enough, else of the last: int64 (images,)."""
    # Shares increase with the bucket; NaN counts as too little.
    return (~(covered >= coverage)).sum(dim=1).clamp(max=covered.shape[1] - 1)


def _shares(covered: Tensor, coverage: float) -> tuple[float, ...]:
    numbers = _first_covering(covered, coverage)
    found = numbers.bincount(minlength=covered.shape[1])
    return tuple((found.double() / len(covered)).tolist())


def _coverage_for(covered: Tensor, counts: Sequence[int], mean_patches: float) -> float:
    """The largest coverage whose mean number of patches is at most `mean_patches`."""
    patches = torch.tensor(counts, dtype=torch.float64)

    def fits(coverage: float) -> bool:
        return float(patches[_first_covering(covered, coverage)].mean()) <= mean_patches

    if fits(1.0):
        return 1.0
    # The mean changes at the shares that images hold, and is constant up to and at each.
    steps = [0.0, *covered[:, :-1].flatten().clamp(0, 1).unique().tolist()]
    low, high = 0, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(steps[middle]) else (low, middle)
    # Between two of them, so that rounding moves no calibration image.
    below = float(steps[max(0, low - 1)])
    return max(_LEAST_COVERAGE, (float(steps[low]) + below) / 2)
