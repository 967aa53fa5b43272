"""Artifacts with buckets: one file that chooses the bucket of each image as torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from selecting_models import divided, noise_images, positioned_selection, sharp_selection
from tiny_models import tiny_vit
from torch import Tensor
from typer.testing import CliRunner
from vitrim import BucketedModel, InputError, export, measure, select_tokens
from vitrim.cli import app
from vitrim.compress.tokens.bucket_rules import RULES, Rule
from vitrim.compress.tokens.select import SelectMethod
from vitrim.export.artifact import Artifact
from vitrim.export.forms import FORMS
from vitrim.export.manifest_parts import BucketsSpec
from vitrim.export.runtimes import runtime_names

COUNTS = (3, 6, 11)


def images(count: int = 12, seed: int = 3) -> Tensor:
    return noise_images(count, seed)


def model(
    method: SelectMethod = "class-attention", rule: Rule = "coverage", **options: Any
) -> BucketedModel:
    return divided(sharp_selection(method, **options), COUNTS, images(), rule)


def run(artifact: Artifact, image: np.ndarray, **feeds: Any) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(artifact.model_path))
    return np.asarray(session.run(["logits"], {"images": image, **feeds})[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["class-attention", "column-attention", "dynamicvit"])
def test_the_file_chooses_the_bucket_of_torch(
    tmp_path: Path, method: SelectMethod, rule: Rule
) -> None:
    source, pictures = model(method, rule), images()
    artifact = export(source, tmp_path / "a", images=pictures.numpy())
    found = artifact.manifest.buckets
    assert found is not None
    assert found.counts == COUNTS
    assert found.equal == 1.0
    assert found.shares == source.buckets.shares
    stage = artifact.manifest.parity[-1]
    assert stage.max_relative_error < 1e-4
    assert stage.choices is not None
    assert [choice.equal for choice in stage.choices] == [1.0]
    assert len(source.bucket_of(pictures).unique()) > 1
    for image in pictures.split(1):
        with torch.no_grad():
            expected = source(image).numpy()
        assert np.abs(run(artifact, image.numpy()) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
def test_positions_are_those_of_the_patches_in_the_bucket(tmp_path: Path, kind: str) -> None:
    network = positioned_selection(kind, "dynamicvit", counts=[10, 6])
    source = divided(network, (3, 6), images(), "divergence")
    artifact = export(source, tmp_path / "a", images=images().numpy())
    stage, found = artifact.manifest.parity[-1], artifact.manifest.buckets
    assert found is not None
    assert found.equal == 1.0
    assert stage.max_relative_error < 1e-4
    assert [choice.equal for choice in stage.choices or ()] == [1.0, 1.0]


def test_the_file_returns_how_many_patches_an_image_kept(tmp_path: Path) -> None:
    source, pictures = model(), images()
    path = export(source, tmp_path / "a").model_path
    session = onnxruntime.InferenceSession(str(path))
    found = [
        int(session.run(["kept"], {"images": each.numpy()})[0][0]) for each in pictures.split(1)
    ]
    assert found == source.bucket_of(pictures).tolist()


def test_the_manifest_states_the_bound(tmp_path: Path) -> None:
    source = model()
    found = export(source, tmp_path / "a").manifest
    assert found.buckets is not None
    assert found.buckets.images == 12
    assert found.buckets.macs == source.shares(images(2)).macs
    # What an image costs at most is what the artifact states.
    assert found.macs == found.buckets.macs[-1]
    data = found.to_dict()["buckets"]
    earlier = {key: value for key, value in data.items() if key not in ("images", "macs")}
    again = BucketsSpec.model_validate(earlier)
    assert again.macs is None
    # What an earlier version wrote has the seal that it had.
    assert again.model_dump(mode="json") == earlier
    for change, reason in (
        ({"counts": [6, 3, 11]}, "must be increasing"),
        ({"macs": [1, 2]}, "2 macs for 3 counts"),
        ({"shares": [1.0]}, "1 shares for 3 counts"),
    ):
        with pytest.raises(ValidationError, match=reason):
            BucketsSpec.model_validate(data | change)


def test_the_optional_input_forces_a_bucket(tmp_path: Path) -> None:
    source, image = model(), images(1)
    artifact = export(source, tmp_path / "a")
    for count in COUNTS:
        with torch.no_grad():
            expected = source.fixed(count)(image).numpy()
        found = run(artifact, image.numpy(), bucket=np.array(count))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_eight_bits_and_an_earlier_selection(tmp_path: Path) -> None:
    chosen = select_tokens(tiny_vit(img_size=32, depth=3), stages=[0, 1], counts=[14, 8])
    source = divided(chosen, (3, 8), images(), "divergence")
    artifact = export(source, tmp_path / "a", precision="int8", images=images().numpy())
    names = [stage.stage for stage in artifact.manifest.parity]
    assert names[-1] == "int8"
    choices = artifact.manifest.parity[-1].choices
    assert choices is not None
    assert [(choice.selection, choice.kept) for choice in choices] == [
        ("select.0", 14),
        ("select.1", 8),
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *(
            ({"runtime": name}, f"runtime '{name}' runs no buckets")
            for name in runtime_names()
            if name != "tvm"
        ),
        ({"runtime": "tvm", "form": FORMS[0]}, "form is not for networks with buckets"),
        ({"runtime": "tvm", "precision": "int8-static"}, "a network with buckets has fp32, int8"),
        ({"precision": "int8-weights"}, "a network with buckets has fp32, int8"),
        ({"batch": 4}, "batch 4: every image has a bucket of its own; use batch 1"),
        ({"outputs": ["features"]}, "outputs is not for networks with buckets"),
        ({"opset": 21}, "opset is not for networks with buckets"),
        ({"image_size": 64}, "image_size is not for networks with buckets"),
        ({"form": "plain"}, "form 'plain' is not for networks with buckets"),
    ],
)
def test_what_has_no_buckets_is_refused(tmp_path: Path, options: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        export(MODEL, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


MODEL = model()


def test_the_command_exports_a_saved_model_with_its_buckets(tmp_path: Path) -> None:
    MODEL.save(tmp_path / "model")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "model"), "--out", str(tmp_path / "a")]
    )
    assert done.exit_code == 0, done.output
    assert "buckets of 3, 6, 11 patches at select.1: the bucket of torch on" in done.output
    assert Artifact.load(tmp_path / "a").manifest.buckets is not None


def test_each_bucket_is_measured(tmp_path: Path) -> None:
    artifact = export(MODEL, tmp_path / "a")
    for count in COUNTS:
        options: dict[str, Any] = {
            "least_rounds": 1,
            "most_rounds": 1,
            "quiet": True,
            "bucket": count,
        }
        assert measure(artifact, **options).latency_s
    with pytest.raises(InputError, match="has no bucket of 4 patches; choose 3, 6, 11"):
        measure(artifact, bucket=4)
    plain = export(MODEL.fixed(3), tmp_path / "b")
    with pytest.raises(InputError, match="all keep the same number; leave it out"):
        measure(plain, bucket=3)
