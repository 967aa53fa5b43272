"""Masks of single weights: exact shares, nested rounds, random comparisons, and hostile files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import tiny_vit
from torch import Tensor
from vitrim import WeightMask
from vitrim.compress.masks.weight_choice import (
    Ranking,
    WeightOptions,
    kept_weights,
    matrix_names,
    round_sparsities,
)
from vitrim.compress.masks.weight_mask import parameters
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import InputError

SHARES = st.floats(0.01, 0.99)
GRANULARITIES = st.sampled_from(["weight", "row", "column"])
RANKINGS = st.sampled_from(["global", "layerwise", "random", "shuffled"])
SCOPES = st.sampled_from(["all", "attention", "ffn"])


@pytest.fixture(scope="module")
def network() -> CompactModel:
    return vitrim.lift(tiny_vit())


def chosen(model: CompactModel, **options: Any) -> WeightMask:
    return WeightMask.from_magnitude(model, **options)


def counts(kept: dict[str, Tensor]) -> list[int]:
    return [int((~keep).sum()) for keep in kept.values()]


@given(share=SHARES, ranking=st.sampled_from(["global", "random", "shuffled"]), scope=SCOPES)
@settings(max_examples=25)
def test_single_weights_hit_the_share_exactly(
    network: CompactModel, share: float, ranking: Any, scope: Any
) -> None:
    mask = WeightMask.from_magnitude(network, share, ranking=ranking, scope=scope)
    assert set(mask.kept) == set(matrix_names(network.architecture, scope))
    assert mask.zeros == round(share * mask.total)


@given(share=SHARES, granularity=GRANULARITIES, ranking=RANKINGS)
@settings(max_examples=30)
def test_whole_units_are_removed_up_to_the_share(
    network: CompactModel, share: float, granularity: Any, ranking: Any
) -> None:
    mask = WeightMask.from_magnitude(network, share, granularity=granularity, ranking=ranking)
    largest = 1
    for keep in mask.kept.values():
        if granularity != "weight":
            lines = keep if granularity == "row" else keep.T
            assert bool((lines.all(dim=1) | ~lines.any(dim=1)).all())
            largest = max(largest, lines.shape[1])
        wanted = round(share * keep.numel())
        if ranking == "layerwise":
            size = 1 if granularity == "weight" else lines.shape[1]
            assert wanted - size < int((~keep).sum()) <= wanted
    if ranking != "layerwise":
        wanted = round(share * mask.total)
        assert wanted - largest < mask.zeros <= wanted


@given(
    share=st.floats(0.3, 0.99),
    rounds=st.integers(1, 5),
    granularity=GRANULARITIES,
    ranking=RANKINGS,
)
@settings(max_examples=25)
def test_masks_of_rounds_are_nested(
    network: CompactModel, share: float, rounds: int, granularity: Any, ranking: Any
) -> None:
    sparsities = round_sparsities(share, rounds)
    assert len(sparsities) == rounds
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == share
    before: WeightMask | None = None
    for number, sparsity in enumerate(sparsities):
        # Weights change between rounds.
        changed = vitrim.lift(tiny_vit(seed=number))
        mask = WeightMask.from_magnitude(
            changed, sparsity, granularity=granularity, ranking=ranking, within=before, seed=3
        )
        if before is not None:
            assert all(bool((~keep | before.kept[name]).all()) for name, keep in mask.kept.items())
        if granularity == "weight" and ranking != "layerwise":
            assert mask.zeros == round(sparsity * mask.total)
        before = mask


def test_the_smallest_weights_of_all_matrices_go(network: CompactModel) -> None:
    mask = WeightMask.from_magnitude(network, 0.7)
    weights = parameters(network)
    gone = max(float(weights[name][~keep].abs().max()) for name, keep in mask.kept.items())
    stay = min(float(weights[name][keep].abs().min()) for name, keep in mask.kept.items())
    assert gone <= stay


def test_rows_go_by_their_mean_square(network: CompactModel) -> None:
    mask = WeightMask.from_magnitude(network, 0.5, granularity="row", scope="ffn")
    weights = parameters(network)
    gone, stay = [], []
    for name, keep in mask.kept.items():
        means = weights[name].square().mean(dim=1)
        gone.append(means[~keep.any(dim=1)])
        stay.append(means[keep.any(dim=1)])
    assert torch.cat(gone).max() <= torch.cat(stay).min()


def test_random_masks_have_the_shares_of_the_global_one(network: CompactModel) -> None:
    kinds: tuple[Ranking, ...] = ("global", "random", "shuffled")
    # One matrix is much smaller than the others, so that shares differ.
    uneven = vitrim.lift(tiny_vit())
    with torch.no_grad():
        uneven.get_parameter("steps.0.0.core.q.weight").mul_(0.01)
    masks = {kind: WeightMask.from_magnitude(uneven, 0.6, ranking=kind) for kind in kinds}
    shares = {kind: counts(dict(mask.kept)) for kind, mask in masks.items()}
    assert shares["random"] == shares["global"]
    assert shares["shuffled"] != shares["global"]
    assert sorted(shares["shuffled"]) == sorted(shares["global"])
    name = "steps.0.0.core.k.weight"
    assert not torch.equal(masks["random"].kept[name], masks["global"].kept[name])
    again = WeightMask.from_magnitude(uneven, 0.6, ranking="shuffled")
    other = WeightMask.from_magnitude(uneven, 0.6, ranking="shuffled", seed=1)
    assert torch.equal(again.kept[name], masks["shuffled"].kept[name])
    assert not torch.equal(other.kept[name], again.kept[name])
    assert network.get_parameter("steps.0.0.core.q.weight").abs().max() > 0.01


def test_a_zeroed_copy_computes_without_the_weights(network: CompactModel) -> None:
    mask = WeightMask.from_magnitude(network, 0.5)
    copy = mask.zeroed(network)
    for name, weight in copy.named_parameters():
        source = network.get_parameter(name)
        keep = mask.kept.get(name, torch.ones_like(source, dtype=torch.bool))
        assert torch.equal(weight, source * keep)
    assert float(network.get_parameter("steps.0.0.core.q.weight").eq(0).sum()) == 0


def test_a_saved_mask_is_loaded_equal(network: CompactModel, tmp_path: Path) -> None:
    mask = WeightMask.from_magnitude(network, 0.9, granularity="weight", scope="attention")
    mask.save(tmp_path / "one.safetensors")
    mask.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()
    found = WeightMask.load(tmp_path / "one.safetensors")
    found.check(network)
    assert found.model == mask.model
    assert found.note == mask.note
    assert found.sparsity == mask.sparsity
    assert all(torch.equal(keep, mask.kept[name]) for name, keep in found.kept.items())
    assert (tmp_path / "one.safetensors").stat().st_size < mask.total / 8 + 4096


def test_a_file_of_something_else_is_not_replaced(network: CompactModel, tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    vitrim.StructuredMask.everything(network).save(path)
    with pytest.raises(InputError, match=r"mask\.safetensors"):
        WeightMask.from_magnitude(network).save(path)
    with pytest.raises(InputError, match=r"schema 'vitrim\.mask/1', wanted"):
        WeightMask.load(path)


HEADER: dict[str, Any] = {
    "schema": "vitrim.weight-mask/1",
    "model": "0" * 64,
    "shapes": {"a": [3, 4]},
    "note": {},
}
BITS = {"a": torch.tensor([255, 240], dtype=torch.uint8)}


def write(path: Path, header: Any, bits: dict[str, Tensor]) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(bits, path, {"vitrim": text})


def test_the_sample_of_the_hostile_files_is_valid(tmp_path: Path) -> None:
    write(tmp_path / "mask", HEADER, BITS)
    assert WeightMask.load(tmp_path / "mask").zeros == 0


@pytest.mark.parametrize(
    ("header", "bits", "message"),
    [
        ({**HEADER, "model": "0" * 63}, BITS, "model: String should match pattern"),
        ({**HEADER, "more": 1}, BITS, "more: Extra inputs are not permitted"),
        ({**HEADER, "shapes": {"a": [3, "4"]}}, BITS, "shapes.a.1: Input should be a valid int"),
        ({**HEADER, "shapes": {"a": [3, -4]}}, BITS, "shapes.a.1: Input should be greater than 0"),
        ({**HEADER, "shapes": {"a": []}}, BITS, "shapes.a: List should have at least 1 item"),
        (
            {**HEADER, "shapes": {"a": [3, 400]}},
            BITS,
            "'a' is U8 [2], but the bits of [3, 400]",
        ),
        (
            {**HEADER, "shapes": {"a": [10**6, 10**6]}},
            BITS,
            "describes 1000000000000 weights",
        ),
        ({**HEADER, "shapes": {"b": [3, 4]}}, BITS, "entry 'a' has a shape or bits, but not both"),
        (HEADER, {"a": torch.tensor([255, 241], dtype=torch.uint8)}, "bits behind its last weight"),
        (
            HEADER,
            {"a": torch.tensor([255, 240], dtype=torch.int16)},
            "'a' is I16 [2], but",
        ),
        ('{"schema": 1, "schema": 2}', BITS, "its metadata are not JSON"),
        ("[]", BITS, "schema 'None', wanted 'vitrim.weight-mask/1'"),
        ({**HEADER, "note": {"a": 1}}, BITS, "note.a: Input should be a valid string"),
    ],
)
def test_hostile_files_are_refused_in_one_line(
    tmp_path: Path, header: Any, bits: dict[str, Tensor], message: str
) -> None:
    path = tmp_path / "hostile"
    write(path, header, bits)
    with pytest.raises(InputError) as caught:
        WeightMask.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\xff" * 64, "not a whole safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "wanted 'vitrim.weight-mask/1'"),
        ((10).to_bytes(8, "little") + b"not json..", "not a whole weight mask"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mask").write_bytes(content)
    with pytest.raises(InputError, match=message):
        WeightMask.load(tmp_path / "mask")
    with pytest.raises(InputError, match="no such weight mask"):
        WeightMask.load(tmp_path / "none")


def test_a_mask_of_another_network_is_refused(network: CompactModel) -> None:
    mask = WeightMask.from_magnitude(network)
    for other, message in (
        (tiny_vit(embed_dim=30), "has shape"),
        (tiny_vit(depth=1), "the network has no such parameter"),
        (tiny_vit(num_classes=7), "made for a network with other parameters"),
    ):
        with pytest.raises(InputError, match=message):
            mask.zeroed(other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: WeightMask.from_magnitude(net, 1.0), "sparsity = 1.0: give a share between"),
        (
            lambda net: chosen(net, ranking="best"),
            "ranking = 'best': choose",
        ),
        (
            lambda net: chosen(net, granularity="head"),
            "granularity = 'head'",
        ),
        (lambda net: chosen(net, scope="head"), "scope = 'head'"),
        (lambda net: WeightMask({"a": torch.ones(3)}, "0" * 64), "a is torch.float32, not boolean"),
        (lambda net: WeightMask({}, "beef"), "'beef' is no fingerprint of a network"),
        (
            lambda net: WeightMask.from_magnitude(
                net, 0.3, within=WeightMask.from_magnitude(net, 0.5)
            ),
            "weights are zero already, a share of 0.5000; give a larger sparsity",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    network: CompactModel, call: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        call(network)


def test_a_network_without_the_scope_is_refused(network: CompactModel) -> None:
    empty = network.architecture.model_copy(update={"steps": ()})
    with pytest.raises(InputError, match="scope = 'ffn': this network has no such sub-layer"):
        kept_weights(empty, {}, WeightOptions(0.5, scope="ffn"))


def test_equal_magnitudes_are_removed_in_order(network: CompactModel) -> None:
    weights = {name: torch.ones_like(weight) for name, weight in parameters(network).items()}
    kept = kept_weights(network.architecture, weights, WeightOptions(0.25))
    flags = np.concatenate([keep.flatten().numpy() for keep in kept.values()])
    assert not flags[: len(flags) // 4].any()
    assert flags[len(flags) // 4 :].all()
