"""Masks by saliency: the scores follow their papers, and the masked and cut models are equal."""

from __future__ import annotations

import pytest
import torch
from tiny_models import relative_error, tiny_vit
from torch.nn import functional as F
from vitrim import StructuredMask, compact, lift, masked
from vitrim.compress.masks.magnitude import magnitude, unit_costs
from vitrim.compress.masks.ranking import Scope
from vitrim.compress.masks.saliency import Criterion, saliency
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 3, 4, 0])
DATA = [(IMAGES[:4], TARGETS[:4]), (IMAGES[4:], TARGETS[4:])]
FFN, ATTENTION = "blocks.0.ffn", "blocks.0.attn"


@pytest.fixture(scope="module")
def model() -> CompactModel:
    return lift(tiny_vit())


def test_costs_are_the_removed_parameters(model: CompactModel) -> None:
    costs = unit_costs(model.architecture, dict(model.named_parameters()), "residual")
    # fc1 row, fc1 bias, fc2 column.
    assert costs["ffn"][FFN].tolist() == [2 * 24 + 1] * 96
    # q and k rows with biases, in each of three heads.
    assert costs["qk"][ATTENTION].tolist() == [2 * 3 * 25] * 8
    # v rows with biases, and out columns.
    assert costs["v"][ATTENTION].tolist() == [3 * (25 + 24)] * 8
    assert costs["head"][ATTENTION].tolist() == [8 * (25 * 3 + 24)] * 3
    assert costs["block"][FFN].item() == sum(
        p.numel() for name, p in model.named_parameters() if name.startswith("steps.1.")
    )
    before = sum(parameter.numel() for parameter in model.parameters())
    cut = compact(model, StructuredMask({"embed": {"*": torch.arange(24) > 0}}))
    assert (
        before - sum(parameter.numel() for parameter in cut.parameters()) == costs["embed"]["*"][0]
    )


def test_magnitudes_are_sums_over_rows_and_columns(model: CompactModel) -> None:
    state = dict(model.named_parameters())
    fc1, fc2 = state["steps.1.0.core.fc1.weight"], state["steps.1.0.core.fc2.weight"]
    l2 = magnitude(model.architecture, state, 2, "unshared")
    l1 = magnitude(model.architecture, state, 1, "unshared")
    torch.testing.assert_close(l2["ffn"][FFN], fc1.square().sum(1) + fc2.square().sum(0))
    torch.testing.assert_close(l1["ffn"][FFN], fc1.abs().sum(1) + fc2.abs().sum(0))
    q, k = state["steps.0.0.core.q.weight"], state["steps.0.0.core.k.weight"]
    torch.testing.assert_close(
        l2["qk"][ATTENTION], (q.square() + k.square()).sum(1).view(3, 8).sum(0)
    )
    torch.testing.assert_close(l2["embed"][f"{FFN}.out"], fc2.square().sum(1))


def test_shared_scores_are_sums_over_sites(model: CompactModel) -> None:
    state = dict(model.named_parameters())
    unshared, shared = (
        magnitude(model.architecture, state, 2, sharing) for sharing in ("unshared", "full")
    )
    for dimension in ("embed", "head", "qk", "v", "ffn"):
        torch.testing.assert_close(
            shared[dimension]["*"], torch.stack(list(unshared[dimension].values())).sum(0)
        )


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool])
def test_raw_pixels_are_refused_with_what_to_do(model: CompactModel, kind: torch.dtype) -> None:
    data = [(IMAGES.mul(50).abs().to(kind), TARGETS)]
    for criterion in ("taylor", "fisher", "head"):
        with pytest.raises(InputError, match=r"data: images of type .*\(pixels / 255 - mean\)"):
            StructuredMask.from_saliency(model, criterion, data=data)


def test_taylor_is_weight_times_gradient(model: CompactModel) -> None:
    network = lift(tiny_vit())
    loss = F.cross_entropy(network(IMAGES), TARGETS)
    loss.backward()
    weight = network.get_parameter("steps.1.0.core.fc2.weight")
    assert weight.grad is not None
    found = saliency(model, "taylor", data=DATA, dimensions=("ffn",))
    torch.testing.assert_close(
        found["ffn"][FFN], (weight * weight.grad).sum(0).abs(), rtol=1e-3, atol=1e-6
    )


def test_head_sensitivity_is_the_mean_magnitude_of_single_gradients(model: CompactModel) -> None:
    sizes = torch.zeros(3)
    for image, target in zip(IMAGES, TARGETS, strict=True):
        network = lift(tiny_vit())
        F.cross_entropy(network(image[None]), target[None]).backward()
        weight = network.get_parameter("steps.0.0.core.out.weight")
        assert weight.grad is not None
        sizes += (weight * weight.grad).sum(0).view(3, 8).sum(1).detach().abs()
    found = saliency(model, "head", data=DATA)
    assert set(found) == {"head"}
    torch.testing.assert_close(found["head"][ATTENTION], sizes / sizes.norm(), rtol=1e-3, atol=1e-5)


def test_fisher_is_the_mean_square_of_single_gradients(model: CompactModel) -> None:
    squares = torch.zeros(3)
    for image, target in zip(IMAGES, TARGETS, strict=True):
        network = lift(tiny_vit())
        F.cross_entropy(network(image[None]), target[None]).backward()
        weight = network.get_parameter("steps.0.0.core.out.weight")
        assert weight.grad is not None
        squares += (weight * weight.grad).sum(0).view(3, 8).sum(1).detach().square()
    found = saliency(model, "fisher", data=DATA, dimensions=("head",))
    torch.testing.assert_close(
        found["head"][ATTENTION], squares / len(IMAGES), rtol=1e-3, atol=1e-6
    )


