"""Saved models: a folder with `model.safetensors` and `architecture.json`, never a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from ...core import strict_json
from ...core.errors import InputError
from ...core.staging import recover
from ...core.storage import replace_file, replace_folder
from ...core.written_kinds import (
    Contents,
    FileKind,
    FolderKind,
    has_schema,
    json_kind,
    json_object,
)
from .architecture import SCHEMA, Architecture
from .modules.model import CompactModel, build
from .patch_grid import max_tokens

WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"
# `vitrim compact` saves the mask beside the model, and records of a cut without training and of a
# choice of tokens; a `BucketedModel` saves its counts.
MASK_FILE, TRIM_FILE, TOKENS_FILE = "mask.safetensors", "trim.json", "tokens.json"
BUCKETS_FILE = "buckets.json"
# Far above any Vision Transformer. A larger claim is refused before memory is allocated.
MAX_PARAMETERS = 20_000_000_000
MAX_ARCHITECTURE_BYTES = 16 * 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_BRANCHES = 4096
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def _is_mask(path: Path) -> bool:
    """Whether a file is a mask: a safetensors file whose metadata have the schema of masks."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return length <= MAX_HEADER_BYTES and b"vitrim.mask/" in stream.read(length)


def _is_weight_mask(path: Path) -> bool:
    """Whether a file is a mask of single weights."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return length <= MAX_HEADER_BYTES and b"vitrim.weight-mask/" in stream.read(length)


def _model_contents(folder: Path) -> Contents | None:
    if not has_schema(json_object(folder / ARCHITECTURE), SCHEMA):
        return None
    records = {MASK_FILE: MASK, TRIM_FILE: TRIM, TOKENS_FILE: TOKENS, BUCKETS_FILE: BUCKETS}
    return {ARCHITECTURE: None, WEIGHTS: None, **records}


MASK = FileKind("a mask", _is_mask)
WEIGHT_MASK = FileKind("a mask of weights", _is_weight_mask)
TRIM = json_kind("a record of a cut", "vitrim.trim/1")
TOKENS = json_kind("a record of a choice of tokens", "vitrim.tokens/1")
BUCKETS = json_kind("buckets of a model", "vitrim.buckets/1")
MODEL = FolderKind("a saved model", ARCHITECTURE, _model_contents)


def is_storable(types: set[torch.dtype]) -> bool:
    """Whether `load` reads a model whose parameters have these floating-point types."""
    return len(types) == 1 and types <= set(_TYPES.values())


def save(model: CompactModel, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write a `CompactModel` to a folder; `vitrim.save` also accepts other models.

    Raises:
        InputError: The folder is not empty, or the disk is full. Nothing is left half-written.
    """
    architecture = model.architecture.model_dump_json(by_alias=True, indent=1)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    with replace_folder(folder, MODEL, overwrite=overwrite) as temporary:
        replace_file(temporary / ARCHITECTURE, architecture + "\n")
        replace_file(temporary / WEIGHTS, tensors_to_bytes(state, {"schema": SCHEMA}))
    return Path(folder)


def load(folder: Path | str) -> CompactModel:
    """Load a saved model. Its outputs are bit-equal to those of the model that was saved.

    Both files are untrusted: they are validated before memory is allocated for what they claim.

    Args:
        folder: A folder that `vitrim.save` wrote.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        InputError: A file is missing, malformed or inconsistent with the other; the message names
            the file and the entry.
    """
    folder = Path(folder)
    architecture = read_architecture(folder / ARCHITECTURE)
    shapes = _shapes(architecture, folder / ARCHITECTURE)
    state = _read_weights(folder / WEIGHTS, shapes)
    return build(architecture, state).eval()


def read_architecture(path: Path) -> Architecture:
    """Parse and validate an architecture file.

    Raises:
        InputError: The file is missing or not a valid architecture; the message names file and key.
    """
    recover(path.parent)
    _require_plain_file(path)
    if path.stat().st_size > MAX_ARCHITECTURE_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes are too many for an architecture")
    try:
        data = strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: schema {_printable(str(found))}, this version reads {SCHEMA!r}")
    _require_few_branches(data.get("steps"), path)
    try:
        # Strict, so that "12" is not a number; from JSON text, where a list is a valid tuple.
        architecture = Architecture.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise InputError(f"{path}: {_clean(where)}: {_clean(first['msg'])}") from error
    except (RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not an architecture ({error})") from error
    _require_names_and_tokens(architecture, path)
    return architecture


def _require_few_branches(steps: object, path: Path) -> None:
    # Counted before validation, which takes far more memory than the parsed JSON.
    if isinstance(steps, list):
        count = sum(len(step) if isinstance(step, list) else 1 for step in steps)
        if max(count, len(steps)) > MAX_BRANCHES:
            raise InputError(
                f"{path}: steps: {max(count, len(steps))} sub-layers, {_above(MAX_BRANCHES)}"
            )


def _require_names_and_tokens(architecture: Architecture, path: Path) -> None:
    for number, branch in enumerate(architecture.branches):
        if not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", branch.name) or len(branch.name) > 200:
            raise InputError(
                f"{path}: sub-layer {number}: the name {_printable(branch.name)} "
                "is not made of words and dots"
            )
    most = max_tokens(architecture)
    if architecture.tokens > most:
        raise InputError(
            f"{path}: image and stem make {architecture.tokens} tokens, {_above(most)}"
        )


def _above(limit: int) -> str:
    return f"more than the {limit} that this version supports"


def _require_plain_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a saved model is a folder with {WEIGHTS} and {ARCHITECTURE}"
        )
    if path.resolve().parent != path.parent.resolve():
        raise InputError(f"{path}: a link to a file outside of the folder; copy the file here")


