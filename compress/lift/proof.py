"""Proof of a lifted model: it is run beside its source on noise and compared at every sub-layer.

Weights and types do not show everything that a model computes: hooks, replaced methods, attributes
that another tool changed. A difference is refused with the path of the first sub-layer where it
occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import Architecture
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel, build
from .equivalence import TOLERANCE
from .hooks import nearest_change
from .registry import Found, Piece, type_name
from .source_state import prepared

# Relative to the largest value. Rounding in float32 may exceed it, which float64 then shows.
_CLOSE = 2e-5
# The source gets two images, of which the first is compared: one that mixes images differs.
_IMAGES = 2
# Values below it are zero.
_ZERO = 1e-12


@dataclass(frozen=True)
class _Checkpoint:
    """A value that source and lifted model must share.

    Attributes:
        path: The part of the source that computed it since the checkpoint before. Empty: none of
            its sub-layers did.
        part: The part in words, for an empty path.
        expected: The value in the source.
        found: The value in the lifted model.
    """

    path: str
    part: str
    expected: Tensor
    found: Tensor


@dataclass(frozen=True)
class _Source:
    """A prepared model, the modules that were converted, and its classifier if it is known.

    Attributes:
        model: The model.
        modules: The modules that were converted.
        classifier: Its classifier, if it is known.
        pooled: Whether its output is one vector per image, instead of all tokens.
    """

    model: nn.Module
    modules: list[Found]
    classifier: nn.Module | None
    pooled: bool

    @property
    def blocks(self) -> list[str]:
        """The paths of the blocks."""
        return [entry.path for entry in self.modules if entry.kind == "block"]


def prove(model: nn.Module, piece: Piece[Architecture], modules: list[Found]) -> str | None:
    """Run a prepared model and its conversion on noise images and compare them.

    The model runs as it is set up, and once more on one image with the other setting of timm's
    `fused_attn` flags.

    Args:
        model: The source, inside of `prepared`.
        piece: Its architecture and tensors.
        modules: The modules that were converted.

    Returns:
        A note if the other setting of `fused_attn` computes something else; None otherwise.

    Raises:
        UnsupportedModel: The outputs differ, or the model does not run; the message names the first
            sub-layer that differs.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(
        _IMAGES, *piece.spec.image, generator=generator, dtype=torch.float32, device="cpu"
    )
    pooled = piece.spec.pool.kind != "none"
    source = _Source(model, modules, _classifier(model, piece), pooled)
    checkpoints = list(_checkpoints(source, piece, noise))
    if max(map(_difference, checkpoints)) > _CLOSE:
        exact = _in_float64(source, piece, noise)
        # A module may cast to float32, or the device lack float64.
        close = TOLERANCE if exact is None else _CLOSE
        wrong = _first_wrong(exact or checkpoints, close)
        if wrong is not None:
            raise _refusal(source, wrong)
    return _note_of_other_mode(source, piece, checkpoints[-1].found, noise)


def _in_float64(
    source: _Source, piece: Piece[Architecture], noise: Tensor
) -> list[_Checkpoint] | None:
    """The checkpoints without the rounding of float32; None if the model cannot compute them."""
    try:
        tensors = {name: tensor.detach().double() for name, tensor in piece.tensors.items()}
        with prepared(source.model, torch.float64):
            return list(_checkpoints(source, Piece(piece.spec, tensors), noise.double()))
    except (UnsupportedModel, TypeError, RuntimeError):
        return None


def _difference(checkpoint: _Checkpoint) -> float:
    """The largest difference, relative to the largest value of the source."""
    expected, found = checkpoint.expected.cpu().double(), checkpoint.found.cpu().double()
    if expected.shape != found.shape:
        return float("inf")
    difference = float((found - expected).abs().max()) / max(float(expected.abs().max()), _ZERO)
    return float("inf") if math.isnan(difference) else difference


