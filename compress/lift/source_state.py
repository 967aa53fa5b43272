"""The state of a source model while it is read and run, which is restored afterwards."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from .hooks import is_changed, isolate_hooks
from .wrappers import unwrap_children

# Hooks that torch calls for every module of the process; they are no part of a model.
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
# Two threads that lift one model would restore the temporary state of each other.
_LOCK = threading.RLock()
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def prepared(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Prepare a model for reading and running, and restore it afterwards.

    Inside, the sub-modules are in evaluation mode (the model's own flag is unchanged, since
    converters read it), parameters and buffers have the type `dtype`, hooks run on copies of their
    state, and wrappers of sub-modules (compilation, checkpointing) are removed. Autocast and
    gradients are off. Nothing that the model does inside remains: attributes, buffers, hooks and
    torch's random state are restored.

    Args:
        model: The model.
        dtype: The floating-point type to compute in.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    kind = "cpu" if device.type == "meta" else device.type
    random_devices = [device] if kind == "cuda" else []
    with (
        _LOCK,
        torch.no_grad(),
        torch.random.fork_rng(random_devices),
        torch.autocast(kind, enabled=False),
        warnings.catch_warnings(),
    ):
        # The model's own, such as torch's about checkpoints without gradients.
        warnings.simplefilter("ignore")
        sources = list(model.modules())
        saved = [_saved(module) for module in sources]
        shared = [vars(torch_modules).get(name, {}) for name in _GLOBAL_HOOKS]
        shared_hooks = [dict(hooks) for hooks in shared]
        try:
            for hooks in shared:
                hooks.clear()
            unwrap_children(sources)
            modules = list(model.modules())
            for module in modules:
                module.training = module is model and model.training
                vars(module).pop("_compiled_call_impl", None)
                for name in _BACKWARD_HOOKS:
                    vars(module).get(name, {}).clear()
            changed = is_changed(model)
            copies = _convert(modules, dtype, copy=changed)
            if changed:
                isolate_hooks(model, copies)
            yield
        finally:
            for module, (attributes, contents) in zip(sources, saved, strict=True):
                _restore(module, attributes, contents)
            for hooks, content in zip(shared, shared_hooks, strict=True):
                hooks.update(content)


Saved = tuple[dict[str, Any], dict[str, Any]]


def _saved(module: nn.Module) -> Saved:
    """The attributes of a module, and copies of those that are containers."""
    attributes = dict(vars(module))
    contents = {
        name: value.copy()
        for name, value in attributes.items()
        if isinstance(value, dict | list | set)
    }
    return attributes, contents


def _restore(module: nn.Module, attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    """Restore attributes; containers stay the same objects, to which handles of hooks refer."""
    vars(module).clear()
    vars(module).update(attributes)
    for name, content in contents.items():
        container = attributes[name]
        if isinstance(container, list):
            container[:] = content
        else:
            container.clear()
            container.update(content)


def _convert(modules: list[nn.Module], dtype: torch.dtype, *, copy: bool) -> dict[int, Tensor]:
    """Replace the tensors of modules by converted ones; return the replacements by the old id.

    Buffers are always copied, since a forward pass may change them. Parameters are copied if their
    type differs, or with `copy`.
    """
    floating = {
        tensor.dtype
        for module in modules
        for tensor in module._parameters.values()
        if tensor is not None and tensor.is_floating_point()
    }
    whole = bool(floating - {dtype})
    replaced: dict[int, Tensor] = {}

    def converted(tensor: Any, *, copied: bool) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        wanted = dtype if whole and tensor.is_floating_point() else tensor.dtype
        if not copied and wanted == tensor.dtype:
            return tensor
        if id(tensor) not in replaced:
            new = tensor.detach().to(wanted, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
        return replaced[id(tensor)]

    for module in modules:
        for name, tensor in module._parameters.items():
            module._parameters[name] = cast("Any", converted(tensor, copied=copy))
        for name, buffer in module._buffers.items():
            module._buffers[name] = converted(buffer, copied=True)
        for name, value in vars(module).items():
            vars(module)[name] = converted(value, copied=copy)
    return replaced
