"""Parity of networks that select tokens: for the same choices, and how often these agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import vitrim
from selecting_models import positioned_selection
from tiny_models import add_noise, tiny_vit
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.select import Choices
from vitrim.compress.tokens.select import SelectMethod, select_tokens
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact, read_manifest, verify
from vitrim.export.choices import SelectionReference, named_choices
from vitrim.export.forms import Form, write_network
from vitrim.export.graphs.model_facts import torch_outputs
from vitrim.export.manifest import ChoiceParity
from vitrim.export.parity import ParityError
from vitrim.export.runtimes import runtime_named
from vitrim.export.runtimes.limits import Planned, require_within_limits
from vitrim.export.runtimes.runtime import limits_of


def selecting(method: SelectMethod = "dynamicvit") -> CompactModel:
    torch.manual_seed(1)
    dense = add_noise(tiny_vit(img_size=32, depth=3))
    return select_tokens(dense, method, stages=[0, 1], ratio=0.6).eval()


def noise(count: int) -> np.ndarray[Any, Any]:
    shape = (count, *selecting().architecture.image)
    return np.random.default_rng(5).standard_normal(shape, dtype=np.float32)


def reference(model: CompactModel, images: np.ndarray[Any, Any]) -> SelectionReference:
    found = SelectionReference.of(model, lambda given: torch_outputs(model, given), images)
    assert found is not None
    return found


def test_the_reference_records_the_choices_of_every_image_in_order() -> None:
    model, images = selecting(), noise(70)
    found, own = reference(model, images), Choices()
    with torch.no_grad():
        model(torch.from_numpy(images), own)
    assert found.values == ("select.0/indices", "select.1/indices")
    for wanted, rows in zip(own.found, found.chosen, strict=True):
        assert np.array_equal(wanted.numpy(), rows)
    with torch.no_grad():
        model(torch.from_numpy(images[:1]))
    assert len(found.chosen[0]) == 70


def test_networks_without_selections_by_content_have_no_reference() -> None:
    for model in (tiny_vit(img_size=32, depth=3), selecting("random")):
        assert SelectionReference.of(model, lambda given: given, noise(1)) is None


def test_outputs_for_other_choices_are_those_of_the_model_with_these() -> None:
    model, images = selecting("evit"), noise(5)
    found = reference(model, images)
    outputs = torch_outputs(model, images)
    assert np.array_equal(found.outputs_for(found.chosen, outputs), outputs)
    other = [rows.copy() for rows in found.chosen]
    kept = other[0].shape[1]
    other[0][3] = np.arange(16 - kept, 16)
    given = Choices(given=[torch.from_numpy(rows) for rows in other])
    with torch.no_grad():
        wanted = model(torch.from_numpy(images), given).numpy()
    changed = found.outputs_for(tuple(other), outputs)
    assert np.allclose(changed, wanted, atol=1e-6)
    assert not np.allclose(changed[3], outputs[3], atol=1e-6)
    # Afterwards the model chooses again.
    assert np.array_equal(torch_outputs(model, images), outputs)


def test_shares_count_images_and_tokens() -> None:
    found = reference(selecting(), noise(4))
    other = [rows.copy() for rows in found.chosen]
    missing = next(place for place in range(16) if place not in other[0][2])
    other[0][2] = np.sort(np.append(other[0][2][1:], missing))
    first, second = found.compare(tuple(other))
    kept = other[0].shape[1]
    assert first.equal == 0.75
    assert first.overlap == pytest.approx(1 - 1 / (4 * kept))
    assert second == ChoiceParity(
        selection="select.1", kept=other[1].shape[1], equal=1.0, overlap=1.0
    )


@pytest.mark.parametrize(("method", "batch"), [("dynamicvit", 1), ("evit", "dynamic")])
def test_an_artifact_states_how_often_it_chose_the_tokens_of_the_model(
    method: SelectMethod, batch: Any, tmp_path: Path
) -> None:
    model, images = selecting(method), noise(7)
    artifact = vitrim.export(model, tmp_path / "a", batch=batch, images=images, target="host")
    for stage in artifact.manifest.parity:
        assert stage.max_relative_error < 1e-5
        assert [choice.selection for choice in stage.choices or ()] == ["select.0", "select.1"]
        assert {choice.equal for choice in stage.choices or ()} == {1.0}
    assert artifact.manifest.parity[0].stage == f"form {artifact.manifest.form}"
    line = verify(tmp_path / "a")
    assert "same tokens on 100.0 % (select.0), 100.0 % (select.1) of 7 images" in line
    assert read_manifest(tmp_path / "a").parity == artifact.manifest.parity
    assert artifact.manifest.warnings == ()


@pytest.mark.parametrize("precision", ["int8", "int8-static", "int8-weights"])
def test_reduced_precisions_are_compared_for_their_own_choices(
    precision: Any, tmp_path: Path
) -> None:
    model = selecting("class-attention")
    options: dict[str, Any] = {"images": noise(16), "target": "host", "precision": precision}
    manifest = vitrim.export(model, tmp_path / "a", **options).manifest
    last = manifest.parity[-1]
    if not last.stage.startswith(precision):
        assert any("parity of" in note for note in manifest.notes)
        return
    assert last.max_relative_error < 0.1
    assert last.choices is not None
    assert all(choice.overlap > 0.8 for choice in last.choices)


def test_plain_graphs_state_their_choices_too(tmp_path: Path) -> None:
    model = selecting()
    artifact = vitrim.export(model, tmp_path / "a", form="plain", target="host")
    assert artifact.manifest.parity[-1].choices is not None
    assert artifact.manifest.parity[-1].max_relative_error < 1e-5


def test_named_outputs_of_a_selecting_network_are_compared_for_the_same_choices(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"outputs": ["logits", "features"], "target": "host"}
    artifact = vitrim.export(selecting(), tmp_path / "a", images=noise(3), **options)
    last = artifact.manifest.parity[-2:]
    assert [stage.output for stage in last] == ["logits", "features"]
    assert all(stage.choices and stage.max_relative_error < 1e-5 for stage in last)
    assert last[1].top1_agreement is None


def with_choices(artifact: Artifact, equal: float, overlap: float, precision: str) -> Any:
    last = artifact.manifest.parity[-1]
    choice = ChoiceParity(selection="select.0", kept=9, equal=equal, overlap=overlap)
    parity = (last.model_copy(update={"choices": (choice,)}),)
    return artifact.manifest.model_copy(update={"parity": parity, "precision": precision})


def test_other_tokens_are_warned_of(tmp_path: Path) -> None:
    artifact = vitrim.export(selecting(), tmp_path / "a", images=noise(8), target="host")
    assert with_choices(artifact, 0.995, 0.9, "fp32").warnings == ()
    assert with_choices(artifact, 0.5, 0.95, "int8").warnings == ()
    for made in (
        with_choices(artifact, 0.75, 0.95, "fp32"),
        with_choices(artifact, 0.75, 0.5, "int8"),
    ):
        (warning,) = made.warnings
        assert "keeps other tokens than torch at select.0 on 25 % of 8 images" in warning
        assert "export in another precision" in warning


def test_a_graph_that_is_wrong_for_its_own_choices_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = write_network

    def wrong(model: CompactModel, *args: Any, **options: Any) -> Any:
        changed = with_other_head(model)
        return written(changed, *args, **options)

    monkeypatch.setattr("vitrim.export.graphs.candidates.write_network", wrong)
    with pytest.raises(ParityError, match=r"stage form .*: outputs differ from torch"):
        vitrim.export(selecting(), tmp_path / "a", images=noise(3), target="host")
    assert not (tmp_path / "a").exists()


def with_other_head(model: CompactModel) -> CompactModel:
    changed = copy.deepcopy(model)
    assert changed.head is not None
    with torch.no_grad():
        changed.head.weight.mul_(1.5)
    return changed


def test_a_graph_with_other_selections_keeps_its_names() -> None:
    graph = write_network(selecting(), Form())
    assert named_choices(graph, ["select.0/indices"]) is graph


@pytest.mark.parametrize("runtime", ["ncnn", "executorch", "litert"])
def test_runtimes_without_topk_refuse_selections(runtime: str) -> None:
    limits = limits_of(runtime_named(runtime))
    planned = Planned(architecture=selecting().architecture)
    with pytest.raises(InputError) as error:
        require_within_limits(runtime, limits, planned)
    assert str(error.value) == (
        f"runtime {runtime}: selects no tokens by content, as select.0 of this network does; "
        "export for onnxruntime, openvino or tvm, or use a token mask, which all runtimes run"
    )
    fixed = Planned(architecture=selecting("random").architecture)
    require_within_limits(runtime, limits, fixed)


def test_openvino_shows_which_tokens_it_selects(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    options: dict[str, Any] = {"runtime": "openvino", "batch": 3, "images": noise(7)}
    last = vitrim.export(selecting("evit"), tmp_path / "a", **options).manifest.parity[-1]
    assert last.stage == "openvino"
    assert last.max_relative_error < 1e-5
    assert [choice.equal for choice in last.choices or ()] == [1.0, 1.0]


def test_torch_as_a_runtime_runs_selections(tmp_path: Path) -> None:
    artifact = vitrim.export(selecting(), tmp_path / "a", runtime="torch", images=noise(2))
    assert artifact.manifest.parity[-1].max_relative_error < 1e-5
    assert any("does not show which tokens" in note for note in artifact.manifest.notes)


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
@pytest.mark.parametrize("batch", [1, 3, "dynamic"])
def test_an_export_verifies_positions_that_follow_the_choice(
    tmp_path: Path, kind: str, batch: Any
) -> None:
    artifact = vitrim.export(
        positioned_selection(kind), tmp_path / "a", batch=batch, images=noise(7)
    )
    last = artifact.manifest.parity[-1]
    assert last.max_relative_error < 1e-5
    assert [choice.equal for choice in last.choices or ()] == [1.0, 1.0]
    verify(tmp_path / "a")


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
def test_openvino_gathers_the_positions_of_each_image(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("openvino")
    options: dict[str, Any] = {"runtime": "openvino", "batch": 3, "images": noise(7)}
    artifact = vitrim.export(positioned_selection(kind), tmp_path / "a", **options)
    last = artifact.manifest.parity[-1]
    assert (last.stage, [choice.equal for choice in last.choices or ()]) == ("openvino", [1.0, 1.0])
    assert last.max_relative_error < 1e-5


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
def test_torchs_own_graph_gathers_positions_as_whole_rows(tmp_path: Path, kind: str) -> None:
    model = positioned_selection(kind)
    for batch in (1, "dynamic"):
        folder = tmp_path / str(batch)
        artifact = vitrim.export(model, folder, form="plain", batch=batch, images=noise(7))
        assert artifact.manifest.parity[-1].max_relative_error < 1e-5
        graph = onnx.load(str(folder / "model.onnx")).graph
        assert not [node.name for node in graph.node if node.op_type == "GatherElements"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_tvm_verifies_the_positions_of_each_image(tmp_path: Path, precision: Any) -> None:
    pytest.importorskip("tvm")
    options: dict[str, Any] = {"runtime": "tvm", "batch": 2, "images": noise(8)}
    model = positioned_selection("relative bias", sharpness=1)
    artifact = vitrim.export(model, tmp_path / "a", precision=precision, **options)
    last = artifact.manifest.parity[-1]
    exact = precision == "fp32"
    assert last.stage == ("tvm" if exact else "tvm int8")
    assert last.max_relative_error < (1e-5 if exact else 0.1)
    if exact:
        assert [choice.equal for choice in last.choices or ()] == [1.0, 1.0]
