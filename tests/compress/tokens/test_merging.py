"""ToMe and PPT: the choice, the merge as a matrix, and the networks that must be equal."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import vitrim
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import fvcore_macs, relative_error, tiny_vit
from torch import Tensor
from vitrim.compress.network.modules.attention import Attention
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.merging.matching import (
    descending_ranks,
    merge_matrix,
    merge_places,
    merged_sizes,
    most_removable,
    prune_places,
    removal_schedule,
)
from vitrim.compress.tokens.merging.merged import MergedModel, MergingOptions, merged_tokens
from vitrim.core.errors import InputError, UnsupportedModel

DISTILLED = "deit_tiny_distilled_patch16_224"


def lifted(name: str = "vit_tiny_patch16_224", **overrides: Any) -> CompactModel:
    settings = {"img_size": 40, "depth": 3} | overrides
    return vitrim.lift(tiny_vit(name, **settings)).eval()


def images_for(model: CompactModel, count: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, *model.architecture.image)


def matched(keys: np.ndarray, r: int, prefix: int) -> list[list[int]]:
    """The source's matching of one image, by sorting: the tokens of each new token, in order."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    even, odd = list(range(0, len(keys), 2)), list(range(1, len(keys), 2))
    similarity = unit[even] @ unit[odd].T
    similarity[[place for place, token in enumerate(even) if token < prefix]] = -np.inf
    similarity[:, [place for place, token in enumerate(odd) if token < prefix]] = -np.inf
    best, nearest = similarity.argmax(axis=1), similarity.max(axis=1)
    merging = sorted(range(len(even)), key=lambda place: (-nearest[place], place))[:r]
    groups = {token: [token] for token in odd}
    for place in merging:
        groups[odd[best[place]]].append(even[place])
    staying = [token for place, token in enumerate(even) if place not in merging]
    rest = [
        *(each for each in staying if each >= prefix),
        *(each for each in odd if each >= prefix),
    ]
    return [groups.get(token, [token]) for token in [*range(prefix), *rest]]


@st.composite
def matchings(draw: Any) -> tuple[Tensor, int, int]:
    """Keys (batch, tokens, width), a number of pairs, and a number of prefix tokens."""
    prefix = draw(st.integers(0, 3))
    tokens = draw(st.integers(prefix + 2, 17))
    r = draw(st.integers(1, most_removable(tokens, prefix)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return torch.randn(2, tokens, 4, generator=generator, dtype=torch.float64), r, prefix


@given(matchings())
@settings(max_examples=60)
def test_places_are_those_of_the_matching_by_sorting(drawn: tuple[Tensor, int, int]) -> None:
    keys, r, prefix = drawn
    places = merge_places(keys, r, prefix)
    for image, found in zip(keys.numpy(), places.tolist(), strict=True):
        groups = matched(image, r, prefix)
        assert len(groups) == keys.shape[1] - r
        for place, tokens in enumerate(groups):
            assert sorted(tokens) == [token for token, at in enumerate(found) if at == place]


@given(matchings())
@settings(max_examples=60)
def test_a_merge_is_a_matrix_of_size_weighted_means(drawn: tuple[Tensor, int, int]) -> None:
    keys, r, prefix = drawn
    count = keys.shape[1] - r
    sizes = torch.arange(1, 2 * keys.shape[1] + 1).reshape(2, -1).double()
    places, x = merge_places(keys, r, prefix), keys + 1
    matrix, after = merge_matrix(places, sizes, count), merged_sizes(places, sizes, count)
    assert matrix.shape == (2, count, keys.shape[1])
    assert after.sum(dim=1).tolist() == sizes.sum(dim=1).tolist()
    merged = matrix @ x
    for image in range(2):
        for place in range(count):
            own = places[image] == place
            mean = (x[image, own] * sizes[image, own, None]).sum(dim=0) / sizes[image, own].sum()
            torch.testing.assert_close(merged[image, place], mean)
            if own.sum() == 1:
                assert torch.equal(merged[image, place], x[image, own][0])


def test_equal_scores_are_ranked_by_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, -torch.inf, 3.0, -torch.inf]])
    assert descending_ranks(scores).tolist() == [[2, 0, 3, 4, 1, 5]]
    assert prune_places(scores).tolist() == [[2, 0, 3, 4, 1, 5]]
    # All keys are equal: the first even patches merge into the first odd patch.
    places = merge_places(torch.ones(1, 8, 2), 2, 1)
    assert places.tolist() == [[0, 2, 2, 3, 2, 4, 1, 5]]


