"""Buckets: an image gets the logits of its own count, the largest count bounds the cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_networks import selecting_architectures
from selecting_models import divided, noise_images, sharp_selection
from tiny_models import relative_error, tiny_vit
from torch import Tensor
from vitrim import BucketedModel, Buckets, InputError, bucketed, load, load_bucketed
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.bucket_rules import RULES, Rule, divergences
from vitrim.compress.tokens.select import SelectMethod

COUNTS = (3, 6, 11)


def images(count: int = 24, seed: int = 3) -> Tensor:
    return noise_images(count, seed)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["class-attention", "column-attention", "dynamicvit", "dps"])
def test_an_image_gets_the_logits_of_its_bucket(method: SelectMethod, rule: Rule) -> None:
    pictures = images()
    model = divided(sharp_selection(method), COUNTS, pictures, rule)
    assert model.buckets.rule == rule
    found, counts = model(pictures), model.bucket_of(pictures)
    assert len(counts.unique()) > 1
    for count in counts.unique().tolist():
        own = counts == count
        expected = model.fixed(count)(pictures)[own]
        assert relative_error(found[own], expected) < 1e-6


@settings(suppress_health_check=list(HealthCheck), max_examples=25)
@given(st.data())
def test_networks_of_any_kind_get_buckets(data: st.DataObject) -> None:
    architecture: Architecture = data.draw(selecting_architectures())
    last = architecture.selects[-1]
    assume(last.scorer != "random" and not last.fused and last.patches > 1)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    network = CompactModel(architecture).eval()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    low = data.draw(st.integers(1, last.patches - 1))
    coverage = data.draw(st.floats(0.05, 1.0))
    model = bucketed(network, (low, last.patches), coverage=coverage)
    pictures = torch.randn(4, *architecture.image)
    counts = model.bucket_of(pictures)
    for place, count in enumerate(counts.tolist()):
        # Alone, so that the choice rests on the same numbers.
        alone = pictures[place : place + 1]
        assume(model.bucket_of(alone).item() == count)
        assert relative_error(model(alone), model.fixed(count)(alone)) < 1e-6


def test_a_bucket_is_the_smallest_count_that_holds_the_coverage() -> None:
    model = bucketed(sharp_selection(), COUNTS, coverage=0.5)
    pictures = images()
    covered = model.covered(pictures)
    assert bool((covered[:, 1:] >= covered[:, :-1]).all())
    for held, count in zip(covered.tolist(), model.bucket_of(pictures).tolist(), strict=True):
        enough = [each for each, share in zip(COUNTS, held, strict=True) if share >= 0.5]
        assert count == (enough or [COUNTS[-1]])[0]


def test_the_largest_bucket_takes_images_that_no_bucket_covers() -> None:
    model = bucketed(sharp_selection(), COUNTS, coverage=1.0)
    assert model.bucket_of(images()).tolist() == [COUNTS[-1]] * 24


@given(st.floats(3, 11))
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
def test_calibration_meets_the_mean_and_leaves_little(mean: float) -> None:
    pictures = images()
    model = bucketed(MODEL, COUNTS, images=pictures, mean_patches=mean, rule="coverage")
    found = model.shares(pictures)
    assert found.mean_patches <= mean + 1e-9
    assert model.buckets.shares == found.shares
    assert model.buckets.images == 24
    # One image more in the next bucket is the finest step.
    assert found.mean_patches > mean - 5 / 24 - 1e-9 or model.buckets.coverage == 1.0
    assert float(model.bucket_of(pictures).double().mean()) == pytest.approx(found.mean_patches)


@given(st.floats(3, 11))
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
def test_learned_buckets_meet_the_mean_where_each_image_is_predicted_by_the_others(
    mean: float,
) -> None:
    model = bucketed(MODEL, COUNTS, images=images(), mean_patches=mean)
    found = model.calibration
    assert found is not None
    assert found.mean_patches <= mean + 1e-9
    assert found.mean_patches > mean - 5 / 24 - 1e-9 or found.shares[-1] == 1
    assert model.buckets.rule == "divergence"


def test_images_whose_logits_need_few_patches_get_a_small_bucket() -> None:
    def pictures(seed: int) -> Tensor:
        found = images(64, seed)
        # Of an almost empty image any patches give the same logits.
        found[::2] *= 0.01
        return found

    model, other = sharp_selection("dynamicvit"), pictures(4)
    changed = {}
    for rule in RULES:
        each = bucketed(model, COUNTS, images=pictures(3), mean_patches=6.5, rule=rule)
        with torch.no_grad():
            logits = [each(other), each.fixed(COUNTS[-1])(other)]
        changed[rule] = float(divergences(logits).exp().mean())
        assert each.shares(other).mean_patches < 7.5
        if rule == "divergence":
            kept = each.bucket_of(other).double()
            assert float(kept[::2].mean()) == COUNTS[0]
            assert float(kept[1::2].mean()) > 8
    assert changed["divergence"] < 0.5 * changed["coverage"]


def test_a_prediction_for_another_stream_is_refused() -> None:
    model = bucketed(sharp_selection(), COUNTS, images=images(), mean_patches=6.5)
    learned = model.buckets.divergence
    assert learned is not None
    short = learned.model_copy(update={"weights": tuple(row[:-1] for row in learned.weights)})
    buckets = model.buckets.model_copy(update={"divergence": short})
    with pytest.raises(InputError, match=r"rows of 47 weights; .* before select.1 has 48 features"):
        BucketedModel(model.network, buckets)


MODEL = sharp_selection()


def test_the_multiply_adds_are_those_of_each_bucket() -> None:
    model = bucketed(sharp_selection(), COUNTS, images=images(), mean_patches=7)
    found = model.shares(images())
    assert found.macs == tuple(count_macs(model.fixed(count).architecture) for count in COUNTS)
    assert found.worst_macs == found.macs[-1]
    assert found.macs[0] < found.mean_macs < found.macs[-1]


def test_all_buckets_share_the_memory_of_the_weights() -> None:
    model = bucketed(sharp_selection(), COUNTS, coverage=0.5)
    sources = dict(model.network.named_parameters())
    for count in COUNTS:
        for name, parameter in model.fixed(count).named_parameters():
            assert parameter.data_ptr() == sources[name].data_ptr()


def test_gradients_reach_the_weights_of_all_buckets() -> None:
    model = divided(sharp_selection(), COUNTS, images())
    model(images()).square().sum().backward()
    assert all(
        parameter.grad is not None
        for name, parameter in model.network.named_parameters()
        if name.startswith("steps.")
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_model_returns_the_same_logits(tmp_path: Path, rule: Rule) -> None:
    model = divided(sharp_selection(), COUNTS, images(), rule)
    model.save(tmp_path / "model")
    again = load_bucketed(tmp_path / "model")
    assert again.buckets == model.buckets
    assert torch.equal(again(images()), model(images()))
    # Without buckets it is the network of the bound.
    assert load(tmp_path / "model").architecture.selects[-1].patches == COUNTS[-1]
    model.save(tmp_path / "model", overwrite=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"counts": [6, 3]}, "must be increasing"),
        ({"counts": ["3", 6]}, "counts.0: Input should be a valid integer"),
        ({"counts": [3, 16]}, "counts: select.1 leaves 16 tokens behind the prefix, there are 16"),
        ({"coverage": 0}, "coverage: Input should be greater than 0"),
        ({"schema": "vitrim.buckets/9"}, "schema: Input should be 'vitrim.buckets/1'"),
        ({"coverage": None}, "give coverage or divergence, one of them"),
        (
            {"divergence": {"weights": [[1.0]], "bias": [0.0], "threshold": 0.0}},
            "give coverage or divergence, one of them",
        ),
        (
            {
                "coverage": None,
                "divergence": {"weights": [[1.0], [2.0]], "bias": [0.0, 0.0], "threshold": 0.0},
            },
            "divergence of 2 buckets for 2 counts",
        ),
        (
            {"coverage": None, "divergence": {"weights": [[1.0]], "bias": [], "threshold": 0.0}},
            "divergence: 0 constants for 1 rows of weights",
        ),
        ({"more": 1}, "more: Extra inputs are not permitted"),
        ({"shares": [0.5, 0.5]}, "shares and the number of images need each other"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    folder = bucketed(sharp_selection(), (3, 6), coverage=0.5).save(tmp_path / "model")
    path = folder / "buckets.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as error:
        load_bucketed(folder)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_buckets_is_refused(tmp_path: Path) -> None:
    folder = bucketed(sharp_selection(), (3, 6), coverage=0.5).save(tmp_path / "model")
    (folder / "buckets.json").write_text("[NaN]")
    with pytest.raises(InputError, match=r"buckets\.json: not JSON"):
        load_bucketed(folder)
    (folder / "buckets.json").unlink()
    with pytest.raises(InputError, match=r"vitrim.load reads a model without buckets"):
        load_bucketed(folder)


def test_selections_without_scores_of_the_image_are_refused() -> None:
    with pytest.raises(InputError, match=r"select.1: scorer 'random' has no scores of an image"):
        bucketed(sharp_selection("random"), COUNTS, coverage=0.5)
    with pytest.raises(InputError, match=r"select.1: a fused token stands for the dropped patches"):
        bucketed(sharp_selection("evit"), COUNTS, coverage=0.5)
    with pytest.raises(InputError, match=r"selects no patches; call vitrim.select_tokens first"):
        bucketed(tiny_vit(img_size=32), COUNTS, coverage=0.5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "give coverage, or images and mean_patches, and not both"),
        ({"coverage": 0.5, "mean_patches": 4}, "and not both"),
        ({"mean_patches": 4}, "mean_patches needs images"),
        ({"mean_patches": 4, "images": images(1)}, "fitted to two images or more"),
        ({"coverage": 0.5, "rule": "divergence"}, "coverage is the threshold of the other rule"),
        ({"coverage": 0.5, "rule": "best"}, "rule = 'best': choose divergence or coverage"),
        ({"mean_patches": 2, "images": images(2)}, "give a number from 3 to 11"),
        ({"coverage": 1.5}, "buckets: coverage: Input should be less than or equal to 1"),
        ({"coverage": 0.5, "images": images(2)[:, :1]}, r"give float images of shape"),
    ],
)
def test_wrong_arguments_are_refused(options: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        bucketed(MODEL, COUNTS, **options)


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(InputError, match=r"buckets: counts: counts \[6, 3\] must be increasing"):
        bucketed(MODEL, (6, 3), coverage=0.5)
    with pytest.raises(InputError, match=r"buckets: counts: select.1 leaves 16 tokens"):
        bucketed(MODEL, (6, 16), coverage=0.5)
    model = BucketedModel(MODEL, Buckets(counts=(3, 6), coverage=0.5))
    with pytest.raises(InputError, match="bucket 4: there is none of 4 patches; choose 3, 6"):
        model.fixed(4)
