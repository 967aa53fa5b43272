"""Samples for the tests of bench: a synthetic measurement, and small ONNX models with data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper
from vitrim.bench.results.measurement import Environment, Measurement


def chain(path: Path, width: int = 256, layers: int = 2, batch: int | str = 1) -> Path:
    """Write a model of `layers` matrix products of `width`.

    Shapes: (batch, 1, 28, 28) -> (batch, 10).
    """
    rng = np.random.default_rng(0)
    nodes, weights, size = [helper.make_node("Flatten", ["image"], ["x0"])], [], 784
    for layer in range(layers):
        matrix = (rng.standard_normal((size, width)) / size**0.5).astype("float32")
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes += [helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"y{layer}"])]
        nodes += [helper.make_node("Relu", [f"y{layer}"], [f"x{layer + 1}"])]
        size = width
    weights.append(
        numpy_helper.from_array(rng.standard_normal((size, 10)).astype("float32"), "head")
    )
    nodes.append(helper.make_node("MatMul", [f"x{layers}", "head"], ["logits"]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 1, 28, 28])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])
    graph = helper.make_graph(nodes, "chain", [image], [logits], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    return path


def images_with_labels(path: Path, model: Path, count: int = 20, wrong: int = 5) -> Path:
    """Write an .npz of random images with the model's own classes, except for the first `wrong`."""
    import onnxruntime

    images = np.random.default_rng(1).standard_normal((count, 1, 28, 28), dtype=np.float32)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    labels = np.array([session.run(None, {"image": image[None]})[0].argmax() for image in images])
    labels[:wrong] = (labels[:wrong] + 1) % 10
    np.savez(path, images=images, labels=labels)
    return path


def kill_run(folder: Path) -> None:
    """Kill the process of a run on this machine as a device: the one that works in its folder."""
    process = psutil.Process(int((folder / "pid").read_text()))
    assert Path(process.cwd()) == folder.resolve()
    process.kill()


def measurement(**changes: object) -> Measurement:
    """Return a complete measurement with three samples; any field can be changed."""
    fields: dict[str, object] = {
        "name": "dense",
        "started_at": "2026-01-01T00:00:00Z",
        "session": "s",
        "artifact_sha256": "0" * 64,
        "file_bytes": 10,
        "runtime": "onnxruntime",
        "runtime_version": "1.31.0",
        "provider": "CPUExecutionProvider",
        "input_shape": (1, 1, 28, 28),
        "input_type": "float32",
        "threads": 1,
        "latency_s": (0.001, 0.002, 0.003),
        "samples_per_turn": (1, 2),
        "first_inference_s": 0.01,
        "load_s": 0.02,
        "warm_up_count": 5,
        "warm_up_stable": True,
        "floor_rss_bytes": 100,
        "peak_rss_bytes": 160,
        "environment": Environment(cpu_model="a CPU"),
    }
    return Measurement.model_validate({**fields, **changes})
