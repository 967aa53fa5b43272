"""What remains of each sub-layer: of a compact model or of a mask alike."""

from __future__ import annotations

import timm
import torch
import vitrim
from tiny_models import tiny_vit
from vitrim.compress.masks.mask import StructuredMask
from vitrim.pipeline.kept_units import kept_branches, selection_map, token_map


def test_a_mask_and_its_compact_model_give_the_same_entries() -> None:
    model = vitrim.lift(tiny_vit())
    mask = StructuredMask.random(model, 0.5, seed=1)
    rows = kept_branches(model, mask)
    assert rows == kept_branches(model, vitrim.compact(model, mask))
    assert rows[0] == {
        "branch": "blocks.0.attn",
        "kind": "attention",
        "dims": {"embed": [12, 24], "head": [2, 3], "qk": [4, 8], "v": [4, 8]},
    }


def test_a_removed_sub_layer_is_listed_as_removed() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=3,
    )
    dense = vitrim.lift(model).architecture
    mask = StructuredMask(
        {
            "block": {"blocks.0.attn": torch.tensor([False])},
            "ffn": {"blocks.1.ffn": torch.zeros(96, dtype=torch.bool)},
        }
    )
    kept = {
        entry["branch"]: entry
        for entry in kept_branches(dense, vitrim.compact(model, mask).architecture)
    }
    assert kept["blocks.0.attn"]["kind"] == "removed"
    assert kept["blocks.0.attn"]["dims"]["head"] == [0, 3]
    assert kept["blocks.1.ffn"]["kind"] in ("constant", "removed")
    assert kept["blocks.1.attn"]["dims"]["head"] == [3, 3]


def test_dropped_tokens_are_part_of_the_entries_and_of_the_map() -> None:
    model = vitrim.lift(tiny_vit(img_size=32))
    keep = torch.zeros(17, dtype=torch.bool)
    keep[[0, 1, 16]] = True
    mask = StructuredMask({"token": {"blocks.0.ffn": keep}})
    small = vitrim.compact(model, mask).architecture
    tokens = {entry["branch"]: entry["dims"]["token"] for entry in kept_branches(model, mask)}
    assert all(each == [3, 17] for each in tokens.values())
    found = token_map(small)
    assert found is not None
    assert found["counts"] == [17, 3, 3, 3, 3]
    assert found["exits"] == [5, *[1] * 14, 5]
    assert token_map(model.architecture) is None


def test_patches_that_are_chosen_for_each_image_have_exits_of_their_own() -> None:
    model = vitrim.select_tokens(tiny_vit(img_size=32, depth=3), "evit", stages=[0, 1], ratio=0.5)
    images = torch.randn(6, 3, 32, 32)
    found = selection_map(model, images, 2)
    assert found["counts"] == [17, 17, 10, 10, 7, 7, 7]
    assert len(found["chosen"]) == 2
    for exits in found["chosen"]:
        # 8 of 16 leave behind the first attention; of 8 and the fused token 5 stay.
        assert exits.count(2) == 8
        assert exits.count(7) in (4, 5)
        assert exits.count(2) + exits.count(4) + exits.count(7) == 16
    assert found["averaged"] == 6
    tokens = {entry["branch"]: entry["dims"]["token"] for entry in kept_branches(model, model)}
    assert tokens["blocks.2.ffn"] == [7, 7]


def test_patches_that_leave_by_place_before_a_selection_keep_their_exits() -> None:
    model = vitrim.lift(tiny_vit(img_size=32, depth=3))
    stem, first = torch.ones(17, dtype=torch.bool), torch.ones(17, dtype=torch.bool)
    stem[16], first[15:] = False, False
    mask = StructuredMask({"token": {"stem.out": stem, "blocks.0.attn": first}})
    small = vitrim.compact(model, mask)
    selecting = vitrim.select_tokens(small, "dynamicvit", stages=[1], counts=[6]).eval()
    found = selection_map(selecting, torch.randn(4, 3, 32, 32), 4)
    for exits in found["chosen"]:
        assert exits[15] == 0, "never embedded"
        assert exits[14] == 1, "dropped behind the first attention"
        assert exits[:14].count(7) == 6
        assert exits[:14].count(3) == 8
