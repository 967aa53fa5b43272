"""Graphs in ONNX Runtime: sessions with other settings than vitrim's, and profiles of operators."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from vitrim.export.sessions import session_options
from vitrim.runtimes.onnxruntime_engine import operator_rows


def opened(
    graph: onnx.ModelProto,
    *,
    threads: int = 1,
    config: Mapping[str, str] | None = None,
    off: Sequence[str] = (),
    **settings: Any,
) -> onnxruntime.InferenceSession:
    """A session with vitrim's options, some of them replaced.

    Args:
        graph: The model.
        threads: Threads of an operator.
        config: Entries of the session's configuration.
        off: Optimizers of the runtime to disable.
        settings: Attributes of `SessionOptions` to replace.
    """
    options = session_options(dict(config or {}), threads=threads)
    for key, value in settings.items():
        setattr(options, key, value)
    return onnxruntime.InferenceSession(
        graph.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(off),
    )


def call_of(session: onnxruntime.InferenceSession, image: np.ndarray) -> Callable[[], object]:
    """One inference of a session, to be timed."""
    return partial(session.run, None, {session.get_inputs()[0].name: image})


def profiled(
    graph: onnx.ModelProto, image: np.ndarray, runs: int, **settings: Any
) -> list[dict[str, Any]]:
    """Operators of one inference by the runtime's own profile; `settings` are those of `opened`."""
    with tempfile.TemporaryDirectory(prefix="vitrim-profile-") as folder:
        session = opened(
            graph,
            enable_profiling=True,
            profile_file_prefix=str(Path(folder) / "trace"),
            **settings,
        )
        for _ in range(runs + 5):
            session.run(None, {"images": image})
        return operator_rows(json.loads(Path(session.end_profiling()).read_text()), runs)
