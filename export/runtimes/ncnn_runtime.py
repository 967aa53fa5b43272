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

from ...core.errors import InputError, UnsupportedModel
from ..forms import Form, form_named
from ..manifest import Precision, tool_versions
from .limits import ONE_IMAGE, SELECTIONS, Limit, Planned
from .runtime import RuntimeFiles, Source, missing_module

PARAM, BIN = "model.ncnn.param", "model.ncnn.bin"
LIMIT_S = 900
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
PLAIN = "plain"


def _other_operators(planned: Planned) -> str | None:
    form = planned.form
    if form is None or form == PLAIN:
        return None
    form = form_named(form) if isinstance(form, str) else form
    if form.operators == "pnnx" and form.attention != "opset23" and not form.runtime_operators:
        return None
    return f"form {form.name} has operators that pnnx does not convert"


class Ncnn:
    """Writes ncnn's two files with pnnx, for batch 1."""

    name = "ncnn"
    extra = "ncnn"
    precisions: tuple[str, ...] = PRECISIONS
    options: tuple[str, ...] = ()
    dynamic_batch = True
    # From opset-23 Attention pnnx writes a layer that ncnn does not have; from separate products it
    # makes ncnn's SDPA or plain products.
    form: Form | None = Form(rows="batch", norm="layer", stream="dense", operators="pnnx")
    limits: tuple[Limit, ...] = (
        ONE_IMAGE,
        # pnnx leaves TopK as it is (Tencent/ncnn issue 5520).
        SELECTIONS,
        Limit(
            "graph forms with other operators than pnnx converts",
            "leave the form out",
            _other_operators,
        ),
    )

    def missing(self) -> str | None:
        """What is not installed; see `Runtime.missing`."""
        return missing_module(self.name, self.extra, "ncnn", "pnnx")

    def write(self, source: Source, folder: Path) -> RuntimeFiles:
        """Convert the graph; see `Runtime.write`."""
        half = source.precision == "fp16"
        with tempfile.TemporaryDirectory(prefix="vitrim-ncnn-") as temporary:
            _convert(source.graph, Path(temporary), half=half)
            if unknown := _unknown_layers(Path(temporary) / PARAM):
                raise UnsupportedModel(
                    f"runtime ncnn: pnnx does not convert {', '.join(unknown)} of "
                    f"{type(source.model).__name__}; export for onnxruntime or openvino"
                )
            for name in (PARAM, BIN):
                shutil.copyfile(Path(temporary) / name, folder / name)
        return RuntimeFiles(
            PARAM,
            ((BIN, "weights"),),
            session={"storage": "fp16" if half else "fp32"},
            versions=tool_versions("ncnn", "pnnx"),
        )


def _convert(graph: onnx.ModelProto, folder: Path, *, half: bool) -> None:
    """Run pnnx on a graph, in an empty folder."""
    import pnnx

    program = Path(pnnx.__file__).with_name("pnnx")
    onnx.save(graph, str(folder / "model.onnx"))
    try:
        done = subprocess.run(
            [str(program), "model.onnx", f"fp16={int(half)}"],
            cwd=folder,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error).replace(str(folder), ".")
        raise InputError(f"runtime ncnn: pnnx cannot be run ({reason}); install it again") from None
    for name in (PARAM, BIN):
        if not (folder / name).is_file():
            output = " ".join(done.stderr.decode(errors="replace").split())[-200:]
            output = output.replace(str(folder), ".")
            raise InputError(
                f"runtime ncnn: pnnx ended with {done.returncode} and wrote no {name} ({output}); "
                "export for onnxruntime or openvino"
            )


def _unknown_layers(path: Path) -> list[str]:
    """The operators that pnnx left as they are, since ncnn has no layer for them."""
    import ncnn

    lines = path.read_text(encoding="utf-8").splitlines()[2:]
    kinds = sorted({line.split()[0] for line in lines if line.strip()})
    return [kind for kind in kinds if ncnn.layer_to_index(kind) < 0]


RUNTIME = Ncnn()
