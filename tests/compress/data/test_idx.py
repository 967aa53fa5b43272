from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vitrim.compress.data.idx import idx_bytes, parse_idx, read_idx
from vitrim.core.errors import InputError


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)),
    st.binary(max_size=9),
)
def test_an_encoded_array_is_read_back(array: np.ndarray, rest: bytes) -> None:
    found, used = parse_idx(idx_bytes(array) + rest, "here")
    assert np.array_equal(found, array)
    assert used == len(idx_bytes(array))


def test_compressed_files_are_decompressed(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name, content in (
        ("a", idx_bytes(array)),
        ("b.gz", gzip.compress(idx_bytes(array), mtime=0)),
        ("c.xz", lzma.compress(idx_bytes(array))),
    ):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(read_idx(tmp_path / name), array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.gz", gzip.compress(bytes(1000), mtime=0)[:-12], "cannot be decompressed"),
        ("cut.xz", lzma.compress(bytes(1000))[:-12], "cannot be decompressed"),
        ("image", b"\x89PNG....", "not an idx file of bytes"),
        ("empty", b"", "not an idx file of bytes"),
        ("short", idx_bytes(np.zeros((4, 5), np.uint8))[:-1], "truncated, 19 of 20 bytes"),
        ("header", idx_bytes(np.zeros((4, 5), np.uint8))[:9], "header is truncated"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_idx(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images\.gz: no such file"):
        read_idx(tmp_path / "images.gz")
