"""Algorithm 1 of Patch Slimming: counts from a tolerance, with each block refitted on its own.

From the last block down, block l starts with the patches that block l + 1 keeps. While the output
of block l + 1 on its kept patches differs from that of the original network by more than the
tolerance, the patches of highest impact are added and block l is trained for some epochs, from the
original input of the block. Inputs and targets are computed once for a block; only two blocks run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..masks.groups import token_sites
from ..masks.mask import StructuredMask
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from ..oneshot.saved_state import SavedState, copy_checked, damaged, fingerprint_of
from ..oneshot.sensitivity import features
from ..surgery.compactor import compact
from .attention_scores import top_tokens
from .choose import TokenChoice, as_choice, token_entries
from .counts import attention_steps, whole_counts
from .impact import impacts
from .streaming import DenseStreams, Progress, batches, silent, working_copy

_BATCH = 32


@dataclass(frozen=True)
class SlimmingOptions:
    """How `slim_patches` searches.

    Attributes:
        tolerance: Largest relative squared error ||Z^ - Z||^2 / ||Z||^2 of the next block. The
            source uses 0.01 and 0.02.
        step: Patches that are added at once, r' of the source.
        epochs: Passes over the images for each step.
        learning_rate: Of Adam; the source states none.
        seed: Of the order of the images.
    """

    tolerance: float = 0.02
    step: int = 10
    epochs: int = 3
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise InputError(
                f"tolerance = {self.tolerance:g}: give a relative error between 0 and 1, e.g. 0.02"
            )
        if self.step < 1 or self.epochs < 0 or not self.learning_rate > 0:
            raise InputError(
                "slimming: give a step and a learning rate above 0, and 0 or more epochs"
            )


@dataclass(frozen=True)
class Slimmed:
    """The result of `slim_patches`.

    Attributes:
        model: The network of full size, with the refitted blocks.
        choice: The tokens that it keeps, and the impact of each where it was computed.
        errors: The relative error after each block that was considered, by the site of its
            attention: of the next block, or of the features for the last.
    """

    model: CompactModel
    choice: TokenChoice
    errors: dict[str, float]

    def compact(self) -> CompactModel:
        """The network that computes the kept tokens only."""
        return compact(self.model, self.choice.mask)


def slim_patches(
    model: nn.Module,
    images: Tensor,
    options: SlimmingOptions | None = None,
    *,
    progress: Progress | None = None,
    resume: Path | str | None = None,
) -> Slimmed:
    """Choose patches and their numbers by a tolerance, and refit each block from its inputs.

    Args:
        model: A supported Vision Transformer, or a `CompactModel`; it is not changed.
        images: Unlabeled images, (images, channels, height, width), normalized as the model
            expects; some hundred.
        options: See `SlimmingOptions`. None: tolerance 0.02, 10 patches a step, 3 epochs each.
        progress: Called with "slim", the blocks done, and the blocks in all. None: it is not.
        resume: A folder that receives each finished block, and from which an interrupted search
            continues with the same result. None: nothing is saved.

    Returns:
        The refitted network, the tokens that it keeps, and the errors. All weights should be
        fine-tuned afterwards, as in the source.

    Raises:
        InputError: The images do not fit, no token can leave, or `resume` has the state of another
            search.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Tang et al. 2022, "Patch Slimming for Efficient Vision Transformers", Algorithm 1.
    """
    options = SlimmingOptions() if options is None else options
    source = working_copy(model)
    batches(source, images)
    mixing = attention_steps(source.architecture)
    state = SavedState()
    if resume is not None:
        state = SavedState.open(resume, fingerprint_of(source, images, asdict(options).items()))
    search = _Search(source, images, options)
    for done, place in enumerate(reversed(range(len(mixing)))):
        if not search.restore(place, state):
            search.block(place)
            search.save(place, state)
        (progress or silent)("slim", done + 1, len(mixing))
    note = {"tolerance": f"{options.tolerance:g}", "seed": str(options.seed)}
    choice = as_choice(
        source.architecture, search.sets, search.scores, "patch-slimming", len(images), note
    )
    names = list(token_sites(source.architecture))
    errors = {names[number + 1]: error for number, error in sorted(search.errors.items())}
    return Slimmed(source, choice, errors)


def _part(place: int) -> str:
    """The name of the file of a block."""
    return f"slim-{place}"


class _Search:
    """The sets chosen so far, from the last block down, and the network with refitted blocks."""

    def __init__(self, source: CompactModel, images: Tensor, options: SlimmingOptions) -> None:
        architecture = source.architecture
        self.source, self.options = source, options
        self.original = copy.deepcopy(source)
        self.mixing = attention_steps(architecture)
        self.sizes = list(token_sites(architecture).values())
        self.streams = DenseStreams(self.original, images, self.mixing)
        self.sets = [torch.ones(size, dtype=torch.bool) for size in self.sizes]
        self.scores: dict[int, Tensor] = {}
        self.errors: dict[int, float] = {}
        self.generator = torch.Generator().manual_seed(options.seed)

    def block(self, place: int) -> None:
        """Choose the tokens of one block: an attention, and what follows until the next one."""
        architecture, number = self.source.architecture, self.mixing[place]
        count = whole_counts(architecture)[number + 1]
        if count <= architecture.prefix:
            # The last attention of a network whose head reads prefix tokens only.
            self._keep(place, torch.arange(self.sizes[number + 1]) < count)
            return
        ends = [*self.mixing, len(self.source.steps), len(self.source.steps)]
        last = place == len(self.mixing) - 1
        after = self.sets[ends[place + 1] + 1] if not last else torch.zeros(0, dtype=torch.bool)
        # The blocks before this one are still the original ones.
        score = impacts(self.source, self.streams, self.sets, [number], number)[number]
        self.scores[number] = score
        task = _Task(self, number, ends[place + 1], ends[place + 2])
        before = copy.deepcopy(self.source.steps[number : ends[place + 1]].state_dict())
        added = int(after.sum()) if not last else architecture.prefix + 1
        count, whole = max(added, architecture.prefix + 1), self.sizes[number + 1]
        while True:
            among = torch.ones(whole, dtype=torch.bool)
            chosen = top_tokens(architecture, score, among, count, after)
            self._keep(place, chosen)
            if count >= whole:
                # Nothing leaves here, so the block needs no refit.
                self.source.steps[number : ends[place + 1]].load_state_dict(before)
                self.errors[number] = task.error(task.network())
                return
            self.errors[number] = task.refit()
            if self.errors[number] <= self.options.tolerance:
                return
            count = min(whole, count + self.options.step)

    def save(self, place: int, state: SavedState) -> None:
        """Save what `block` chose and trained."""
        number = self.mixing[place]
        tensors = {
            "keep": self.sets[number + 1].to(torch.uint8),
            "generator": self.generator.get_state(),
            **{f"steps.{name}": tensor for name, tensor in self._weights(place).items()},
        }
        if number in self.scores:
            tensors["score"] = self.scores[number]
        state.save(_part(place), {"error": self.errors.get(number)}, tensors)

    def restore(self, place: int, state: SavedState) -> bool:
        """Take a block from the state; whether it was there."""
        found = state.load(_part(place))
        if found is None:
            return False
        record, tensors = found
        number, path = self.mixing[place], state.path(_part(place))
        keep, generator = tensors.get("keep"), tensors.get("generator")
        if keep is None or generator is None or keep.shape != self.sets[number + 1].shape:
            raise damaged(path, "the kept tokens")
        copy_checked(
            path, {f"steps.{name}": each for name, each in self._weights(place).items()}, tensors
        )
        self._keep(place, keep.bool())
        self.generator.set_state(generator)
        if "score" in tensors:
            self.scores[number] = tensors["score"]
        if record["error"] is not None:
            self.errors[number] = float(record["error"])
        return True

    def _weights(self, place: int) -> dict[str, Tensor]:
        """The parameters that `block` may train."""
        ends = [*self.mixing, len(self.source.steps)]
        return dict(self.source.steps[self.mixing[place] : ends[place + 1]].named_parameters())

    def _keep(self, place: int, chosen: Tensor) -> None:
        ends = [*self.mixing[1:], len(self.source.steps)]
        for site in range(self.mixing[place] + 1, ends[place] + 1):
            self.sets[site] = chosen[: self.sizes[site]]


class _Task:
    """A block to refit: its inputs, and what the next block returned on them originally."""

    def __init__(self, search: _Search, start: int, middle: int, end: int) -> None:
        self.search, self.start, self.middle, self.end = search, start, middle, end
        # Without a next block the features of the head are compared.
        self.headed = middle == len(search.source.steps)
        self.inputs, self.targets = [], list[Tensor]()
        keep = None if self.headed else search.sets[end]
        for batch in range(len(search.streams)):
            self.inputs.append(search.streams.before(start, batch))
            wanted = search.streams.before(end, batch)
            with torch.no_grad():
                self.targets.append(
                    features(search.original, wanted) if keep is None else wanted[:, keep]
                )
        self.size = sum(float(target.square().sum()) for target in self.targets)

    def network(self) -> CompactModel:
        """The network with the current sets; patches of one depth keep their order."""
        search = self.search
        entries = token_entries(search.source.architecture, search.sets)
        return compact(search.source, StructuredMask(entries, scale="original"), proof=False)

    def refit(self) -> float:
        """Train the block until its epochs are over, and return the relative error.

        A block that is within the tolerance is not trained further.
        """
        options, network = self.search.options, self.network().eval().requires_grad_(False)
        error = self.error(network)
        steps = self._steps(network)[: self.middle - self.start]
        parameters = [each for step in steps for branch in step for each in branch.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
        run = self._runner(network)
        inputs, targets = torch.cat(self.inputs), torch.cat(self.targets)
        mean = self.size / targets.numel()
        for _ in range(options.epochs if error > options.tolerance else 0):
            rows = torch.randperm(len(inputs), generator=self.search.generator)
            for part in rows.split(_BATCH):
                with torch.enable_grad():
                    loss = (run(inputs[part]) - targets[part]).square().mean() / max(mean, 1e-30)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self._write_back(network)
        return self.error(network)

    def error(self, network: CompactModel) -> float:
        """||Z^ - Z||^2 / ||Z||^2 over all images."""
        run, total = self._runner(network), 0.0
        with torch.no_grad():
            for x, wanted in zip(self.inputs, self.targets, strict=True):
                total += float((run(x) - wanted).square().sum())
        return total / max(self.size, 1e-30)

    def _steps(self, network: CompactModel) -> list[Sequence[Branch]]:
        return [cast("Sequence[Branch]", step) for step in network.steps][self.start : self.end]

    def _runner(self, network: CompactModel) -> Callable[[Tensor], Tensor]:
        """The function of the inputs that is compared with the targets."""
        search, steps = self.search, self._steps(network)
        counts = network.architecture.step_tokens()[self.start : self.end]
        # For each token of the network's stream, its place in that of the source.
        order = torch.tensor(network.architecture.places_in(search.source.architecture))
        # The tokens that the network keeps, back in the places of the source.
        keep = order[: counts[-1]].argsort()

        def run(x: Tensor) -> Tensor:
            x = x[:, order[: x.shape[1]]]
            for step, count in zip(steps, counts, strict=True):
                x = network.run_step(step, x, count)
            return features(network, x) if self.headed else x[:, keep]

        return run

    def _write_back(self, network: CompactModel) -> None:
        source = self._steps(self.search.source)[: self.middle - self.start]
        for old, new in zip(source, self._steps(network), strict=False):
            for target, branch in zip(old, new, strict=True):
                found = dict(branch.named_parameters())
                with torch.no_grad():
                    for name, parameter in target.named_parameters():
                        parameter.copy_(found[name])
