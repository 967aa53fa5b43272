"""ncnn: `model.ncnn.param` and `model.ncnn.bin`, converted from the ONNX graph by pnnx.

fp16 stores weights and activations in half precision. int8 is not among the precisions: ncnn's
quantizer is a separate program that its wheel does not contain.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import onnx

from ...core.errors import InputError
from ..forms import Form
from ..manifest import Precision, tool_versions
from .runtime import RuntimeFiles, Source, missing_module

LIMIT_S = 900
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


class Ncnn:
    """Writes ncnn's two files with pnnx, for batch 1."""

    name = "ncnn"
    extra = "ncnn"
    precisions: tuple[str, ...] = PRECISIONS
    options: tuple[str, ...] = ()
    dynamic_batch = True
    # From opset-23 Attention pnnx writes a layer that ncnn does not have; from separate products it
    # makes ncnn's SDPA or plain products.
    form: Form | None = Form(rows="batch", attention="split", norm="layer", stem="conv")

    def missing(self) -> str | None:
        """What is not installed; see `Runtime.missing`."""
        return missing_module(self.name, self.extra, "ncnn", "pnnx")

    def write(self, source: Source, folder: Path) -> RuntimeFiles:
        """Convert the graph; see `Runtime.write`."""
        if source.batch != 1:
            raise InputError(
                f"runtime ncnn: runs one image at a time, and batch {source.batch} was requested; "
                "export with batch 1"
            )
        import pnnx

        program = Path(pnnx.__file__).with_name("pnnx")
        half = source.precision == "fp16"
        with tempfile.TemporaryDirectory(prefix="vitrim-ncnn-") as temporary:
            onnx.save(source.graph, str(Path(temporary) / "model.onnx"))
            try:
                done = subprocess.run(
                    [str(program), "model.onnx", f"fp16={int(half)}"],
                    cwd=temporary,
                    capture_output=True,
                    timeout=LIMIT_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise InputError(
                    f"runtime ncnn: pnnx cannot be run ({error}); install it again"
                ) from None
            for name in ("model.ncnn.param", "model.ncnn.bin"):
                if not (Path(temporary) / name).is_file():
                    output = " ".join(done.stderr.decode(errors="replace").split())[-200:]
                    raise InputError(
                        f"runtime ncnn: pnnx ended with {done.returncode} and wrote no {name} "
                        f"({output}); try another form"
                    )
                shutil.copyfile(Path(temporary) / name, folder / name)
        return RuntimeFiles(
            "model.ncnn.param",
            (("model.ncnn.bin", "weights"),),
            session={"storage": "fp16" if half else "fp32"},
            versions=tool_versions("ncnn", "pnnx"),
        )


RUNTIME = Ncnn()
