"""How an artifact's ONNX Runtime session is made: one place, so that what is timed is what was
proven. Free of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import Artifact

if TYPE_CHECKING:
    import onnxruntime

# The defaults of every session here. A form may add entries; the manifest's `session` holds them
# all.
DEFAULT_CONFIG: dict[str, str] = {"session.intra_op.allow_spinning": "0"}
# Of a session that was exported for several threads: one that waits inside a call does so busily,
# but no longer than this, and never after the call. Waking a sleeping thread for each of some 150
# operators is a fifth of the latency of DeiT-Tiny in eight bits on two threads
# (benchmarks/results/int8_threads.md). A runtime that does not know `spin_duration_us` yet
# (microsoft/onnxruntime PR 27916) waits as long as it always did.
SPIN_US = 30
THREADS_CONFIG: dict[str, str] = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": str(SPIN_US),
    "session.force_spinning_stop": "1",
}


def config_for(threads: int) -> dict[str, str]:
    """The entries that an artifact for so many threads brings along."""
    return dict(THREADS_CONFIG) if threads > 1 else {}


def session_options(
    config: dict[str, str] | None = None, *, threads: int = 1, optimised: bool = True
) -> onnxruntime.SessionOptions:
    """Options for one session: all graph optimisations (or none), `threads` within an operator,
    operators one after the other.

    Threads do not spin while they wait: a device that answers one picture at a time should sleep in
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
    options.log_severity_level = 3
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
    """An ONNX Runtime session on the CPU for an artifact (with the options in its manifest), a file
    or a model's bytes.
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
