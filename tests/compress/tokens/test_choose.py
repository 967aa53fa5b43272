"""Every method gives nested sets of the requested sizes, and the mask's compact model is exact."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import vitrim
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from tiny_models import assert_equal_outputs, relative_error, tiny_vit
from torch import Tensor, nn
from vitrim.compress.masks.groups import token_sites
from vitrim.compress.masks.token_sets import token_sets
from vitrim.compress.network.architecture import Architecture, least_tokens
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.sensitivity import features
from vitrim.compress.tokens.attention_scores import top_tokens
from vitrim.compress.tokens.choose import (
    METHODS,
    SCHEDULES,
    WITHOUT_IMAGES,
    Method,
    Schedule,
    TokenRequest,
    radial_scores,
    token_choice,
    whole_scores,
)
from vitrim.compress.tokens.counts import (
    STEM,
    attention_steps,
    fewest_counts,
    macs_share,
    read_counts,
    settled,
    whole_counts,
)
from vitrim.compress.tokens.impact import stem_impact
from vitrim.compress.tokens.leaving_errors import leaving_errors
from vitrim.compress.tokens.streaming import DenseStreams, working_copy
from vitrim.core.errors import InputError

MODELS: dict[str, dict[str, Any]] = {
    "class": {},
    "registers": {"reg_tokens": 2},
    "mean": {"class_token": False, "global_pool": "avg"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "attention-pool": {"class_token": False, "global_pool": "map"},
    "rope": {"name": "eva02_tiny_patch14_224"},
    "bias": {"name": "beit_base_patch16_224"},
    "parallel": {"name": "vit_small_patch16_36x1_224"},
}


@cache
def model_named(name: str) -> CompactModel:
    return vitrim.lift(tiny_vit(**{"img_size": 24, **MODELS[name]})).eval()


@cache
def images_of(count: int = 4) -> Tensor:
    torch.manual_seed(3)
    return torch.randn(count, 3, 24, 24)


def drawn_counts(draw: Any, architecture: Architecture) -> list[int]:
    counts, least = [], max(least_tokens(architecture), 1)
    before = architecture.tokens
    for number, size in enumerate(token_sites(architecture).values()):
        low = max(least, architecture.prefix + 1) if number == 0 else least
        before = draw(st.integers(low, min(before, size)))
        counts.append(before)
    return counts


def check_sets(model: nn.Module, architecture: Architecture, counts: list[int], kept: Any) -> None:
    sets = token_sets(architecture, kept.get("token", {}))
    assert [int(keep.sum()) for keep in sets] == counts
    for before, after in pairwise(sets):
        assert not bool((after & ~before).any())
    # Prefix tokens leave last, the last one first.
    for keep, count in zip(sets, counts, strict=True):
        assert bool(keep[: min(count, architecture.prefix)].all())


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(MODELS)), method=st.sampled_from(METHODS))
def test_sets_are_nested_and_have_the_requested_sizes(
    data: st.DataObject, name: str, method: Method
) -> None:
    model = model_named(name)
    counts = drawn_counts(data.draw, model.architecture)
    wanted = settled(model.architecture, counts)
    images = None if method in WITHOUT_IMAGES else images_of()
    found = token_choice(model, TokenRequest(method, counts, seed=1), images)
    check_sets(model, model.architecture, wanted, found.mask.kept)
    assert list(found.counts.values()) == wanted
    small = vitrim.compact(model, found.mask)
    assert [small.architecture.tokens, *small.architecture.step_tokens()] == wanted
    with torch.no_grad():
        reference = vitrim.masked(model, found.mask)(images_of())
        assert relative_error(small(images_of()), reference) < 1e-5


@settings(max_examples=25)
@given(data=st.data(), architecture=architectures(), method=st.sampled_from(METHODS))
def test_methods_work_for_random_architectures(
    data: st.DataObject, architecture: Architecture, method: Method
) -> None:
    try:
        attention_steps(architecture)
    except InputError:
        return
    model = network(architecture)
    counts = drawn_counts(data.draw, architecture)
    torch.manual_seed(0)
    images = torch.randn(3, *architecture.image, dtype=torch.float64)
    found = token_choice(model, TokenRequest(method, counts), images)
    check_sets(model, architecture, settled(architecture, counts), found.mask.kept)
    with torch.no_grad():
        wanted = vitrim.masked(model, found.mask)(images)
        assert_equal_outputs(vitrim.compact(model, found.mask)(images), wanted, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_met_and_the_model_is_not_changed(method: Method) -> None:
    model = model_named("class")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = None if method in WITHOUT_IMAGES else images_of()
    mask = vitrim.choose_tokens(model, method, macs=0.7, images=images)
    found = token_choice(model, TokenRequest(method, macs=0.7), images)
    assert 0.55 < found.macs <= 0.7
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model_named("class").steps[0][0].core.key_keep is None  # type: ignore[index]
    assert mask.note["tokens"] == method
    assert mask.note["counts"] == ",".join(map(str, found.counts.values()))
    again = token_choice(model, TokenRequest(method, macs=0.7), images)
    assert all(torch.equal(keep, again.mask.kept["token"][site]) for _, site, keep in found.mask)
    assert set(found.record()) == {
        *("schema", "method", "images", "macs_share", "counts", "scores"),
    }


@pytest.mark.parametrize("place", ["stem", "first attention"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_errors_when_patches_leave_are_those_of_the_compact_network(name: str, place: str) -> None:
    model = working_copy(model_named(name))
    architecture = model.architecture
    step = STEM if place == "stem" else attention_steps(architecture)[0]
    scores = whole_scores(model, "column-attention", images_of(), stem=True)
    errors = leaving_errors(model, scores, images_of())[step]
    assert len(errors) == architecture.tokens + 1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0.0, abs=1e-10)
    keep = top_tokens(
        architecture,
        scores[step],
        torch.ones(architecture.tokens, dtype=torch.bool),
        architecture.prefix + 1,
    )
    site = list(token_sites(architecture))[step + 1]
    small = vitrim.compact(model, vitrim.StructuredMask({"token": {site: keep}}))
    with torch.no_grad():
        wanted = features(model, model.features(images_of()))
        found = features(small, small.features(images_of()))
    error = float((found - wanted).square().sum() / wanted.square().sum())
    # Fewer patches may have a smaller error; the curve does not rise.
    assert errors[architecture.prefix + 1] >= error * (1 - 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_errors_may_decide_that_patches_never_enter(method: Method) -> None:
    for name, share in (("class", 0.3), ("rope", 0.3), ("bias", 0.3), ("mean", 0.35)):
        model = model_named(name)
        found = token_choice(model, TokenRequest(method, macs=share, schedule="error"), images_of())
        counts = list(found.counts.values())
        assert counts[0] < model.architecture.tokens
        assert found.macs <= share
        # Scores that do not depend on what is kept elsewhere are those of the first attention.
        fixed = method in (*WITHOUT_IMAGES, "scop")
        assert ("stem.out" in found.scores) != fixed
        small = vitrim.compact(model, found.mask)
        assert small.architecture.patches == counts[0] - model.architecture.prefix
        assert [small.architecture.tokens, *small.architecture.step_tokens()] == counts
        with torch.no_grad():
            reference = vitrim.masked(model, found.mask)(images_of())
            assert relative_error(small(images_of()), reference) < 1e-5


@settings(max_examples=25)
@given(
    data=st.data(),
    architecture=architectures(),
    method=st.sampled_from(METHODS),
    schedule=st.sampled_from(["error", "importance"]),
)
def test_a_searched_budget_holds_for_random_architectures(
    data: st.DataObject, architecture: Architecture, method: Method, schedule: Schedule
) -> None:
    assume(schedule == "error" or method not in WITHOUT_IMAGES)
    try:
        least = macs_share(architecture, fewest_counts(architecture))
    except InputError:
        return
    share = data.draw(st.floats(min(0.99, least * 1.001), 0.99))
    model = network(architecture)
    torch.manual_seed(0)
    images = torch.randn(3, *architecture.image, dtype=torch.float64)
    request = TokenRequest(method, macs=share, schedule=schedule)
    if share < least:
        with pytest.raises(InputError, match="with the fewest tokens"):
            token_choice(model, request, images)
        return
    found = token_choice(model, request, images)
    assert found.macs <= share
    check_sets(model, architecture, list(found.counts.values()), found.mask.kept)
    with torch.no_grad():
        wanted = vitrim.masked(model, found.mask)(images)
        assert_equal_outputs(vitrim.compact(model, found.mask)(images), wanted, 1e-9)


def test_the_stem_is_scored_by_what_the_first_attention_reads() -> None:
    model = working_copy(model_named("mean"))
    for method in ("class-attention", "column-attention", "power-bert", "scop"):
        found = whole_scores(model, method, images_of(), stem=True)
        assert torch.equal(found[STEM], found[0])
        assert STEM not in whole_scores(model, method, images_of())
    found = whole_scores(model, "patch-slimming", images_of(), stem=True)
    sets = [torch.ones(size, dtype=torch.bool) for size in token_sites(model.architecture).values()]
    streams = DenseStreams(model, images_of(), ())
    torch.testing.assert_close(found[STEM], stem_impact(model, streams, sets))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_meets_the_budget(schedule: Schedule) -> None:
    found = token_choice(
        model_named("mean"), TokenRequest("power-bert", macs=0.6, schedule=schedule), images_of()
    )
    assert 0.45 < found.macs <= 0.6
    by_error = TokenRequest("random", macs=0.6, schedule="error")
    assert token_choice(model_named("mean"), by_error, images_of()).images == 4


def test_methods_choose_differently() -> None:
    model = vitrim.lift(tiny_vit(img_size=48, depth=3)).eval()
    torch.manual_seed(0)
    images = torch.randn(4, 3, 48, 48)
    masks = {
        method: vitrim.choose_tokens(model, method, [20, 12, 1], images, seed=2)
        for method in METHODS
    }
    kept = {
        method: tuple(torch.cat([keep for _, _, keep in mask]).tolist())
        for method, mask in masks.items()
    }
    assert len(set(kept.values())) == len(METHODS)


def test_radial_keeps_the_center() -> None:
    model = vitrim.lift(tiny_vit(img_size=48, depth=2)).eval()
    keep = vitrim.choose_tokens(model, "radial", [5, 1]).kept["token"]["blocks.0.attn"]
    assert torch.nonzero(keep).flatten().tolist() == [0, 15, 16, 21, 22]
    once = vitrim.compact(model, vitrim.choose_tokens(model, "radial", [9, 1]))
    # The order of a network that has dropped patches already is taken into account.
    score = radial_scores(once.architecture)[1:]
    assert score.tolist() == sorted(score.tolist(), reverse=True) or len(score) == 36


def test_a_cut_network_can_be_cut_again() -> None:
    model = model_named("class")
    once = vitrim.compact(model, vitrim.choose_tokens(model, "random", [8, 8, 5, 5, 5][:2]))
    for method in METHODS:
        images = None if method in WITHOUT_IMAGES else images_of()
        counts = [once.architecture.tokens - 2, once.architecture.step_tokens()[-1]]
        mask = vitrim.choose_tokens(once, method, counts, images)
        twice = vitrim.compact(once, mask)
        with torch.no_grad():
            wanted = vitrim.masked(once, mask)(images_of())
            assert relative_error(twice(images_of()), wanted) < 1e-5


def test_attention_scores_are_those_of_the_maps() -> None:
    model = working_copy(tiny_vit(img_size=24, depth=1, num_heads=2))
    with torch.no_grad():
        x = model.embed(images_of())
        core = model.steps[0][0].core  # type: ignore[index]
        normed = model.steps[0][0].norm(x)  # type: ignore[index]
        q, k, v = (
            layer(normed).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (core.q, core.k, core.v)
        )
        maps = (q @ k.transpose(2, 3) * core.spec.scale).softmax(-1)
    size = v.transpose(1, 2).flatten(2).norm(dim=-1)
    wanted = {
        "class-attention": maps[:, :, 0].mean(dim=1),
        "column-attention": maps.mean(dim=(1, 2)) * size,
    }
    for method, each in wanted.items():
        found = whole_scores(model, method, images_of())[0]  # type: ignore[arg-type]
        torch.testing.assert_close(found.float(), each.mean(dim=0), rtol=1e-4, atol=1e-6)
    received = maps.sum(dim=(1, 2)) - maps.diagonal(dim1=2, dim2=3).sum(dim=1)
    ranks = received[:, 1:].argsort(dim=-1).argsort(dim=-1).double().mean(dim=0) / 8
    found = whole_scores(model, "power-bert", images_of())[0]
    torch.testing.assert_close(found[1:], ranks)


def test_scop_prefers_patches_that_decide_the_output() -> None:
    model = vitrim.lift(tiny_vit(img_size=24, depth=2)).eval()
    torch.manual_seed(0)
    # All patches but one are the same in every image: their knockoffs are equal to them.
    images = torch.randn(1, 3, 24, 24).repeat(8, 1, 1, 1)
    images[:, :, 8:16, 16:24] = 3 * torch.randn(8, 3, 8, 8)
    score = whole_scores(working_copy(model), "scop", images)[0]
    assert int(score[1:].argmax()) == 5
    assert score[0] == 1.0


@pytest.mark.parametrize(
    ("request_of", "words"),
    [
        ({"method": "patch-slimming", "macs": 0.7}, "patch-slimming' needs images"),
        ({"method": "magic", "macs": 0.7}, "choose one of patch-slimming, class-attention"),
        ({"method": "radial"}, "give the counts, or macs"),
        ({"method": "radial", "macs": 0.7, "counts": [10, 1]}, "one of them"),
        ({"method": "radial", "counts": [10, 1], "schedule": "linear"}, "not both"),
        ({"method": "radial", "counts": [10, 11]}, "counts: 11 tokens at blocks.1, after 10"),
        ({"method": "radial", "macs": 0.7, "schedule": "cosine"}, "choose one of error, imp"),
        ({"method": "radial", "macs": 0.7, "schedule": "importance"}, "radial has no importance"),
        ({"method": "radial", "macs": 0.7, "schedule": "error"}, "'radial' needs images"),
        ({"method": "scop", "counts": [5, 1], "images": "one"}, "at least two images"),
        ({"method": "scop", "counts": [5, 1], "images": "wrong"}, "give float images of shape"),
    ],
)
def test_invalid_requests_are_refused(request_of: dict[str, Any], words: str) -> None:
    images = {"one": images_of()[:1], "wrong": torch.zeros(2, 3, 16, 16)}.get(
        request_of.get("images", "")
    )
    arguments = {**request_of, "images": images}
    with pytest.raises(InputError, match=words):
        vitrim.choose_tokens(model_named("class"), **arguments)


def test_counts_of_the_whole_network_make_an_empty_mask() -> None:
    model = model_named("mean")
    counts = whole_counts(model.architecture)
    assert vitrim.choose_tokens(model, "random", counts).kept == {}
    assert read_counts(model.architecture, counts) == counts
