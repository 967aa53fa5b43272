"""An artifact's folder is measured by its manifest, and the measurement contains its digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from bench_samples import chain, images_with_labels
from onnx_graphs import classifier
from vitrim.bench.local.artifact_facts import artifact_facts
from vitrim.bench.local.measure import measure
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact, entry_for
from vitrim.export.manifest import Manifest, PreprocessingSpec, TensorSpec


def artifact(folder: Path, runtime: str = "onnxruntime") -> Artifact:
    folder.mkdir()
    chain(folder / "model.onnx")
    manifest = Manifest(
        name="tiny",
        inputs=(TensorSpec(name="image", shape=(1, 1, 28, 28), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(1, 10), layout="NC"),),
        preprocessing=PreprocessingSpec(channels=1, height=28, width=28, mean=(0.25,), std=(0.5,)),
        target="x86-64",
        runtime=runtime,
        precision="fp32",
        form="chain",
        session={"session.intra_op.allow_spinning": "0"},
        files=(entry_for(folder, "model.onnx", "model"),),
    )
    return Artifact.write(folder, manifest)


def test_an_artifact_is_measured_by_object_and_by_folder(tmp_path: Path) -> None:
    written = artifact(tmp_path / "tiny-fp32")
    images_with_labels(tmp_path / "floats.npz", written.model_path)
    with np.load(tmp_path / "floats.npz") as data:
        pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
        np.savez(tmp_path / "bytes.npz", images=pixels, labels=data["labels"][:4])
    found = measure(
        written,
        dataset=tmp_path / "bytes.npz",
        target="x86-64",
        time_limit_s=0.5,
        least_rounds=2,
        quiet=True,
    )
    assert (found.name, found.target, found.precision) == ("tiny", "x86-64", "fp32")
    assert found.artifact_sha256 == written.sha256
    assert found.file_bytes == written.bytes
    assert found.total == 4
    again = measure(tmp_path / "tiny-fp32", time_limit_s=0.5, least_rounds=2, quiet=True)
    assert again.artifact_sha256 == written.sha256


def test_an_artifact_of_another_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"made for the runtime 'abacus'; `vitrim bench` measures artifacts of .*onnxruntime",
    ):
        measure(artifact(tmp_path / "a", runtime="abacus"))


def test_a_changed_artifact_is_refused(tmp_path: Path) -> None:
    written = artifact(tmp_path / "a")
    with written.model_path.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(InputError, match="copy the whole folder again"):
        measure(tmp_path / "a")


def test_a_bare_file_is_measured_with_its_external_weights_whatever_their_name(
    tmp_path: Path,
) -> None:
    path = tmp_path / "Model.ONNX"
    onnx.save(
        classifier(),
        str(path),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    facts = artifact_facts(path)
    assert facts.files == (path, tmp_path / "weights.bin")
    assert facts.file_bytes > 768 * 4 * 4
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"Model.ONNX: onnxruntime .* cannot load it: External"):
        measure(path, time_limit_s=0.2, quiet=True)
