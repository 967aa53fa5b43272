"""A folder from which an interrupted `trim` continues: one safetensors file for each finished part.

The folder has `state.json` with the schema and a fingerprint of model, images and options. Each
part is `<name>.safetensors`: tensors, and in its metadata the schema, the fingerprint and a JSON
record. Files are written atomically, so a kill leaves whole parts only. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from ...core import strict_json
from ...core.errors import InputError
from ...core.storage import replace_file
from ..network.modules.model import CompactModel

SCHEMA = "vitrim.trim-state/1"
STATE = "state.json"


class SavedState:
    """Finished parts of a cut; without a folder nothing is saved or found."""

    def __init__(self, folder: Path | None = None, fingerprint: str = "") -> None:
        self.folder, self.fingerprint = folder, fingerprint

    @classmethod
    def open(cls, folder: Path | str, fingerprint: str) -> SavedState:
        """Begin a state in an empty folder, or continue the one in it.

        Args:
            folder: The folder; it is created.
            fingerprint: Identifies what the parts depend on; see `fingerprint_of`.

        Raises:
            InputError: The folder has other files, or the state of another cut.
        """
        folder = Path(folder)
        marker = folder / STATE
        if not marker.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise InputError(f"{folder}: not the state of a cut; name an empty or a new folder")
            content = {"schema": SCHEMA, "fingerprint": fingerprint}
            replace_file(marker, json.dumps(content, indent=1) + "\n")
            return cls(folder, fingerprint)
        try:
            found = strict_json.parse(marker.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{marker}: cannot be read ({error}); delete the folder") from None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise InputError(f"{marker}: not a {SCHEMA} file; name an empty or a new folder")
        if found.get("fingerprint") != fingerprint:
            raise InputError(
                f"{folder}: was begun with another model, other images or other options; "
                "name another folder, or delete it to start again"
            )
        return cls(folder, fingerprint)

    def save(self, name: str, record: object, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write one finished part."""
        if self.folder is None:
            return
        metadata = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "record": json.dumps(record),
        }
        whole = {key: value.detach().contiguous().clone() for key, value in (tensors or {}).items()}
        replace_file(self.path(name), tensors_to_bytes(whole, metadata))

    def load(self, name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """Return the record and the tensors of a finished part, or None.

        Raises:
            InputError: The file is damaged, or belongs to another cut.
        """
        path = self.path(name)
        if not self.has(name):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            record = strict_json.parse(metadata.get("record", "").encode())
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path, str(error).splitlines()[0]) from None
        if (metadata.get("schema"), metadata.get("fingerprint")) != (SCHEMA, self.fingerprint):
            raise damaged(path, "it belongs to another cut")
        return record, tensors

    def path(self, name: str) -> Path:
        """The file of a part."""
        return (self.folder or Path()) / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return self.folder is not None and self.path(name).is_file()


def damaged(path: Path, why: str) -> InputError:
    """The error for a part that cannot be used."""
    return InputError(f"{path}: damaged ({why[:120]}); delete the file to compute the part again")


def copy_checked(path: Path, targets: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Copy tensors of a part into parameters of the same names and shapes.

    Raises:
        InputError: A tensor is missing, or has another shape or values that are not finite.
    """
    for name, target in targets.items():
        tensor = found.get(name)
        if tensor is None or tensor.shape != target.shape or not tensor.isfinite().all():
            raise damaged(path, f"tensor {name!r}")
        with torch.no_grad():
            target.copy_(tensor)


def fingerprint_of(model: CompactModel, images: Tensor, parts: Iterable[object]) -> str:
    """A hash of a network, the images and anything else that a result depends on."""
    digest = hashlib.sha256(model.architecture.model_dump_json(by_alias=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    digest.update(str(tuple(images.shape)).encode())
    digest.update(images.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    digest.update(repr(tuple(parts)).encode())
    return digest.hexdigest()
