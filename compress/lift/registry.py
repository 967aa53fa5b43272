"""The converters that turn modules of other libraries into ours, and the values they exchange.

A converter is found by the exact type of a module. A subclass may compute something else, so it is
never converted like its parent: an unknown type is refused with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.errors import InputError, UnsupportedModel
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


@dataclass(frozen=True)
class Found:
    """A block, an attention or an FFN that was converted.

    Attributes:
        kind: "block", "attention" or "ffn".
        path: Its path; of an attention or an FFN the name of its branch.
        module: The source module.
    """

    kind: str
    path: str
    module: nn.Module


Converter = Callable[..., Any]
_RECORDED = ("block", "attention", "ffn")
_found: ContextVar[dict[tuple[str, str], Found] | None] = ContextVar("found", default=None)
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


def plain_type(module: nn.Module) -> type:
    """The type of a module, without the parametrizations of its tensors."""
    kind = type(module)
    return kind.__mro__[1] if parametrize.is_parametrized(module) else kind


def type_name(module: nn.Module) -> str:
    """Fully qualified name of a module's type."""
    kind = plain_type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def recorded_modules() -> Iterator[dict[tuple[str, str], Found]]:
    """Collect the blocks, attentions and FFNs that are converted, by kind and path, in order."""
    found: dict[tuple[str, str], Found] = {}
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def record(kind: str, module: nn.Module, path: str) -> None:
    """Add a converted module to those that `recorded_modules` collects."""
    found = _found.get()
    if found is not None and kind in _RECORDED:
        found[kind, path] = Found(kind, path, module)


def has_converter(kind: str, module: nn.Module) -> bool:
    """Whether the type of a module has a converter of its own."""
    return type_name(module) in _CONVERTERS.get(kind, {})


def forget(path: str) -> None:
    """Exclude a module that was recorded, because its conversion returns other values."""
    found = _found.get()
    for kind in _RECORDED if found is not None else ():
        found.pop((kind, path), None)  # type: ignore[union-attr]


def find_converter(kind: str, module: nn.Module, path: str) -> Converter:
    """Return the converter of a module.

    Raises:
        UnsupportedModel: There is none, or a forward or a dropout of the module was replaced. The
            converter raises it where the module is not built as its type describes.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModel(f"{path or 'model'}: {module!r} where a module was expected")
    converter = _CONVERTERS.get(kind, {}).get(type_name(module)) or _UNKNOWN_CONVERTERS.get(kind)
    if converter is None:
        raise UnsupportedModel(no_rule_message(kind, module, path))
    if "forward" in vars(module):
        raise UnsupportedModel(
            f"{path or 'model'}: this {type(module).__name__} has a forward of its own, "
            "set on the instance; no rule reads it"
        )
    _check_inert(module, path)

    def convert(*args: Any) -> Any:
        record(kind, module, path)
        try:
            return converter(*args)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # a module that was edited may fail in any way
            raise UnsupportedModel(
                f"{path or 'model'}: this {type_name(module)} is not built as its type describes "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from error

    return convert


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"])
    return (str(error).strip().splitlines() or [""])[0]


def no_rule_message(kind: str, module: nn.Module, path: str) -> str:
    """Return one line about a type without a converter."""
    known = ", ".join(sorted({name.rpartition(".")[2] for name in _CONVERTERS.get(kind, {})}))
    for name, child in module.named_children():
        if kind == "model" and has_converter("model", child):
            return (
                f"{path or 'model'}: no rule for model type {type_name(module)}; "
                f"give its attribute {name!r}, a {type(child).__name__}"
            )
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
