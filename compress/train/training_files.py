"""The state of a training at the end of an epoch: tensors and plain data only, so that no file can
run code when it is read.
"""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import InputError
from ...core.storage import replace_file

State = dict[str, Any]


def write_state(path: Path, state: State) -> None:
    """Save aside, then rename: a kill leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    replace_file(path, buffer.getvalue())


def read_state(path: Path) -> State:
    """Read what `write_state` wrote. Errors: InputError if the file is damaged or holds more than
    tensors and plain data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({_first_line(error)}); delete it to start this phase anew"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a training checkpoint; delete it to start this phase anew")
    return state


def random_states() -> State:
    """The three global generators, as tensors and plain data."""
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
    }


def set_random_states(states: State) -> None:
    """Put the three global generators back."""
    torch.set_rng_state(states["torch"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, python_gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), python_gauss))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