def _checkpoints(
    source: _Source, piece: Piece[Architecture], noise: Tensor
) -> Iterator[_Checkpoint]:
    """Compare source and lifted model in the order in which they compute."""
    network = build(piece.spec, piece.tensors).eval()
    images = noise.to(next(network.parameters()).device)
    classifier = source.classifier
    watched = [entry.module for entry in source.modules]
    with _recorded([*watched, *([classifier] if classifier else [])]) as theirs:
        output = _run(source, images)
    branches = _branches(network)
    inner = [*branches, *(branch.core for branch in branches)]
    with _recorded([*inner, *([network.head] if network.head else [])]) as ours:
        stream = network.features(images[:1])
        result = network.classify(stream)
    yield from _inside(network, source.modules, theirs, ours, stream)
    if classifier is not None and network.head is not None and theirs[classifier].inputs:
        expected, found = theirs[classifier].inputs[0], ours[network.head].inputs[0]
        if expected.shape == found.shape:
            yield _Checkpoint("", "norm and pooling", expected, found)
    yield _Checkpoint("", "pooling and classifier", output[:1], result)


def _inside(
    network: CompactModel,
    modules: list[Found],
    theirs: Mapping[nn.Module, _Calls],
    ours: Mapping[nn.Module, _Calls],
    last: Tensor,
) -> Iterator[_Checkpoint]:
    """The stream around each block, and what each attention and FFN reads and returns."""
    blocks = [entry for entry in modules if entry.kind == "block"]
    cores = {entry.path: entry for entry in modules if entry.kind != "block"}
    # A module that is used several times is called in the order of its uses.
    inputs = {module: iter(calls.inputs) for module, calls in theirs.items()}
    outputs = {module: iter(calls.outputs) for module, calls in theirs.items()}

    def block_of(branch: Branch) -> Found | None:
        return next((b for b in blocks if branch.spec.name.startswith(f"{b.path}.")), None)

    before, end = "", None
    values: list[tuple[str, Tensor | None, Tensor]] = []
    for block, row in groupby(_branches(network), block_of):
        branches = list(row)
        if block is not None:
            stream = ours[branches[0]].inputs[0]
            values.append((before, next(inputs[block.module], None), stream))
        for branch in branches:
            entry = cores.get(branch.spec.name)
            if entry is not None:
                calls, path = ours[branch.core], before if block is None else block.path
                values.append((path, next(inputs[entry.module], None), calls.inputs[0]))
                values.append((entry.path, next(outputs[entry.module], None), calls.outputs[0]))
        if block is not None:
            before, end = block.path, next(outputs[block.module], None)
    values.append((before, end, last))
    for path, expected, found in values:
        if expected is not None and expected.shape == found.shape:
            yield _Checkpoint(path, "patch embedding, prefix tokens and positions", expected, found)


def _branches(network: CompactModel) -> list[Branch]:
    return [cast("Branch", each) for step in network.steps for each in cast("nn.ModuleList", step)]


@dataclass
class _Calls:
    """The first tensor argument and result of each call of a module, for the first image."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[Mapping[nn.Module, _Calls]]:
    """Record the calls of modules while the context is open."""
    calls = {module: _Calls([], []) for module in modules}

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        value = _first_tensor((*args, *named.values()))
        if value is not None:
            # A copy, since the module may change it in place.
            calls[module].inputs.append(value[:1].clone())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        value = _first_tensor(output)
        if value is not None:
            calls[module].outputs.append(value[:1].clone())

    handles = []
    for module in calls:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Tensor | None:
    items = value if isinstance(value, tuple | list) else [value]
    return next((item for item in items if isinstance(item, Tensor) and item.ndim), None)


def _run(source: _Source, images: Tensor) -> Tensor:
    model = source.model
    training, model.training = model.training, False
    try:
        found = model(images)
    except Exception as error:  # an unknown model may fail in any way
        line = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedModel(
            f"model: it raises {type(error).__name__} on images {tuple(images.shape)}: {line}; "
            "make it run, or pass proof=False to read its weights without running it"
        ) from error
    finally:
        model.training = training
    output = _output(found, pooled=source.pooled)
    if output is None:
        raise UnsupportedModel(
            f"model: it returns {type(found).__name__}, where logits or features (batch, width) "
            "were expected"
        )
    return output


def _output(found: Any, *, pooled: bool) -> Tensor | None:
    """Logits or features from a tensor, or from a result of the transformers library."""
    if isinstance(found, Tensor):
        return found
    if not pooled:
        tokens = getattr(found, "last_hidden_state", None)
        tokens = _first_tensor(found) if tokens is None else tokens
        return tokens if isinstance(tokens, Tensor) else None
    if isinstance(found, tuple):
        # A base model returns the tokens before the pooled features.
        flat = next((item for item in found if isinstance(item, Tensor) and item.ndim == 2), None)
        first = _first_tensor(found)
        return flat if flat is not None else first if first is None else first[:, 0]
    for name in ("logits", "image_embeds", "pooler_output"):
        value = getattr(found, name, None)
        if isinstance(value, Tensor):
            return value
    tokens = getattr(found, "last_hidden_state", None)
    return tokens[:, 0] if isinstance(tokens, Tensor) else None


def _classifier(model: nn.Module, piece: Piece[Architecture]) -> nn.Module | None:
    """The module of the source that holds the classifier's weight."""
    weight = piece.tensors.get("head.weight")
    if weight is None or piece.spec.pool.kind in ("distilled", "dense"):
        return None
    for module in model.modules():
        own = vars(module).get("_parameters", {}).get("weight")
        if own is not None and own.data_ptr() == weight.data_ptr() and own.shape == weight.shape:
            return module
    return None


