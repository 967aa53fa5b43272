"""Fitting the entries of a checkpoint to a model: prefixes, bookkeeping entries, and the head."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from .checkpoint_file import Entry
from .checkpoint_folding import fold_reparametrized, plain_name

NEW_HEAD = "`model.new_head = true` (`vitrim train --new-head`) starts a new one"
# Modules that wrap others without a computation of their own, wherever they stand in a name.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_forward_module",
    "_original_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
# Parts of a name that mean averaged weights, which are preferred to others.
_AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|shadow|teacher|momentum)(_|$)")
# Counters of averaging, of profilers and of training loops: one number each.
_COUNTERS = {
    "n_averaged",
    "num_averaged",
    "num_updates",
    "updates",
    "decay",
    "step",
    "global_step",
    "epoch",
    "total_ops",
    "total_params",
}
# What only masked image modelling reads, and the networks that pretraining adds.
_PRETRAINING = ("mask_token",)
_PRETRAINING_NETWORKS = ("decoder", "predictor", "projector", "projection")
_SHOWN = 4
# Names of other libraries: (part of a name, library).
_LIBRARIES = (
    ("conv_proj", "torchvision"),
    ("encoder.layer.0.attention.attention", "transformers"),
    ("attention.attention.query", "transformers"),
    ("self_attn.q_proj", "transformers"),
)


@dataclass(frozen=True)
class Expected:
    """The entries that a model needs.

    Attributes:
        name: The name of the model, for messages.
        state: Its state dict; the values are those of a new model.
        classifiers: The names of its classifiers, also of one that it was built without.
    """

    name: str
    state: Mapping[str, Tensor]
    classifiers: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Expected:
        """Read a timm model."""
        found = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
        names = (found,) if isinstance(found, str) else tuple(found)
        return cls(name, model.state_dict(), names)

    def is_head(self, key: str) -> bool:
        """Whether an entry belongs to a classifier."""
        return any(key.startswith(f"{name}.") for name in self.classifiers)


def fitted_state(
    entries: Sequence[Entry], expected: Expected, path: Path, *, new_head: bool = False
) -> dict[str, Tensor]:
    """Return the state dict of a model from the entries of a checkpoint.

    Args:
        entries: The contents of the checkpoint. Prefixes of wrappers and of dictionaries are
            removed in any order and depth; averaged weights are preferred; masks of
            `torch.nn.utils.prune`, weight norms and spectral norms are folded.
        expected: What the model needs.
        path: The checkpoint, for messages.
        new_head: Keep the classifier of the new model.

    Returns:
        A tensor for each entry that the model needs.

    Raises:
        InputError: An entry is missing, unknown, ambiguous, of another shape or type, or not
            finite; the message names the file and the entry.
    """
    state = _selected(entries, expected, path, new_head=new_head)
    if new_head or not any(map(expected.is_head, expected.state)):
        state = {key: tensor for key, tensor in state.items() if not expected.is_head(key)}
        state |= {key: each for key, each in expected.state.items() if expected.is_head(key)}
    _require_head(state, expected, entries, path)
    way_out = "name the model that was saved (model.name, model.overrides)"
    for key, wanted in expected.state.items():
        if key not in state:
            raise InputError(
                f"{path}: it has no entry {key!r}, which {expected.name} needs; its entries begin "
                f"with {beginnings(entries)}; {_library(entries) or way_out}"
            )
        if state[key].shape != wanted.shape:
            found, shape = list(state[key].shape), list(wanted.shape)
            raise InputError(
                f"{path}: {key} has shape {found}, {expected.name} needs {shape}; {way_out}"
            )
    for key, tensor in state.items():
        if key not in expected.state:
            raise InputError(f"{path}: its entry {key!r} is not part of {expected.name}; {way_out}")
        _require_numbers(key, tensor, expected.state[key], path)
    return state


def head_classes(entries: Sequence[Entry], expected: Expected, path: Path) -> int | None:
    """The number of classes of a checkpoint's head; None if it has none."""
    state = _selected(entries, expected, path)
    for name in expected.classifiers:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in state and state[key].ndim:
                return int(state[key].shape[0])
    return None


def beginnings(entries: Sequence[Entry]) -> str:
    """What the names of most entries begin with, for messages: 'a.b', 'a.c' and 3 others."""
    parts = [entry.parts for entry in entries]
    depth = 0
    while all(len(each) > depth + 1 and each[depth] == parts[0][depth] for each in parts):
        depth += 1
    counts = Counter(".".join(each[: depth + 1]) for each in parts)
    shown = ", ".join(repr(name) for name, _ in counts.most_common(_SHOWN))
    rest = len(counts) - _SHOWN
    return f"{shown} and {rest} others" if rest > 0 else shown


