"""Accuracy of frozen features: nearest neighbours and the linear probe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vitrim
from tiny_models import tiny_vit
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import Split
from vitrim.compress.oneshot.probe import linear_probe, nearest_neighbours, probe
from vitrim.core.errors import InputError


def _clouds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three well separated clouds of features, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 8) * 5
    return centres[labels] + 0.3 * torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize("classify", [nearest_neighbours, linear_probe])
def test_separated_clouds_are_classified(classify: object) -> None:
    known, labels = _clouds(60, 0)
    found, wanted = _clouds(30, 1)
    assert callable(classify)
    assert classify(known, labels, found).tolist() == wanted.tolist()


def test_a_near_neighbour_outweighs_many_far_ones() -> None:
    known = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]])
    found = torch.tensor([[1.0, 0.01]])
    labels = torch.tensor([1, 0, 0, 0])
    assert nearest_neighbours(known, labels, found).tolist() == [1]
    assert nearest_neighbours(known, labels, found, temperature=100.0).tolist() == [0]


def test_a_linear_probe_ignores_the_scale_of_channels() -> None:
    known, labels = _clouds(60, 0)
    found, _ = _clouds(30, 1)
    scale = torch.logspace(-3, 3, 8)
    expected = linear_probe(known, labels, found)
    assert linear_probe(known * scale, labels, found * scale).tolist() == expected.tolist()


@pytest.mark.parametrize("classes", [0, 4])
def test_a_network_with_or_without_a_head_is_probed_the_same_way_twice(classes: int) -> None:
    model = vitrim.lift(tiny_vit(depth=1, num_classes=classes)).eval()
    train, test = _split(model, 20, 0), _split(model, 10, 1)
    seen: list[int] = []
    first = probe(model, train, test, progress=seen.append)
    assert first == probe(model, train, test)
    assert (first.train_images, first.test_images) == (20, 10)
    assert 0 <= first.knn <= 1
    assert 0 <= first.linear <= 1
    assert seen == sorted(seen)
    assert seen[-1] == 30


def test_bright_and_dark_images_are_distinguished_by_their_features() -> None:
    model = vitrim.lift(tiny_vit(depth=1, num_classes=0)).eval()
    found = probe(model, _split(model, 40, 0), _split(model, 20, 1))
    assert found.linear == 1.0


def test_an_empty_split_is_refused() -> None:
    model = vitrim.lift(tiny_vit(depth=1)).eval()
    with pytest.raises(InputError, match="probe: there is no image"):
        probe(model, _split(model, 0, 0), _split(model, 4, 1))


def _split(model: vitrim.CompactModel, count: int, seed: int) -> Split:
    """Images whose brightness is their label, 0 or 1."""
    channels, height, width = model.architecture.image
    preprocessing = Preprocessing(
        channels=channels,
        height=height,
        width=width,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )
    targets = np.arange(count, dtype=np.int64) % 2
    noise = np.random.default_rng(seed).integers(0, 60, (count, channels, height, width))
    pixels = (noise + 150 * targets[:, None, None, None]).astype(np.uint8)
    return Split(pixels, targets, preprocessing)
