"""Saved models are loaded bit-equal, match the published schema, and old ones still load."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from golden_model import golden_images
from tiny_models import relative_error, tiny_vit
from vitrim import StructuredMask, compact, load, save
from vitrim.compress.network.architecture import SCHEMA_FILE, schema_text

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("sharing", ["unshared", "residual", "full"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_loaded_model_computes_the_same_bits(tmp_path: Path, name: str, sharing: str) -> None:
    source = tiny_vit(name, embed_dim=48)
    model = compact(source, StructuredMask.random(source, 0.7, sharing=sharing, seed=3))  # type: ignore[arg-type]
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.architecture == model.architecture
    assert {key: tensor.shape for key, tensor in loaded.state_dict().items()} == {
        key: t.shape for key, t in model.state_dict().items()
    }
    assert all(
        torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items()
    )
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))


def test_loaded_tensors_are_aligned_and_are_copies_of_the_file(tmp_path: Path) -> None:
    save(tiny_vit(), tmp_path / "model")
    parameters = list(load(tmp_path / "model").parameters())
    assert all(parameter.data_ptr() % 64 == 0 for parameter in parameters)
    # A later change of the file does not reach the model.
    before = [parameter.clone() for parameter in parameters]
    weights = tmp_path / "model" / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(weights.stat().st_size - 64)
        stream.write(b"\xff" * 64)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        save(tiny_vit(), tmp_path / name)
    for file in ("model.safetensors", "architecture.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_the_golden_model_still_loads_with_the_same_outputs() -> None:
    model = load(GOLDEN)
    wanted = torch.tensor(json.loads((GOLDEN / "logits.json").read_text()))
    with torch.no_grad():
        assert relative_error(model(golden_images(model)), wanted) < 1e-5


def test_the_schema_file_matches_the_code() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), (
        "run python -m vitrim.compress.network.architecture"
    )


def test_saved_architectures_validate_loadedst_the_schema(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((GOLDEN / "architecture.json").read_text()), schema)
    source = tiny_vit("deit_tiny_distilled_patch16_224")
    save(compact(source, StructuredMask.random(source, 0.5)), tmp_path / "model")
    found = json.loads((tmp_path / "model" / "architecture.json").read_text())
    jsonschema.validate(found, schema)
    found["steps"][0][0]["core"]["heads"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema)