def _shapes(architecture: Architecture, path: Path) -> dict[str, torch.Size]:
    # The meta device computes shapes without memory.
    try:
        with torch.device("meta"):
            shapes = {
                name: tensor.shape
                for name, tensor in CompactModel(architecture).state_dict().items()
            }
    except (RuntimeError, OverflowError) as error:
        raise InputError(
            f"{path}: these shapes exceed any memory ({_clean(str(error).splitlines()[0])[:160]})"
        ) from error
    total = sum(shape.numel() for shape in shapes.values())
    if total > MAX_PARAMETERS:
        raise InputError(f"{path}: describes {total} parameters, {_above(MAX_PARAMETERS)}")
    return shapes


def _read_weights(path: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    _require_plain_file(path)
    require_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            _require_same(path, file, shapes)
            return {name: _read_tensor(path, file, name) for name in shapes}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({_clean(str(error))[:200]})"
        ) from error


def require_header(path: Path) -> None:
    """Check the length of the header of a safetensors file before it is read.

    Raises:
        InputError: It is longer than the file, or than any that vitrim writes.
    """
    # The library accepts headers of up to 100 MB, far above those of real models.
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise InputError(
            f"{path}: not a whole safetensors file: "
            f"its header claims {length} bytes, the file has {size}"
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: a header of {length} bytes is too long for a model")


def mask_metadata(
    path: Path, metadata: Mapping[str, str] | None, schema: str, kind: FileKind
) -> dict[str, Any]:
    """Parse the metadata of a safetensors file of masks, which may be untrusted.

    Args:
        path: The file, for messages.
        metadata: What the library read.
        schema: The schema that they must have.
        kind: The kind of the file, for messages.

    Returns:
        The JSON object of the entry `vitrim`; its other keys are not validated.

    Raises:
        InputError: They are not JSON, or of another schema.
    """
    try:
        data = strict_json.parse((metadata or {}).get("vitrim", "null"))
    except ValueError as error:
        raise InputError(f"{path}: its metadata are not JSON ({error})") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != schema:
        raise InputError(
            f"{path}: schema {str(found)[:80]!r}, wanted {schema!r}; is this {kind.title} saved "
            "by vitrim?"
        )
    return dict(data)


def _require_same(path: Path, file: Any, shapes: dict[str, torch.Size]) -> None:
    found = set(file.keys())
    for name in sorted(shapes.keys() - found):
        raise InputError(f"{path}: tensor {name!r} is missing")
    for name in sorted(found - shapes.keys()):
        raise InputError(f"{path}: tensor {_printable(name)} is not part of this architecture")
    first: tuple[str, str] | None = None
    for name, shape in shapes.items():
        part = file.get_slice(name)
        if list(part.get_shape()) != list(shape):
            raise InputError(
                f"{path}: tensor {name!r} has shape {part.get_shape()}, "
                f"the architecture requires {list(shape)}"
            )
        kind = part.get_dtype()
        if kind not in _TYPES:
            raise InputError(
                f"{path}: tensor {name!r} has type {kind}, "
                "not a floating-point type that torch computes with"
            )
        first = first or (name, kind)
        if kind != first[1]:
            raise InputError(
                f"{path}: tensor {name!r} has type {kind}, {first[0]!r} has {first[1]}; "
                "all must have the same"
            )


def _read_tensor(path: Path, file: Any, name: str) -> Tensor:
    # Tensors in the file are not aligned like torch's own, and BLAS may then round the last bit
    # differently; a copy is aligned.
    tensor: Tensor = file.get_tensor(name).clone()
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensor


def _clean(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", text)


def _printable(name: str) -> str:
    return repr(_clean(name)[:80])
