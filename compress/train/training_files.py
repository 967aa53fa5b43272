"""The files of a training: checkpoints, and the history with one line per epoch.

A checkpoint is the state at the end of an epoch: tensors and plain data only, so that reading an
untrusted file runs no code. history.jsonl has one JSON line for each epoch of every phase of a run.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import InputError
from ...core.storage import replace_file

State = dict[str, Any]
# What torch.load raises for damaged files and for files with code.
_LOADING_ERRORS = (
    *(RuntimeError, OSError, EOFError, ValueError, KeyError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


def write_state(path: Path, state: State) -> None:
    """Write a checkpoint in one step: after a kill the file is the old or the new one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def read_state(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        InputError: The file is damaged, or has more than tensors and plain data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _LOADING_ERRORS as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({_first_line(error)}); "
            "delete it to start this phase again"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a training checkpoint; delete it to start this phase again")
    return state


def random_states() -> State:
    """The states of the global random generators of torch (its GPUs too), numpy and Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, torch.tensor(words, dtype=torch.int64), python_gauss],
        # Of the current GPU, where this process uses one.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: State) -> None:
    """Restore the global random generators of torch, numpy and Python."""
    torch.set_rng_state(states["torch"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, python_gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), python_gauss))
    if states.get("cuda") is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a history; a line that a kill truncated is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            lines.append(record)
    return lines


def rewind_history(path: Path, phase: str, last_epoch: int) -> list[dict[str, Any]]:
    """Drop the lines of `phase` after `last_epoch`; return the remaining lines of the phase."""
    records = read_history(path)
    kept = [
        record
        for record in records
        if record.get("phase") != phase or int(record.get("epoch", 0)) <= last_epoch
    ]
    if path.is_file():
        replace_file(path, "".join(f"{json.dumps(record)}\n" for record in kept))
    return [record for record in kept if record.get("phase") == phase]


def append_history(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dict(record)) + "\n")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
