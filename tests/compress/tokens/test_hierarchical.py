"""HVT: pools between blocks, counted as in its paper, trainable, without a class token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import vitrim
from tiny_models import fvcore_macs, tiny_vit
from training_material import stripes
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.tokens.merging.hierarchical import hierarchical
from vitrim.compress.train.dense import DenseTask
from vitrim.compress.train.loop import fit
from vitrim.compress.train.settings import TrainSettings
from vitrim.core.errors import InputError, UnsupportedModel


def test_pools_halve_the_sequence_at_their_blocks() -> None:
    model = vitrim.lift(tiny_vit(img_size=112, depth=4)).eval()
    images = torch.randn(2, 3, 112, 112)
    for every, counts in [
        (None, (196, 97, 97, 97, 97, 97, 97, 97)),
        (2, (196, 97, 97, 97, 97, 48, 48, 48)),
        (1, (196, 97, 97, 48, 48, 23, 23, 11)),
    ]:
        pooled = hierarchical(model, every)
        assert pooled.token_counts == counts
        assert [x.shape[1] for x in pooled.trace(images)] == [196, *counts]
        assert pooled(images).shape == (2, 5)
        assert pooled.macs == fvcore_macs(pooled, images[:1])


def test_a_pool_is_the_maximum_of_neighbors_and_a_new_position() -> None:
    model = vitrim.lift(tiny_vit(img_size=56, depth=2)).eval()
    pooled = hierarchical(model)
    with torch.no_grad():
        streams = list(pooled.trace(torch.randn(2, 3, 56, 56)))
        before = pooled.model.run_step(cast("Any", pooled.model.steps[1]), streams[1])
    wanted = torch.stack([before[:, n : n + 3].amax(dim=1) for n in range(0, 47, 2)], dim=1)
    torch.testing.assert_close(streams[2], wanted + pooled.positions[0])
    means = pooled.model.normed(streams[-1]).mean(dim=1)
    head = cast("Any", pooled.model.head)
    torch.testing.assert_close(pooled.model.classify(streams[-1]), head(means))


def test_counts_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        source = timm.create_model("deit_tiny_patch16_224")
    source = source.to_empty(device="cpu")
    for parameter in source.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    pooled = hierarchical(source)
    # HVT-Ti-1: 0.64 G multiply-adds, 5.74 M parameters.
    assert pooled.macs / 1e9 == pytest.approx(0.64, abs=0.005)
    assert sum(each.numel() for each in pooled.parameters()) / 1e6 == pytest.approx(5.74, abs=0.005)


def test_weights_are_copied_and_the_prefix_is_gone() -> None:
    model = vitrim.lift(tiny_vit("deit_tiny_distilled_patch16_224", img_size=56)).eval()
    pooled = hierarchical(model)
    assert isinstance(pooled.model.architecture, Architecture)
    assert (pooled.model.architecture.prefix, pooled.model.head_dist) == (0, None)
    assert not pooled.training
    with torch.no_grad():
        pooled.model.stem.weight.zero_()
    assert bool(model.stem.weight.any())
    again = hierarchical(model)
    assert torch.equal(pooled.positions[0], again.positions[0])
    assert not torch.equal(pooled.positions[0], hierarchical(model, seed=1).positions[0])


def test_it_trains_like_any_network(tmp_path: Path) -> None:
    pooled = hierarchical(tiny_vit(patch_size=4, num_classes=4))
    before = {name: tensor.clone() for name, tensor in pooled.state_dict().items()}
    fit(
        DenseTask(pooled, optimizer="muon"),
        stripes(),
        TrainSettings(1, 16, 0, quiet=True),
        tmp_path,
    )
    changed = [name for name, each in pooled.state_dict().items() if not each.equal(before[name])]
    assert set(changed) == set(before)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (0, "every = 0: the number of blocks between pools must be positive"),
        (1, "pool 4 of 4 finds 1 tokens and needs 3; pool less often"),
    ],
)
def test_too_many_pools_are_refused(every: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hierarchical(tiny_vit(img_size=32, depth=4), every)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("eva02_tiny_patch14_224", {}, r"blocks\.0\.attn: .*rotary"),
        ("beit_base_patch16_224", {}, r"blocks\.0\.attn: .*relative position bias"),
        ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}, "pool: 'attention'"),
    ],
)
def test_what_cannot_be_pooled_is_refused_with_its_path(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        hierarchical(tiny_vit(name, **settings))
