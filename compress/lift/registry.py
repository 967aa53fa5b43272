"""The handlers that turn modules of other libraries into pieces of ours, found by the module's
exact type.

A subclass may compute something else, so it is never taken for its parent: an unknown type is
refused with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ...core.errors import UnsupportedModel

SpecT = TypeVar("SpecT")


@dataclass(frozen=True)
class Piece(Generic[SpecT]):
    """A lifted module: its plain-data spec, and its tensors under the names of our module."""

    spec: SpecT
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors with `prefix.` before their names."""
        return {f"{prefix}.{name}": tensor for name, tensor in self.tensors.items()}


Handler = Callable[..., Any]
_HANDLERS: dict[str, dict[str, Handler]] = {}
_FALLBACKS: dict[str, Handler] = {}
# What does nothing outside of training.
_INERT = ("Identity", "Dropout", "Dropout1d", "DropPath", "PatchDropout", "PatchDropoutWithIndices")


def handles(kind: str, *type_names: str) -> Callable[[Handler], Handler]:
    """Register a handler of `kind` (model, block, attention, ffn, norm, position, pool...) for
    fully qualified type names.
    """

    def register(handler: Handler) -> Handler:
        for name in type_names:
            _HANDLERS.setdefault(kind, {})[name] = handler
        return handler

    return register


def falls_back(kind: str) -> Callable[[Handler], Handler]:
    """Register the handler that tries types of `kind` which nobody knows; it must prove what it
    finds.
    """

    def register(handler: Handler) -> Handler:
        _FALLBACKS[kind] = handler
        return handler

    return register


def type_name(module: nn.Module) -> str:
    """Fully qualified name of a module's type."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find(kind: str, module: nn.Module, path: str) -> Handler:
    """The handler for a module. Errors: UnsupportedModel with path, type and the known types."""
    handler = _HANDLERS.get(kind, {}).get(type_name(module)) or _FALLBACKS.get(kind)
    if handler is None:
        raise UnsupportedModel(refusal(kind, module, path))
    if "forward" in vars(module):
        raise UnsupportedModel(
            f"{path or 'model'}: this {type(module).__name__} has a forward of its own, set on the instance; no rule reads it"
        )
    _check_inert(module, path)
    return handler


def refusal(kind: str, module: nn.Module, path: str) -> str:
    """One line on a type that no rule covers."""
    known = ", ".join(sorted({name.rpartition(".")[2] for name in _HANDLERS.get(kind, {})}))
    return f"{path or 'model'}: no rule for {kind} type {type_name(module)} (known: {known}); CONTRIBUTING.md says how to add one"


def knows(kind: str, module: nn.Module) -> bool:
    """Whether there is a handler for this very type."""
    return type_name(module) in _HANDLERS.get(kind, {})


def _check_inert(module: nn.Module, path: str) -> None:
    """Refuse a dropout that was replaced by something that computes. Handlers skip these
    children.
    """
    for name, child in module.named_children():
        if (name.startswith("drop") or name.endswith("_drop")) and type(
            child
        ).__name__ not in _INERT:
            where = f"{path}.{name}" if path else name
            raise UnsupportedModel(f"{where}: {type_name(child)} where a dropout was expected")
