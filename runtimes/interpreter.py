"""Which Python starts a runtime: this one, or the one that the user names because the runtime's
packages suit no other.
"""

from __future__ import annotations

import os
import shutil

from .engine import EngineError


def variable(runtime: str) -> str:
    """The environment variable that names a runtime's interpreter, such as
    VITRIM_PYTHON_EXECUTORCH.
    """
    return f"VITRIM_PYTHON_{runtime.upper()}"


def interpreter(runtime: str) -> str | None:
    """The interpreter that the user named, or None for the one that asks. Errors: EngineError where
    it is not there.
    """
    named = os.environ.get(variable(runtime))
    if not named:
        return None
    found = shutil.which(named)
    if found is None:
        raise EngineError(
            f"{variable(runtime)}={named}: no such interpreter; name the path of a Python with {runtime} and numpy"
        )
    return found
