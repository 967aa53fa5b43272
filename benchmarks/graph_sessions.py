"""A graph in ONNX Runtime as a benchmark opens it, and what its own profile says of one
inference.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
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
    """A session as vitrim opens it, but for `settings` of its options and the optimisers that are
    switched off.
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


def profiled(
    graph: onnx.ModelProto, image: np.ndarray, runs: int, **settings: Any
) -> list[dict[str, Any]]:
    """Rows of the runtime's own profile, of one inference; `settings` are those of `opened`."""
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
