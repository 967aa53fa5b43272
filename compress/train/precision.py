"""Threads and matrix-product precision for the length of a training, put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn


@contextlib.contextmanager
def arithmetic(matmul_precision: Literal["highest", "high", "medium"], threads: int | None, model: nn.Module) -> Iterator[None]:
    """Set torch's threads and float32 matmul precision; `medium` lets a CPU multiply in bfloat16 where it has the instructions.

    torch's fused attention on the CPU is several times slower under anything but `highest` (images/s of a
    small ViT: 435 fused and `highest`, 287 fused and `medium`, 732 unfused and `medium`), so modules that know a `fused_attn` switch,
    as timm's do, compute attention step by step meanwhile.
    """
    precision_before, threads_before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    switched = [module for module in model.modules() if matmul_precision != "highest" and getattr(module, "fused_attn", None) is True]
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
