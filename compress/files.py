"""A saved model: `model.safetensors` and `architecture.json` in one folder. No pickle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from ..errors import InputError
from ..storage import replace_file, replace_folder
from .architecture import SCHEMA, Architecture
from .compactor import build
from .lift import lift
from .vit.model import CompactModel

WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"
# Far above any Vision Transformer; what claims to be larger is refused before memory is taken.
MAX_PARAMETERS = 20_000_000_000
MAX_ARCHITECTURE_BYTES = 64 * 1024 * 1024


def save(model: nn.Module, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write a model to a folder, whole or not at all. Errors: InputError if the folder is not empty or the disk is full."""
    compact = lift(model)
    with replace_folder(folder, overwrite=overwrite) as aside:
        replace_file(aside / ARCHITECTURE, compact.architecture.model_dump_json(by_alias=True, indent=1, exclude_defaults=False) + "\n")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in compact.state_dict().items()}
        replace_file(aside / WEIGHTS, tensors_to_bytes(state, {"schema": SCHEMA}))
    return Path(folder)


def load(folder: Path | str) -> CompactModel:
    """Rebuild a saved model, bit-equal, in eval mode.

    Everything is checked before memory is taken for it. Errors: InputError naming the file and the entry.
    """
    folder = Path(folder)
    architecture = read_architecture(folder / ARCHITECTURE)
    wanted = _shapes(architecture, folder / ARCHITECTURE)
    state = _read_weights(folder / WEIGHTS, wanted)
    return build(architecture, state).eval()


def read_architecture(path: Path) -> Architecture:
    """Parse and check an architecture file. Errors: InputError naming the file and the key."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a saved model is a folder with {WEIGHTS} and {ARCHITECTURE}")
    if path.stat().st_size > MAX_ARCHITECTURE_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes is no architecture file")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: schema {found!r}, this version reads {SCHEMA!r}")
    try:
        return Architecture.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise InputError(f"{path}: {where}: {first['msg']}") from error


def _shapes(architecture: Architecture, path: Path) -> dict[str, torch.Size]:
    # The meta device computes shapes without memory.
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CompactModel(architecture).state_dict().items()}
    total = sum(shape.numel() for shape in shapes.values())
    if total > MAX_PARAMETERS:
        raise InputError(f"{path}: asks for {total} parameters, more than the {MAX_PARAMETERS} that this version takes")
    return shapes


def _read_weights(path: Path, wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; a saved model is a folder with {WEIGHTS} and {ARCHITECTURE}")
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            for name in sorted(wanted.keys() - found):
                raise InputError(f"{path}: tensor {name!r} is missing")
            for name in sorted(found - wanted.keys()):
                raise InputError(f"{path}: tensor {_printable(name)} is not part of this architecture")
            for name, shape in wanted.items():
                part = file.get_slice(name)
                if list(part.get_shape()) != list(shape):
                    raise InputError(f"{path}: tensor {name!r} has shape {part.get_shape()}, the architecture says {list(shape)}")
                if part.get_dtype() not in ("F32", "F16", "BF16", "F64"):
                    raise InputError(f"{path}: tensor {name!r} has type {part.get_dtype()}, not a floating-point type")
            state: dict[str, Tensor] = {}
            for name in wanted:
                tensor = file.get_tensor(name)
                if not bool(torch.isfinite(tensor).all()):
                    raise InputError(f"{path}: tensor {name!r} holds NaN or infinity")
                state[name] = tensor
            return state
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from error


def _printable(name: str) -> str:
    return repr(re.sub(r"[^\x20-\x7e]", "?", name)[:80])
