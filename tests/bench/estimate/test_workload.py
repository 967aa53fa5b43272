"""A workload counts the operators of a network."""

from __future__ import annotations

from typing import Any

import pytest
from vitrim.bench.estimate.workload import PlainVit

TINY = PlainVit(image=224, patch=16, embed=192, depth=12, heads=3, ffn=768)


def test_the_multiply_adds_are_the_published_ones() -> None:
    # timm's tables: vit_tiny_patch16_224 1.26 G, vit_base_patch32_384 13.06 G.
    assert TINY.workload("tiny").macs == pytest.approx(1.26e9, rel=0.01)
    base = PlainVit(image=384, patch=32, embed=768, depth=12, heads=12, ffn=3072)
    assert base.tokens == 145
    assert base.workload("base").macs == pytest.approx(13.06e9, rel=0.01)


def test_the_last_block_computes_one_row_where_the_graph_does() -> None:
    whole, short = TINY.workload("tiny"), TINY.workload("tiny", last_queries=True)
    assert len(whole.operators) == len(short.operators)
    assert whole.macs - short.macs == 196 * (2 * 192 * 192 + 2 * 197 * 192 + 2 * 192 * 768)


def test_a_saved_network_counts_as_a_plain_vit_of_its_sizes() -> None:
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    import vitrim
    from vitrim.compress.network.count import count_macs
    from vitrim.pipeline.estimates import network_workload

    torch.manual_seed(0)
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    architecture = vitrim.lift(timm.models.VisionTransformer(**sizes).eval()).architecture
    counted = network_workload(architecture)
    plain = PlainVit(image=32, patch=8, embed=48, depth=2, heads=3, ffn=192, classes=5).workload(
        "plain", last_queries=True
    )
    assert (
        counted.macs
        == plain.macs
        == count_macs(architecture.model_copy(update={"last_queries": True}))
    )
    assert counted.weights == plain.weights
    assert [operator.kind for operator in counted.operators if operator.kind == "attention"] == [
        "attention"
    ] * 2


@pytest.mark.parametrize("method", ["dynamicvit", "dps", "class-attention", "evit", "random"])
def test_selections_of_tokens_are_part_of_the_workload_and_of_the_peak(method: str) -> None:
    pytest.importorskip("torch")
    from selecting_models import sharp_selection
    from vitrim.compress.network.count import count_macs
    from vitrim.pipeline.estimates import network_workload, peak_activation_bytes

    architecture = sharp_selection(method).architecture  # type: ignore[arg-type]
    shortened = architecture.model_copy(update={"last_queries": True})
    workload = network_workload(architecture)
    assert workload.macs == count_macs(shortened)
    names = [operator.name for operator in workload.operators]
    assert any(name.startswith("select.") for name in names)
    wide = architecture.model_copy(
        update={"selects": tuple(_with_wide_layer(select) for select in architecture.selects)}
    )
    if method in ("dynamicvit", "dps"):
        assert peak_activation_bytes(wide) > peak_activation_bytes(architecture)


def _with_wide_layer(select: Any) -> Any:
    if select.predictor is None:
        return select
    predictor = select.predictor.model_copy(update={"local": 5000})
    return select.model_copy(update={"predictor": predictor})
