"""A wrong compiler or converter stops the export; the error names stage, place and size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_models import tiny_vit
from tvm_sample import source as tiny_source
from vitrim.export import Artifact, ParityError, export
from vitrim.export.runtimes import RuntimeFiles, Source, runtime_named
from vitrim.export.runtimes.tvm_runtime import has_cuda
from vitrim.export.tvm_kernels.first_difference import first_difference

IMAGES = np.random.default_rng(6).standard_normal((4, 3, 16, 16), dtype=np.float32)
# The place of an error, and the weight that is changed to cause it.
PLACES = {
    "the stem": "stem.weight",
    "blocks.0.attn": "steps.0.0.core.v.weight",
    "blocks.1.ffn": "steps.3.0.core.fc2.weight",
    "the head": "head.weight",
}


def with_changed_weight(source: Source, name: str = PLACES["blocks.1.ffn"]) -> Source:
    """The source with the rows of one weight reversed.

    In the network it is the weight `name`, in the graph one of the second block's FFN.
    """
    assert source.compact is not None
    compact = copy.deepcopy(source.compact)
    with torch.no_grad():
        weight = compact.state_dict()[name]
        weight.copy_(weight.flip(0))
    graph = onnx.ModelProto()
    graph.CopyFrom(source.graph)
    wide = [
        tensor
        for tensor in graph.graph.initializer
        if len(tensor.dims) == 2 and max(tensor.dims) >= 64
    ]
    reversed_rows = np.ascontiguousarray(numpy_helper.to_array(wide[-1])[::-1])
    wide[-1].CopyFrom(numpy_helper.from_array(reversed_rows, wide[-1].name))
    return replace(source, model=compact, compact=compact, make_graph=lambda: graph)


def test_without_an_error_the_head_is_the_only_remaining_place(tmp_path: Path) -> None:
    source = tiny_source("host", batch=2)
    written = runtime_named("tvm").write(source, tmp_path)
    assert written.first_difference is first_difference
    assert str(first_difference(source, tmp_path / written.main, 1e-5)).startswith(
        "the head, after kernel "
    )


@pytest.mark.parametrize("place", PLACES)
def test_the_first_error_of_a_compiled_network_is_located_by_sublayer_and_kernel(
    place: str, tmp_path: Path
) -> None:
    source = tiny_source("host")
    written = runtime_named("tvm").write(with_changed_weight(source, PLACES[place]), tmp_path)
    found = first_difference(source, tmp_path / written.main, 1e-5)
    assert found is not None
    before = "the images" if place == "the stem" else "kernel "
    assert found.startswith(f"{place}, after {before}")
    if place != "the head":
        assert float(found.split(", by ")[1].split()[0]) > 1e-2


@pytest.mark.parametrize(
    ("runtime", "precision", "where"),
    [
        (
            "tvm",
            "fp32",
            r"blocks\.1\.ffn, after kernel \d+\.\w+, by \d\.\d\de[-+]\d\d of its largest value; ",
        ),
        ("openvino", "fp32", r"node '.*' \(\w+\), by \d\.\d\de[-+]\d\d of its largest value; "),
        ("ncnn", "fp32", "somewhere inside ncnn, which shows no inner values here; "),
    ],
)
def test_a_wrong_conversion_is_refused_and_leaves_no_files(
    runtime: str, precision: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = runtime_named(runtime)
    if reason := found.missing():
        pytest.skip(reason)
    whole: Callable[[Source, Path], RuntimeFiles] = found.write
    # A weight changes between the verified graph and the written files.
    monkeypatch.setattr(
        found, "write", lambda source, folder: whole(with_changed_weight(source), folder)
    )
    refusal = (
        rf"stage {runtime}: outputs differ from torch by \d\.\d\de[-+]\d\d of the largest logit, "
        rf"1e-04 is allowed; first difference: {where}"
    )
    with pytest.raises(ParityError, match=refusal) as caught:
        export(tiny_vit(), tmp_path / "out", images=IMAGES, runtime=runtime, target="host")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_code_for_an_absent_gpu_is_written_without_parity(tmp_path: Path) -> None:
    tvm = runtime_named("tvm")
    if reason := tvm.missing():
        pytest.skip(reason)
    if has_cuda():
        pytest.skip("this machine has a GPU")
    artifact = export(tiny_vit(), tmp_path / "out", images=IMAGES, runtime="tvm", target="cuda")
    assert artifact.manifest.session["device"] == "cuda"
    notes = [note for note in artifact.manifest.notes if "CUDA" in note]
    assert notes == [
        "parity was not run: there is no CUDA device on this machine; "
        "run `vitrim bench` on one that has it"
    ]
    # The stages of the graph that TVM reads have figures; the stage without parity has none.
    assert [stage.stage for stage in artifact.manifest.parity] == ["onnx", "simplified"]
    assert Artifact.load(artifact.folder).manifest.target == "cuda"
