"""TVM with our kernels compared with ONNX Runtime: `python -m benchmarks.speed.tvm_kernels`.

First the matrix products of a Vision Transformer's layers, as rates: ONNX Runtime's MatMul (MLAS)
and our dense kernel. Then whole networks at batch 1: ONNX Runtime in the best graph form for the
target, and TVM with our kernels; `--default` adds TVM's own pipeline without tuning. All rows of a
table run in one process in turns; medians, and the median of the ratios of neighbours in time.
Rates are by processor time, which other work on the machine does not lengthen. The relative error
is against torch.

    python -m benchmarks.speed.tvm_kernels [--model NAME ...] [--half] [--threads 1]
        [--target host] [--rounds 30] [--log FILE] [--tune SECONDS] [--default] [--json FILE]

`--tune` first measures tiles for so many seconds a network, and writes them to `--log`. With
several threads set TVM_NUM_THREADS to the same number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import tvm
from tvm import relax
from vitrim.bench.local.environment import read_machine, read_state
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import Form, write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.parity import relative_error
from vitrim.export.sessions import open_session
from vitrim.export.tvm_kernels.build import TvmNetwork, build_network, default_network, tvm_target
from vitrim.export.tvm_kernels.dense import Dense, dense
from vitrim.export.tvm_kernels.lanes import Lanes, RowLayout
from vitrim.export.tvm_kernels.packing import panels
from vitrim.export.tvm_kernels.program import compile_kernels
from vitrim.export.tvm_kernels.schedule import default_schedule
from vitrim.export.tvm_kernels.tuner import tune
from vitrim.targets.catalog import load_target
from vitrim.targets.profile import TargetProfile

from ..models import lifted, noise, randomly_cut
from ..results_file import markdown_head, markdown_row, save_result
from ..turns import in_turns

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
HALF = {"head": 0.5, "ffn": 0.5}
SHAPES = (
    (197, 192, 576),
    (197, 192, 768),
    (197, 768, 192),
    (197, 384, 1152),
    (197, 384, 1536),
    (197, 1536, 384),
)
# What TVM's own ONNX front end takes.
PORTABLE = Form(
    rows="batch",
    attention="split",
    residual="add",
    norm="layer",
    activation="gelu",
    stem="matrix",
    last_queries=True,
)


@dataclass(frozen=True)
class Product:
    """Rates of one matrix product, in floating-point operations a second of processor time."""

    rows: int
    depth: int
    columns: int
    mlas_per_s: float
    ours_per_s: float

    def line(self) -> str:
        """One line of the table."""
        return markdown_row(
            f"{self.rows} x {self.depth} x {self.columns}",
            f"{self.mlas_per_s / 1e9:.0f}",
            f"{self.ours_per_s / 1e9:.0f}",
            f"{self.ours_per_s / self.mlas_per_s:.2f}",
        )


@dataclass(frozen=True)
class Row:
    """One network in one runtime.

    Attributes:
        ratio: Its time over ONNX Runtime's, the median over rounds.
        processor_s: Median processor time of all threads.
        processor_ratio: The same ratio, of processor times.
    """

    model: str
    runtime: str
    latency_s: float
    fastest_s: float
    ratio: float
    processor_s: float
    processor_ratio: float
    relative_error: float
    build_s: float

    def line(self) -> str:
        """One line of the table."""
        return markdown_row(
            self.model,
            self.runtime,
            f"{self.latency_s * 1e3:.2f}",
            f"{self.fastest_s * 1e3:.2f}",
            f"{self.ratio:.2f}",
            f"{self.processor_s * 1e3:.2f}",
            f"{self.processor_ratio:.2f}",
            f"{self.relative_error:.1e}",
            f"{self.build_s:.1f}",
        )


def product(
    shape: tuple[int, int, int], profile: TargetProfile, threads: int, rounds: int
) -> Product:
    """Time our kernel and ONNX Runtime's MatMul, both with constant weights.

    Args:
        shape: Rows, depth and columns of the product.
        profile: The target that our kernel is compiled for.
        threads: Threads of both.
        rounds: Turns of both.

    Returns:
        The rates of both.
    """
    rows, depth, columns = shape
    random = np.random.default_rng(0)
    left = random.standard_normal((rows, depth), np.float32)
    right = random.standard_normal((depth, columns), np.float32)
    session = open_session(_matmul(rows, right), threads=threads)
    result = np.zeros((rows, columns), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("x", left)
    binding.bind_output("y", "cpu", 0, np.float32, list(result.shape), result.ctypes.data)
    lanes, schedule = Lanes.of(profile.vector), default_schedule(profile.vector, threads)
    spec = Dense(1, rows, depth, columns, RowLayout(rows, depth), bias=False)
    kernel = dense(spec, lanes, schedule).with_attr("global_symbol", "kernel")
    module = compile_kernels(tvm.IRModule({"kernel": kernel}), tvm_target(profile))
    weights = panels(right, spec.panels(lanes, schedule), lanes.count)
    operands = [
        tvm.runtime.tensor(array) for array in (left.ravel(), weights, result.ravel().copy())
    ]
    calls: dict[str, Callable[[], object]] = {
        "mlas": partial(session.run_with_iobinding, binding),
        "ours": partial(module["kernel"], *operands),
    }
    turns = in_turns(calls, range(rounds), repeats=5)
    assert np.allclose(operands[2].numpy().reshape(rows, columns), result, rtol=1e-4, atol=1e-3)
    # Two operations for a multiply-add.
    rate = {
        name: 2 * rows * depth * columns / statistics.median(turn.processor_s for turn in found)
        for name, found in turns.items()
    }
    return Product(rows, depth, columns, rate["mlas"], rate["ours"])


def _matmul(rows: int, weight: np.ndarray[Any, Any]) -> bytes:
    depth, columns = weight.shape
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [value("x", onnx.TensorProto.FLOAT, [rows, depth])],
        [value("y", onnx.TensorProto.FLOAT, [rows, columns])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = onnx.helper.make_opsetid("", 20)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    return bytes(model.SerializeToString())


def machine_of(built: TvmNetwork) -> Any:
    """The compiled network, ready to run."""
    return relax.VirtualMachine(built.compile(), tvm.cpu())["main"]


def network(
    name: str, model: CompactModel, profile: TargetProfile, options: argparse.Namespace
) -> list[Row]:
    """Time one model in every runtime, in turns.

    Args:
        name: Name of the model.
        model: The model.
        profile: The target that it is compiled for.
        options: `threads`, `rounds`, `log` and `default` of the command.

    Returns:
        One row a runtime.
    """
    images, threads = noise(model), options.threads
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    start_s = time.perf_counter()
    graph = write_network(model, best_form(profile.name, 1)[0])
    session = open_session(graph.SerializeToString(), threads=threads)
    build_s = {"onnxruntime": time.perf_counter() - start_s}
    source, tensor = session.get_inputs()[0].name, tvm.runtime.tensor(images)
    calls: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
        "onnxruntime": lambda: session.run(None, {source: images})[0]
    }
    makers: dict[str, Callable[[], TvmNetwork]] = {
        "tvm, our kernels": lambda: build_network(model, profile, threads=threads, log=options.log)
    }
    if options.default:
        makers["tvm, its own pipeline"] = lambda: default_network(
            write_network(model, PORTABLE, batch=1), profile, threads=threads
        )
    for runtime, make in makers.items():
        start_s = time.perf_counter()
        main = machine_of(make())
        build_s[runtime] = time.perf_counter() - start_s
        calls[runtime] = lambda main=main: main(tensor).numpy()  # type: ignore[misc]
    errors = {name: float(relative_error(expected, call()).max()) for name, call in calls.items()}
    turns = in_turns(calls, range(options.rounds), repeats=1)
    rows = []
    for runtime, found in turns.items():
        pairs = list(zip(found, turns["onnxruntime"], strict=True))
        rows.append(
            Row(
                model=name,
                runtime=runtime,
                latency_s=statistics.median(turn.least_s for turn in found),
                fastest_s=min(turn.least_s for turn in found),
                ratio=statistics.median(one.least_s / other.least_s for one, other in pairs),
                processor_s=statistics.median(turn.processor_s for turn in found),
                processor_ratio=statistics.median(
                    one.processor_s / other.processor_s for one, other in pairs
                ),
                relative_error=errors[runtime],
                build_s=build_s[runtime],
            )
        )
    return rows


def models(names: list[str], *, half: bool) -> dict[str, CompactModel]:
    """The networks with random weights, and their halves."""
    found = {}
    for name in names:
        found[name] = lifted(name)
        if half:
            found[f"{name}, half of heads and FFN"] = randomly_cut(found[name], HALF)
    return found


def main() -> None:
    """Measure, print, and write JSON where requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="host")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--tune", type=float, metavar="SECONDS")
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    profile = load_target(options.target)
    torch.set_num_threads(1)
    products = []
    titles = ("rows x depth x columns", "MLAS (GFLOP/s)", "our kernel (GFLOP/s)", "ours / MLAS")
    print("\n".join(markdown_head(*titles)))
    for shape in SHAPES:
        products.append(product(shape, profile, options.threads, options.rounds))
        print(products[-1].line(), flush=True)
    columns = (
        *("model", "runtime", "median (ms)", "fastest (ms)", "time / ONNX Runtime's"),
        *("processor (ms)", "processor / its", "relative error", "built in (s)"),
    )
    print("", *markdown_head(*columns), sep="\n")
    rows = []
    for name, model in models(options.model, half=options.half).items():
        if options.tune and options.log:
            tune(model, profile, options.log, threads=options.threads, time_limit_s=options.tune)
        for row in network(name, model, profile, options):
            rows.append(row)
            print(row.line(), flush=True)
    if options.json:
        result = {
            "threads": options.threads,
            "products": [asdict(one) for one in products],
            "networks": [asdict(row) for row in rows],
            "machine": read_machine(),
            "state": read_state(),
        }
        save_result(options.json, result)


if __name__ == "__main__":
    main()
