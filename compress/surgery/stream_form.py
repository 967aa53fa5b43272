"""How a reader or writer of some channels meets the residual stream: by index (gather, scatter), or
as a matrix over the whole stream with zeros.

Unshared masks leave each sub-layer channels of its own. Moving them costs time without computing
anything; zeros in the matrix cost products. Which is cheaper depends on the widths, so it is
decided for each reader and writer, by constants that `python -m benchmarks.unshared` measures on
ONNX Runtime. A reader behind a norm has no choice: the statistics run over its channels alone.
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

# In multiply-adds of one token, measured in ONNX Runtime 1.31 on one AVX-512 core
# (benchmarks/unshared.py): scattering one channel, filling one channel of the stream with zeros
# before that, and gathering one channel.
SCATTER_MACS = 190
FILL_MACS = 35
GATHER_MACS = 230

Form = Literal["index", "dense"]


@dataclass(frozen=True)
class Choice:
    """What was chosen at a site, `<branch>.in` or `.out`, `stem.out` or `head.in`, and what both
    would cost in multiply-adds of one token.
    """

    site: str
    form: Form
    index_macs: int
    dense_macs: int
    why: str


@dataclass(frozen=True)
class StreamForm:
    """A model that computes the same, each reader and writer in its cheaper form, and what was
    chosen where there was anything to choose.
    """

    model: CompactModel
    choices: tuple[Choice, ...]


def choose_stream_form(model: CompactModel) -> StreamForm:
    """Fill up with zeros those matrices for which that is cheaper than moving channels by index.
    Exact; without index lists nothing changes.
    """
    architecture = model.architecture
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    choices: list[Choice] = []
    steps = []
    for number, step in enumerate(architecture.steps):
        row = []
        for position, branch in enumerate(step):
            prefix, update = f"steps.{number}.{position}.", dict[str, object]()
            if branch.reads is not None and not isinstance(branch.core, ConstantSpec):
                choice = _reading(
                    f"{branch.name}.in",
                    _fan_out(branch),
                    branch.reads,
                    architecture.embed,
                    branch.norm is not None,
                )
                choices.append(choice)
                if choice.form == "dense":
                    for leaf in ("q", "k", "v", "gate", "fc1"):
                        _widen(
                            state,
                            f"{prefix}core.{leaf}.weight",
                            branch.reads,
                            architecture.embed,
                            1,
                        )
                    update["reads"] = None
            if branch.writes is not None:
                choice = _writing(
                    f"{branch.name}.out",
                    _fan_in(branch),
                    branch.writes,
                    architecture.embed,
                    branch.post_norm is not None,
                )
                choices.append(choice)
                if choice.form == "dense":
                    for leaf in (
                        "core.out.weight",
                        "core.out.bias",
                        "core.fc2.weight",
                        "core.fc2.bias",
                        "core.value",
                        "layer_scale",
                    ):
                        _widen(state, prefix + leaf, branch.writes, architecture.embed, 0)
                    update["writes"] = None
            row.append(branch.model_copy(update=update))
        steps.append(tuple(row))
    outer = _outer(architecture, state, choices)
    if all(choice.form == "index" for choice in choices):
        return StreamForm(model, tuple(choices))
    data = architecture.model_copy(update={"steps": tuple(steps), **outer}).model_dump(
        by_alias=True
    )
    chosen = build(Architecture.model_validate(data), state).train(model.training)
    return StreamForm(chosen, tuple(choices))


def _outer(
    architecture: Architecture, state: dict[str, Tensor], choices: list[Choice]
) -> dict[str, object]:
    outer: dict[str, object] = {}
    embed = architecture.embed
    if architecture.stem_writes is not None:
        inner = state["stem.weight"][0].numel()
        normed = architecture.stem_norm is not None or architecture.patch_norm is not None
        choices.append(_writing("stem.out", inner, architecture.stem_writes, embed, normed))
        if choices[-1].form == "dense":
            for name, axis in (
                ("stem.weight", 0),
                ("stem.bias", 0),
                ("prefix", 1),
                ("position", 1),
            ):
                _widen(state, name, architecture.stem_writes, embed, axis)
            outer["stem_writes"] = None
    if architecture.head_reads is not None:
        # One pooled vector, of which a gather is nothing.
        choices.append(Choice("head.in", "index", 0, 0, "once an image, or behind a norm"))
    return outer


def _reading(site: str, fan_out: int, reads: Indices, embed: int, normed: bool) -> Choice:
    index, dense = GATHER_MACS * len(reads), fan_out * (embed - len(reads))
    if normed:
        return Choice(
            site, "index", index, dense, "the norm's statistics run over these channels alone"
        )
    return _cheaper(site, index, dense)


def _writing(site: str, fan_in: int, writes: Indices, embed: int, normed: bool) -> Choice:
    index, dense = SCATTER_MACS * len(writes) + FILL_MACS * embed, fan_in * (embed - len(writes))
    if normed:
        return Choice(
            site, "index", index, dense, "the norm's statistics run over these channels alone"
        )
    return _cheaper(site, index, dense)


def _cheaper(site: str, index: int, dense: int) -> Choice:
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
    """Spread a tensor over the whole stream, zero where it says nothing."""
    if name not in state:
        return
    tensor = state[name]
    shape = list(tensor.shape)
    shape[axis] = width
    state[name] = tensor.new_zeros(shape).index_copy(
        axis, torch.tensor(indices, device=tensor.device), tensor
    )
