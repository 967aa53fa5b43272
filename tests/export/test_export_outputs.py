"""Named outputs of artifacts: features, tokens, patches and blocks, in every runtime."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import vitrim
from bundle_sample import build, needs_compiler, runtime_library
from onnx_graphs import classifier, written
from onnxruntime_header import NO_HEADER, header_folder
from PIL import Image
from pydantic import ValidationError
from torch import nn
from typer.testing import CliRunner
from vitrim.bench.local.measure import measure_interleaved
from vitrim.cli import app, call
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.lift import lift
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.named_outputs import NamedOutputs, output_specs
from vitrim.core.errors import InputError, UnsupportedModel
from vitrim.export import Artifact, export
from vitrim.export.bundle import bundle
from vitrim.export.forms import FORMS, form_named, write_network
from vitrim.export.manifest import Manifest
from vitrim.export.parity import side_by_side
from vitrim.export.runtimes import runtime_named
from vitrim.export.sessions import open_session
from vitrim.pipeline.recipe import parse_recipe
from vitrim.runtimes.subprocess_inference import interpreter

timm = pytest.importorskip("timm")
Array = Any
NAMES = ("logits", "features", "patches", "tokens", "blocks.0", "blocks.2")
SPEC = {"channels": 3, "height": 16, "width": 16, "mean": [0.4] * 3, "std": [0.2] * 3}
PREPROCESSING = Preprocessing.model_validate(SPEC)


def tiny(classes: int = 5, **options: object) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=classes,
        **options,
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def noise(count: int = 8) -> Array:
    return np.random.default_rng(0).standard_normal((count, 3, 16, 16), dtype=np.float32)


def expected(model: nn.Module, names: tuple[str, ...], images: Array) -> list[Array]:
    with torch.no_grad():
        return [value.numpy() for value in NamedOutputs(lift(model), names)(torch.tensor(images))]


def error_of(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One artifact for the tests that only read it."""
    folder = tmp_path_factory.mktemp("outputs") / "artifact"
    return export(
        tiny(),
        folder,
        outputs=["patches", "logits", "features", "blocks.0"],
        preprocessing=SPEC,
        images=noise(),
    )


def test_outputs_have_names_shapes_and_meanings_in_the_manifest(made: Artifact) -> None:
    outputs = {output.name: output for output in made.manifest.outputs}
    assert list(outputs) == ["logits", "patches", "features", "blocks.0"]
    assert [output.shape for output in outputs.values()] == [
        (1, 5),
        (1, 16, 32),
        (1, 32),
        (1, 16, 32),
    ]
    assert [output.layout for output in outputs.values()] == ["NC", "NLC", "NC", "NLC"]
    assert [output.kind for output in outputs.values()] == [
        "logits",
        "patches",
        "features",
        "block",
    ]
    assert outputs["patches"].grid == outputs["blocks.0"].grid == (4, 4)
    assert outputs["patches"].meaning == (
        "patch tokens after the final norm, in rows from the top left"
    )
    assert "before the final norm" in str(outputs["blocks.0"].meaning)
    assert Artifact.load(made.folder).manifest == made.manifest


