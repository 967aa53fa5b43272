"""Unshared masks in ONNX Runtime: what placing a writer's channels costs against zero rows in its
matrix. `python -m benchmarks.compression.unshared`

For one writer of `written` of `embed` channels from `inner` inputs, over 197 tokens on one thread,
three graphs, timed in turns, the least time each: `scatter` (ScatterElements into zeros), `place`
(one zero column appended, one Gather of columns) and `dense` (zero rows in the matrix).
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

TOKENS = 197


def graph(form: str, inner: int, embed: int, written: int) -> bytes:
    """stream + place(hidden W): (tokens, embed)."""
    random = np.random.default_rng(0)
    indices = np.sort(random.permutation(embed)[:written])
    weight = random.standard_normal((inner, written)).astype(np.float32)
    constants = {"bias": np.zeros(embed if form == "dense" else written, np.float32)}
    nodes = [helper.make_node("Gemm", ["hidden", "weight", "bias"], ["y"])]
    if form == "dense":
        constants["weight"] = np.zeros((inner, embed), np.float32)
        constants["weight"][:, indices] = weight
    elif form == "place":
        # Channels that are not written read the appended zero.
        where = np.full(embed, written, np.int64)
        where[indices] = np.arange(written)
        constants |= {
            "weight": weight,
            "nothing": np.zeros((TOKENS, 1), np.float32),
            "where": where,
        }
        nodes.append(helper.make_node("Concat", ["y", "nothing"], ["wider"], axis=1))
        nodes.append(helper.make_node("Gather", ["wider", "where"], ["placed"], axis=1))
    else:
        constants |= {
            "weight": weight,
            "zeros": np.zeros((TOKENS, embed), np.float32),
            "where": np.tile(indices, (TOKENS, 1)).astype(np.int64),
        }
        nodes.append(
            helper.make_node("ScatterElements", ["zeros", "where", "y"], ["placed"], axis=1)
        )
    nodes.append(helper.make_node("Add", ["stream", "y" if form == "dense" else "placed"], ["out"]))
    sides = {"hidden": inner, "stream": embed}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "writer",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [TOKENS, width])
                for name, width in sides.items()
            ],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, [TOKENS, embed])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def session(content: bytes) -> onnxruntime.InferenceSession:
    """On one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def least_latency_s(
    sessions: dict[str, onnxruntime.InferenceSession], feed: dict[str, np.ndarray], turns: int = 150
) -> dict[str, float]:
    """The least of `turns` runs of each, taken in turns, so that a busy machine slows all alike."""
    latency_s = dict.fromkeys(sessions, float("inf"))
    for _, (name, runs) in itertools.product(range(turns), sessions.items()):
        start = time.perf_counter()
        runs.run(None, feed)
        latency_s[name] = min(latency_s[name], time.perf_counter() - start)
    return latency_s


def main() -> None:
    """Print a line a case, and the constants that compress/surgery/stream_form.py decides by."""
    print(
        f"{'inner':>6} {'embed':>6} {'written':>8} {'scatter us':>11} {'place us':>9} {'dense us':>9}  best"
    )
    rows, prices = [], []
    for inner, embed, share in itertools.product((64, 192, 768), (192, 384), (0.25, 0.5, 0.75)):
        written = int(embed * share)
        random = np.random.default_rng(1)
        feed = {
            "hidden": random.standard_normal((TOKENS, inner), np.float32),
            "stream": random.standard_normal((TOKENS, embed), np.float32),
        }
        latency_s = least_latency_s(
            {
                form: session(graph(form, inner, embed, written))
                for form in ("scatter", "place", "dense")
            },
            feed,
        )
        print(
            f"{inner:6} {embed:6} {written:8} "
            + " ".join(
                f"{latency_s[form] * 1e6:{width}.1f}"
                for form, width in (("scatter", 11), ("place", 9), ("dense", 9))
            )
            + f"  {min(latency_s, key=lambda form: latency_s[form])}"
        )
        # Dense time is the products'; what `scatter` takes beyond its own products is the price of
        # `written` channels and of `embed` zeros.
        macs_per_s = TOKENS * inner * embed / latency_s["dense"]
        rows.append((written, embed))
        prices.append(latency_s["scatter"] * macs_per_s / TOKENS - inner * written)
    scatter, fill = np.linalg.lstsq(np.array(rows, np.float64), np.array(prices), rcond=None)[0]
    print(
        f"for each token, scattering one channel costs as much as {scatter:.0f} multiply-adds, and one channel of zeros {fill:.0f}"
    )


if __name__ == "__main__":
    main()
