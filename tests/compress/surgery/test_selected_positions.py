"""Positions follow the tokens that a selection keeps of each image, and so do dense heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lv_vit import LVViT
from selecting_models import POSITIONED, noise_images, positioned, positioned_selection
from tiny_models import fvcore_macs, relative_error
from torch import Tensor
from vitrim import StructuredMask, bucketed, compact, lift, load, masked, save, select_tokens
from vitrim.compress.masks.groups import token_sites
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.select import Choices
from vitrim.compress.tokens.select import SelectMethod, chosen_tokens
from vitrim.compress.train.policies import BestPolicy

METHODS: tuple[SelectMethod, ...] = ("column-attention", "dynamicvit", "random")
WIDTHS = {"embed": 0.6, "head": 0.5, "qk": 0.5, "v": 0.5, "ffn": 0.5}


def mask_of(model: CompactModel, chosen: list[Tensor], image: int) -> StructuredMask:
    """The token mask that keeps what the selections of a network keep of one image."""
    architecture = model.architecture
    sites, prefix = list(token_sites(architecture)), architecture.prefix
    # A site without an entry keeps what came in; sites behind a selection have none by name.
    names = ["stem.out", *(step[0].name for step in architecture.steps)]
    assert sites == names[: len(sites)]
    entries = {}
    for select, places in zip(architecture.selects, chosen, strict=True):
        keep = torch.zeros(prefix + architecture.patches, dtype=torch.bool)
        keep[:prefix] = True
        keep[prefix + places[image]] = True
        entries[names[select.at]] = keep
    return StructuredMask({"token": entries})


def assert_equal_to_token_masks(dense: CompactModel, model: CompactModel, x: Tensor) -> None:
    """Compare each image with the dense network under the mask of its own choice."""
    chosen = chosen_tokens(model, x)
    with torch.no_grad():
        found = model(x)
        for image in range(len(x)):
            mask = mask_of(model, chosen, image)
            wanted = masked(dense, mask)(x[image : image + 1])
            assert relative_error(found[image : image + 1], wanted) < 1e-5
            cut = compact(dense, mask)(x[image : image + 1])
            assert relative_error(found[image : image + 1], cut) < 1e-5


@pytest.mark.parametrize("kind", POSITIONED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_each_image_gets_what_a_token_mask_of_its_choice_computes(
    kind: str, method: SelectMethod, batch: int
) -> None:
    model, x = positioned_selection(kind, method), noise_images(batch)
    if method != "random" and batch > 1:
        assert len({tuple(row) for row in chosen_tokens(model, x)[0].tolist()}) > 1
    assert_equal_to_token_masks(positioned(kind).eval(), model, x)


def test_class_attention_scores_by_the_positions_of_the_tokens_that_are_left() -> None:
    for kind in ("rope", "relative bias"):
        dense = positioned(kind).eval()
        model = select_tokens(dense, "class-attention", stages=[0, 1], ratio=0.6)
        x, choices = noise_images(1), Choices(scores=[])
        with torch.no_grad():
            model(x, choices)
            first = mask_of(model, chosen_tokens(model, x), 0).kept["token"]
            name = model.architecture.steps[0][0].name
            small: Any = compact(dense, StructuredMask({"token": {name: first[name]}}))
            stream = small.embed(x)
            counts = small.architecture.step_tokens()
            for number in range(2):
                stream = small.run_step(small.steps[number], stream, counts[number])
            wanted = small.steps[2][0].attention_scores(stream, "class-attention").mean(1)[:, 1:]
        assert choices.scores is not None
        # The compact network has the patches that stay in front, in the same order.
        assert relative_error(choices.scores[1], wanted) < 1e-5


@pytest.mark.parametrize("kind", POSITIONED)
def test_factors_in_training_compute_what_gathered_patches_compute(kind: str) -> None:
    model, x = positioned_selection(kind, "dynamicvit"), noise_images(3)
    with torch.no_grad():
        wanted = model(x)
        model.policy = BestPolicy()
        assert relative_error(model.train()(x), wanted) < 1e-5


@pytest.mark.parametrize("kind", POSITIONED)
def test_widths_and_tokens_by_place_are_cut_around_a_selection(kind: str, tmp_path: Any) -> None:
    model, x = positioned_selection(kind, "dynamicvit", stages=[1], counts=[5]), noise_images(3)
    mask = StructuredMask.random(model, WIDTHS | {"token": 0.8}, seed=2)
    cut = compact(model, mask)
    assert cut.architecture.order is not None
    assert cut.architecture.selects
    with torch.no_grad():
        wanted = masked(model, mask)(x)
        assert relative_error(cut(x), wanted) < 1e-5
        save(cut, tmp_path / "cut")
        assert torch.equal(load(tmp_path / "cut")(x), cut.eval()(x))
    assert count_macs(cut.architecture) == fvcore_macs(cut, x[:1])


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
def test_buckets_behind_another_selection_keep_positions(kind: str) -> None:
    x, network = noise_images(12), positioned_selection(kind, "dynamicvit", counts=[10, 6])
    model = bucketed(network, (3, 6), images=x, mean_patches=4.5)
    counts = model.bucket_of(x)
    assert len(counts.unique()) == 2
    with torch.no_grad():
        for count in counts.unique().tolist():
            own = counts == count
            assert relative_error(model(x)[own], model.fixed(count)(x)[own]) < 1e-6


def test_gradients_reach_the_table_of_a_relative_bias() -> None:
    model = positioned_selection("relative bias", "dynamicvit").train()
    model(noise_images(2)).square().sum().backward()
    tables = [p.grad for name, p in model.named_parameters() if name.endswith("bias.table")]
    assert len(tables) == 3
    assert all(grad is not None and bool((grad != 0).any()) for grad in tables)


@pytest.mark.parametrize("method", ["class-attention", "dynamicvit", "random"])
def test_a_dense_head_pools_the_patches_that_are_left(method: SelectMethod) -> None:
    torch.manual_seed(0)
    dense = lift(LVViT(img_size=64, embed_dim=24, depth=3, num_heads=3, classes=5).eval())
    model = select_tokens(dense, method, counts=[9, 4], stages=[0, 1]).eval()
    x = torch.randn(2, 3, 64, 64)
    assert_equal_to_token_masks(dense, model, x)
    if method == "dynamicvit":
        with torch.no_grad():
            wanted = model(x)
            model.policy = BestPolicy()
            assert relative_error(model.train()(x), wanted) < 1e-5