def test_a_manifest_that_lists_an_output_twice_or_of_an_unknown_kind_is_refused(
    made: Artifact,
) -> None:
    data = made.manifest.to_dict()
    first, second, *rest = data["outputs"]
    for outputs, message in (
        ([first, first, second, *rest], "output 'logits' is listed twice"),
        ([{**first, "kind": "masks"}, second, *rest], "Input should be 'logits', 'features'"),
        ([first, {**second, "grid": [4, 0]}, *rest], "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=re.escape(message)):
            Manifest.model_validate({**data, "outputs": outputs})


def test_the_session_and_the_engine_return_them_by_name(made: Artifact) -> None:
    images = noise(1)
    names = ("logits", "patches", "features", "blocks.0")
    wanted = expected(tiny(), names, images)
    session = open_session(made)
    assert [output.name for output in session.get_outputs()] == list(names)
    for name, value in zip(names, wanted, strict=True):
        assert error_of(session.run([name], {"images": images})[0], value) < 1e-5
    engine = made.engine()
    found = engine.infer_outputs(images)
    assert list(found) == list(names)
    for name, value in zip(names, wanted, strict=True):
        assert error_of(found[name], value) < 1e-5
    np.testing.assert_array_equal(engine.infer(images), found["logits"])


def test_every_stage_compares_every_output(made: Artifact) -> None:
    stages: dict[str, list[str | None]] = {}
    for parity in made.manifest.parity:
        stages.setdefault(parity.stage, []).append(parity.output)
        assert parity.max_relative_error < 1e-5
        assert (parity.top1_agreement is None) == (parity.output != "logits")
    assert set(stages) == {f"form {made.manifest.form}"}
    assert all(
        set(found) == {"logits", "patches", "features", "blocks.0"} for found in stages.values()
    )


def test_without_outputs_the_manifest_is_as_before(tmp_path: Path) -> None:
    for name, outputs in (("default", None), ("logits", ["logits"])):
        artifact = export(tiny(), tmp_path / name, outputs=outputs)
        data = json.loads((artifact.folder / "manifest.json").read_text())
        assert data["outputs"] == [
            {"name": "logits", "shape": [1, 5], "type": "float32", "layout": "NC"}
        ]
        assert all("output" not in stage for stage in data["parity"])
        assert artifact.manifest.logits == artifact.manifest.outputs[0]
        assert list(artifact.engine().infer_outputs(noise(1))) == ["logits"]


def test_the_last_block_is_shortened_only_where_no_output_needs_it(tmp_path: Path) -> None:
    forms = {
        outputs: form_named(
            export(tiny(), tmp_path / outputs, outputs=outputs.split(",")).manifest.form
        )
        for outputs in ("features", "patches", "blocks.2", "features,blocks.1")
    }
    assert [form.last_queries for form in forms.values()] == [True, False, False, True]
    assert [form.norm for form in forms.values()] == [
        "centred-rms",
        "centred-rms",
        "layer",
        "layer",
    ]


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_every_form_computes_every_output(form: Any) -> None:
    model = lift(tiny())
    images, outputs = noise(1), output_specs(model.architecture, NAMES)
    graph = write_network(model, form, outputs=outputs)
    found = open_session(graph.SerializeToString()).run(None, {"images": images})
    for name, value, wanted in zip(NAMES, found, expected(model, NAMES, images), strict=True):
        assert error_of(value, wanted) < 1e-5, name


POOLS = {
    "mean": ({"global_pool": "avg"}, "vit_tiny_patch16_224"),
    "distilled": ({}, "deit_tiny_distilled_patch16_224"),
    "attention": ({"global_pool": "map"}, "vit_base_patch16_siglip_224"),
}


@pytest.mark.parametrize("pool", POOLS)
def test_graphs_of_every_pooling_and_of_cut_models(pool: str) -> None:
    options, name = POOLS[pool]
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = timm.create_model(name, num_classes=4, **size, **options).eval()
    for sharing in ("residual", "unshared"):
        mask = vitrim.StructuredMask.random(model, keep_ratio=0.6, sharing=sharing, seed=1)
        compact = vitrim.compact(model, mask)
        outputs = output_specs(compact.architecture, NAMES)
        assert {output.shape[-1] for output in outputs[1:]} == {32}
        for form in (FORMS[0], FORMS[6]):
            graph = write_network(compact, form, outputs=outputs)
            found = open_session(graph.SerializeToString()).run(None, {"images": noise(1)})
            for value, wanted in zip(found, expected(compact, NAMES, noise(1)), strict=True):
                assert error_of(value, wanted) < 1e-4


def test_outputs_of_early_blocks_need_no_later_weights() -> None:
    model = lift(tiny())
    sizes = [
        len(
            write_network(
                model, FORMS[0], outputs=output_specs(model.architecture, [name])
            ).SerializeToString()
        )
        for name in ("blocks.0", "blocks.1", "blocks.2")
    ]
    assert sizes[0] < 0.7 * sizes[1] < 0.6 * sizes[2]


QUICK = [
    ("onnxruntime", "int8"),
    ("onnxruntime", "int8-static"),
    ("onnxruntime", "int4-weights"),
    ("openvino", "fp32"),
    ("ncnn", "fp32"),
    ("ncnn", "fp16"),
    ("torch", "fp32"),
    ("tvm", "fp32"),
    ("tvm", "int8"),
    ("tvm", "int8-static"),
]
SLOW = [("executorch", "fp32"), ("litert", "fp32")]
BOUNDS = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.1, "int8-static": 0.2, "int4-weights": 0.8}


@cache
def cut() -> CompactModel:
    """A network that was cut, with random weights."""
    mask = vitrim.StructuredMask.random(tiny(), keep_ratio=0.6, sharing="residual", seed=0)
    return vitrim.compact(tiny(), mask)


def check_runtime(folder: Path, runtime: str, precision: str, **options: Any) -> Artifact:
    if runtime != "onnxruntime" and (reason := runtime_named(runtime).missing()):
        pytest.skip(reason)
    artifact = export(
        cut(),
        folder,
        runtime=runtime,
        precision=precision,  # type: ignore[arg-type]
        images=noise(),
        outputs=NAMES,
        **options,
    )
    last = artifact.manifest.parity[-len(NAMES) :]
    assert [parity.output for parity in last] == list(NAMES)
    batch = int(artifact.manifest.batch)
    if runtime in ("executorch", "litert") and interpreter(runtime) is not None:
        return artifact
    engine = artifact.engine()
    found = engine.infer_outputs(noise(batch))
    assert list(found) == list(NAMES)
    for name, wanted in zip(NAMES, expected(cut(), NAMES, noise(batch)), strict=True):
        assert error_of(found[name], wanted) < BOUNDS[precision], name
    np.testing.assert_array_equal(engine.infer(noise(batch)), found["logits"])
    return artifact


@pytest.mark.parametrize(("runtime", "precision"), QUICK)
def test_every_runtime_returns_every_output(tmp_path: Path, runtime: str, precision: str) -> None:
    artifact = check_runtime(tmp_path / "a", runtime, precision)
    measured = measure_interleaved({"a": artifact}, time_limit_s=0.2, least_rounds=2, quiet=True)
    assert measured["a"].input_shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("runtime", "precision"), SLOW)
