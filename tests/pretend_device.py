"""A device for tests of code that moves tensors: named `meta`, computed on the CPU.

Like a GPU, it refuses operations on tensors of both devices, except CPU scalars and indices. Unlike
torch's own `meta`, its tensors have values, so that results can be compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
# They accept tensors of both devices, as CUDA does.
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
MIXED |= {aten.index_put.default, aten._index_put_impl_.default}


class There(torch.Tensor):
    """A tensor on the pretend device, with its values on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held})"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor on a device has no numpy array; copy it to the CPU")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the values, and return its results on the device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == DEVICE.type
    to_cpu = device is not None and not to_device
    if there and func not in MIXED:
        for tensor in tensors:
            if not isinstance(tensor, There) and tensor.ndim:
                raise RuntimeError(
                    f"{func}: expected all tensors to be on the same device, found a CPU tensor "
                    f"of shape {tuple(tensor.shape)}"
                )
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(_values, args), tree_map(_values, kwargs)
    if func is aten._to_copy.default:
        plain = plain_args[0].clone() if to_device or to_cpu else plain_args[0]
        result = func(plain, **{**plain_kwargs, "device": None})
        on_device = to_device or (isinstance(args[0], There) and not to_cpu)
        return There(result) if on_device else result
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable:
        # Operations on lists of tensors return nothing.
        return args[0] if func._schema.returns else None
    if to_cpu or not (there or to_device):
        return result
    return tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _values(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, There) else leaf


class PretendDevice(TorchDispatchMode):
    """In this context, `device="meta"` creates tensors on the pretend device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        # Tensors of a subclass cannot be inference tensors.
        self.inference_mode = torch.inference_mode
        torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.inference_mode = self.inference_mode  # type: ignore[misc]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
