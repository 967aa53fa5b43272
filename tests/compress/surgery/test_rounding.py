"""Masks rounded to multiples: every width is allowed, the budget holds, saliency decides."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrim.compress.masks.groups import Sharing, architecture_of
from vitrim.compress.masks.mask import StructuredMask
from vitrim.compress.network.architecture import Architecture, AttentionSpec, FfnSpec
from vitrim.compress.surgery.plan import plan
from vitrim.compress.surgery.rounding import macs_cost, params_cost, snap
from vitrim.core.errors import InputError


@pytest.fixture(scope="module")
def demo() -> Architecture:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=4,
        in_chans=1,
        embed_dim=128,
        depth=2,
        num_heads=4,
        num_classes=10,
    )
    return architecture_of(model)


def test_every_width_is_a_multiple(demo: Architecture) -> None:
    mask = StructuredMask.random(
        demo, {"embed": 0.6, "head": 0.75, "qk": 0.7, "v": 0.6, "ffn": 0.45}, seed=3
    )
    snapped = snap(mask, demo, 16, budget=10**9)
    new = plan(demo, snapped).architecture
    assert new.embed % 16 == 0
    for branch in new.branches:
        core = branch.core
        if isinstance(core, AttentionSpec):
            assert core.heads * core.qk % 16 == 0
            assert core.heads * core.v % 16 == 0
        else:
            assert isinstance(core, FfnSpec)
            assert core.hidden % 16 == 0


@settings(max_examples=6)
@given(
    ratio=st.floats(0.3, 0.9),
    seed=st.integers(0, 99),
    sharing=st.sampled_from(["residual", "full"]),
)
def test_the_budget_holds_and_is_used(
    demo: Architecture, ratio: float, seed: int, sharing: Sharing
) -> None:
    mask = StructuredMask.random(demo, ratio, sharing=sharing, seed=seed)
    cost = macs_cost(demo)
    spent = cost(snap(mask, demo, 16, cost=cost))
    assert spent <= cost(mask)
    assert spent >= 0.99 * cost(mask)


def test_unshared_and_per_head_masks_keep_their_form(demo: Architecture) -> None:
    mask = StructuredMask.random(demo, 0.6, sharing="unshared", per_head=True, seed=1)
    snapped = snap(mask, demo, 8)
    assert snapped.sharing == "unshared"
    assert {(d, s): tuple(k.shape) for d, s, k in snapped} == {
        (d, s): tuple(k.shape) for d, s, k in mask
    }
    assert all(
        int(keep.sum()) % 8 == 0 or bool(keep.all()) for d, _, keep in snapped if d == "embed"
    )


def test_parameters_are_the_default_budget(demo: Architecture) -> None:
    mask = StructuredMask.random(demo, 0.5, seed=5)
    cost = params_cost(demo)
    assert 0.99 * cost(mask) <= cost(snap(mask, demo, 16)) <= cost(mask)


def test_saliency_chooses_the_units(demo: Architecture) -> None:
    name = "blocks.0.ffn"
    mask = StructuredMask({"ffn": {name: torch.arange(512) < 24}})
    saliency = {"ffn": {name: torch.arange(512.0)}}

    def units(of: StructuredMask) -> list[int]:
        return torch.nonzero(of.kept["ffn"][name]).flatten().tolist()

    # The budget allows the count above: the best of the removed units return.
    up = snap(mask, demo, 16, saliency=saliency, cost=lambda m: len(units(m)), budget=32)
    assert units(up) == [*range(24), *range(504, 512)]
    # The budget does not: the worst of the kept units go.
    down = snap(mask, demo, 16, saliency=saliency, cost=lambda m: len(units(m)), budget=16)
    assert units(down) == list(range(8, 24))


def test_the_more_salient_branch_keeps_more_units(demo: Architecture) -> None:
    def half(size: int) -> torch.Tensor:
        return torch.arange(size) < 24

    names = ("blocks.0.ffn", "blocks.1.ffn")
    mask = StructuredMask({"ffn": {name: half(512) for name in names}})
    saliency = {"ffn": {names[0]: torch.full((512,), 0.1), names[1]: torch.full((512,), 5.0)}}
    snapped = snap(
        mask, demo, 16, saliency=saliency, cost=lambda m: sum(int(keep.sum()) for _, _, keep in m)
    )
    assert [int(snapped.kept["ffn"][name].sum()) for name in names] == [16, 32]


def test_snapping_twice_changes_nothing(demo: Architecture) -> None:
    mask = snap(StructuredMask.random(demo, 0.5, seed=2), demo, 1)
    again = snap(mask, demo, 1)
    assert all(torch.equal(keep, again.kept[dimension][site]) for dimension, site, keep in mask)


def test_a_width_below_the_multiple_stays_near(demo: Architecture) -> None:
    kept = torch.arange(512) < 5
    snapped = snap(StructuredMask({"ffn": {"blocks.0.ffn": kept}}), demo, 16)
    assert int(snapped.kept["ffn"]["blocks.0.ffn"].sum()) in (4, 5)


def test_an_empty_group_stays_empty(demo: Architecture) -> None:
    mask = StructuredMask(
        {
            "ffn": {"blocks.0.ffn": torch.zeros(512, dtype=torch.bool)},
            "embed": {"*": torch.arange(128) < 100},
        }
    )
    snapped = snap(mask, demo, 16)
    assert not bool(snapped.kept["ffn"]["blocks.0.ffn"].any())
    assert int(snapped.kept["embed"]["*"].sum()) == 96


def test_an_unreachable_budget_or_wrong_argument_is_refused(demo: Architecture) -> None:
    mask = StructuredMask.random(demo, 0.5)
    with pytest.raises(
        InputError, match=r"more than the budget 10; lower round_to or raise the budget"
    ):
        snap(mask, demo, 64, budget=10)
    with pytest.raises(InputError, match="round_to = 0"):
        snap(mask, demo, 0)
    with pytest.raises(InputError, match="has 3 scores"):
        snap(mask, demo, 8, saliency={"embed": {"*": torch.ones(3)}})


def test_rope_pairs_stay_whole(demo: Architecture) -> None:
    data = demo.model_dump(by_alias=True)
    for step in data["steps"]:
        for branch in step:
            if branch["core"]["kind"] == "attention":
                branch["core"]["rope"] = {"layout": "half", "tokens": demo.tokens - 1, "prefix": 1}
    with_rope = Architecture.model_validate(data)
    mask = StructuredMask.random(with_rope, {"qk": 0.4, "embed": 0.7}, seed=4)
    snapped = snap(mask, with_rope, 16)
    snapped.check(with_rope)
    for _, keep in snapped.kept["qk"].items():
        assert torch.equal(keep[:16], keep[16:])
        assert int(keep.sum()) * 4 % 16 == 0
