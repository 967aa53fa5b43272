"""The description of a cut: shapes of the real module, its masks, and counts equal to fvcore's."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import fvcore_macs, tiny_vit
from vitrim import StructuredMask, compact, lift
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.surgery.explain import explain

MASK = StructuredMask(
    {
        "embed": {"*": torch.arange(24) % 3 != 0},
        "head": {"blocks.0.attn": torch.tensor([True, False, True])},
        "qk": {"blocks.0.attn": torch.arange(8) < 5},
        "ffn": {
            "blocks.0.ffn": torch.arange(96) < 40,
            "blocks.1.ffn": torch.zeros(96, dtype=torch.bool),
        },
        "block": {"blocks.1.attn": torch.tensor([False])},
    }
)


@pytest.fixture(scope="module")
def model() -> CompactModel:
    return lift(tiny_vit())


def test_shapes_are_those_of_the_cut_module(model: CompactModel) -> None:
    cuts = {
        (module.module, cut.tensor): cut
        for module in explain(model, MASK).modules
        for cut in module.tensors
    }
    small = compact(model, MASK)
    q = cuts["blocks.0.attn", "core.q.weight"]
    assert q.before == (24, 24)
    assert q.after == (10, 16) == tuple(small.get_parameter("steps.0.0.core.q.weight").shape)
    assert q.masks == ("head/blocks.0.attn", "qk/blocks.0.attn", "embed/*")
    out = cuts["blocks.0.attn", "core.out.weight"]
    assert (out.before, out.after, out.masks) == (
        (24, 24),
        (16, 16),
        ("embed/*", "head/blocks.0.attn"),
    )
    fc1 = cuts["blocks.0.ffn", "core.fc1.bias"]
    assert (fc1.before, fc1.after, fc1.masks) == ((96,), (40,), ("ffn/blocks.0.ffn",))
    assert cuts["head", "head.bias"].masks == ()


def test_removed_and_constant_modules_are_marked(model: CompactModel) -> None:
    by_name = {module.module: module for module in explain(model, MASK).modules}
    assert by_name["blocks.1.attn"].status == "removed"
    assert {cut.masks for cut in by_name["blocks.1.attn"].tensors} == {("block/blocks.1.attn",)}
    assert by_name["blocks.1.ffn"].status == "constant"
    assert by_name["blocks.1.ffn"].params[1] == 16
    assert by_name["blocks.0.ffn"].status == ""


def test_the_counts_of_modules_add_up(model: CompactModel) -> None:
    explained = explain(model, MASK)
    for side in (0, 1):
        assert sum(module.params[side] for module in explained.modules) == explained.params[side]
        assert sum(module.macs[side] for module in explained.modules) == explained.macs[side]
    assert explained.params[0] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("sharing", ["unshared", "residual", "full"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    ],
)
def test_counts_agree_with_fvcore_on_the_real_module(
    name: str, settings: dict[str, Any], sharing: str
) -> None:
    source = tiny_vit(name, **settings)
    mask = StructuredMask.random(source, 0.6, sharing=sharing, seed=2)  # type: ignore[arg-type]
    explained, images = explain(source, mask), torch.randn(1, 3, 16, 16)
    small = compact(source, mask)
    assert explained.params == tuple(
        sum(parameter.numel() for parameter in model.parameters())
        for model in (lift(source), small)
    )
    assert explained.macs == (
        fvcore_macs(lift(source), images),
        fvcore_macs(small, images),
    )


def test_the_table_prints_every_cut(model: CompactModel) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(explain(model, MASK).table())
    text = console.export_text()
    assert "core.q.weight" in text
    assert "10 x 16" in text
    assert "block/blocks.1.attn" in text


def test_dropped_tokens_are_listed_where_they_leave() -> None:
    source = tiny_vit()
    keep = torch.tensor([True, True, False, True, False])
    explained = explain(source, StructuredMask({"token": {"blocks.0.ffn": keep}}))
    tokens = {module.module: module.tokens for module in explained.modules}
    assert tokens["stem"] == (5, 5)
    # The attention before computes no queries that only the FFN would read.
    assert tokens["blocks.0.attn"] == tokens["blocks.1.ffn"] == (5, 3)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(explained.table(tensors=False))
    assert "5 tokens" in console.export_text()
