"""ONNX Runtime's own file format, and the list of operators for a runtime build that holds nothing
else.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

ORT_FILE = "model.ort"
OPERATORS = "required_operators.config"


def save_ort_format(
    model: Path, folder: Path, answer: Callable[[Any], NDArray[Any]]
) -> tuple[list[tuple[str, str]], NDArray[Any]]:
    """Write `model.ort` and `required_operators.config` beside a model; (path, role) of both, and
    the answers of the file as loaded back.

    The file is optimised as far as every processor allows: layouts that only this machine likes are
    not baked in.
    """
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / ORT_FILE)
    options.log_severity_level = 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            create_config_from_models([folder / ORT_FILE], folder / OPERATORS, False)
    finally:
        logging.disable(level)
    text = (folder / OPERATORS).read_text()
    # The tool notes the paths it read, which are nobody's business.
    (folder / OPERATORS).write_text(
        "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    )
    plain = onnxruntime.SessionOptions()
    plain.intra_op_num_threads = 1
    plain.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / ORT_FILE), plain, providers=["CPUExecutionProvider"]
    )
    return [(ORT_FILE, "other"), (OPERATORS, "operators")], answer(session)
