"""Hooks and replaced methods of a source model: what weights and types do not show.

Hooks that reparametrize a tensor (`torch.nn.utils.prune`, `weight_norm`, `spectral_norm`) are
folded. Others run on copies of what they refer to, so that a hook that counts or records can be
compared with a model without hooks and is left unchanged.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# They compute `module.<name>` from other tensors before each forward pass.
_REPARAMETRIZATIONS = (BasePruningMethod, SpectralNorm, WeightNorm)
_HOOKS = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
_METHODS = (FunctionType, MethodType, BuiltinMethodType, partial)
# Nested objects of a hook that are copied. Deeper ones are shared.
_MAX_DEPTH = 5
# What a function may change in a global variable; other globals are shared.
_COUNTERS = (dict, list, set, deque, Tensor, np.ndarray)


def own_methods(module: nn.Module) -> list[str]:
    """Names of the methods of its class that a module replaces on the instance."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, _METHODS) and hasattr(type(module), name)
    ]


def changes(module: nn.Module) -> Iterator[str]:
    """Describe what may make a module compute something else than its type and weights show."""
    for table, description in _HOOKS.items():
        hooks = vars(module).get(table, {}).values()
        if any(not isinstance(hook, _REPARAMETRIZATIONS) for hook in hooks):
            yield f"has {description}"
    for name in own_methods(module):
        yield f"has its own {name}"
    for kind in type(module).__mro__:
        if kind is nn.Module or parametrize.is_parametrized(module):
            return
        for name, value in vars(kind).items():
            outside = isinstance(value, FunctionType) and _package(value) != _package(kind)
            if outside and (name in ("forward", "__call__") or not hasattr(nn.Module, name)):
                yield f"runs a replaced {kind.__name__}.{name}"


def _package(value: FunctionType | type) -> str:
    return (value.__module__ or "").partition(".")[0]


def nearest_change(model: nn.Module, path: str, blocks: Sequence[str] = ()) -> str:
    """Return ": <module> has a forward hook" or the like, of the change nearest to a path.

    Args:
        model: The model.
        path: Where its output differs; empty for what is outside of the blocks.
        blocks: The paths of its blocks.

    Returns:
        Text for an error message; empty if there is no known change.
    """
    owner = path.rpartition(".")[0]

    def distance(name: str) -> int:
        inside = any(_is_in(name, block) for block in blocks)
        if not path:
            return int(inside)
        return 0 if _is_in(name, path) else 1 if name and _is_in(name, owner) else 2 + inside

    found = [
        (distance(name), f": {name or 'the model'} {change}")
        for name, module in model.named_modules()
        for change in changes(module)
    ]
    return min(found, key=lambda each: each[0])[1] if found else ""


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def is_changed(model: nn.Module) -> bool:
    """Whether a module has hooks other than reparametrizations, or methods of its own."""
    return any(
        own_methods(module)
        or any(
            not isinstance(hook, _REPARAMETRIZATIONS)
            for table in _HOOKS
            for hook in vars(module).get(table, {}).values()
        )
        for module in model.modules()
    )


def is_reparametrized(model: nn.Module) -> bool:
    """Whether a tensor of the model is computed from others before each use."""
    return any(
        parametrize.is_parametrized(module) or vars(module).get("_forward_pre_hooks")
        for module in model.modules()
    )


@contextmanager
def folded_reparametrizations(model: nn.Module) -> Iterator[None]:
    """Recompute the tensors that hooks reparametrize; they are stale after `load_state_dict`.

    Afterwards they are as before: a model that uses a stale tensor itself must differ.
    """
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in model.modules():
            for hook in vars(module).get("_forward_pre_hooks", {}).values():
                if isinstance(hook, _REPARAMETRIZATIONS):
                    saved.append((module, dict(vars(module))))
                    hook(module, ())
        yield
    finally:
        for module, attributes in reversed(saved):
            vars(module).update(attributes)


def isolate_hooks(model: nn.Module, replaced: dict[int, Any]) -> None:
    """Replace hooks and own methods by copies that share no counters, lists or tensors with them.

    Args:
        model: The module to change.
        replaced: Objects that stand for others, by id: the copies of the model's tensors.
    """
    memo = {id(module): module for module in model.modules()} | replaced
    for module in model.modules():
        for table in _HOOKS:
            hooks = vars(module).get(table, {})
            for key, hook in hooks.items():
                if not isinstance(hook, _REPARAMETRIZATIONS):
                    hooks[key] = _isolated(hook, memo)
        for name in own_methods(module):
            vars(module)[name] = _isolated(vars(module)[name], memo)


def _isolated(value: Any, memo: dict[int, Any], depth: int = 0) -> Any:
    """Copy a hook with the state that it may change; modules and unknown objects are shared."""
    if id(value) in memo or depth > _MAX_DEPTH:
        return memo.get(id(value), value)
    again = partial(_isolated, memo=memo, depth=depth + 1)
    if isinstance(value, FunctionType):
        return _isolated_function(value, memo, depth)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, again(value.__self__))
    if isinstance(value, BuiltinMethodType):
        owner = value.__self__
        return (
            value
            if owner is None or again(owner) is owner
            else getattr(again(owner), value.__name__)
        )
    if isinstance(value, partial):
        named = {name: again(item) for name, item in value.keywords.items()}
        return partial(again(value.func), *map(again, value.args), **named)
    if isinstance(value, Tensor):
        memo[id(value)] = copied = value.detach().clone()
        return copied
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(again, value))
    if isinstance(value, nn.Module | type | ModuleType):
        return value
    return _isolated_object(value, memo, depth)


def _isolated_function(function: FunctionType, memo: dict[int, Any], depth: int) -> FunctionType:
    read, cells = function.__code__.co_names, [CellType() for _ in function.__closure__ or ()]
    copied = FunctionType(
        function.__code__, {**function.__globals__}, function.__name__, None, tuple(cells) or None
    )
    memo[id(function)] = copied  # Before its contents, which may refer to it.
    again = partial(_isolated, memo=memo, depth=depth + 1)
    for name, value in function.__globals__.items():
        if name in read and (value is function or isinstance(value, _COUNTERS)):
            copied.__globals__[name] = again(value)
    for cell, source in zip(cells, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            cell.cell_contents = again(source.cell_contents)
    copied.__defaults__ = function.__defaults__ and tuple(map(again, function.__defaults__))
    copied.__kwdefaults__ = function.__kwdefaults__ and {
        name: again(value) for name, value in function.__kwdefaults__.items()
    }
    copied.__dict__.update({name: again(value) for name, value in vars(function).items()})
    return copied


def _isolated_object(value: Any, memo: dict[int, Any], depth: int) -> Any:
    try:
        copied = copy.copy(value)
    except Exception:  # locks, files, generators
        return value
    if copied is value:
        return value
    memo[id(value)] = copied
    if isinstance(copied, dict):
        for key, item in value.items():
            copied[key] = _isolated(item, memo, depth + 1)
    elif isinstance(copied, list | deque):
        for number, item in enumerate(value):
            copied[number] = _isolated(item, memo, depth + 1)
    for name, item in list(getattr(copied, "__dict__", {}).items()):
        vars(copied)[name] = _isolated(item, memo, depth + 1)
    return copied
