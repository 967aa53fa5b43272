"""The handlers that turn modules of other libraries into pieces of ours, found by the module's exact type.

A subclass may compute something else, so it is never taken for its parent: an unknown type is refused with its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ...errors import UnsupportedModel

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


def handles(kind: str, *type_names: str) -> Callable[[Handler], Handler]:
    """Register a handler of `kind` (model, block, attention, ffn, norm, stem...) for fully qualified type names."""

    def register(handler: Handler) -> Handler:
        for name in type_names:
            _HANDLERS.setdefault(kind, {})[name] = handler
        return handler

    return register


def type_name(module: nn.Module) -> str:
    """Fully qualified name of a module's type."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find(kind: str, module: nn.Module, path: str) -> Handler:
    """The handler for a module. Errors: UnsupportedModel with path, type and the known types."""
    handler = _HANDLERS.get(kind, {}).get(type_name(module))
    if handler is None:
        known = ", ".join(sorted(name.rpartition(".")[2] for name in _HANDLERS.get(kind, {})))
        raise UnsupportedModel(f"{path or 'model'}: no rule for {kind} type {type_name(module)} (known: {known}); CONTRIBUTING.md says how to add one")
    return handler


def knows(kind: str, module: nn.Module) -> bool:
    """Whether there is a handler for this module."""
    return type_name(module) in _HANDLERS.get(kind, {})
