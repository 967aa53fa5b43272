"""How an artifact's ONNX Runtime session is made: one place, so that what is timed is what was proven. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import Artifact

if TYPE_CHECKING:
    import onnxruntime

# The defaults of every session here. A form may add entries; the manifest's `session` holds them all.
DEFAULT_CONFIG: dict[str, str] = {"session.intra_op.allow_spinning": "0"}


def session_options(config: dict[str, str] | None = None, *, threads: int = 1, optimised: bool = True) -> onnxruntime.SessionOptions:
    """Options for one session: all graph optimisations (or none), `threads` within an operator, operators one after the other.

    Threads do not spin while they wait: a device that answers one picture at a time should sleep in between.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in {**DEFAULT_CONFIG, **(config or {})}.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    model: Artifact | Path | str | bytes, *, threads: int = 1, config: dict[str, str] | None = None, optimised: bool = True
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU for an artifact (with the options in its manifest), a file or a model's bytes."""
    import onnxruntime

    source: Any = model
    if isinstance(model, Artifact):
        config = {**model.manifest.session, **(config or {})}
        source = str(model.model_path)
    elif isinstance(model, Path):
        source = str(model)
    return onnxruntime.InferenceSession(source, session_options(config, threads=threads, optimised=optimised), providers=["CPUExecutionProvider"])
