"""The converters that turn modules of other libraries into ours, and the values they exchange.

A converter is found by the exact type of a module. A subclass may compute something else, so it is
never converted like its parent: an unknown type is refused with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ..network.architecture import RelativeBiasSpec, RopeGridSpec

SpecT = TypeVar("SpecT")


@dataclass(frozen=True)
class Piece(Generic[SpecT]):
    """A converted module.

    Attributes:
        spec: What it computes, as plain data.
        tensors: Its tensors under the names of our module.
    """

    spec: SpecT
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def prefixed(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors with `prefix.` before their names."""
        return {f"{prefix}.{name}": tensor for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class RopeTable:
    """The rotary position embedding of one attention at the model's image size.

    Attributes:
        table: Sines and cosines in timm's layout, (heads or 1, patches, 2 * qk).
        frequencies: The frequencies behind the table, (heads or 1, 2, qk / 2). None: unknown.
        at: The coordinates that the frequencies are multiplied with. None: unknown.
    """

    table: Tensor
    frequencies: Tensor | None = None
    at: RopeGridSpec | None = None


@dataclass(frozen=True)
class TokenLayout:
    """The tokens that a block sees, and the position information that the model gives it.

    Attributes:
        grid: Rows and columns of patches.
        prefix: Number of prefix tokens.
        rope: Rotary position embedding of the block.
        bias: A relative position bias that all blocks share, as in BEiT.
    """

    grid: tuple[int, int]
    prefix: int
    rope: RopeTable | None = None
    bias: Piece[RelativeBiasSpec] | None = None


Converter = Callable[..., Any]
_CONVERTERS: dict[str, dict[str, Converter]] = {}
_UNKNOWN_CONVERTERS: dict[str, Converter] = {}
# Modules that compute nothing outside of training.
_INERT = ("Identity", "Dropout", "Dropout1d", "DropPath", "PatchDropout", "PatchDropoutWithIndices")


def converts(kind: str, *type_names: str) -> Callable[[Converter], Converter]:
    """Register the converter of `kind` for fully qualified type names.

    Kinds are model, block, attention, ffn, norm, pool, rope and relative bias.
    """

    def register(converter: Converter) -> Converter:
        for name in type_names:
            _CONVERTERS.setdefault(kind, {})[name] = converter
        return converter

    return register


def converts_unknown(kind: str) -> Callable[[Converter], Converter]:
    """Register the converter that tries types of `kind` without a converter of their own.

    It must check numerically that its result equals the module.
    """

    def register(converter: Converter) -> Converter:
        _UNKNOWN_CONVERTERS[kind] = converter
        return converter

    return register


def type_name(module: nn.Module) -> str:
    """Fully qualified name of a module's type."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_converter(kind: str, module: nn.Module, path: str) -> Converter:
    """Return the converter of a module.

    Raises:
        UnsupportedModel: There is none, or a forward or a dropout of the module was replaced.
    """
    converter = _CONVERTERS.get(kind, {}).get(type_name(module)) or _UNKNOWN_CONVERTERS.get(kind)
    if converter is None:
        raise UnsupportedModel(no_rule_message(kind, module, path))
    if "forward" in vars(module):
        raise UnsupportedModel(
            f"{path or 'model'}: this {type(module).__name__} has a forward of its own, "
            "set on the instance; no rule reads it"
        )
    _check_inert(module, path)
    return converter


def no_rule_message(kind: str, module: nn.Module, path: str) -> str:
    """Return one line about a type without a converter."""
    known = ", ".join(sorted({name.rpartition(".")[2] for name in _CONVERTERS.get(kind, {})}))
    return (
        f"{path or 'model'}: no rule for {kind} type {type_name(module)} (known: {known}); "
        "CONTRIBUTING.md describes how to add one"
    )


def _check_inert(module: nn.Module, path: str) -> None:
    """Refuse a dropout that was replaced by a module that computes; converters skip dropouts."""
    for name, child in module.named_children():
        is_dropout = name.startswith("drop") or name.endswith("_drop")
        if is_dropout and type(child).__name__ not in _INERT:
            where = f"{path}.{name}" if path else name
            raise UnsupportedModel(f"{where}: {type_name(child)} where a dropout was expected")
