"""ONNX Runtime sessions for artifacts, opened in the same way for parity and for benchmarks.

Free of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..runtimes.onnxruntime_engine import runtime_reason
from .artifact import Artifact

if TYPE_CHECKING:
    import onnxruntime

# The defaults of every session; the manifest's `session` adds to them.
DEFAULT_CONFIG: dict[str, str] = {"session.intra_op.allow_spinning": "0"}
# For artifacts for several threads: a thread that waits inside a call spins, but no longer than
# this, and never after the call. Waking a sleeping thread for each of some 150 operators is a fifth
# of the latency of DeiT-Tiny in eight bits on two threads (benchmarks/results/int8_threads.md). A
# runtime without `spin_duration_us` (microsoft/onnxruntime PR 27916) spins for its default time.
SPIN_US = 30
THREADS_CONFIG: dict[str, str] = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": str(SPIN_US),
    "session.force_spinning_stop": "1",
}


def config_for(threads: int) -> dict[str, str]:
    """Return the session entries of an artifact for this number of threads."""
    return dict(THREADS_CONFIG) if threads > 1 else {}


def session_options(
    config: dict[str, str] | None = None, *, threads: int = 1, optimised: bool = True
) -> onnxruntime.SessionOptions:
    """Return options for one session that runs operators one after the other.

    Threads do not spin by default: a device that classifies one picture at a time should sleep in
    between.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    )
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # What fails is raised, so errors are not logged as well.
    options.log_severity_level = 4
    for key, value in {**DEFAULT_CONFIG, **(config or {})}.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    model: Artifact | Path | str | bytes,
    *,
    threads: int = 1,
    config: dict[str, str] | None = None,
    optimised: bool = True,
) -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session on the CPU.

    Args:
        model: An artifact, whose manifest may add session entries; a model file; or its bytes.
        threads: Threads within an operator.
        config: Session config entries, over the defaults and the manifest's.
        optimised: Whether the runtime optimises the graph.

    Returns:
        The session: `session.run(None, {"images": images})[0]` are the logits (batch, classes).

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    source: Any = model
    if isinstance(model, Artifact):
        config = {**model.manifest.session, **(config or {})}
        source = str(model.model_path)
    elif isinstance(model, Path):
        source = str(model)
    return onnxruntime.InferenceSession(
        source,
        session_options(config, threads=threads, optimised=optimised),
        providers=["CPUExecutionProvider"],
    )


@contextlib.contextmanager
def runtime_errors(subject: str, way_out: str) -> Iterator[None]:
    """Raise InputError, with the runtime's reason in one line, for what ONNX Runtime raises inside.

    Args:
        subject: The file, or the stage of an export.
        way_out: What to do about it.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        import onnxruntime

        raise InputError(
            f"{subject}: ONNX Runtime {onnxruntime.__version__} cannot run it: "
            f"{runtime_reason(error)}; {way_out}"
        ) from error
