"""Networks of every kind train in bfloat16 by autocast, where products are of another type."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from random_networks import architectures, network, selecting_architectures
from tiny_models import relative_error
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.modules.model import CompactModel

SLOW = settings(suppress_health_check=list(HealthCheck), max_examples=25)


def trained(architecture: Architecture) -> tuple[CompactModel, torch.Tensor, torch.Tensor]:
    """The network after a step's backward pass, images, and its outputs in bfloat16."""
    model = network(architecture).float()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, *architecture.image, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images).float()
    found.square().sum().backward()
    return model, images, found.detach()


@SLOW
@given(architectures())
def test_a_network_trains_in_bfloat16(architecture: Architecture) -> None:
    model, images, found = trained(architecture)
    assert any(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert relative_error(found, model(images)) < 0.2


@SLOW
@given(selecting_architectures())
def test_a_network_with_selections_trains_in_bfloat16(architecture: Architecture) -> None:
    # Scores in another precision may choose other tokens.
    assert trained(architecture)[2].isfinite().all()
