"""Gates: hard masks forward, identity backward, one unit of each group always kept."""

from __future__ import annotations

import pytest
import torch
import vitrim
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from tiny_models import relative_error, tiny_vit
from vitrim.compress.lift import lift
from vitrim.compress.masks.gates import GATED, Gates
from vitrim.compress.masks.masked_network import MaskedNetwork


@pytest.mark.parametrize("sharing", ["unshared", "residual", "full"])
def test_gates_compute_the_same_as_their_mask(sharing: str) -> None:
    dense = lift(tiny_vit())
    gates = Gates(dense.architecture, sharing)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for scores in gates.scores:
            scores.uniform_(0, 1)
    images = torch.randn(3, 3, 16, 16)
    compacted = vitrim.compact(dense, gates.mask())
    gates.begin()
    gated = MaskedNetwork(dense)(images, gates.value)
    assert relative_error(compacted(images), gated) < 1e-5


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_gates_of_any_kind_of_network_equal_the_cut_model(data: st.DataObject) -> None:
    """Masked equals compact for random scores, over random networks of every kind."""
    architecture = data.draw(architectures())
    # Double precision, so that only rounding differs.
    gates = Gates(architecture, data.draw(st.sampled_from(["unshared", "residual"]))).double()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with torch.no_grad():
        for scores in gates.scores:
            scores.copy_(
                torch.rand(scores.shape, generator=generator, dtype=torch.float64)
                + data.draw(st.sampled_from([-0.2, 0.0, 0.2]))
            )
    mask = gates.mask()
    try:
        mask.check(architecture)
    except vitrim.InputError as error:
        # A reader of few channels may keep none, which is refused.
        if "channels that there are at" not in str(error):
            raise
        reject()
    model = network(architecture)
    images = torch.randn(
        2, *architecture.image, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    found = vitrim.compact(model, mask)(images)
    gates.begin()
    wanted = MaskedNetwork(model)(images, gates.value)
    assert torch.allclose(
        found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.detach().abs().max().clamp(min=1))
    )


def test_every_score_gets_a_gradient_even_if_its_unit_is_removed() -> None:
    dense = lift(tiny_vit())
    gates = Gates(dense.architecture, "residual")
    with torch.no_grad():
        for scores in gates.scores:
            scores[::2] = 0.0
    gates.begin()
    MaskedNetwork(dense)(torch.randn(3, 3, 16, 16), gates.value).square().sum().backward()
    for group, scores in zip(gates.groups, gates.scores, strict=True):
        assert scores.grad is not None
        assert bool((scores.grad != 0).any()), group
        if group.dimension in ("ffn", "qk", "v"):
            assert bool((scores.grad[::2] != 0).any()), (
                f"{group}: a removed unit could never return"
            )


def test_a_group_never_loses_its_last_unit() -> None:
    gates = Gates(lift(tiny_vit()).architecture, "residual")
    with torch.no_grad():
        for scores in gates.scores:
            scores.fill_(-1.0)
            scores[2] = -0.5
    for keep in gates.kept():
        assert int(keep.sum()) == 1
        assert bool(keep[2])


def test_fixed_dimensions_have_no_gate() -> None:
    gates = Gates(lift(tiny_vit()).architecture, "residual", fixed=("head", "embed"))
    assert {group.dimension for group in gates.groups} == {"qk", "v", "ffn"}
    assert gates.value("embed", "stem.out") is None


def test_fixing_everything_or_something_unknown_is_refused() -> None:
    architecture = lift(tiny_vit()).architecture
    with pytest.raises(vitrim.InputError, match="nothing is left to remove"):
        Gates(architecture, "residual", fixed=GATED)
    with pytest.raises(
        vitrim.InputError, match="fixed = 'heads': not a dimension; choose from embed, head"
    ):
        Gates(architecture, "residual", fixed=("heads",))


def test_shared_masks_learn_slower_and_none_decays() -> None:
    """L. Tredese 2023: the rate of a shared mask is scaled by 1 - (times shared / total masks)."""
    gates = Gates(lift(tiny_vit()).architecture, "residual")
    uses = sum(group.uses for group in gates.groups)
    rates = {
        group.dimension: entry["lr"]
        for group, entry in zip(gates.groups, gates.parameter_groups(0.01), strict=True)
    }
    # The stem, the inputs and outputs of four sub-layers, and the head share the embed mask.
    assert rates["embed"] == pytest.approx(0.01 * (1 - 10 / uses))
    assert rates["ffn"] == 0.01
    assert all(entry["weight_decay"] == 0.0 for entry in gates.parameter_groups(0.01))