def _selected(
    entries: Sequence[Entry], expected: Expected, path: Path, *, new_head: bool = False
) -> dict[str, Tensor]:
    """The entries of one network by the model's names, and those that the model does not have."""
    prefix = _prefix(entries, expected, path)
    inside = [entry for entry in entries if entry.parts[: len(prefix)] == prefix]
    names: dict[str, Entry] = {}
    for entry in inside:
        name = _tail(entry.parts[len(prefix) :], expected.state)
        known = names.setdefault(name, entry)
        if name in expected.state and not _is_same(known.tensor, entry.tensor):
            raise InputError(
                f"{path}: both {'.'.join(known.parts)!r} and {'.'.join(entry.parts)!r} are "
                f"{name!r} of {expected.name}; save one state_dict()"
            )
    needed = {name for name in names if plain_name(name, expected.state) in expected.state}
    places = {names[name].place for name in needed}
    # Where the names themselves are nested dictionaries, every place is part of the network.
    nested = any(len(place) > len(prefix) for place in places)
    state = {
        name: entry.tensor
        for name, entry in names.items()
        if (nested or entry.place in places) and not _is_left_out(name, entry, expected, new_head)
    }
    try:
        return fold_reparametrized(state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _is_left_out(name: str, entry: Entry, expected: Expected, new_head: bool) -> bool:
    """Whether an entry has no meaning for a model that does not have it."""
    if name in expected.state:
        return False
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    return (
        (last in _COUNTERS and entry.tensor.numel() == 1)
        or first in _PRETRAINING
        or (new_head and first.startswith(_PRETRAINING_NETWORKS))
    )


def _prefix(entries: Sequence[Entry], expected: Expected, path: Path) -> tuple[str, ...]:
    """The keys and parts of names that stand before the model's own names."""
    fits: dict[tuple[str, ...], dict[str, Tensor]] = defaultdict(dict)
    for entry in entries:
        # The longest name that the model has; of equal ones, that with the longest prefix.
        found = None
        for start in range(len(entry.parts)):
            name = plain_name(_tail(entry.parts[start:], expected.state), expected.state)
            if name in expected.state and (found is None or name == found[1]):
                found = start, name
        if found is not None and not expected.is_head(found[1]):
            fits[entry.parts[: found[0]]][found[1]] = entry.tensor
    if not fits:
        raise InputError(
            f"{path}: none of its entries is named as in {expected.name}; its entries begin with "
            f"{beginnings(entries)}; {_library(entries) or 'name the model that was saved'}"
        )

    def fit(prefix: tuple[str, ...]) -> tuple[int, int]:
        tensors = fits[prefix]
        same = sum(each.shape == expected.state[name].shape for name, each in tensors.items())
        return same, len(tensors)

    best = max(map(fit, fits))
    first = [prefix for prefix in fits if fit(prefix) == best]
    averaged = [prefix for prefix in first if any(map(_AVERAGED.search, prefix))]
    candidates = averaged or first
    chosen = candidates[0]
    for other in candidates[1:]:
        if not all(
            _is_same(each, fits[other].get(name, each)) for name, each in fits[chosen].items()
        ):
            raise InputError(
                f"{path}: two networks in it fit {expected.name}, {'.'.join(chosen) or '(top)'!r} "
                f"and {'.'.join(other) or '(top)'!r}; save the state_dict() of one"
            )
    return chosen


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or ("meta" not in (one.device.type, other.device.type) and one.equal(other))


def _tail(parts: Sequence[str], names: Collection[str]) -> str:
    """A name without the parts that wrappers add."""
    whole = ".".join(parts)
    if whole in names:
        return whole
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _library(entries: Sequence[Entry]) -> str | None:
    """What to do with the names of another library; None where they are not recognised."""
    names = [".".join(entry.parts) for entry in entries]
    for part, library in _LIBRARIES:
        if any(part in name for name in names):
            return (
                f"these are names of {library}: build the model with {library}, load the file, and "
                "save it with vitrim.save(model, FOLDER)"
            )
    return None


def _require_head(
    state: Mapping[str, Tensor], expected: Expected, entries: Sequence[Entry], path: Path
) -> None:
    for key, wanted in expected.state.items():
        if not expected.is_head(key):
            continue
        if key not in state:
            raise InputError(
                f"{path}: it has no head ({key!r} is missing, its entries begin with "
                f"{beginnings(entries)}); {NEW_HEAD}"
            )
        found = state[key].shape
        if found[:1] != wanted.shape[:1] and found[1:] == wanted.shape[1:]:
            raise InputError(
                f"{path}: its head has {found[0]} classes, and {wanted.shape[0]} are needed; "
                f"{NEW_HEAD}"
            )


def _require_numbers(key: str, tensor: Tensor, wanted: Tensor, path: Path) -> None:
    if tensor.device.type == "meta":
        raise InputError(f"{path}: {key} has no values (device meta); save a model with weights")
    if not wanted.is_floating_point():
        return
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"{path}: {key} contains numbers of type {kind} where floating-point numbers are "
            "needed; save the model before quantization"
        )
    if not bool(torch.isfinite(tensor.float()).all()):
        raise InputError(f"{path}: {key} contains NaN or infinity")