def test_a_token_whose_key_is_zero_has_a_place() -> None:
    places = merge_places(torch.zeros(1, 6, 3), 2, 1)
    assert sorted(set(places[0].tolist())) == [0, 1, 2, 3]


def test_schedules_are_constant_or_have_a_trend() -> None:
    assert removal_schedule(13, 3) == (13, 13, 13)
    assert removal_schedule((8, -1.0), 5) == (16, 12, 8, 4, 0)
    assert removal_schedule((8, 1), 5) == (0, 4, 8, 12, 16)
    assert removal_schedule((13, 0.0), 4) == (13, 13, 13, 13)
    assert removal_schedule([3, 2], 4) == (3, 2, 0, 0)
    assert removal_schedule((5, -1.0), 1) == (10,)


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "r = -1: a number of removed tokens is negative"),
        ([1, -2], r"r = \[1, -2\]: a number of removed tokens is negative"),
        ((4, 1.5), r"the trend 1.5 must lie between -1 and 1"),
        ([1] * 4, "4 numbers for 3 attentions; give one for each"),
        ((1, 2, 3), r"give \(number, trend\), or a list"),
    ],
)
def test_a_wrong_schedule_is_refused(r: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merged_tokens(lifted(), r=r)


@pytest.mark.parametrize("method", ["tome", "ppt"])
def test_without_removals_the_network_is_unchanged(method: Any) -> None:
    model = lifted()
    images = images_for(model)
    merged = merged_tokens(model, method, 0)
    assert merged.token_counts == (26,) * 6
    assert torch.equal(merged(images), model(images))


def test_counts_and_sizes_after_every_step() -> None:
    model = lifted()
    merged = merged_tokens(model, "tome", 4)
    assert merged.token_counts == (22, 22, 18, 18, 14, 14)
    streams = list(merged.trace(images_for(model)))
    assert [x.shape[1] for x, _, _ in streams] == [26, *merged.token_counts]
    for x, sizes, _ in streams[1:]:
        assert sizes is not None
        assert sizes.shape == x.shape[:2]
        assert sizes.sum(dim=1).tolist() == [26.0] * 3
        # The class token does not merge.
        assert sizes[:, 0].tolist() == [1.0] * 3


def test_at_most_half_of_the_patches_are_removed_at_once() -> None:
    assert merged_tokens(lifted(), "tome", 99).token_counts == (14, 14, 8, 8, 5, 5)
    assert merged_tokens(lifted(DISTILLED), "tome", 99).token_counts[0] == 27 - 12


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", DISTILLED])
def test_tome_is_the_network_of_the_source(name: str) -> None:
    model = lifted(name)
    images = images_for(model, 2)
    merged = merged_tokens(model, "tome", 5)
    with torch.no_grad():
        wanted = torch.cat([_by_sorting(model, image[None], 5) for image in images])
        assert relative_error(merged(images), wanted) < 1e-5


def _by_sorting(model: CompactModel, image: Tensor, r: int) -> Tensor:
    """ToMe of one image, token by token."""
    prefix, x = model.architecture.prefix, model.embed(image)
    sizes = torch.ones(x.shape[1])
    for step in model.steps:
        branch = cast("Any", step)[0]
        if not isinstance(branch.core, Attention):
            x = model.run_step([branch], x)
            continue
        core, normed = branch.core, branch.norm(x)
        q, k = core.queries_and_keys(normed, normed)
        scores = q @ k.transpose(-2, -1) * core.spec.scale + sizes.log()
        y = (scores.softmax(dim=-1) @ core.values(normed)).transpose(1, 2).flatten(2)
        x = x + core.out(y)
        groups = matched(k.mean(dim=1)[0].numpy(), r, prefix)
        rows = [
            sum(x[0, token] * sizes[token] for token in group) / sizes[group].sum()
            for group in groups
        ]
        x = torch.stack(rows)[None]
        sizes = torch.stack([sizes[group].sum() for group in groups])
    logits: Tensor = model.classify(x)
    return logits


def _repeated(model: CompactModel, patterns: int = 4) -> Tensor:
    """Images of few different patches: those at 2 n and 2 n + 1 are equal."""
    torch.manual_seed(5)
    (rows, columns), (channels, *_) = model.architecture.grid, model.architecture.image
    height, width = model.architecture.stem.patch
    patches = 2 * torch.randn(2, patterns, channels, height, width)
    chosen = patches[:, torch.arange(rows * columns) // 2 % patterns]
    tiled = chosen.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    found: Tensor = tiled.flatten(4, 5).flatten(2, 3)
    return found


@pytest.mark.parametrize(("method", "pool"), [("tome", "token"), ("tome", "avg"), ("ppt", "token")])
def test_merging_equal_tokens_changes_nothing(method: Any, pool: str) -> None:
    model = lifted(pos_embed="none", global_pool=pool, class_token=True)
    images = _repeated(model)
    everything = MergingOptions(threshold=torch.inf)
    merged = merged_tokens(model, method, 12, blocks=[0], options=everything)
    plain = merged_tokens(
        model, method, 12, blocks=[0], options=MergingOptions(False, everything.threshold)
    )
    with torch.no_grad():
        wanted = model(images)
        assert merged.token_counts == (14,) * 6
        assert relative_error(merged(images), wanted) < 1e-5
        # It is the sizes in the attention that make it exact.
        assert relative_error(plain(images), wanted) > 1e-4


def test_ppt_prunes_images_whose_scores_differ_and_merges_the_others() -> None:
    model = lifted()
    images = images_for(model, 4)
    with torch.no_grad():
        steps = list(merged_tokens(model, "ppt", 6, blocks=[1]).trace(images))
        merging = merged_tokens(model, "tome", 6, blocks=[1])(images)
        x = steps[2][0]
        branch = cast("Any", model.steps[2])[0]
        q, k = branch.core.queries_and_keys(branch.norm(x), branch.norm(x))
        lengths = branch.core.values(branch.norm(x)).transpose(1, 2).flatten(2).norm(dim=-1)
        scores = (branch.core.weights(q, k)[:, :, 0].sum(dim=1) * lengths)[:, 1:]
        scores = scores / scores.sum(dim=1, keepdim=True)
        spread = scores.var(dim=1)
        between = float(spread.sort().values[1:3].mean())
        options = MergingOptions(threshold=between)
        mixed = merged_tokens(model, "ppt", 6, blocks=[1], options=options)
        sizes = cast("Tensor", list(mixed.trace(images))[-1][1])
        found = mixed(images)
    for number in range(4):
        if spread[number] < between:
            assert relative_error(found[number], merging[number]) < 1e-5
        else:
            order = scores[number].argsort(descending=True, stable=True) + 1
            kept = [0, *order[:19].tolist()]
            row = _places_after(mixed, images[number : number + 1])
            assert [row.index(place) for place in range(20)] == kept
            assert sizes[number].tolist() == [1.0] * 20
    assert {bool(value < between) for value in spread} == {True, False}


def _places_after(merged: MergedModel, images: Tensor) -> list[int]:
    with torch.no_grad():
        found = [places for _, _, places in merged.trace(images) if places is not None]
    return list(map(int, found[0][0]))


def test_ppt_removes_at_the_quarters_of_the_depth() -> None:
    model = lifted(depth=4)
    assert merged_tokens(model, "ppt", 3).token_counts == (26, 26, 23, 23, 20, 20, 17, 17)


@pytest.mark.parametrize("method", ["tome", "ppt"])
def test_a_pruned_network_merges_with_any_widths(method: Any) -> None:
    model = lifted(num_heads=2)
    mask = vitrim.StructuredMask.random(model, {"embed": 0.6, "head": 0.5, "qk": 0.5, "ffn": 0.4})
    small = vitrim.compact(model, mask).eval()
    images = images_for(model)
    assert torch.equal(merged_tokens(small, method, 0)(images), small(images))
    merged = merged_tokens(small, method, 5)
    assert merged(images).shape == (3, 5)
    assert merged.macs == fvcore_macs(merged, images[:1])


@pytest.mark.parametrize("last_queries", [False, True])
def test_multiply_adds_are_those_that_fvcore_counts(last_queries: bool) -> None:
    architecture = lifted().architecture.model_copy(update={"last_queries": last_queries})
    model = CompactModel(architecture).eval()
    merged = merged_tokens(model, "tome", (5, -1.0))
    assert merged.macs == fvcore_macs(merged, images_for(model, 1))
    assert merged.token_counts[-1] == (1 if last_queries else merged.token_counts[-3])


def test_the_last_block_without_patches_changes_no_output() -> None:
    model = lifted()
    short = vitrim.lift(tiny_vit(img_size=40, depth=3)).eval()
    short.architecture = short.architecture.model_copy(update={"last_queries": True})
    images = images_for(model)
    with torch.no_grad():
        wanted = merged_tokens(model, "tome", 4)(images)
        assert relative_error(merged_tokens(short, "tome", 4)(images), wanted) < 1e-5


def test_gradients_reach_every_weight() -> None:
    model = lifted().train()
    merged = merged_tokens(model, "tome", 5)
    assert merged.training
    merged(images_for(model)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in merged.parameters())


@pytest.mark.parametrize(
    ("method", "name", "settings", "message"),
    [
        ("tome", "eva02_tiny_patch14_224", {}, r"blocks\.0\.attn: .*rotary"),
        ("tome", "beit_base_patch16_224", {}, r"blocks\.0\.attn: .*relative position bias"),
        ("tome", "vit_small_patch16_18x2_224", {}, r"blocks\.0\.\S+: parallel sub-layers"),
        ("tome", "vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}, "pool: "),
        ("ppt", DISTILLED, {}, "protects no other one; this network has 2 prefix tokens"),
        ("ppt", "vit_tiny_patch16_224", {"reg_tokens": 2}, "this network has 3 prefix tokens"),
        (
            "ppt",
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "class_token": False},
            "pools by 'mean'",
        ),
    ],
)
def test_what_cannot_merge_is_refused_with_its_path(
    method: Any, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        merged_tokens(tiny_vit(name, **settings), method)


def test_a_network_with_a_token_mask_is_refused() -> None:
    model = lifted()
    small = vitrim.compact(model, vitrim.choose_tokens(model, "radial", [20, 15, 10]))
    with pytest.raises(UnsupportedModel, match="already drops patches, so tome cannot run it"):
        merged_tokens(small)


def test_unknown_methods_and_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="method 'evit' is unknown; choose one of tome, ppt"):
        merged_tokens(lifted(), "evit")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there is no attention 7 of 3"):
        merged_tokens(lifted(), blocks=[0, 7])


def test_a_merged_network_is_not_read_as_the_one_inside() -> None:
    with pytest.raises(UnsupportedModel, match="MergedModel"):
        vitrim.lift(merged_tokens(lifted(), "tome", 4))
