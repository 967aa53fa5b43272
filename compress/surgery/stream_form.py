"""The form in which readers and writers access some channels of the residual stream.

With unshared masks each sub-layer has channels of its own. It accesses them by index (gather and
scatter), which takes time without computing anything, or by a matrix over the whole stream with
zeros, which costs products. The cheaper form depends on the widths and is chosen for each reader
and writer, by constants that `python -m benchmarks.compression.unshared` measures on ONNX Runtime.
A reader behind a norm has no choice: the statistics run over its channels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    ConstantSpec,
    FfnSpec,
    Indices,
)
from ..network.modules.model import CompactModel, build

# In multiply-adds of one token, measured in ONNX Runtime 1.31 on one AVX-512 core: scattering one
# channel, filling one channel of the stream with zeros before that, and gathering one channel.
SCATTER_MACS = 190
FILL_MACS = 35
GATHER_MACS = 230

_READING = tuple(f"core.{leaf}.weight" for leaf in ("q", "k", "v", "gate", "fc1"))
_WRITING = (
    *("core.out.weight", "core.out.bias", "core.fc2.weight", "core.fc2.bias"),
    *("core.value", "layer_scale"),
)
_STEM_AXES = {"stem.weight": 0, "stem.bias": 0, "prefix": 1, "position": 1}

Form = Literal["index", "dense"]


@dataclass(frozen=True)
class Choice:
    """The form chosen at one site.

    Attributes:
        site: `<branch>.in`, `<branch>.out`, `stem.out` or `head.in`.
        form: "index", or "dense" for a matrix over the whole stream.
        index_macs: The cost of access by index, in multiply-adds of one token.
        dense_macs: The cost of the zeros in the matrix, in multiply-adds of one token.
        why: The reason.
    """

    site: str
    form: Form
    index_macs: int
    dense_macs: int
    why: str


@dataclass(frozen=True)
class StreamForm:
    """A model with each reader and writer in its cheaper form, and the choices that were made."""

    model: CompactModel
    choices: tuple[Choice, ...]


def choose_stream_form(model: CompactModel) -> StreamForm:
    """Fill matrices with zeros where that is cheaper than access by index.

    The result computes the same. A model without index lists is returned unchanged.
    """
    architecture, embed = model.architecture, model.architecture.embed
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    choices: list[Choice] = []
    steps = []
    for number, step in enumerate(architecture.steps):
        row = []
        for position, branch in enumerate(step):
            prefix, update = f"steps.{number}.{position}.", dict[str, object]()
            if branch.reads is not None and not isinstance(branch.core, ConstantSpec):
                choices.append(_reading(branch, branch.reads, embed))
                if choices[-1].form == "dense":
                    for leaf in _READING:
                        _widen(state, prefix + leaf, branch.reads, embed, 1)
                    update["reads"] = None
            if branch.writes is not None:
                normed = branch.post_norm is not None
                fan_in = _fan_in(branch)
                choices.append(_writing(f"{branch.name}.out", fan_in, branch.writes, embed, normed))
                if choices[-1].form == "dense":
                    for leaf in _WRITING:
                        _widen(state, prefix + leaf, branch.writes, embed, 0)
                    update["writes"] = None
            row.append(branch.model_copy(update=update))
        steps.append(tuple(row))
    outer = _outer(architecture, state, choices)
    if all(choice.form == "index" for choice in choices):
        return StreamForm(model, tuple(choices))
    changed = architecture.model_copy(update={"steps": tuple(steps), **outer})
    chosen = build(Architecture.model_validate(changed.model_dump(by_alias=True)), state)
    return StreamForm(chosen.train(model.training), tuple(choices))


def _outer(
    architecture: Architecture, state: dict[str, Tensor], choices: list[Choice]
) -> dict[str, object]:
    outer: dict[str, object] = {}
    embed = architecture.embed
    if architecture.stem_writes is not None:
        fan_in = state["stem.weight"][0].numel()
        normed = architecture.stem_norm is not None or architecture.patch_norm is not None
        choices.append(_writing("stem.out", fan_in, architecture.stem_writes, embed, normed))
        if choices[-1].form == "dense":
            for name, axis in _STEM_AXES.items():
                _widen(state, name, architecture.stem_writes, embed, axis)
            outer["stem_writes"] = None
    if architecture.head_reads is not None:
        # One pooled vector, for which a gather costs nothing.
        choices.append(Choice("head.in", "index", 0, 0, "once an image, or behind a norm"))
    return outer


def _reading(branch: BranchSpec, reads: Indices, embed: int) -> Choice:
    index, dense = GATHER_MACS * len(reads), _fan_out(branch) * (embed - len(reads))
    return _cheaper(f"{branch.name}.in", index, dense, branch.norm is not None)


def _writing(site: str, fan_in: int, writes: Indices, embed: int, normed: bool) -> Choice:
    index, dense = SCATTER_MACS * len(writes) + FILL_MACS * embed, fan_in * (embed - len(writes))
    return _cheaper(site, index, dense, normed)


def _cheaper(site: str, index: int, dense: int, normed: bool) -> Choice:
    if normed:
        why = "the norm's statistics run over these channels alone"
        return Choice(site, "index", index, dense, why)
    form: Form = "dense" if dense <= index else "index"
    return Choice(site, form, index, dense, "cheaper")


def _fan_out(branch: BranchSpec) -> int:
    core = branch.core
    if isinstance(core, AttentionSpec):
        keys = core.kv_heads * (core.parts * core.qk + core.v)
        return core.heads * core.parts * core.qk + keys + (core.heads * core.v if core.gated else 0)
    return core.hidden * (2 if core.gated else 1) if isinstance(core, FfnSpec) else 0


def _fan_in(branch: BranchSpec) -> int:
    core = branch.core
    if isinstance(core, AttentionSpec):
        return core.heads * core.v
    return core.hidden if isinstance(core, FfnSpec) else 0


def _widen(state: dict[str, Tensor], name: str, indices: Indices, width: int, axis: int) -> None:
    """Scatter a tensor, if there is one, along an axis over the whole stream, zero elsewhere."""
    if name not in state:
        return
    tensor = state[name]
    shape = list(tensor.shape)
    shape[axis] = width
    state[name] = tensor.new_zeros(shape).index_copy(
        axis, torch.tensor(indices, device=tensor.device), tensor
    )
