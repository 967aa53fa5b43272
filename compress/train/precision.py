"""Threads and matrix-product precision for the length of a training, put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def arithmetic(
    matmul_precision: Literal["highest", "high", "medium"], threads: int | None, model: nn.Module
) -> Iterator[None]:
    """Set torch's threads and float32 matmul precision; `medium` lets a CPU multiply in bfloat16
    where it has the instructions.

    torch's flash attention on the CPU is slower under anything but `highest`, so attention is then
    computed by plain matrix products, and modules with a `fused_attn` switch, as timm's, do so
    themselves. Training steps of a small ViT, images a CPU-second: `highest` flash 241, plain 223;
    `medium` flash 149, plain 315, timm's own products 347.
    """
    precision_before, threads_before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    plain = matmul_precision != "highest"
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
            if threads is not None:
                torch.set_num_threads(threads)
            for module in switched:
                module.fused_attn = False  # type: ignore[assignment]
            yield
        finally:
            torch.set_float32_matmul_precision(precision_before)
            torch.set_num_threads(threads_before)
            for module in switched:
                module.fused_attn = True  # type: ignore[assignment]
