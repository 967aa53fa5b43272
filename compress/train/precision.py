"""Threads and the precision of matrix products during a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def arithmetic(
    matmul_precision: Literal["highest", "high", "medium"],
    threads: int | None,
    model: nn.Module,
    device: torch.device | None = None,
    short: bool = False,
) -> Iterator[None]:
    """Set the threads and the float32 matmul precision of torch, and restore them on exit.

    In bfloat16 torch's flash attention is slow on a CPU, so attention is then computed by plain
    matrix products, in modules with a `fused_attn` switch (timm and ours) by their own. Images per
    CPU-second in training steps of a small ViT: "highest" flash 241, plain 223; "medium" flash
    149, plain 315, timm's own products 347; with autocast flash 345, plain 410, timm's own 479.

    Args:
        matmul_precision: As for `torch.set_float32_matmul_precision`; with "medium" a CPU
            multiplies in bfloat16 if it has the instructions.
        threads: The number of threads, or None to leave it.
        model: The model, whose `fused_attn` switches are set.
        device: Where the model computes (default: the CPU).
        short: Whether autocast computes products in bfloat16 or float16.
    """
    precision_before, threads_before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    # Convolutions on a GPU follow a switch of their own, which is on by default.
    short_before = torch.backends.cudnn.allow_tf32
    plain = (short or matmul_precision != "highest") and (device is None or device.type == "cpu")
    switched = [
        module
        for module in model.modules()
        if plain and getattr(module, "fused_attn", None) is True
    ]
    with contextlib.ExitStack() as stack:
        if plain:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            torch.set_float32_matmul_precision(matmul_precision)
            torch.backends.cudnn.allow_tf32 = matmul_precision != "highest"
            if threads is not None:
                torch.set_num_threads(threads)
            for module in switched:
                module.fused_attn = False  # type: ignore[assignment]
            yield
        finally:
            torch.set_float32_matmul_precision(precision_before)
            torch.backends.cudnn.allow_tf32 = short_before
            torch.set_num_threads(threads_before)
            for module in switched:
                module.fused_attn = True  # type: ignore[assignment]
