"""What the files of both kinds of masks have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ...core.errors import InputError
from ...core.storage import replace_file
from ...core.written_kinds import FileKind


def write_masks(
    path: Path | str, tensors: Mapping[str, Tensor], about: Mapping[str, Any], kind: FileKind
) -> None:
    """Write a safetensors file of masks; `network.files.mask_metadata` reads what is about them.

    Args:
        path: The file to write or to replace.
        tensors: The masks as bytes.
        about: Schema and further entries, as JSON has them.
        kind: What a file that is replaced has to be.

    Raises:
        InputError: The file cannot be written, or exists and is of another kind.
    """
    # One metadata entry, because safetensors writes several in random order.
    metadata = {"vitrim": json.dumps(about, sort_keys=True)}
    replace_file(path, save(dict(tensors), metadata), kind)


def require_mask_file(path: Path | str, title: str) -> Path:
    """The path of a file of masks.

    Raises:
        InputError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such {title}")
    return path
