"""What a compiler or a converter got wrong stops the export with the stage, where it is and by how
much, and leaves nothing.
"""

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
from vitrim.export.runtimes.tvm_runtime import cuda_here
from vitrim.export.tvm_kernels.first_kernel import first_kernel

IMAGES = np.random.default_rng(6).standard_normal((4, 3, 16, 16), dtype=np.float32)
# What errs, and the weight that another is compiled for.
PLACES = {
    "the stem": "stem.weight",
    "blocks.0.attn": "steps.0.0.core.v.weight",
    "blocks.1.ffn": "steps.3.0.core.fc2.weight",
    "the head": "head.weight",
}


def otherwise(source: Source, name: str = PLACES["blocks.1.ffn"]) -> Source:
    """The source with one weight turned upside down: in the network the one named, in the graph an
    FFN's of the second block.
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
    wide[-1].CopyFrom(
        numpy_helper.from_array(
            np.ascontiguousarray(numpy_helper.to_array(wide[-1])[::-1]), wide[-1].name
        )
    )
    return replace(source, model=compact, compact=compact, graph=graph)


def test_where_nothing_is_wrong_only_the_head_is_left_to_suspect(tmp_path: Path) -> None:
    source = tiny_source("host", batch=2)
    written = runtime_named("tvm").write(source, tmp_path)
    assert written.first_difference is first_kernel
    assert str(first_kernel(source, tmp_path / written.main, 1e-5)).startswith(
        "the head, behind kernel "
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_compiled_networks_first_error_is_named_by_sublayer_and_kernel(
    place: str, tmp_path: Path
) -> None:
    source = tiny_source("host")
    written = runtime_named("tvm").write(otherwise(source, PLACES[place]), tmp_path)
    words = first_kernel(source, tmp_path / written.main, 1e-5)
    assert words is not None
    before = "the images" if place == "the stem" else "kernel "
    assert words.startswith(f"{place}, behind {before}")
    if place != "the head":
        assert float(words.split(", by ")[1].split()[0]) > 1e-2


@pytest.mark.parametrize(
    ("runtime", "precision", "where"),
    [
        (
            "tvm",
            "fp32",
            r"blocks\.1\.ffn, behind kernel \d+\.\w+, by \d\.\d\de[-+]\d\d of its largest value; ",
        ),
        ("openvino", "fp32", r"node '.*' \(\w+\), by \d\.\d\de[-+]\d\d of its largest value; "),
        ("ncnn", "fp32", "somewhere inside ncnn, which shows no inner values here; "),
    ],
)
def test_what_was_written_wrongly_is_refused_and_nothing_is_left(
    runtime: str, precision: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = runtime_named(runtime)
    if reason := found.missing():
        pytest.skip(reason)
    whole: Callable[[Source, Path], RuntimeFiles] = found.write
    # Between what was proven and what is written, a weight changes.
    monkeypatch.setattr(found, "write", lambda source, folder: whole(otherwise(source), folder))
    refusal = rf"stage {runtime}: outputs differ from torch by \d\.\d\de[-+]\d\d of the largest logit, 1e-04 is allowed; first difference: {where}"
    with pytest.raises(ParityError, match=refusal) as caught:
        export(tiny_vit(), tmp_path / "out", images=IMAGES, runtime=runtime, target="host")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_code_for_a_gpu_that_is_not_here_says_that_nobody_ran_it(tmp_path: Path) -> None:
    tvm = runtime_named("tvm")
    if reason := tvm.missing():
        pytest.skip(reason)
    if cuda_here():
        pytest.skip("this machine has a GPU")
    artifact = export(tiny_vit(), tmp_path / "out", images=IMAGES, runtime="tvm", target="cuda")
    assert artifact.manifest.session["device"] == "cuda"
    told = [note for note in artifact.manifest.notes if "CUDA" in note]
    assert told == [
        "parity was not run: there is no CUDA device on this machine; `vitrim bench` on one tells its answers and its speed"
    ]
    # The stages before it were proven all the same, and no figure stands for the one that was not.
    assert [stage.stage for stage in artifact.manifest.parity] == ["onnx", "simplified"]
    assert Artifact.load(artifact.folder).manifest.target == "cuda"
