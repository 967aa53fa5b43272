"""One model for every runtime that is installed here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import InputError
from ..core.storage import require_empty
from .artifact import Artifact
from .exporter import export
from .runtimes import runtime_named, runtime_names

# Needs vitrim and torch where it runs: nothing that one ships.
NOT_SHIPPED = ("torch",)


def export_everywhere(
    model: nn.Module,
    folder: Path | str,
    *,
    precision: str = "fp32",
    tell: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """({runtime: artifact in folder/RUNTIME}, {runtime: why there is none}), with the options of
    `export`.

    `tell` hears each runtime's name before its work. A runtime that cannot take the model, the
    precision or the batch costs only its own artifact. Errors: InputError if not even ONNX Runtime
    takes it, or if the folder holds something.
    """
    folder = Path(folder)
    require_empty(folder, overwrite=bool(options.get("overwrite")))
    tell("onnxruntime")
    made = {
        "onnxruntime": export(
            model,
            folder / "onnxruntime",
            runtime="onnxruntime",
            precision=precision,  # type: ignore[arg-type]
            **options,
        )
    }
    absent: dict[str, str] = {}
    # What only ONNX Runtime's graphs have.
    shared = {
        key: value for key, value in options.items() if key not in ("form", "tune", "ort_format")
    }
    for name in runtime_names():
        if name in NOT_SHIPPED:
            continue
        runtime = runtime_named(name)
        if precision not in runtime.precisions:
            absent[name] = f"has no {precision}; it has {', '.join(runtime.precisions)}"
        elif reason := runtime.missing():
            absent[name] = reason
        else:
            tell(name)
            try:
                made[name] = export(
                    model,
                    folder / name,
                    runtime=name,
                    precision=precision,  # type: ignore[arg-type]
                    **shared,
                )
            except InputError as error:
                absent[name] = str(error)
    return made, absent
