"""Unshared masks in ONNX Runtime: `python -m benchmarks.compression.unshared`.

A sub-layer that writes `written` of `embed` channels from `inner` inputs, over 197 tokens on one
thread, in three graphs, timed in turns, the least time of each: `scatter` (ScatterElements into
zeros), `place` (one zero column appended, one Gather of columns) and `dense` (zero rows in the
matrix).
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from vitrim.export.sessions import open_session

from ..turns import in_turns, least

TOKENS, ROUNDS = 197, 150
FORMS = ("scatter", "place", "dense")


def graph(form: str, inner: int, embed: int, written: int) -> bytes:
    """A model that computes `stream + place(hidden W)`: (tokens, embed).

    Args:
        form: One of `FORMS`.
        inner: Width of `hidden`.
        embed: Width of `stream`.
        written: Channels of the stream that are written.
    """
    random = np.random.default_rng(0)
    indices = np.sort(random.permutation(embed)[:written])
    weight = random.standard_normal((inner, written)).astype(np.float32)
    bias = np.zeros(embed if form == "dense" else written, np.float32)
    constants: dict[str, np.ndarray[Any, Any]] = {"bias": bias}
    nodes = [helper.make_node("Gemm", ["hidden", "weight", "bias"], ["y"])]
    placed = "placed"
    if form == "dense":
        constants["weight"] = np.zeros((inner, embed), np.float32)
        constants["weight"][:, indices] = weight
        placed = "y"
    elif form == "place":
        # Channels that are not written read the appended zero.
        where = np.full(embed, written, np.int64)
        where[indices] = np.arange(written)
        zero = np.zeros((TOKENS, 1), np.float32)
        constants |= {"weight": weight, "zero": zero, "where": where}
        nodes.append(helper.make_node("Concat", ["y", "zero"], ["wider"], axis=1))
        nodes.append(helper.make_node("Gather", ["wider", "where"], [placed], axis=1))
    else:
        where = np.tile(indices, (TOKENS, 1)).astype(np.int64)
        zeros = np.zeros((TOKENS, embed), np.float32)
        constants |= {"weight": weight, "zeros": zeros, "where": where}
        nodes.append(helper.make_node("ScatterElements", ["zeros", "where", "y"], [placed], axis=1))
    nodes.append(helper.make_node("Add", ["stream", placed], ["out"]))
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "writer",
            [value("hidden", shape=[TOKENS, inner]), value("stream", shape=[TOKENS, embed])],
            [value("out", shape=[TOKENS, embed])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def least_latency_s(inner: int, embed: int, written: int) -> dict[str, float]:
    """{form: least time of an inference in seconds}."""
    random = np.random.default_rng(1)
    feed = {
        "hidden": random.standard_normal((TOKENS, inner), np.float32),
        "stream": random.standard_normal((TOKENS, embed), np.float32),
    }
    calls = {
        form: partial(open_session(graph(form, inner, embed, written)).run, None, feed)
        for form in FORMS
    }
    turns = in_turns(calls, range(ROUNDS), repeats=1, untimed=0)
    return {form: min(seconds) for form, seconds in least(turns).items()}


def main() -> None:
    """Print a line a case, and the constants that compress/surgery/stream_form.py uses."""
    print(
        f"{'inner':>6} {'embed':>6} {'written':>8} "
        f"{'scatter us':>11} {'place us':>9} {'dense us':>9}  best"
    )
    rows, prices = [], []
    for inner, embed, share in itertools.product((64, 192, 768), (192, 384), (0.25, 0.5, 0.75)):
        written = int(embed * share)
        latency_s = least_latency_s(inner, embed, written)
        times = " ".join(
            f"{latency_s[form] * 1e6:{width}.1f}"
            for form, width in zip(FORMS, (11, 9, 9), strict=True)
        )
        best = min(latency_s, key=lambda form: latency_s[form])
        print(f"{inner:6} {embed:6} {written:8} {times}  {best}")
        # The dense time is the products'; what `scatter` takes beyond its own products is the
        # price of `written` channels and of `embed` zeros.
        macs_per_s = TOKENS * inner * embed / latency_s["dense"]
        rows.append((written, embed))
        prices.append(latency_s["scatter"] * macs_per_s / TOKENS - inner * written)
    scatter, fill = np.linalg.lstsq(np.array(rows, np.float64), np.array(prices), rcond=None)[0]
    print(
        f"for each token, scattering one channel costs as much as {scatter:.0f} multiply-adds, "
        f"and one channel of zeros {fill:.0f}"
    )


if __name__ == "__main__":
    main()