def test_every_converted_runtime_returns_every_output(
    tmp_path: Path, runtime: str, precision: str
) -> None:
    check_runtime(tmp_path / "a", runtime, precision)


def test_compiled_networks_return_the_outputs_of_a_batch_and_of_tvms_pipeline(
    tmp_path: Path,
) -> None:
    check_runtime(tmp_path / "batch", "tvm", "fp32", batch=3, threads=2)
    artifact = check_runtime(tmp_path / "own", "tvm", "fp32", options={"schedule": "default"})
    assert artifact.manifest.session["entry"] == "machine"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["patch"], "outputs: there is no output 'patch'; did you mean 'patches'?"),
        (["patches", "patches"], "outputs: 'patches' occurs twice; name each output once"),
        (["blocks.3"], "outputs: 'blocks.3' is outside of the network, which has blocks 0 to 2"),
    ],
)
def test_wrong_outputs_are_refused_before_anything_is_written(
    tmp_path: Path, outputs: list[str], message: str
) -> None:
    with pytest.raises(InputError) as error:
        export(tiny(), tmp_path / "a", outputs=outputs)
    assert str(error.value) == message
    assert not (tmp_path / "a").exists()


def test_labels_without_logits_and_models_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels: are for logits, which are not among the outputs"):
        export(tiny(), tmp_path / "a", outputs=["patches"], labels=list("abcde"))
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()
    with pytest.raises(UnsupportedModel, match="outputs: 'patches' is of models that vitrim can"):
        export(other, tmp_path / "a", outputs=["patches"], image=(3, 16, 16))


def test_top1_of_an_artifact_without_logits_is_refused(tmp_path: Path) -> None:
    artifact = export(tiny(), tmp_path / "a", outputs=["patches", "features"])
    assert artifact.manifest.logits is None
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 3, 16, 16), np.uint8), labels=np.zeros(2, int))
    with pytest.raises(InputError) as error:
        measure_interleaved({"a": artifact}, dataset=tmp_path / "d.npz", quiet=True)
    assert str(error.value) == (
        "a: returns patches, features and no logits, which top-1 on a data set needs; leave the "
        "data set out, or export it with logits among its outputs"
    )
    measured = measure_interleaved({"a": artifact}, time_limit_s=0.2, least_rounds=2, quiet=True)
    assert measured["a"].summary().p50_s > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "tvm"])
def test_a_backbone_without_pooling_has_tokens_and_blocks(tmp_path: Path, runtime: str) -> None:
    if runtime == "tvm":
        pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")
    model = tiny(0, global_pool="")
    names = ("patches", "blocks.1")
    artifact = export(model, tmp_path / "a", runtime=runtime, outputs=names)
    found = artifact.engine().infer_outputs(noise(1))
    for name, wanted in zip(names, expected(model, names, noise(1)), strict=True):
        assert error_of(found[name], wanted) < 1e-5
    with pytest.raises(InputError) as error:
        export(model, tmp_path / "b", runtime=runtime, outputs=["features"])
    assert str(error.value) == (
        "outputs: the network pools no tokens and has no features; use tokens or patches"
    )


