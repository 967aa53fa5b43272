"""OpenVINO: the intermediate representation `model.xml` and `model.bin`.

int8: weights in eight bits, inputs quantized in groups as they come (OpenVINO's dynamic
quantization). int8-static: NNCF's post-training quantization with ranges found on calibration
images. bf16 leaves the file as it is and lets the processor compute in bfloat16.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from ...core.errors import InputError
from ..artifact import Precision
from ..forms import Form
from ..quantization.quantize import CALIBRATION_IMAGES
from ..versions import tool_versions
from .installed import lacking
from .openvino_first_node import first_node
from .runtime import Source, Written

# Inputs of a product are quantized so many at a time: 32 and 64 ran nearly twice as fast as whole
# rows (0), which OpenVINO 2026.4 leaves in float, at nearly the same error (DeiT-Tiny, AVX-512
# VNNI, one thread).
GROUP_SIZE = "64"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "int8-static")


class OpenVino:
    """Writes OpenVINO's own files with OpenVINO, and NNCF for eight bits. option group_size: see
    GROUP_SIZE.
    """

    name = "openvino"
    extra = "openvino"
    precisions: tuple[str, ...] = PRECISIONS
    dynamic_batch = True
    # Patches as one product beat the convolution by 20 % here, and the split products are what
    # OpenVINO fuses into one attention.
    form: Form | None = Form(rows="batch", attention="split", norm="layer", stem="matrix")

    def missing(self) -> str | None:
        return lacking(self.name, self.extra, "openvino")

    def write(self, source: Source, folder: Path) -> Written:
        import openvino

        unknown = set(source.options) - {"group_size"}
        if unknown:
            raise InputError(
                f"runtime openvino: no option {', '.join(sorted(unknown))}; it has group_size"
            )
        if source.precision in ("int8", "int8-static") and (
            reason := lacking(self.name, self.extra, "nncf")
        ):
            raise InputError(reason)
        with tempfile.TemporaryDirectory(prefix="vitrim-openvino-") as aside:
            path = Path(aside) / "model.onnx"
            onnx.save(source.graph, str(path))
            try:
                model = openvino.Core().read_model(str(path))
            except Exception as error:  # OpenVINO's errors share no narrower type
                raise InputError(
                    f"runtime openvino: cannot read the graph: {' '.join(str(error).split())[:300]}; try another form"
                ) from None
            session = {}
            if source.precision == "int8":
                model = _weights_in_eight_bits(model)
                session["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = source.options.get(
                    "group_size", GROUP_SIZE
                )
            elif source.precision == "int8-static":
                model = _all_in_eight_bits(model, source)
            elif source.precision == "bf16":
                session["INFERENCE_PRECISION_HINT"] = "bf16"
            used = ("openvino", "nncf") if source.precision.startswith("int8") else ("openvino",)
            # Halves would be smaller, but the processor computes in singles.
            openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
        return Written(
            "model.xml",
            (("model.bin", "weights"),),
            session=session,
            versions=tool_versions(*used),
            where=first_node,
        )


def _weights_in_eight_bits(model: Any) -> Any:
    with _quiet():
        import nncf

        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def _all_in_eight_bits(model: Any, source: Source) -> Any:
    assert source.images is not None
    size = 1 if source.batch == "dynamic" else source.batch
    images = source.images[:CALIBRATION_IMAGES]
    batches = [images[first : first + size] for first in range(0, len(images) - size + 1, size)]
    if not batches:
        raise InputError(
            f"int8-static finds its ranges on whole batches of {size}, and {len(images)} images were given; give more"
        )
    with _quiet():
        import nncf

        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF and torch, which it imports, report on every step."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


RUNTIME = OpenVino()
