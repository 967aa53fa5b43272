"""Damaged and malicious files are refused with one line that names the entry.

They are refused before memory is allocated for what they claim.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vitrim import InputError, load

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "model")
    return tmp_path / "model"


def assert_refused(folder: Path, message: str, *, most_bytes: int = 64 * 2**20) -> None:
    """Assert that loading fails with one printable matching line, in at most `most_bytes`."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()
    text = str(caught.value).replace(str(folder), "")
    assert "\n" not in text
    assert text.isprintable()


def edit_architecture(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "architecture.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def set_entry(data: Any, *path: Any, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


Q = "steps.0.0.core.q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(Q), f"tensor '{Q}' is missing"),
        (
            lambda s: s.update(extra=torch.ones(1)),
            "tensor 'extra' is not part of this architecture",
        ),
        (
            lambda s: s.update({"e\x1b[31m\nvil": torch.ones(1)}),
            r"tensor 'e\?\[31m\?vil' is not part",
        ),
        (
            lambda s: s.update({"../../../etc/passwd": torch.ones(1)}),
            "'../../../etc/passwd' is not part",
        ),
        (
            lambda s: s.update({Q: torch.ones(3, 3)}),
            rf"tensor '{Q}' has shape \[3, 3\], the architecture requires",
        ),
        (
            lambda s: (
                s.update({Q: s[Q].T.contiguous()})
                if s[Q].shape[0] != s[Q].shape[1]
                else s.update({Q: s[Q][None]})
            ),
            "has shape",
        ),
        (lambda s: s.update({Q: s[Q].int()}), f"tensor '{Q}' has type I32"),
        (lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)}), f"tensor '{Q}' has type F8"),
        (lambda s: s.update({Q: s[Q].double()}), "all must have the same"),
        (lambda s: s[Q].view(-1)[0].fill_(float("nan")), f"tensor '{Q}' holds NaN or infinity"),
        (lambda s: s[Q].view(-1)[-1].fill_(float("-inf")), f"tensor '{Q}' holds NaN or infinity"),
    ],
    ids=[
        "missing",
        "extra",
        "escape",
        "path",
        "shape",
        "transposed",
        "int",
        "float8",
        "mixed",
        "nan",
        "inf",
    ],
)
def test_tensors_that_do_not_match_the_architecture_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(folder, change)
    assert_refused(folder, message)


def branch(number: int = 0) -> tuple[Any, ...]:
    return "steps", number, 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("schema",),
            "vitrim.architecture/2",
            "schema 'vitrim.architecture/2', this version reads",
        ),
        (("schema",), "\x1b[2J", r"schema '\?\[2J'"),
        (("embed",), -1, "embed: Input should be greater"),
        (("embed",), 10**30, "embed: "),
        (("embed",), "12", "embed"),
        (("classes",), 3, "classes: Extra inputs"),
        ((*branch(), "core", "kind"), "exec", r"steps\.0\.0\.core"),
        ((*branch(), "core", "heads"), 1_000_000, "steps.0.0"),
        ((*branch(), "core", "q_norm", "width"), 999_999, "q_norm has width 999999"),
        ((*branch(), "reads"), [0, 0, 1], "must be increasing indices"),
        ((*branch(), "reads"), [5, 999_999], "must be increasing indices"),
        ((*branch(), "reads"), [-1], "reads"),
        ((*branch(), "name"), "../../etc/cron.d/evil", "is not made of words and dots"),
        ((*branch(), "name"), "a" * 300, "is not made of words and dots"),
        ((*branch(), "name"), "red\x1b[31m", r"the name 'red\?\[31m' is not made"),
        (branch(1), None, "steps.1.0"),
        (("steps",), "none", "steps: "),
        (("steps",), {}, "steps: "),
        (("image",), [1_000_000, 1_000_000, 1_000_000], "tokens, more than the 65536"),
        (("image",), [3, 2, 2], "too small for convolution"),
        (("head", "classes"), 1_000_000, "has shape"),
        (
            ("head",),
            {"classes": 1_000_000, "hidden": 1_000_000},
            "describes 1000.* parameters|more than the",
        ),
    ],
)
def test_inconsistent_architectures_are_refused(
    folder: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    edit_architecture(folder, lambda data: set_entry(data, *path, value=value))
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"eps": 1e-6', '"eps": NaN', "not JSON .NaN is no number"),
        ('"eps": 1e-6', '"eps": 1e999', r"eps: Input should be a finite number"),
        ('"eps": 1e-6', '"eps": -1.0', r"eps: Input should be greater than or equal to 0"),
        ('"embed": ', '"embed": 7, "embed": ', "the key 'embed' is there twice"),
        ('"prefix": ', '"prefix\\u0000": ', "prefix"),
        ('"embed": ', '"embed": ' + "9" * 5000 + ', "x": ', "architecture.json"),
    ],
    ids=["nan", "infinity", "negative", "twice", "nul", "digits"],
)
def test_numbers_and_keys_that_json_parsers_accept_are_refused(
    folder: Path, old: str, new: str, message: str
) -> None:
    path = folder / "architecture.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert_refused(folder, message)


def test_a_softmax_scale_of_nan_is_refused(folder: Path) -> None:
    edit_architecture(
        folder, lambda data: set_entry(data, *branch(), "core", "scale", value=float("nan"))
    )
    assert_refused(folder, "NaN is no number")


