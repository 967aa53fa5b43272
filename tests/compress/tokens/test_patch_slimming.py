"""Algorithm 1 of Patch Slimming: counts from a tolerance, and blocks refitted on cached inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import vitrim
from tiny_models import relative_error, tiny_vit
from torch import Tensor
from vitrim.compress.masks.token_sets import token_sets
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.patch_slimming import Slimmed
from vitrim.core.errors import InputError

KINDS: dict[str, dict[str, Any]] = {
    "class": {},
    "mean": {"class_token": False, "global_pool": "avg"},
    "rope": {"name": "eva02_tiny_patch14_224"},
    "bias": {"name": "beit_base_patch16_224", "depth": 2},
}


def slimmed(model: CompactModel, images: Tensor, **options: Any) -> Slimmed:
    settings = {"step": 2, "epochs": 2, "learning_rate": 1e-3, **options}
    return vitrim.slim_patches(model, images, vitrim.SlimmingOptions(**settings))


def dense(kind: str) -> tuple[CompactModel, Tensor]:
    model = vitrim.lift(tiny_vit(**{"img_size": 32, "depth": 3, **KINDS[kind]})).eval()
    torch.manual_seed(0)
    return model, torch.randn(8, *model.architecture.image)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_larger_tolerance_keeps_fewer_tokens(kind: str) -> None:
    model, images = dense(kind)
    totals = []
    for tolerance in (0.001, 0.05, 0.6):
        found = slimmed(model, images, tolerance=tolerance)
        counts = list(found.choice.counts.values())
        assert counts == sorted(counts, reverse=True)
        totals.append(sum(counts))
        small = found.compact()
        with torch.no_grad():
            wanted = vitrim.masked(found.model, found.choice.mask)(images)
            assert relative_error(small(images), wanted) < 1e-5
        for site, error in found.errors.items():
            assert error <= tolerance or found.choice.counts[site] == counts[0]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_the_error_is_that_of_the_next_block_on_its_kept_tokens() -> None:
    model, images = dense("class")
    found = slimmed(model, images, tolerance=0.05)
    sets = token_sets(model.architecture, found.choice.mask.kept["token"])
    # The second block drops; before it everything is kept, so its inputs are the original ones.
    alone = vitrim.StructuredMask(
        {"token": {"blocks.1.attn": sets[3], "blocks.2.attn": sets[5]}}, scale="original"
    )
    refitted = vitrim.compact(found.model, alone)
    with torch.no_grad():
        inputs = original = model.embed(images)
        for number, step in enumerate(model.steps):
            original = model.run_step(step, original)  # type: ignore[arg-type]
            inputs = original if number == 1 else inputs
        # The class token of the last block is what it keeps.
        order = refitted.architecture.order or tuple(range(16))
        x = inputs[:, [0, *(place + 1 for place in order)]]
        counts = refitted.architecture.step_tokens()
        for number in range(2, 6):
            step = cast("Any", refitted.steps[number])
            x = refitted.run_step(step, x, counts[number] if counts[number] < x.shape[1] else None)
    error = (x[:, 0] - original[:, 0]).square().sum() / original[:, 0].square().sum()
    assert float(error) == pytest.approx(found.errors["blocks.1.attn"], rel=1e-4)


def test_training_a_block_lowers_the_error_and_changes_that_block_only() -> None:
    model, images = dense("class")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    still = slimmed(model, images, tolerance=0.02, step=16, epochs=0)
    trained = slimmed(model, images, tolerance=0.02, step=16, epochs=20)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in still.model.state_dict().items()
    )
    # Without epochs one step of all patches is needed; with them the class token's block suffices.
    assert sum(trained.choice.counts.values()) < sum(still.choice.counts.values())
    changed = {
        name.split(".")[1]
        for name, tensor in trained.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    # The last block computes the class token only, from all keys, and is never refitted.
    assert changed
    assert changed <= {"0", "1", "2", "3"}


def test_an_interrupted_search_continues_with_the_same_result(tmp_path: Path) -> None:
    model, images = dense("class")
    options = vitrim.SlimmingOptions(tolerance=0.05, step=2, epochs=2, learning_rate=1e-3)
    whole = vitrim.slim_patches(model, images, options)
    for name, places in (("first", 1), ("last", 3)):
        vitrim.slim_patches(model, images, options, resume=tmp_path / name)
        # As if it had been killed after so many of its three blocks.
        for place in range(3 - places):
            (tmp_path / name / f"slim-{place}.safetensors").unlink()
        found = vitrim.slim_patches(model, images, options, resume=tmp_path / name)
        assert found.choice.record() == whole.choice.record()
        assert found.errors == whole.errors
        for key, tensor in whole.model.state_dict().items():
            assert torch.equal(found.model.state_dict()[key], tensor)
    other = vitrim.SlimmingOptions(tolerance=0.06)
    with pytest.raises(InputError, match="was begun with another model, other images or other opt"):
        vitrim.slim_patches(model, images, other, resume=tmp_path / "first")
    (tmp_path / "last" / "slim-2.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"slim-2.safetensors: damaged .*; delete the file"):
        vitrim.slim_patches(model, images, options, resume=tmp_path / "last")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": 0.0}, "tolerance = 0: give a relative error"),
        ({"tolerance": 1.0}, "between 0 and 1"),
        ({"step": 0}, "step and a learning rate above 0"),
        ({"epochs": -1}, "0 or more epochs"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        vitrim.SlimmingOptions(**options)


def test_images_must_fit() -> None:
    model, _ = dense("class")
    with pytest.raises(InputError, match="give float images of shape"):
        vitrim.slim_patches(model, torch.zeros(2, 3, 16, 16))
