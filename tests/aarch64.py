"""The emulator of aarch64 programs for tests.

It is prepared beforehand (`.ci/run` does so), never downloaded by a test.
"""

from __future__ import annotations

import pytest
from vitrim.targets.emulation import Emulator, ready


def emulator(*distributions: str) -> Emulator:
    """Return the prepared emulator with the named wheels, or skip with the command for it."""
    found = ready()
    if found is None:
        pytest.skip("aarch64 emulation is not prepared: vitrim targets emulate")
    missing = [name for name in distributions if name not in found.versions]
    if missing:
        pytest.skip(
            f"the prepared emulation has no {', '.join(missing)}: "
            "vitrim targets emulate --runtime tvm"
        )
    return found