def _note_of_other_mode(
    source: _Source, piece: Piece[Architecture], ours: Tensor, noise: Tensor
) -> str | None:
    """Run the other setting of `fused_attn`, which another process or an export may use."""
    modules: list[Any] = [
        module
        for module in source.model.modules()
        if isinstance(getattr(module, "fused_attn", None), bool)
    ]
    if not modules:
        return None
    settings = [module.fused_attn for module in modules]
    fused = settings[0]
    try:
        for module, setting in zip(modules, settings, strict=True):
            module.fused_attn = not setting
        output = _run(source, noise[:1].to(ours.device))
        if _difference(_Checkpoint("", "", output, ours)) <= TOLERANCE:
            return None
        first = _first_wrong(_checkpoints(source, piece, noise), TOLERANCE)
    except UnsupportedModel:
        first = None
    finally:
        for module, setting in zip(modules, settings, strict=True):
            module.fused_attn = setting
    path = _path_of(source, first)
    return (
        f"{path or 'model'}: with fused_attn = {not fused} it computes something else"
        f"{nearest_change(source.model, path, source.blocks) or ' (an outdated scale?)'}; "
        f"it is read as it runs now, with fused_attn = {fused}"
    )


def _first_wrong(checkpoints: Iterable[_Checkpoint], close: float) -> _Checkpoint | None:
    return next((each for each in checkpoints if _difference(each) > close), None)


def _refusal(source: _Source, first: _Checkpoint) -> UnsupportedModel:
    """The error for the first checkpoint that differs."""
    path = _path_of(source, first)
    what = type_name(source.model.get_submodule(path) if path else source.model)
    where = f"{path}: {what}" if path else f"model: the {first.part} of {what}"
    if first.expected.shape == first.found.shape:
        how = f"the outputs differ by {_difference(first):.1e}"
    else:
        shapes = tuple(first.expected.shape), tuple(first.found.shape)
        how = f"it returns shape {shapes[0]} where they give {shapes[1]}"
    return UnsupportedModel(
        f"{where} computes something else than its weights and type describe ({how})"
        f"{nearest_change(source.model, path, source.blocks)}; no rule reads that: undo it first, "
        "or pass proof=False to lift what weights and types describe"
    )


def _path_of(source: _Source, checkpoint: _Checkpoint | None) -> str:
    """The path of the module behind a checkpoint; the name of a branch may end in another word."""
    name = "" if checkpoint is None else checkpoint.path
    module = next((entry.module for entry in source.modules if entry.path == name), None)
    if module is None:
        return ""
    owner = name.rpartition(".")[0]
    paths: list[str] = [
        path
        for path, found in source.model.named_modules(remove_duplicate=False)
        if found is module
    ]
    return next((path for path in paths if path.startswith(owner)), paths[0])
