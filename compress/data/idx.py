"""The idx format of MNIST and Fashion-MNIST: unsigned bytes after a short header.

The header is two zero bytes, a type byte (8 = unsigned byte), the number of dimensions, and each
dimension as big-endian uint32. Files may be compressed.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InputError


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file; `.gz` and `.xz` are decompressed.

    Raises:
        InputError: The file is missing or damaged; the message names it.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        elif path.suffix == ".xz":
            raw = lzma.decompress(raw)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; an idx data set needs its four files") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: cannot be decompressed ({error}); the file is damaged, download it again"
        ) from error
    return parse_idx(raw, str(path))[0]


def parse_idx(raw: bytes, where: str) -> tuple[NDArray[np.uint8], int]:
    """Read one array from the start of `raw`, which is named `where` in errors.

    Returns:
        The array, and the number of bytes that were read.

    Raises:
        InputError: The bytes are no complete idx file.
    """
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        found = raw[:4].hex() or "nothing"
        raise InputError(f"{where}: not an idx file of bytes (it starts with {found}, not 000008)")
    dimensions = raw[3]
    start = 4 + 4 * dimensions
    if len(raw) < start:
        raise InputError(f"{where}: the idx header is truncated; download the file again")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    size = int(np.prod(shape, dtype=np.int64))
    if len(raw) < start + size:
        raise InputError(
            f"{where}: truncated, {len(raw) - start} of {size} bytes; download the file again"
        )
    return np.frombuffer(raw, dtype=np.uint8, count=size, offset=start).reshape(shape), start + size


def idx_bytes(array: NDArray[Any]) -> bytes:
    """Encode a uint8 array as an idx file."""
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + np.ascontiguousarray(array, dtype=np.uint8).tobytes()