def test_saliency_leaves_the_model_unchanged(model: CompactModel) -> None:
    before = model(IMAGES)
    saliency(model, "taylor", data=DATA)
    assert torch.equal(model(IMAGES), before)
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_layer_scope_keeps_the_ratio_in_every_group(model: CompactModel) -> None:
    mask = StructuredMask.from_saliency(
        model, "l1", keep_ratio={"ffn": 0.25, "qk": 0.5, "embed": 0.75}, scope="layer"
    )
    assert {(dimension, int(keep.sum())) for dimension, _, keep in mask} == {
        ("ffn", 24),
        ("qk", 4),
        ("embed", 18),
    }


@pytest.mark.parametrize(("criterion", "scope"), [("l2", "layer"), ("fisher", "global")])
def test_the_default_scope_is_the_best_of_the_criterion(
    model: CompactModel, criterion: Criterion, scope: Scope
) -> None:
    found = StructuredMask.from_saliency(model, criterion, data=DATA)
    named = StructuredMask.from_saliency(model, criterion, data=DATA, scope=scope)
    assert found.note == named.note
    assert found.note["scope"] == scope
    for dimension, site, keep in found:
        assert torch.equal(keep, named.kept[dimension][site])


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_wider_scopes_remove_from_the_weak_layer(scope: str) -> None:
    network = lift(tiny_vit())
    with torch.no_grad():
        network.get_parameter("steps.1.0.core.fc1.weight").mul_(0.01)
        network.get_parameter("steps.1.0.core.fc2.weight").mul_(0.01)
    mask = StructuredMask.from_saliency(network, "l2", keep_ratio={"ffn": 0.5}, scope=scope)  # type: ignore[arg-type]
    kept = {site: int(keep.sum()) for site, keep in mask.kept["ffn"].items()}
    assert kept["blocks.0.ffn"] == 1
    assert kept["blocks.1.ffn"] in (95, 96)


def test_global_scope_ranks_dimensions_against_each_other_and_isomorphic_does_not() -> None:
    network = lift(tiny_vit())
    with torch.no_grad():
        for step in (1, 3):
            network.get_parameter(f"steps.{step}.0.core.fc1.weight").mul_(0.01)
            network.get_parameter(f"steps.{step}.0.core.fc2.weight").mul_(0.01)
    everywhere = StructuredMask.from_saliency(network, "l2", keep_ratio=0.6, scope="global")
    assert all(int(keep.sum()) == 1 for keep in everywhere.kept["ffn"].values())
    same = StructuredMask.from_saliency(network, "l2", keep_ratio=0.6, scope="isomorphic")
    assert sum(int(keep.sum()) for keep in same.kept["ffn"].values()) in (115, 116)


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "fisher", "random"])
@pytest.mark.parametrize("sharing", ["unshared", "residual", "full"])
def test_the_cut_model_equals_the_masked_model(
    model: CompactModel, criterion: str, sharing: str
) -> None:
    mask = StructuredMask.from_saliency(
        model,
        criterion,  # type: ignore[arg-type]
        keep_ratio=0.5,
        sharing=sharing,  # type: ignore[arg-type]
        data=DATA,
        seed=1,
    )
    assert mask.sharing == sharing
    cut = compact(model, mask)
    assert sum(p.numel() for p in cut.parameters()) < 0.75 * sum(
        p.numel() for p in model.parameters()
    )
    with torch.no_grad():
        assert relative_error(cut(IMAGES), masked(model, mask)(IMAGES)) < 1e-5


def test_random_is_fixed_by_its_seed(model: CompactModel) -> None:
    one, same, other = (
        StructuredMask.from_saliency(model, "random", keep_ratio=0.5, seed=seed)
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(keep, same.kept[dimension][site]) for dimension, site, keep in one)
    assert any(not torch.equal(keep, other.kept[dimension][site]) for dimension, site, keep in one)


def test_fixed_dimensions_stay_whole_and_blocks_are_removed_only_by_name(
    model: CompactModel,
) -> None:
    mask = StructuredMask.from_saliency(model, "l2", keep_ratio=0.5, fixed=("embed", "head"))
    assert set(mask.kept) == {"qk", "v", "ffn"}
    blocks = StructuredMask.from_saliency(model, "taylor", keep_ratio={"block": 0.5}, data=DATA)
    kept = [bool(keep) for keep in blocks.kept["block"].values()]
    assert True in kept
    assert False in kept
    assert len(compact(model, blocks).architecture.branches) == sum(kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "l3"}, "saliency = 'l3': choose"),
        ({"criterion": "taylor"}, "needs data"),
        ({"criterion": "taylor", "data": []}, "data: no images"),
        ({"scope": "local"}, "scope = 'local': choose"),
        ({"keep_ratio": 0.0}, "keep_ratio embed = 0.0"),
        ({"keep_ratio": {"width": 0.5}}, "names 'width'"),
        ({"criterion": "head", "keep_ratio": {"ffn": 0.5}, "data": DATA}, "scores heads only"),
        ({"fixed": ("embed", "head", "qk", "v", "ffn")}, "every dimension is fixed"),
    ],
)
def test_invalid_arguments_are_refused(
    model: CompactModel, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        StructuredMask.from_saliency(model, **arguments)  # type: ignore[arg-type]
