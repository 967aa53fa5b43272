"""A cut of the training graph: the model, its gates and the state of its optimizer.

Units that will not return are removed during mask learning, so that later steps are cheaper. The
function of the network does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..masks.gates import Gates
from ..network.modules.model import CompactModel, build
from ..surgery.compactor import cut, cut_names
from ..surgery.plan import Plan, plan

Moments = dict[str, Any]


@dataclass(frozen=True)
class SmallerGraph:
    """A training graph after a cut.

    Attributes:
        model: The smaller model.
        gates: Its gates, with the scores of the units that stay.
        groups: For each group of `gates`, the number of its group before the cut.
        keep: For each group of `gates`, the indices that stay, in their new order.
        moments: The optimizer state of each parameter that was cut, by name.
        score_moments: The optimizer state of each group's scores.
    """

    model: CompactModel
    gates: Gates
    groups: list[int]
    keep: list[Tensor]
    moments: dict[str, Moments]
    score_moments: list[Moments]

    def restore_moments(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Copy the state of the old optimizer to a new one over `model` and the gates."""
        for name, parameter in model.named_parameters():
            if name in self.moments:
                optimizer.state[parameter] = _on_device(self.moments[name], parameter.device)
        for scores, entry in zip(self.gates.scores, self.score_moments, strict=True):
            if entry:
                optimizer.state[scores] = _on_device(entry, scores.device)


def shrink_graph(
    model: CompactModel, gates: Gates, keep: Sequence[Tensor], optimizer: Optimizer | None
) -> SmallerGraph:
    """Remove units from a training graph; the work is done on the CPU.

    Args:
        model: The network in training.
        gates: Its gates.
        keep: Booleans of the units that stay, one tensor on the CPU for each group of `gates`.
        optimizer: The optimizer over the model and the scores, if there is one.

    Returns:
        The smaller graph on the CPU, with weights, scores and moments of its own.
    """
    surgery = plan(model.architecture, gates.mask(keep))
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    smaller = build(surgery.architecture, cut(surgery, state))
    new_gates = Gates(smaller.architecture, gates.sharing, gates.fixed, gates.tokens)
    groups = _old_groups(surgery, gates, new_gates)
    indices = _indices(surgery, new_gates, [keep[number] for number in groups])
    with torch.no_grad():
        for new, number, index in zip(new_gates.scores, groups, indices, strict=True):
            new.copy_(gates.scores[number].cpu()[index])
    scores = [gates.scores[number] for number in groups]
    return SmallerGraph(
        smaller,
        new_gates,
        groups,
        indices,
        _cut_moments(surgery, _moments(model, optimizer)),
        _score_moments(scores, optimizer, indices),
    )


def _old_groups(surgery: Plan, gates: Gates, new: Gates) -> list[int]:
    """For each group of the new gates, the number of its group in the old ones.

    Groups of sub-layers that were removed as a whole are not in the new graph. Where such a
    sub-layer stood, tokens are named by another site, so their groups are found by the reader.
    """
    widths, tokens = gates.split(range(len(gates.groups)))
    numbers = {
        (gates.groups[number].dimension, gates.groups[number].site): number for number in widths
    }
    readers = dict(zip((place.reader for place in gates.token_places), tokens, strict=True))
    old_steps = [*(row[0].step for row in surgery.branches), len(surgery.source.steps)]
    return [
        *(numbers[group.dimension, group.site] for group in new.split(new.groups)[0]),
        *(readers[old_steps[place.reader]] for place in new.token_places),
    ]


def _indices(surgery: Plan, gates: Gates, keep: Sequence[Tensor]) -> list[Tensor]:
    """For each new group, the indices in its old group: patches may have another order now."""
    places = surgery.architecture.places_in(surgery.source)
    assert places is not None, "a cut embeds no other patches than before"
    prefix = surgery.source.prefix
    patches = torch.tensor(places[prefix:]) - prefix
    widths, tokens = gates.split(gates.groups)
    return [
        *(torch.nonzero(kept).flatten() for kept, _ in zip(keep, widths, strict=False)),
        *(patches[: group.size] for group in tokens),
    ]


def _moments(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Moments]:
    if optimizer is None:
        return {}
    return {
        name: optimizer.state[parameter]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def _cut_moments(surgery: Plan, moments: dict[str, Moments]) -> dict[str, Moments]:
    """The optimizer state of each parameter, cut as the parameter is.

    Tensors of the parameter's shape are sliced; counters and flags are copied.
    """
    keys = {key for entry in moments.values() for key in entry}
    sliced = {
        key: cut(
            surgery,
            {
                name: entry[key].cpu()
                for name, entry in moments.items()
                if _is_moment(entry.get(key))
            },
        )
        for key in keys
    }

    def cut_value(key: str, name: str, value: Any) -> Any:
        if _is_moment(value):
            return sliced[key][name]
        return value.clone() if isinstance(value, Tensor) else value

    return {
        new: {key: cut_value(key, new, value) for key, value in moments[old].items()}
        for new, old in cut_names(surgery, moments).items()
    }


def _score_moments(
    scores: Sequence[Tensor], optimizer: Optimizer | None, indices: Sequence[Tensor]
) -> list[Moments]:
    if optimizer is None:
        return [{} for _ in scores]
    return [
        {
            name: value.cpu()[index].clone() if _is_moment(value) else value
            for name, value in optimizer.state.get(old, {}).items()
        }
        for old, index in zip(scores, indices, strict=True)
    ]


def _on_device(entry: Moments, device: torch.device) -> Moments:
    # Counters of steps stay where the optimizer keeps them.
    return {name: value.to(device) if _is_moment(value) else value for name, value in entry.items()}


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
