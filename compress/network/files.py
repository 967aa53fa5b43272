"""A saved model: `model.safetensors` and `architecture.json` in one folder. No pickle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from ...core import strict_json
from ...core.errors import InputError
from ...core.storage import replace_file, replace_folder
from .architecture import SCHEMA, Architecture, AttentionSpec
from .modules.model import CompactModel, build
from .patch_fit import MAX_BIASED_TOKENS, MAX_TOKENS

WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"
# Far above any Vision Transformer; what claims to be larger is refused before memory is taken.
MAX_PARAMETERS = 20_000_000_000
MAX_ARCHITECTURE_BYTES = 16 * 1024 * 1024
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_BRANCHES = 4096
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def save(model: CompactModel, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write a model to a folder, whole or not at all. Errors: InputError if the folder is not empty
    or the disk is full.
    """
    with replace_folder(folder, overwrite=overwrite) as aside:
        replace_file(
            aside / ARCHITECTURE,
            model.architecture.model_dump_json(by_alias=True, indent=1, exclude_defaults=False)
            + "\n",
        )
        state = {
            name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
        }
        replace_file(aside / WEIGHTS, tensors_to_bytes(state, {"schema": SCHEMA}))
    return Path(folder)


def load(folder: Path | str) -> CompactModel:
    """Rebuild a saved model, bit-equal, in eval mode.

    Everything is checked before memory is taken for it. Errors: InputError naming the file and the
    entry.
    """
    folder = Path(folder)
    architecture = read_architecture(folder / ARCHITECTURE)
    wanted = _shapes(architecture, folder / ARCHITECTURE)
    state = _read_weights(folder / WEIGHTS, wanted)
    return build(architecture, state).eval()


def read_architecture(path: Path) -> Architecture:
    """Parse and check an architecture file. Errors: InputError naming the file and the key."""
    _require_plain_file(path)
    if path.stat().st_size > MAX_ARCHITECTURE_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes is no architecture file")
    try:
        data = strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: schema {_printable(str(found))}, this version reads {SCHEMA!r}")
    steps = data.get("steps")
    branches = (
        sum(len(step) if isinstance(step, list) else 1 for step in steps)
        if isinstance(steps, list)
        else 0
    )
    if branches > MAX_BRANCHES or (isinstance(steps, list) and len(steps) > MAX_BRANCHES):
        raise InputError(
            f"{path}: steps: {max(branches, len(steps))} sub-layers, more than the {MAX_BRANCHES} that this version takes"
        )
    try:
        # Strict, and as JSON: "12" is no number, and a list is how JSON writes a tuple.
        architecture = Architecture.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise InputError(f"{path}: {_clean(where)}: {_clean(first['msg'])}") from error
    except (RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not an architecture ({error})") from error
    _require_sane(architecture, path)
    return architecture


def _require_sane(architecture: Architecture, path: Path) -> None:
    for number, branch in enumerate(architecture.branches):
        if not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", branch.name) or len(branch.name) > 200:
            raise InputError(
                f"{path}: sub-layer {number}: the name {_printable(branch.name)} is not made of words and dots"
            )
    biased = any(
        isinstance(branch.core, AttentionSpec) and branch.core.bias is not None
        for branch in architecture.branches
    )
    most = MAX_BIASED_TOKENS if biased else MAX_TOKENS
    if architecture.tokens > most:
        raise InputError(
            f"{path}: image and stem make {architecture.tokens} tokens, more than the {most} that this version takes"
        )


def _require_plain_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a saved model is a folder with {WEIGHTS} and {ARCHITECTURE}"
        )
    if path.resolve().parent != path.parent.resolve():
        raise InputError(f"{path}: a link that leaves the folder; copy the file here")


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
            f"{path}: no memory holds these shapes ({_clean(str(error).splitlines()[0])[:160]})"
        ) from error
    total = sum(shape.numel() for shape in shapes.values())
    if total > MAX_PARAMETERS:
        raise InputError(
            f"{path}: asks for {total} parameters, more than the {MAX_PARAMETERS} that this version takes"
        )
    return shapes


def _read_weights(path: Path, wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    _require_plain_file(path)
    _require_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            _require_same(path, file, wanted)
            return {name: _read_tensor(path, file, name) for name in wanted}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({_clean(str(error))[:200]})"
        ) from error


def _require_header(path: Path) -> None:
    # The library believes a length of up to 100 MB; nothing honest comes near.
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise InputError(
            f"{path}: not a whole safetensors file: its header says {length} bytes, the file has {size}"
        )
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: a header of {length} bytes is no model's")


def _require_same(path: Path, file: Any, wanted: dict[str, torch.Size]) -> None:
    found = set(file.keys())
    for name in sorted(wanted.keys() - found):
        raise InputError(f"{path}: tensor {name!r} is missing")
    for name in sorted(found - wanted.keys()):
        raise InputError(f"{path}: tensor {_printable(name)} is not part of this architecture")
    first: tuple[str, str] | None = None
    for name, shape in wanted.items():
        part = file.get_slice(name)
        if list(part.get_shape()) != list(shape):
            raise InputError(
                f"{path}: tensor {name!r} has shape {part.get_shape()}, the architecture says {list(shape)}"
            )
        kind = part.get_dtype()
        if kind not in _TYPES:
            raise InputError(
                f"{path}: tensor {name!r} has type {kind}, not a floating-point type that torch computes with"
            )
        first = first or (name, kind)
        if kind != first[1]:
            raise InputError(
                f"{path}: tensor {name!r} has type {kind}, {first[0]!r} has {first[1]}; all must have the same"
            )


def _read_tensor(path: Path, file: Any, name: str) -> Tensor:
    # A copy of our own starts at an address that is aligned as any tensor's; the file's do not, and
    # BLAS may then round the last bit otherwise.
    tensor: Tensor = file.get_tensor(name).clone()
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensor


def _clean(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", text)


def _printable(name: str) -> str:
    return repr(_clean(name)[:80])
