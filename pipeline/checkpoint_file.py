"""Reading the tensors of a checkpoint file, whatever kind of file it is.

The kind is recognised by the contents, not by the name. Nothing in a file is executed: PyTorch's
files are read with `weights_only`, and kinds that contain code are refused.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import InputError

NO_FILE = "name a .safetensors or .pth file, or a folder that vitrim saved"
FLAX_ANCHORS = ("embedding/kernel", "params/embedding/kernel", "opt/target/embedding/kernel")
_MAX_DEPTH = 12
_SAVE_STATE = "save the model's state_dict() with torch.save"
_COPY_AGAIN = "download or copy it again"
_UNPACK = "unpack it and name the file inside"

# (offset, bytes there, kind of file, way out)
_SIGNATURES = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    (0, b"\x89HDF", "an HDF5 file (Keras)", f"convert it to PyTorch, and {_SAVE_STATE}"),
    (0, b"GGUF", "a GGUF file", "name the file that it was converted from"),
    (4, b"TFL3", "a LiteRT model", "name the model that it was converted from"),
    (0, b"\x1f\x8b", "compressed with gzip", _UNPACK),
    (0, b"BZh", "compressed with bzip2", _UNPACK),
    (0, b"\xfd7zXZ", "compressed with xz", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"%PDF", "a PDF document", NO_FILE),
    (0, b"\x89PNG", "an image", NO_FILE),
    (0, b"\xff\xd8\xff", "an image", NO_FILE),
)
_ZIP, _NPY, _PICKLE = b"PK\x03\x04", b"\x93NUMPY", b"\x80"
# Markers of zip files that contain code: (name of a member, kind of file, way out).
_CODE_ARCHIVES = (
    (
        "constants.pkl",
        "a TorchScript archive, which contains code",
        "save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
    ),
    (
        "archive_format",
        "an exported program (torch.export), which contains code",
        "save its weights alone: torch.save(torch.export.load(FILE).state_dict, 'weights.pth')",
    ),
    (
        "serialized_exported_program.json",
        "an exported program (torch.export), which contains code",
        "save its weights alone: torch.save(torch.export.load(FILE).state_dict, 'weights.pth')",
    ),
    (
        ".data/extern_modules",
        "a torch.package archive, which contains code",
        f"load the model in Python, and {_SAVE_STATE}",
    ),
)
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint file.

    Attributes:
        place: The keys of the dictionaries that contain it, from the outside.
        name: Its key in the innermost one.
        tensor: The dense tensor.
    """

    place: tuple[str, ...]
    name: str
    tensor: Tensor

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys and the parts of the name, which dots separate."""
        return (*self.place, *self.name.split("."))


def read_entries(path: Path) -> list[Entry]:
    """Return every named tensor of a checkpoint file, in its order.

    Args:
        path: PyTorch's `.pth`, safetensors, `.npz`, or the index of a checkpoint in shards; with
            any ending.

    Returns:
        The tensors, at any depth of nested dictionaries.

    Raises:
        InputError: The file is missing, damaged, of another kind, contains no named tensors, or
            could run code; the message names the file, its kind and what to do.
    """
    require_file(path)
    if _SHARD.search(path.name):
        raise InputError(
            f"{path}: one of several shards of a checkpoint; name its index, "
            "such as model.safetensors.index.json"
        )
    found = _load(path)
    entries = list(_entries(found, (), path))
    if not entries:
        raise InputError(f"{path}: {_without_names(found)}; {_SAVE_STATE}")
    return entries


def require_file(path: Path) -> None:
    """Raise InputError, with what to name instead, if `path` is no readable file."""
    if path.is_dir():
        kind = folder_kind(path) or f"a folder without a model of vitrim; {NO_FILE}"
        raise InputError(f"{path}: {kind}")
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; {NO_FILE}")
    if not path.is_file():
        raise InputError(f"{path}: neither a file nor a folder; {NO_FILE}")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def is_flax(entries: list[Entry]) -> bool:
    """Whether a checkpoint has the names of Google's Vision Transformers in JAX."""
    return any(entry.name in FLAX_ANCHORS for entry in entries)


