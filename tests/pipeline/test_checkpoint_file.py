"""Kinds of checkpoint files: read whatever their ending, or refused by what they are."""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import pathlib
import pickle
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vitrim.core.errors import InputError
from vitrim.pipeline.checkpoint_file import read_entries, shards_of

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.ones(2)}


def read(path: Path) -> dict[str, Tensor]:
    return {".".join(entry.parts): entry.tensor for entry in read_entries(path)}


def assert_state(path: Path) -> None:
    found = read(path)
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(found[name], tensor)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_entries(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


# ---- read ----


@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "ckpt", "pth.tar", "safetensors", "model"])
def test_the_contents_decide_and_not_the_ending(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"weights.{ending}"
    torch.save(STATE, path)
    assert_state(path)
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert_state(path)
    save_file(STATE, path)
    assert_state(path)


def test_numpy_archives(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {name: each.numpy() for name, each in STATE.items()}
    np.savez(tmp_path / "w.npz", **arrays)
    assert_state(tmp_path / "w.npz")


def test_a_table_of_numpy_arrays(tmp_path: Path) -> None:
    torch.save({name: each.numpy() for name, each in STATE.items()}, tmp_path / "w.pth")
    assert_state(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=1e-3, betas=(0.9, 0.99), out=pathlib.Path("runs")),
        types.SimpleNamespace(lr=1e-3),
        np.float64(0.5),
        np.arange(3),
        collections.defaultdict(list, loss=[0.1]),
        pathlib.PurePosixPath("a/b"),
        pathlib.PureWindowsPath("a"),
        [1, "two", None, {"three": {4}}],
    ],
)
def test_plain_data_beside_the_weights(tmp_path: Path, beside: Any) -> None:
    torch.save({**STATE, "beside": beside}, tmp_path / "w.pth")
    found = read(tmp_path / "w.pth")
    assert all(torch.equal(found[name], each) for name, each in STATE.items())


@pytest.mark.parametrize(
    "convert",
    [
        lambda each: each.to_sparse(),
        lambda each: each.to_sparse_csr() if each.ndim == 2 else each,
        lambda each: nn.Parameter(each),
        lambda each: each.t().contiguous().t() if each.ndim == 2 else each,
        lambda each: torch.stack([each, each])[1],
    ],
    ids=["sparse", "compressed rows", "parameters", "transposed", "a view"],
)
def test_tensors_of_any_layout_are_made_dense(
    tmp_path: Path, convert: Callable[[Tensor], Tensor]
) -> None:
    torch.save({name: convert(each) for name, each in STATE.items()}, tmp_path / "w.pth")
    assert_state(tmp_path / "w.pth")


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name, (key, each) in zip(names, STATE.items(), strict=True):
        save_file({key: each}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(STATE, names, strict=True))}))
    assert_state(index)
    assert shards_of(index) == [index, *(tmp_path / name for name in names)]
    assert "one of several shards of a checkpoint; name its index" in refusal(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: no such checkpoint"):
        read_entries(index)
    index.write_text(json.dumps({"weight_map": {"head.weight": "../other.safetensors"}}))
    assert "is outside of its folder" in refusal(index)


# ---- refused ----


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.pth", b"x")


def tarred(path: Path) -> None:
    (path.parent / "inner.txt").write_text("x")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inner.txt", "weights.pth")


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), str(path))


def exported(path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    torch.export.save(program, str(path) + ".pt2")
    Path(str(path) + ".pt2").rename(path)


def cut(path: Path, saved: Callable[[Any, Path], object], share: float) -> None:
    saved({"a": torch.zeros(500)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def legacy(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: path.write_bytes(b""), "not a complete checkpoint (an empty file)"),
    "cut zip": (lambda path: cut(path, torch.save, 0.6), "not a complete checkpoint"),
    "cut zip, first bytes": (lambda path: cut(path, torch.save, 0.02), "not a complete checkpoint"),
    "cut legacy": (lambda path: cut(path, legacy, 0.6), "not a complete checkpoint"),
    "cut safetensors": (lambda path: cut(path, save_file, 0.6), "not a complete checkpoint"),
    "Git LFS": (
        lambda path: path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    "HTML": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "a web page"),
    "XML": (lambda path: path.write_text("<?xml version='1.0'?><Error/>"), "a web page"),
    "JSON": (lambda path: path.write_text('{"error": "not found"}'), "JSON text, without tensors"),
    "text": (lambda path: path.write_text("Not Found\n"), "a text file"),
    "binary": (lambda path: path.write_bytes(bytes(range(1, 99))), "not a checkpoint (it begins"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "compressed with gzip"),
    "tar": (tarred, "a tar archive; unpack it"),
    "zip": (zipped, "a zip archive (it contains weights.pth); unpack it"),
    "TorchScript": (scripted, "a TorchScript archive, which contains code; save its weights"),
    "torch.export": (exported, "an exported program (torch.export), which contains code"),
    "npy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "one array without a name"),
    "objects in npz": (
        lambda path: np.savez(path.open("wb"), a=np.array([{}], object)),
        "it contains Python objects, which could run code",
    ),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "a module": (
        lambda path: torch.save(nn.Linear(3, 2), path),
        "it contains more than tensors and could run code, so it is not read "
        "(torch.nn.modules.linear.Linear); save its state_dict()",
    ),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": [1]})), ""),
    "a list": (lambda path: torch.save([torch.zeros(2)], path), "a list of 1 tensors without"),
    "a tensor": (lambda path: torch.save(torch.zeros(2), path), "one tensor without a name"),
    "an optimizer": (
        lambda path: torch.save(torch.optim.AdamW([torch.zeros(2)]).state_dict(), path),
        "it contains the state of an optimizer only; save the model's state_dict()",
    ),
    "numbers": (lambda path: torch.save({"epoch": 3}, path), "it contains no table of tensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_what_they_are(tmp_path: Path, kind: str) -> None:
    write, words = REFUSED[kind]
    path = tmp_path / "weights.pth"
    write(path)
    assert words in refusal(path)


def test_an_onnx_graph(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a\x12")
    assert "an ONNX graph" in refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("model.safetensors", "name a file in it: model.safetensors"),
        (".metadata", "a distributed checkpoint"),
        ("zero_to_fp32.py", "a DeepSpeed checkpoint"),
        ("saved_model.pb", "a TensorFlow model"),
        ("data.pkl", "the unpacked contents of a checkpoint file"),
        ("notes.txt", "a folder without a model of vitrim"),
    ],
)
def test_folders_are_refused_by_what_they_are(tmp_path: Path, inner: str, words: str) -> None:
    (tmp_path / inner).write_bytes(b"x")
    assert words in refusal(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such checkpoint; name a .safetensors or .pth file" in refusal(tmp_path / "w.pth")