def test_a_million_sub_layers_are_refused(folder: Path) -> None:
    path = folder / "architecture.json"
    text = path.read_text()
    path.write_text(
        text[: text.index('"steps": ')] + '"steps": [' + "[" + ",".join(["0"] * 1_000_000) + "]]}"
    )
    assert_refused(folder, "steps: 1000000 sub-layers, more than the 4096", most_bytes=256 * 2**20)


def test_deeply_nested_json_is_refused(folder: Path) -> None:
    (folder / "architecture.json").write_text("[" * 1_000_000)
    assert_refused(folder, "not JSON")


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 64, b"\xff\xfe{}", b"[]", b"null", b'"' + b"a" * 1000]
)
def test_content_that_is_not_a_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "architecture.json").write_bytes(content)
    assert_refused(folder, "not JSON|schema 'None'")


def test_an_architecture_file_of_a_gigabyte_is_refused(folder: Path) -> None:
    # A sparse file has the size but occupies no blocks on disk.
    os.truncate(folder / "architecture.json", 2**30)
    assert_refused(folder, "1073741824 bytes are too many for an architecture")


def test_large_shapes_in_the_architecture_alone_are_refused(folder: Path) -> None:
    edit_architecture(
        folder, lambda data: set_entry(data, *branch(1), "core", "hidden", value=999_999)
    )
    assert_refused(folder, r"tensor 'steps.1.0.core.fc1.weight' has shape")


def edit_header(
    folder: Path, change: Callable[[dict[str, Any]], object], data: bytes | None = None
) -> None:
    """Rewrite the header of the weights file, and the data if given."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + (raw[8 + length :] if data is None else data)
    )


def test_large_shapes_in_both_files_are_refused(folder: Path) -> None:
    """Header and architecture agree on a tensor that the file does not contain."""
    edit_architecture(
        folder, lambda data: set_entry(data, *branch(1), "core", "hidden", value=500_000)
    )
    width = json.loads((folder / "architecture.json").read_text())["steps"][1][0]["reads"]

    def claim(header: dict[str, Any]) -> None:
        header["steps.1.0.core.fc1.weight"] = {
            "dtype": "F32",
            "shape": [500_000, len(width)],
            "data_offsets": [0, 500_000 * len(width) * 4],
        }

    edit_header(folder, claim)
    assert_refused(folder, "not a whole safetensors file")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[Q].update(data_offsets=[0, 2**62]),
        lambda header: header[Q].update(data_offsets=[2**40, 2**40 + 4]),
        lambda header: header[Q].update(data_offsets=[100, 0]),
        lambda header: header[Q].update(data_offsets=[-4, 0]),
        lambda header: header[Q].update(shape=[2**40, 2**40]),
        lambda header: header[Q].update(shape=[-1, 4]),
        lambda header: header[Q].update(dtype="PICKLE"),
        lambda header: header.update({Q: header["stem.weight"]}),
        lambda header: header.update(__metadata__={"schema": {"a": 1}}),
    ],
    ids=[
        "end",
        "outside",
        "backwards",
        "negative",
        "overflow",
        "below-zero",
        "type",
        "overlap",
        "metadata",
    ],
)
def test_invalid_header_entries_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_header(folder, change)
    assert_refused(folder, f"not a whole safetensors file|tensor '{Q}'")


@pytest.mark.parametrize("size", [0, 4, 8, 100, 2000, -1])
def test_truncated_weights_are_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(folder, "not a whole safetensors file")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_invalid_header_lengths_are_refused(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert_refused(folder, "not a whole safetensors file")


def test_a_header_of_a_gigabyte_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**30))
    os.truncate(path, 2**30 + 8)
    assert_refused(folder, "a header of 1073741824 bytes is too long for a model")


def test_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    assert_refused(folder, "not a whole safetensors file")


def test_a_pickle_instead_of_weights_is_refused(folder: Path) -> None:
    torch.save({Q: torch.ones(2)}, folder / "model.safetensors")
    assert_refused(folder, "not a whole safetensors file")


@pytest.mark.parametrize("file", ["model.safetensors", "architecture.json"])
def test_links_to_files_outside_of_the_folder_are_refused(
    folder: Path, tmp_path: Path, file: str
) -> None:
    (folder / file).rename(tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    assert_refused(folder, "a link to a file outside of the folder")


@pytest.mark.parametrize("file", ["model.safetensors", "architecture.json"])
def test_missing_and_irregular_files_are_refused(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert_refused(folder, "no such file")
    (folder / file).mkdir()
    assert_refused(folder, "no such file")
    (folder / file).rmdir()
    os.mkfifo(folder / file)
    assert_refused(folder, "no such file")
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    assert_refused(folder, "no such file")


def test_a_bias_table_for_too_many_tokens_is_refused(folder: Path) -> None:
    """A table of four megabytes would need an index of half a terabyte."""

    def widen(data: Any) -> None:
        data["image"], data["stem"]["patch"] = [3, 250, 250], [1, 1]
        data["steps"][0][0]["core"]["bias"] = {"grid": [250, 250], "prefix": 1}

    edit_architecture(folder, widen)
    assert_refused(folder, "62501 tokens, more than the 8192")
