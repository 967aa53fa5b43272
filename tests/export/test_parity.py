"""How stages are compared: agreement below chance is refused, near ties are not counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import tiny_vit
from vitrim.compress.lift import lift
from vitrim.export import ParityError, export
from vitrim.export.forms import FORMS, write_network
from vitrim.export.parity import Probe, require_agreement
from vitrim.export.quantization import quantize
from vitrim.export.quantization.quantize import weights_only

IMAGES = np.random.default_rng(0).standard_normal((16, 3, 16, 16), dtype=np.float32)


def probe(logits: NDArray[np.float32], kind: str = "images") -> Probe:
    images = np.zeros((len(logits), 3, 2, 2), np.float32)
    return Probe(images, kind, None, logits)  # type: ignore[arg-type]


def logits_of(classes: list[int], count: int, margin: float) -> NDArray[np.float32]:
    """One row an image, whose largest logit is 1 and at the class, and the others lower."""
    found = np.full((len(classes), count), 1.0 - margin, np.float32)
    found[np.arange(len(classes)), classes] = 1.0
    return found


def test_agreement_below_chance_is_refused() -> None:
    expected = logits_of([0] * 8, 4, margin=0.5)
    found = logits_of([0, *[1] * 7], 4, margin=0.5)
    reference = probe(expected)
    parity = reference.compare("int8", found, tolerance=None)
    with pytest.raises(ParityError) as refused:
        require_agreement(parity, reference.clear_agreement(found))
    assert str(refused.value) == (
        "stage int8: the top-1 class is that of torch on 12 % of 8 images, less than by chance "
        "(25 %); export in another precision, or with more images"
    )
    half = logits_of([0, 0, *[1] * 6], 4, margin=0.5)
    require_agreement(
        reference.compare("int8", half, tolerance=None), reference.clear_agreement(half)
    )


@pytest.mark.parametrize(
    ("kind", "count", "margin", "agreement"),
    [
        ("images", 8, 0.05, 0.0),
        ("images", 8, 5e-4, 1.0),
        ("images", 7, 0.05, 1.0),
        ("seeded-noise", 8, 0.05, 1.0),
        ("seeded-noise", 8, 0.5, 0.0),
    ],
)
def test_near_ties_count_as_agreement_where_a_class_means_little(
    kind: str, count: int, margin: float, agreement: float
) -> None:
    reference = probe(logits_of([0] * count, 10, margin), kind)
    found = logits_of([1] * count, 10, margin)
    assert reference.clear_agreement(found) == (agreement, 0.1)


def test_an_export_that_confuses_the_classes_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any quantizer that turns the order of the classes around, within the tolerance.
    model = tiny_vit(num_classes=2)
    with torch.no_grad():
        head = model.get_submodule("head")
        assert isinstance(head, torch.nn.Linear)
        head.weight.mul_(0.02)
        head.bias.copy_(torch.tensor([1.0, 0.9]))
    turned = tiny_vit(num_classes=2)
    turned.load_state_dict(model.state_dict())
    with torch.no_grad():
        other = turned.get_submodule("head")
        assert isinstance(other, torch.nn.Linear)
        other.bias.copy_(torch.tensor([0.9, 1.0]))
    wrong, original = write_network(lift(turned), FORMS[1], linears="product"), weights_only
    monkeypatch.setattr(quantize, "weights_only", lambda graph, bits: original(wrong, bits))
    with pytest.raises(ParityError, match="less than by chance"):
        export(model, tmp_path / "a", precision="int8-weights", images=IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_not_this_processor_is_reported(tmp_path: Path) -> None:
    made = export(tiny_vit(), tmp_path / "a", target="x86-64", images=IMAGES)
    notes = [note for note in made.manifest.notes if "parity was computed on" in note]
    assert len(notes) == 1
    assert "other kernels on x86-64, so verify top-1 there" in notes[0]
    made = export(tiny_vit(), tmp_path / "b", images=IMAGES)
    assert not [note for note in made.manifest.notes if "parity was" in note]


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_parity_of_every_runtime_is_reported_as_that_of_this_processor(
    tmp_path: Path, runtime: str
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="pip install 'vitrim[openvino]'")
    made = export(tiny_vit(), tmp_path / "a", target="rpi4", runtime=runtime, images=IMAGES)
    assert any("parity was computed on this processor" in note for note in made.manifest.notes)
