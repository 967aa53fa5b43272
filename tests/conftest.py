"""Preparation of a run of the tests in several processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from functools import cache

import pytest
from hypothesis import settings

# The verdict of `make test` depends on the commit alone; `make fuzz` draws new examples every time.
# Nothing depends on the time that an example takes.
settings.register_profile("same-examples", derandomize=True, deadline=None)
settings.register_profile("fuzz", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("fuzz" if os.environ.get("VITRIM_FUZZ") else "same-examples")


@pytest.fixture(autouse=True, scope="session")
def _one_registry() -> None:
    """Keep torch's table of ONNX functions, a third of the time of an export of a tiny network.

    torch parses its five hundred functions for each export; they do not change.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        kept = staticmethod(cache(ONNXRegistry.from_torchlib))
        ONNXRegistry.from_torchlib = kept  # type: ignore[method-assign]
    except (ImportError, AttributeError):
        # Another version of torch: the same, slower.
        return


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


# Files whose tests take longest, of 30 s to two minutes. A worker gets whole files: if these began
# last, the others would wait for them at the end.
_LONG_FILES = (
    *("test_engine", "test_cross_compiler", "test_ray_workers", "test_notebook", "test_wheel"),
    *("test_devices", "test_terminals", "test_processes", "test_bucket_programs"),
    *("test_int8_kernels", "test_selections", "test_saturation", "test_runtimes"),
    *("test_token_masks", "test_export_outputs", "test_pipeline", "test_tvm_bundle"),
    *("test_stem_layers", "test_learned_tokens_leave", "test_merged_graph", "test_ssh"),
    *("test_training_host", "test_export_aarch64", "test_export_bundle", "test_public_names"),
    *("test_limits", "test_tvm_rpc", "test_native_runner", "test_choices", "test_outputs"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first; the order is otherwise kept."""
    places = {name: place for place, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One worker more than cores: some tests wait for boards, killed runs and lost links."""
    return (yield) + 1
