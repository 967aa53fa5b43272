"""Files of masks: damaged and hostile ones are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from vitrim import StructuredMask, WeightMask
from vitrim.core.errors import InputError

SCHEMA = "vitrim.mask/1"
ENTRIES = {"ffn/a": torch.tensor([1, 0, 1], dtype=torch.uint8)}

SAVED = {
    "units": StructuredMask({"ffn": {"a": torch.tensor([True, False, True])}}, note={"a": "b"}),
    "weights": WeightMask({"a": torch.ones(3, 4, dtype=torch.bool)}, "0" * 64, {"a": "b"}),
}


def write(path: Path, about: Any, entries: dict[str, Tensor] | None = None) -> None:
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(ENTRIES if entries is None else entries, path, {"vitrim": text})


def test_the_sample_of_the_hostile_files_is_valid(tmp_path: Path) -> None:
    write(tmp_path / "mask", {"schema": SCHEMA, "scale": "original", "note": {"made": "here"}})
    mask = StructuredMask.load(tmp_path / "mask")
    assert mask.kept["ffn"]["a"].tolist() == [True, False, True]
    assert (mask.scale, mask.note) == ("original", {"made": "here"})
    write(tmp_path / "mask", {"schema": SCHEMA})
    assert StructuredMask.load(tmp_path / "mask").note == {}


@pytest.mark.parametrize(
    ("about", "entries", "message"),
    [
        ("[" * 100_000, {}, "its metadata are not JSON (nested too deeply)"),
        (f'{{"schema": "{SCHEMA}", "schema": 2}}', {}, "the key 'schema' is there twice"),
        ("[]", {}, "schema 'None', wanted 'vitrim.mask/1'; is this a mask saved by vitrim?"),
        ({"schema": "vitrim.weight-mask/1"}, {}, "schema 'vitrim.weight-mask/1', wanted"),
        ({"schema": SCHEMA, "note": 5}, {}, "its note is not a table of texts"),
        ({"schema": SCHEMA, "note": "text"}, {}, "its note is not a table of texts"),
        ({"schema": SCHEMA, "note": [1]}, {}, "its note is not a table of texts"),
        ({"schema": SCHEMA, "scale": [1]}, {}, "mask scale [1]: choose 'kept' or 'original'"),
        ({"schema": SCHEMA}, {"qk/a": (0, 5)}, "mask qk/a has shape (0, 5)"),
        ({"schema": SCHEMA}, {"qk/a": ()}, "mask qk/a has shape ()"),
        ({"schema": SCHEMA}, {"more/a": (3,)}, "unknown dimension 'more'"),
    ],
)
def test_hostile_files_are_refused_in_one_line(
    tmp_path: Path, about: Any, entries: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors = {name: torch.ones(shape, dtype=torch.uint8) for name, shape in entries.items()}
    write(tmp_path / "mask", about, tensors or None)
    with pytest.raises(InputError) as caught:
        StructuredMask.load(tmp_path / "mask")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_other_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such mask file"):
        StructuredMask.load(tmp_path / "none")
    write(tmp_path / "mask", {"schema": SCHEMA}, {"ffn/a": torch.tensor([0, 2]).byte()})
    with pytest.raises(InputError, match="entry 'ffn/a' is not made of 0 and 1"):
        StructuredMask.load(tmp_path / "mask")


@pytest.mark.parametrize("mask", SAVED.values(), ids=SAVED)
@given(tail=st.binary(max_size=200))
@settings(max_examples=50)
def test_a_changed_byte_never_gives_another_error(
    mask: StructuredMask | WeightMask, tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "mask"
    mask.save(path)
    whole = bytearray(path.read_bytes())
    for place, byte in enumerate(tail):
        whole[(7 * place + byte) % len(whole)] = byte
    path.write_bytes(whole)
    try:
        loaded = type(mask).load(path)
    except InputError:
        return
    kept = (
        [keep for _, _, keep in loaded]
        if isinstance(loaded, StructuredMask)
        else list(loaded.kept.values())
    )
    assert all(keep.dtype == torch.bool for keep in kept)
