"""Threads and the precision of matrix products during a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..network.modules.attention import Attention
from .devices import Placement


@contextlib.contextmanager
def arithmetic(
    matmul_precision: Literal["highest", "high", "medium"],
    threads: int | None,
    model: nn.Module,
    place: Placement | None = None,
) -> Iterator[None]:
    """Set the threads and the float32 matmul precision of torch, and restore them on exit.

    In bfloat16 torch's flash attention is slow on a CPU, so attention is then computed by plain
    matrix products, in modules with a `fused_attn` switch (timm and ours) by their own. Images per
    CPU-second in training steps of a small ViT: "highest" flash 241, plain 223; "medium" flash
    149, plain 315, timm's own products 347; with autocast flash 345, plain 410, timm's own 479.
    Our modules are switched by their class: a teacher, and networks that replace the model while
    it shrinks, compute beside it.

    Args:
        matmul_precision: As for `torch.set_float32_matmul_precision`; with "medium" a CPU
            multiplies in bfloat16 if it has the instructions.
        threads: The number of threads, or None to leave it.
        model: A model, whose own `fused_attn` switches are set beside those of our modules.
        place: Where the model computes, and how (default: the CPU, in float32).
    """
    precision_before, threads_before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    # Convolutions on a GPU follow a switch of their own, which is on by default.
    short_before = torch.backends.cudnn.allow_tf32
    place = place or Placement()
    plain = place.waits and (place.short or matmul_precision != "highest")
    own = [module for module in model.modules() if vars(module).get("fused_attn") is True]
    switched: list[Any] = [*([Attention] if Attention.fused_attn else []), *own] if plain else []
    with contextlib.ExitStack() as stack:
        if plain:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            torch.set_float32_matmul_precision(matmul_precision)
            torch.backends.cudnn.allow_tf32 = matmul_precision != "highest"
            if threads is not None:
                torch.set_num_threads(threads)
            for owner in switched:
                owner.fused_attn = False
            yield
        finally:
            torch.set_float32_matmul_precision(precision_before)
            torch.backends.cudnn.allow_tf32 = short_before
            torch.set_num_threads(threads_before)
            for owner in switched:
                owner.fused_attn = True
