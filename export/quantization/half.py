"""Half precision for targets that compute in it: weights and inner values in 16 bits, input and
logits in 32.
"""

from __future__ import annotations

import warnings

import onnx


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float16. Ensures: input and output stay float32; norms and softmax follow
    the runtime's own precision.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with warnings.catch_warnings():
        # Weights below the smallest half are set to it, with a warning for each.
        warnings.simplefilter("ignore")
        converted: onnx.ModelProto = convert_float_to_float16(
            copy, keep_io_types=True, disable_shape_infer=True
        )
    return converted