def shards_of(path: Path) -> list[Path]:
    """The files that a checkpoint consists of: itself, and its shards if it is an index."""
    if path.suffix != ".json":
        return [path]
    names = sorted(set(_weight_map(path).values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{path}: shard {name!r} is outside of its folder")
    return [path, *(path.parent / name for name in names)]


def _load(path: Path) -> Any:
    with path.open("rb") as stream:
        head = stream.read(512)
    _refuse_other_kinds(path, head)
    if head.startswith(_ZIP):
        return _load_zip(path)
    if head.startswith(_NPY):
        raise InputError(
            f"{path}: a .npy file contains one array without a name; save a state_dict() "
            "with torch.save, or named arrays with numpy.savez"
        )
    # The length of its header, eight bytes, may begin like a pickle.
    if head[8:9] == b"{" and path.suffix != ".json":
        return _load_safetensors(path)
    if head.startswith(_PICKLE):
        return _load_torch(path)
    if path.suffix == ".json":
        return _load_shards(path)
    raise InputError(f"{path}: {_text_kind(head)}")


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    if not head:
        raise InputError(f"{path}: not a complete checkpoint (an empty file); {_COPY_AGAIN}")
    require_no_graph(path)
    for offset, signature, kind, way_out in _SIGNATURES:
        if head[offset:].startswith(signature):
            raise InputError(f"{path}: {kind}; {way_out}")


def require_no_graph(path: Path) -> None:
    """Raise InputError for an .onnx file: it has no modules that could be cut."""
    if path.suffix.lower() == ".onnx":
        raise InputError(
            f"{path}: an ONNX graph, which is exported and measured, not trained or cut; "
            "name the model that it was exported from"
        )


def _text_kind(head: bytes) -> str:
    """What a file is that no other rule recognises, and what to do."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<")):
        return "a web page, not the file itself; download the file behind the page"
    if text.startswith((b"{", b"[")):
        return f"JSON text, without tensors; {NO_FILE}"
    if not re.search(rb"[^\x09\x0a\x0d\x20-\x7e\x80-\xff]", head):
        return f"a text file; {NO_FILE}"
    return f"not a checkpoint (it begins with {head[:8].hex(' ')}); {NO_FILE}"


def folder_kind(folder: Path) -> str | None:
    """What a folder is that vitrim did not save, and what to name; None if it is not recognised."""
    names = sorted(path.name for path in folder.iterdir())
    if ".metadata" in names:
        return (
            "a distributed checkpoint; convert it to one file with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    if "zero_to_fp32.py" in names:
        return "a DeepSpeed checkpoint; run the zero_to_fp32.py in it, and name its output"
    if "saved_model.pb" in names:
        return f"a TensorFlow model; convert it to PyTorch, and {_SAVE_STATE}"
    if "data.pkl" in names:
        return "the unpacked contents of a checkpoint file; name the file itself"
    indices = [name for name in names if name.endswith(".index.json")]
    files = [name for name in names if re.search(r"\.(safetensors|pth|pt|bin|ckpt|tar|npz)$", name)]
    if indices or files:
        return f"a folder that vitrim did not save; name a file in it: {(indices or files)[0]}"
    return None


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a complete checkpoint index ({error})") from error
    table = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise InputError(f"{path}: JSON text, without tensors; {NO_FILE}")
    return table


# ---- the kinds that are read ----


def _load_shards(path: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for shard in shards_of(path)[1:]:
        require_file(shard)
        tensors |= _load(shard)
    return tensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _incomplete(path, error) from error


def _load_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _incomplete(path, error) from error
    # torch's archives have one folder, named after the file that was saved first.
    inner = {name.partition("/")[2] for name in names}
    for member, kind, way_out in _CODE_ARCHIVES:
        if member in inner or member in names:
            raise InputError(f"{path}: {kind}; {way_out}")
    if "data.pkl" in inner:
        return _load_torch(path)
    if names and all(name.endswith(".npy") for name in names):
        return _load_npz(path)
    content = names[0] if names else "nothing"
    raise InputError(f"{path}: a zip archive (it contains {content}); {_UNPACK}")


def _load_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path}: it contains Python objects, which could run code, so it is not read; "
                "save arrays only"
            ) from error
        raise _incomplete(path, error) from error


def _load_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_plain_data()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about sparse tensors and old protocols
            # Not its path, by whose ending torch also selects the format.
            with path.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: it contains more than tensors and could run code, so it is not read"
            f"{_named_classes(path)}; save its state_dict()"
        ) from error
    except Exception as error:  # A damaged file may fail in any way.
        raise _incomplete(path, error) from error


def _plain_data() -> list[Any]:
    """Classes that training scripts save beside the weights; none of them runs code.

    Paths of any system become plain ones, and default dictionaries plain dictionaries.
    """
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    allowed: list[Any] = [
        argparse.Namespace,
        types.SimpleNamespace,
        datetime.date,
        datetime.datetime,
        datetime.timedelta,
        np.dtype,
        np.ndarray,
        *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFDG"},
        (_empty, "collections.defaultdict"),
    ]
    allowed += [(each, f"builtins.{each.__name__}") for each in (int, float, str, list, dict, bool)]
    for module in ("pathlib", "pathlib._local"):
        for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"):
            allowed.append((pathlib.PurePosixPath, f"{module}.{kind}"))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    return allowed


def _empty(*factory: object) -> dict[object, object]:
    del factory
    return {}


def _named_classes(path: Path) -> str:
    """The classes in a file that are not read: " (its classes: ...)"; empty where unknown."""
    try:
        with torch.serialization.safe_globals(_plain_data()):
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # Only zip archives have a list.
        return ""
    more = f" and {len(found) - 2} more" if len(found) > 2 else ""
    return f" ({', '.join(found[:2])}{more})" if found else ""


def _incomplete(path: Path, error: Exception) -> InputError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return InputError(f"{path}: not a complete checkpoint ({first}); {_COPY_AGAIN}")


# ---- tensors in nested dictionaries ----


def _entries(value: Any, place: tuple[str, ...], path: Path) -> Iterator[Entry]:
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if not isinstance(value, Mapping) or len(place) > _MAX_DEPTH:
        return
    for key, item in value.items():
        if not isinstance(key, str):
            continue
        if isinstance(item, np.ndarray) and item.dtype.kind in "biufc":
            item = torch.from_numpy(np.array(item))
        if isinstance(item, Tensor):
            yield Entry(place, key, _dense(item, ".".join((*place, key)), path))
        else:
            yield from _entries(item, (*place, key), path)


def _dense(tensor: Tensor, name: str, path: Path) -> Tensor:
    tensor = tensor.detach()
    try:
        if tensor.is_quantized:
            return tensor.dequantize()
        if tensor.layout != torch.strided or tensor.is_nested:
            return tensor.to_dense()
    except (RuntimeError, NotImplementedError) as error:
        layout = str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{path}: {name} has the layout {layout}; save to_dense()") from error
    return tensor


def _without_names(found: Any) -> str:
    if isinstance(found, Tensor):
        return "it contains one tensor without a name"
    if isinstance(found, list | tuple) and any(isinstance(each, Tensor) for each in found):
        return f"it contains a list of {len(found)} tensors without names"
    if isinstance(found, Mapping) and "param_groups" in found:
        return "it contains the state of an optimizer only"
    return "it contains no table of tensors"
