"""Preparation of a run of the tests in several processes."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import settings

# The verdict of `make test` depends on the commit alone; `make fuzz` draws new examples every time.
settings.register_profile("same-examples", derandomize=True)
settings.register_profile("fuzz", derandomize=False, print_blob=True)
settings.load_profile("fuzz" if os.environ.get("VITRIM_FUZZ") else "same-examples")


def pytest_configure(config: pytest.Config) -> None:
    """Fill the caches that the workers share, before they start: each writes them otherwise."""
    is_worker = hasattr(config, "workerinput")
    if is_worker or not getattr(config.option, "numprocesses", None):
        return
    import onnxruntime_header
    from vitrim.bench.remote import native_build
    from vitrim.core.errors import InputError

    onnxruntime_header.header_folder()
    for machine in ("x86_64", "aarch64"):
        # Tests that need what is missing are skipped, or report it.
        with contextlib.suppress(InputError):
            native_build.compile_runner(machine)
            native_build.runtime_library(machine)
