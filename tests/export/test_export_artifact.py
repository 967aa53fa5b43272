"""An artifact folder is intact, or refused with the name of the wrong entry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact, entry_for, verify
from vitrim.export.manifest import (
    MANIFEST,
    Manifest,
    Parity,
    TensorSpec,
    manifest_schema,
    path_problem,
    seal_of,
)

PREPROCESSING = {"channels": 1, "height": 8, "width": 8, "mean": [0.5], "std": [0.25]}


def make(folder: Path) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(bytes(range(256)) * 4)
    (folder / "ops").mkdir()
    (folder / "ops" / "required.config").write_text("ai.onnx;20;MatMul\n")
    manifest = Manifest(
        name="tiny",
        inputs=(TensorSpec(name="images", shape=(1, 1, 8, 8), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(1, 2), layout="NC"),),
        preprocessing=PREPROCESSING,
        labels=("cat", "dog"),
        opset=20,
        target="x86-64",
        runtime="onnxruntime",
        precision="fp32",
        form="plain",
        files=(
            entry_for(folder, "model.onnx", "model"),
            entry_for(folder, "ops/required.config", "operators"),
        ),
        parity=(
            Parity(
                stage="onnx",
                reference="torch",
                max_relative_error=1e-6,
                mean_relative_error=1e-7,
                top1_agreement=1.0,
                images=4,
                input_kind="seeded-noise",
                seed=0,
            ),
        ),
    )
    return Artifact.write(folder, manifest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "artifact")
    return tmp_path / "artifact"


def edit(folder: Path, change: Any, *, reseal: bool = True) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    if reseal:
        data["seal"] = seal_of(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_an_artifact_round_trips(folder: Path) -> None:
    artifact = Artifact.load(folder)
    assert artifact.name == "tiny"
    assert artifact.model_path == folder / "model.onnx"
    assert artifact.bytes == 1024
    assert artifact.sha256 == seal_of(json.loads((folder / MANIFEST).read_text()))
    assert artifact.manifest.preprocessing is not None
    assert artifact.manifest.preprocessing.mean == (0.5,)
    assert verify(folder) == (
        "tiny: fp32 for x86-64 on onnxruntime, 1024 bytes, 2 files unchanged, "
        "parity 1.0e-06 over 1 stages"
    )


@pytest.mark.parametrize(
    ("target", "runtime", "precision", "present", "needs", "assumes"),
    [
        ("x86-64", "onnxruntime", "int8", "x86-64-v4-vnni", (), ("avx512_vnni|avx_vnni",)),
        ("x86-64", "onnxruntime", "fp32", "x86-64-v4-vnni", (), ()),
        ("x86-64-avx2", "openvino", "int8-static", "x86-64-v3", (), ()),
        ("x86-64", "tvm", "int8", "x86-64-v4-vnni", ("avx2", "avx512_vnni"), ()),
        ("x86-64-avx2", "tvm", "fp32", "x86-64-v3", ("avx2", "fma"), ()),
    ],
)
def test_a_manifest_of_an_earlier_version_keeps_the_meaning_of_its_target(
    folder: Path,
    target: str,
    runtime: str,
    precision: str,
    present: str,
    needs: tuple[str, ...],
    assumes: tuple[str, ...],
) -> None:
    def earlier(data: Any) -> None:
        del data["cpu"]
        data.update(target=target, runtime=runtime, precision=precision)

    edit(folder, earlier)
    manifest = Artifact.load(folder).manifest
    assert manifest.target == present
    assert manifest.cpu is not None
    assert set(needs) <= set(manifest.cpu.needs)
    assert bool(needs) == bool(manifest.cpu.needs)
    assert manifest.cpu.assumes == assumes


def test_other_targets_of_an_earlier_version_need_nothing(folder: Path) -> None:
    edit(folder, lambda data: (data.pop("cpu"), data.update(target="rpi4")))
    assert Artifact.load(folder).manifest.cpu is None


@pytest.mark.parametrize(
    ("precision", "agreement", "images", "warnings"),
    [
        ("fp32", 1.0, 1, []),
        ("int8", 0.9, 8, []),
        ("int8", 0.875, 8, ["parity: int8 has the top-1 class of torch on only 88 % of 8 images"]),
        ("int8", 1.0, 7, ["parity: int8: parity rests on only 7 images; export with 8 or more"]),
        (
            "int8-static",
            0.5,
            2,
            ["on only 50 % of 2 images", "int8-static: ranges and parity rest on only 2 images"],
        ),
    ],
)
def test_little_agreement_and_few_images_are_warned_of(
    folder: Path, precision: str, agreement: float, images: int, warnings: list[str]
) -> None:
    manifest = Artifact.load(folder).manifest
    stage = manifest.parity[0].model_copy(
        update={
            "stage": precision,
            "top1_agreement": agreement,
            "images": images,
            "input_kind": "images",
        }
    )
    changed = manifest.model_copy(update={"precision": precision, "parity": (stage,)})
    assert len(changed.warnings) == len(warnings)
    assert all(part in line for part, line in zip(warnings, changed.warnings, strict=True))


def test_the_schema_accepts_written_manifests_and_refuses_unknown_keys(folder: Path) -> None:
    schema = manifest_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    data = json.loads((folder / MANIFEST).read_text())
    jsonschema.validate(data, schema)
    data["precison"] = "fp32"
    with pytest.raises(jsonschema.ValidationError, match="precison"):
        jsonschema.validate(data, schema)


@pytest.mark.parametrize("position", [0, 511, 1023])
def test_a_flipped_byte_of_the_model_is_named(folder: Path, position: int) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[position] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.onnx: its SHA-256 is not the manifest's"):
        Artifact.load(folder)
    # Without verification only the manifest is read.
    assert Artifact.load(folder, verify=False).name == "tiny"


@settings(max_examples=60)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_manifest_is_always_detected(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip") / "artifact"
    make(folder)
    path = folder / MANIFEST
    data = bytearray(path.read_bytes())
    before = json.loads(data)
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    message = ""
    try:
        Artifact.load(folder)
    except InputError as error:
        message = str(error)
    shutil.rmtree(folder)
    if message:
        assert MANIFEST in message
        assert "\n" not in message
    else:
        # Only white space between values is not covered by the seal.
        assert json.loads(data) == before


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "ops" / "required.config").unlink()
    with pytest.raises(
        InputError,
        match=r"required\.config: missing; the manifest lists 'ops/required\.config' with 18 bytes",
    ):
        Artifact.load(folder)


def test_a_shortened_file_is_named(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model\.onnx: has 5 bytes, the manifest says 1024"):
        Artifact.load(folder)


def test_a_file_that_is_not_listed_is_named(folder: Path) -> None:
    (folder / "ops" / "extra.so").write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match=r"the manifest does not list 'ops/extra\.so'"):
        Artifact.load(folder)


def test_a_symbolic_link_is_refused_wherever_it_leads(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(folder / "model.onnx", outside)
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(InputError, match=r"a symbolic link \(model\.onnx\)"):
        Artifact.load(folder)
    (folder / "model.onnx").unlink()
    shutil.move(outside, folder / "model.onnx")
    shutil.move(folder / MANIFEST, tmp_path / MANIFEST)
    (folder / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(InputError, match="is a symbolic link"):
        Artifact.load(folder)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/passwd", "the path is absolute"),
        ("../model.onnx", "'..'"),
        ("ops/../../model.onnx", "'..'"),
        ("./model.onnx", "'.'"),
        ("C:/model.onnx", "the path is absolute"),
        ("ops\\model.onnx", "backslash"),
        ("", "empty"),
        ("a//b", "empty part"),
        ("a\x00b", "control character"),
        ("x" * 2000, "longer"),
    ],
)
def test_a_path_out_of_the_folder_is_refused_under_a_valid_seal(
    folder: Path, path: str, reason: str
) -> None:
    assert reason in str(path_problem(path))

    def change(data: dict[str, Any]) -> None:
        data["files"][0]["path"] = path

    edit(folder, change)
    with pytest.raises(InputError) as caught:
        Artifact.load(folder)
    assert reason in str(caught.value) or "..." in str(caught.value)
    assert "files.0" in str(caught.value)


@given(path=st.text(max_size=40))
def test_an_accepted_path_stays_inside_the_folder(path: str) -> None:
    if path_problem(path) is None:
        root = Path("/root/of/artifact")
        assert root in (root / path).parents
        assert ".." not in Path(path).parts


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "half": (b'{"schema": "vitrim.manifest/1", "name": ', "not valid JSON"),
    "list": (b"[]", "holds a list"),
    "null": (b"null", "holds a NoneType"),
    "latin-1": (b'{"name": "\xe9"}', "not valid JSON"),
    "repeated key": (
        b'{"schema": "vitrim.manifest/1", "schema": "vitrim.manifest/1"}',
        "the key 'schema' is there twice",
    ),
    "no schema": (b"{}", "schema is None"),
    "another schema": (
        b'{"schema": "vitrim.manifest/2"}',
        r"schema is 'vitrim.manifest/2', this vitrim reads 'vitrim.manifest/1'",
    ),
    "nan": (b'{"schema": "vitrim.manifest/1", "name": NaN}', "NaN is no number"),
    "no fields": (b'{"schema": "vitrim.manifest/1"}', "name: Field required"),
    "deep": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", sorted(MALFORMED))
def test_a_malformed_manifest_is_refused_in_one_line(folder: Path, case: str) -> None:
    content, reason = MALFORMED[case]
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(InputError) as caught:
        Artifact.load(folder)
    assert reason in str(caught.value)
    assert str(folder / MANIFEST) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("inputs", [], "inputs: Tuple should have at least 1 item"),
        ("precision", "fp33", "precision: Input should be"),
        ("labels", ["one"], "1 labels for 2 classes"),
        ("batch", 0, "batch"),
        ("surprise", 1, "surprise: Extra inputs are not permitted"),
        (
            "preprocessing",
            {**PREPROCESSING, "height": 9},
            "preprocessing makes (1, 9, 8), the input takes (1, 8, 8)",
        ),
        ("preprocessing", {**PREPROCESSING, "std": [0.0]}, "preprocessing.std.0"),
        ("preprocessing", {**PREPROCESSING, "mean": [0.1, 0.2]}, "mean and std need 1 numbers"),
        ("seal", "xyz", "seal"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(
    folder: Path, key: str, value: Any, reason: str
) -> None:
    edit(folder, lambda data: data.update({key: value}), reseal=key != "seal")
    with pytest.raises(InputError) as caught:
        Artifact.load(folder)
    assert reason in str(caught.value)


def test_an_edited_label_without_a_new_seal_is_refused(folder: Path) -> None:
    edit(folder, lambda data: data.update({"labels": ["cat", "wolf"]}), reseal=False)
    with pytest.raises(InputError, match="the seal does not fit"):
        Artifact.load(folder)


def test_two_models_or_a_file_twice_are_refused(folder: Path) -> None:
    edit(folder, lambda data: data["files"][1].update({"role": "model"}))
    with pytest.raises(InputError, match="exactly one file has the role 'model'"):
        Artifact.load(folder)
    edit(folder, lambda data: data["files"].__setitem__(1, data["files"][0]))
    with pytest.raises(InputError, match=r"file 'model\.onnx' is listed twice"):
        Artifact.load(folder)


def test_a_missing_folder_and_a_missing_manifest_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Artifact.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"manifest\.json: missing"):
        Artifact.load(tmp_path)


def test_artifacts_and_sessions_import_without_torch_and_onnx() -> None:
    hide = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime')));"
    code = f"{hide} import vitrim.export.artifact, vitrim.export.sessions"
    subprocess.run([sys.executable, "-c", code], check=True)
