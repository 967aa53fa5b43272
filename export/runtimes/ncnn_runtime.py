"""ncnn: `model.ncnn.param` and `model.ncnn.bin`, converted by pnnx from the proven graph. fp16
keeps weights and inner values in halves.

Eight bits are not among its precisions: ncnn's quantizer is a program of its own that its wheel
does not carry.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import onnx

from ...core.errors import InputError
from ..artifact import Precision
from ..forms import Form
from ..versions import tool_versions
from .installed import lacking
from .runtime import Source, Written

LIMIT_S = 900
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")


class Ncnn:
    """Writes ncnn's two files with pnnx; one image at a time."""

    name = "ncnn"
    extra = "ncnn"
    precisions: tuple[str, ...] = PRECISIONS
    dynamic_batch = True
    # pnnx reads opset-23 Attention and writes a layer that ncnn does not have; from separate
    # products it makes ncnn's own SDPA or plain products.
    form: Form | None = Form(rows="batch", attention="split", norm="layer", stem="conv")

    def missing(self) -> str | None:
        return lacking(self.name, self.extra, "ncnn", "pnnx")

    def write(self, source: Source, folder: Path) -> Written:
        if source.batch != 1:
            raise InputError(
                f"runtime ncnn: answers one image at a time, and batch {source.batch} was asked for; export with batch 1"
            )
        if source.options:
            raise InputError(
                f"runtime ncnn: has no options, and {', '.join(sorted(source.options))} was given; leave it out"
            )
        import pnnx

        program = Path(pnnx.__file__).with_name("pnnx")
        half = source.precision == "fp16"
        with tempfile.TemporaryDirectory(prefix="vitrim-ncnn-") as aside:
            onnx.save(source.graph, str(Path(aside) / "model.onnx"))
            try:
                done = subprocess.run(
                    [str(program), "model.onnx", f"fp16={int(half)}"],
                    cwd=aside,
                    capture_output=True,
                    timeout=LIMIT_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise InputError(
                    f"runtime ncnn: pnnx could not do its work ({error}); install it again"
                ) from None
            for name in ("model.ncnn.param", "model.ncnn.bin"):
                if not (Path(aside) / name).is_file():
                    said = " ".join(done.stderr.decode(errors="replace").split())[-200:]
                    raise InputError(
                        f"runtime ncnn: pnnx ended with {done.returncode} and wrote no {name} ({said}); try another form"
                    )
                shutil.copyfile(Path(aside) / name, folder / name)
        return Written(
            "model.ncnn.param",
            (("model.ncnn.bin", "weights"),),
            session={"storage": "fp16" if half else "fp32"},
            versions=tool_versions("ncnn", "pnnx"),
        )


RUNTIME = Ncnn()