def test_a_module_traced_by_torch_has_the_same_outputs(tmp_path: Path) -> None:
    artifact = export(tiny(), tmp_path / "a", outputs=NAMES, form="plain", batch="dynamic")
    found = open_session(artifact).run(None, {"images": noise(3)})
    wanted = expected(tiny(), NAMES, noise(3))
    assert error_of(side_by_side(found), side_by_side(wanted)) < 1e-5
    graph = onnx.load(str(artifact.model_path))
    assert [output.name for output in graph.graph.output] == list(NAMES)


@pytest.mark.parametrize("runtime", ["onnxruntime", "tvm"])
def test_a_bundle_returns_two_outputs(tmp_path: Path, runtime: str) -> None:
    needs_compiler()
    if runtime == "tvm":
        pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")
    header = header_folder()
    if header is None:
        pytest.skip(NO_HEADER)
    artifact = export(
        tiny(),
        tmp_path / "a",
        runtime=runtime,
        outputs=["features", "blocks.1"],
        preprocessing=SPEC,
    )
    folder = bundle(artifact, tmp_path / "bundle")
    text = (folder / "vitrim_model.h").read_text()
    assert "#define VITRIM_CLASSES 0\n" in text
    assert "#define VITRIM_BLOCKS_1_START 32\n" in text
    assert "#define VITRIM_OUTPUT_NUMBERS 544\n" in text
    settings = ["-DVITRIM_LINKED=OFF"] if runtime == "tvm" else []
    program = build(folder, header, *settings)
    pixels = np.random.default_rng(0).integers(0, 256, (31, 53, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "picture.ppm")
    library = str(runtime_library()) if runtime == "onnxruntime" else "-"
    command = [program, library, folder / "model", tmp_path / "picture.ppm"]
    ran = subprocess.run(
        [str(word) for word in (*command, "--outputs", tmp_path, "--repeat", 3)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[:2] == ["features 32", "blocks.1 16 32"]
    image = PREPROCESSING.apply(picture)[None]
    for name, wanted in zip(
        ("features", "blocks.1"), expected(tiny(), ("features", "blocks.1"), image), strict=True
    ):
        found = np.fromfile(tmp_path / f"{name}.f32", np.float32).reshape(wanted.shape)
        assert error_of(found, wanted) < 1e-5


def test_the_command_exports_outputs_and_refuses_wrong_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vitrim.save(lift(tiny()), tmp_path / "m")
    command = ["export", str(tmp_path / "m"), "--out", str(tmp_path / "a")]
    assert call([*command, "--output", "patch"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "--output: there is no output 'patch'; did you mean 'patches'?" in errors
    deep = CliRunner().invoke(app, [*command, "--output", "blocks.7"])
    assert isinstance(deep.exception, InputError)
    assert "outputs: 'blocks.7' is outside of the network" in str(deep.exception)
    done = CliRunner().invoke(app, [*command, "--output", "features", "--output", "blocks.1"])
    assert done.exit_code == 0, done.output
    assert "output blocks.1: 1 x 16 x 32, patch tokens of the residual stream" in done.output
    manifest = Artifact.load(tmp_path / "a").manifest
    assert [output.name for output in manifest.outputs] == ["features", "blocks.1"]


def test_a_graph_file_keeps_its_own_output(tmp_path: Path) -> None:
    path = written(classifier(), tmp_path, "m.onnx")
    command = ["export", str(path), "--out", str(tmp_path / "a"), "--output", "patches"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, InputError)
    assert "an .onnx file keeps its own output; leave --output out" in str(refused.exception)


def test_recipes_name_outputs_with_the_logits() -> None:
    def parsed(*outputs: str) -> tuple[str, ...]:
        tables = {"masks": {"params": 0.5}, "export": {"outputs": outputs}}
        return parse_recipe({"name": "r", **tables}, "r.toml").export.outputs

    assert parsed("patches", "logits") == ("logits", "patches")
    with pytest.raises(InputError, match=r"there is no output .patch.; did you mean .patches"):
        parsed("logits", "patch")
    with pytest.raises(InputError, match="measures the accuracy of its artifacts; add 'logits'"):
        parsed("patches")
