"""A profile as a target of TVM."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ...core.errors import InputError
from ...targets.profile import TargetProfile

if TYPE_CHECKING:
    from tvm.target import Target

EXTRA = "pip install 'vitrim[tvm]'"


def missing() -> str | None:
    """Why TVM cannot be used here, in one line, or None."""
    return None if importlib.util.find_spec("tvm") else f"TVM is not installed; {EXTRA}"


def tvm_target(profile: TargetProfile) -> Target:
    """The target that code is generated for. Errors: InputError where TVM is missing, has no code
    generator for the profile, or the profile names none.
    """
    if (reason := missing()) is not None:
        raise InputError(reason)
    from tvm.target import Target

    if profile.tvm_target is None:
        raise InputError(
            f'target {profile.name!r} has no tvm_target; add one to its profile ({{ kind = "llvm", mcpu = ... }}), or take another runtime'
        )
    options = dict(profile.tvm_target)
    if options["kind"] == "cuda" and "host" not in options:
        return Target(options, host={"kind": "llvm", "mtriple": profile.triple})
    try:
        return Target(options)
    except Exception as error:  # TVM raises its own kinds, RuntimeError and ValueError among them
        raise InputError(
            f"target {profile.name!r}: TVM refuses tvm_target {options}: {str(error).strip().splitlines()[-1]}"
        ) from None
