"""Tiny networks with random weights, and the checks that tests of several folders share.

Every parameter is random, so that no norm, bias or scale is hidden by its initial value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from vitrim import StructuredMask, compact, lift, masked
from vitrim.compress.masks.groups import Sharing, token_sites
from vitrim.compress.masks.token_sets import token_sets
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.modules.model import CompactModel

SHARINGS: tuple[Sharing, ...] = ("unshared", "residual", "full")


def tiny_vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **overrides: Any) -> nn.Module:
    """A timm model in eval mode: two blocks, 24 channels, 16 x 16 images of 8 x 8 patches."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    } | overrides
    return add_noise(timm.create_model(name, **settings))


def add_noise(model: nn.Module) -> nn.Module:
    """Add noise to every parameter and running statistic, and put the model into eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model.eval()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted magnitude, or as it is where that is 0."""
    top = float(wanted.detach().abs().max()) or 1.0
    return float((found - wanted).detach().abs().max()) / top


def token_counts(architecture: Architecture, mask: StructuredMask) -> dict[str, int]:
    """Site -> number of tokens that the stream carries after it, by a mask."""
    sets = token_sets(architecture, mask.kept.get("token", {}))
    names = token_sites(architecture)
    return {site: int(keep.sum()) for site, keep in zip(names, sets, strict=True)}


def fvcore_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass by fvcore, with attention products and without norms."""

    def products(inputs: list[Any], outputs: list[Any]) -> int:
        q, k, v = (value.type().sizes() for value in inputs[:3])
        del outputs
        return int(math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))

    analysis = FlopCountAnalysis(model, images)
    analysis.set_op_handle("aten::scaled_dot_product_attention", products)
    for name in ("aten::layer_norm", "aten::rms_norm"):
        analysis.set_op_handle(name, lambda inputs, outputs: 0)
    analysis.unsupported_ops_warnings(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(analysis.total())


def assert_exact(
    model: nn.Module,
    images: Tensor,
    *,
    per_head: Sequence[bool] = (True, True, True),
    output: Callable[[Any], Tensor] = lambda output: output,
) -> CompactModel:
    """Lifted equals source, and compact equals masked for one random mask per sharing.

    Args:
        model: The source model.
        images: Its input.
        per_head: For each sharing, whether the heads of its mask may keep different columns.
        output: Extracts the tensor from the output of `model`.

    Returns:
        The lifted model.
    """
    lifted = lift(model)
    with torch.no_grad():
        assert relative_error(lifted(images), output(model(images))) < 1e-5
        for seed, (sharing, each) in enumerate(zip(SHARINGS, per_head, strict=True)):
            mask = StructuredMask.random(lifted, 0.4, sharing, seed=seed, per_head=each)
            small, wanted = compact(model, mask)(images), masked(lifted, mask)(images)
            assert small.shape == wanted.shape
            assert relative_error(small, wanted) < 1e-5
    return lifted


def assert_equal_outputs(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Compare relative to the largest wanted magnitude; outputs may be nothing but zeros."""
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale + 1e-12)
