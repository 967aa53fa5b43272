"""TVM with our schedule beside ONNX Runtime: `python -m benchmarks.speed.tvm_kernels`.

First the products of a Vision Transformer's layers, as rates: ONNX Runtime's MatMul (MLAS) and our
dense kernel. Then whole networks at batch 1: ONNX Runtime in our best graph form for this target,
and TVM with our kernels; `--default` adds TVM's own pipeline without tuning. All of a table runs in
one process in turns; medians, and the median of the ratios of neighbours in time. Beside the clock
stands the processor time, which a machine with other work does not stretch: rates are by processor
time. Relative error is against torch.

    python -m benchmarks.speed.tvm_kernels [--model NAME ...] [--half] [--threads 1] [--target x86-64]
    [--rounds 30] [--log FILE] [--tune SECONDS] [--default] [--json FILE]

`--tune` measures tiles for so many seconds a network first, and writes them to `--log`. With
several threads set TVM_NUM_THREADS to as many.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import timm
import torch
import tvm
import vitrim
from tvm import relax
from vitrim.bench.local.environment import read_machine, read_state
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import Form, write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.parity import relative_error
from vitrim.export.sessions import open_session
from vitrim.export.tvm_kernels.build import build_network
from vitrim.export.tvm_kernels.built import Built
from vitrim.export.tvm_kernels.default import default_network
from vitrim.export.tvm_kernels.dense import Dense, dense
from vitrim.export.tvm_kernels.lanes import Lanes
from vitrim.export.tvm_kernels.packing import panels
from vitrim.export.tvm_kernels.place import Rows
from vitrim.export.tvm_kernels.schedule import default_schedule
from vitrim.export.tvm_kernels.targets import tvm_target
from vitrim.export.tvm_kernels.tune import tune
from vitrim.targets.catalog import load_target
from vitrim.targets.profile import TargetProfile

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
SHAPES = (
    (197, 192, 576),
    (197, 192, 768),
    (197, 768, 192),
    (197, 384, 1152),
    (197, 384, 1536),
    (197, 1536, 384),
)
Call = Callable[[], object]


@dataclass(frozen=True)
class Product:
    """Rates of one product, in floating-point operations a second of processor time (two for a
    multiply-add).
    """

    rows: int
    depth: int
    columns: int
    mlas_per_s: float
    ours_per_s: float


@dataclass(frozen=True)
class Row:
    """One network in one runtime. ratio: its time over ONNX Runtime's, the median over rounds;
    processor_s, processor_ratio: of processor time, all threads.
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


class Taken(NamedTuple):
    """By the clock, and of processors."""

    clock_s: float
    processor_s: float


def in_turns(calls: dict[str, Call], rounds: int, repeats: int = 1) -> dict[str, list[Taken]]:
    """What a call takes, one list entry a round; the order turns round by round."""
    names = list(calls)
    took: dict[str, list[Taken]] = {name: [] for name in names}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began, worked = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                calls[name]()
            took[name].append(
                Taken(
                    (time.perf_counter() - began) / repeats,
                    (time.process_time() - worked) / repeats,
                )
            )
    return took


def product(
    rows: int, depth: int, columns: int, profile: TargetProfile, threads: int, rounds: int
) -> Product:
    """Our kernel against ONNX Runtime's MatMul, both with constant weights."""
    random = np.random.default_rng(0)
    left, right = (
        random.standard_normal((rows, depth), np.float32),
        random.standard_normal((depth, columns), np.float32),
    )
    session = open_session(_matmul(rows, right), threads=threads)
    result = np.zeros((rows, columns), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("x", left)
    binding.bind_output("y", "cpu", 0, np.float32, list(result.shape), result.ctypes.data)
    lanes, schedule = Lanes.of(profile.vector), default_schedule(profile.vector, threads)
    spec = Dense(1, rows, depth, columns, Rows(rows, depth), bias=False)
    kernel = dense(spec, lanes, schedule).with_attr("global_symbol", "kernel")
    module = tvm.tirx.build(tvm.IRModule({"kernel": kernel}), target=tvm_target(profile))
    weights = panels(right, spec.panels(lanes, schedule), lanes.count)
    operands = [
        tvm.runtime.tensor(array) for array in (left.ravel(), weights, result.ravel().copy())
    ]
    took = in_turns(
        {
            "mlas": lambda: session.run_with_iobinding(binding),
            "ours": lambda: module["kernel"](*operands),
        },
        rounds,
        repeats=5,
    )
    assert np.allclose(operands[2].numpy().reshape(rows, columns), result, rtol=1e-4, atol=1e-3)
    operations = 2 * rows * depth * columns
    rate = {
        name: operations / statistics.median(one.processor_s for one in taken)
        for name, taken in took.items()
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
    return bytes(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
        ).SerializeToString()
    )


def machine_of(built: Built) -> Any:
    """The compiled network, ready to be asked."""
    return relax.VirtualMachine(built.compile(), tvm.cpu())["main"]


def network(
    name: str,
    model: CompactModel,
    profile: TargetProfile,
    threads: int,
    rounds: int,
    log: Path | None,
    *,
    default: bool,
) -> list[Row]:
    """One model in every runtime, in turns."""
    images = np.random.default_rng(0).standard_normal((1, *model.architecture.image), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    began = time.perf_counter()
    session = open_session(
        write_network(model, best_form(profile.name, 1)[0]).SerializeToString(), threads=threads
    )
    builds = {"onnxruntime": time.perf_counter() - began}
    source, tensor = session.get_inputs()[0].name, tvm.runtime.tensor(images)
    asks: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
        "onnxruntime": lambda: session.run(None, {source: images})[0]
    }
    makers: dict[str, Callable[[], Built]] = {
        "tvm, our kernels": lambda: build_network(model, profile, threads=threads, log=log)
    }
    if default:
        form = Form(
            rows="batch",
            attention="split",
            residual="add",
            norm="layer",
            activation="gelu",
            stem="matrix",
            last_queries=True,
        )
        makers["tvm, its own pipeline"] = lambda: default_network(
            write_network(model, form, batch=1), profile, threads=threads
        )
    for runtime, make in makers.items():
        began = time.perf_counter()
        main = machine_of(make())
        builds[runtime] = time.perf_counter() - began
        asks[runtime] = lambda main=main: main(tensor).numpy()  # type: ignore[misc]
    errors = {
        runtime: float(relative_error(expected, ask()).max()) for runtime, ask in asks.items()
    }
    took = in_turns(dict(asks), rounds)
    found = []
    for runtime, taken in took.items():
        pairs = list(zip(taken, took["onnxruntime"], strict=True))
        found.append(
            Row(
                name,
                runtime,
                statistics.median(one.clock_s for one in taken),
                min(one.clock_s for one in taken),
                statistics.median(one.clock_s / other.clock_s for one, other in pairs),
                statistics.median(one.processor_s for one in taken),
                statistics.median(one.processor_s / other.processor_s for one, other in pairs),
                errors[runtime],
                builds[runtime],
            )
        )
    return found


def models(names: list[str], *, half: bool) -> dict[str, CompactModel]:
    """The networks with random weights, and their halves."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        dense_model = vitrim.lift(timm.create_model(name).eval())
        found[name] = dense_model
        if half:
            mask = vitrim.StructuredMask.random(
                dense_model, keep_ratio={"head": 0.5, "ffn": 0.5}, seed=0
            )
            found[f"{name}, half of heads and FFN"] = vitrim.compact(dense_model, mask).eval()
    return found


def main() -> None:
    """Measure, print, and perhaps write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="x86-64")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--tune", type=float, metavar="SECONDS")
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    profile = load_target(arguments.target)
    torch.set_num_threads(1)
    products = []
    print(
        "| rows x depth x columns | MLAS (GFLOP/s) | our kernel (GFLOP/s) | ours / MLAS |\n|---|---|---|---|"
    )
    for shape in SHAPES:
        one = product(*shape, profile, arguments.threads, arguments.rounds)
        products.append(one)
        rates = f"{one.mlas_per_s / 1e9:.0f} | {one.ours_per_s / 1e9:.0f} | {one.ours_per_s / one.mlas_per_s:.2f}"
        print(f"| {' x '.join(map(str, shape))} | {rates} |", flush=True)
    print(
        "\n| model | runtime | median (ms) | fastest (ms) | time / ONNX Runtime's | processor (ms) | processor / its | relative error | built in (s) |"
    )
    print("|---" * 9 + "|")
    rows = []
    for name, model in models(arguments.model, half=arguments.half).items():
        if arguments.tune and arguments.log:
            tune(
                model,
                profile,
                arguments.log,
                threads=arguments.threads,
                time_limit_s=arguments.tune,
            )
        for row in network(
            name,
            model,
            profile,
            arguments.threads,
            arguments.rounds,
            arguments.log,
            default=arguments.default,
        ):
            rows.append(row)
            times = f"{row.latency_s * 1e3:.2f} | {row.fastest_s * 1e3:.2f} | {row.ratio:.2f} | {row.processor_s * 1e3:.2f} | {row.processor_ratio:.2f}"
            print(
                f"| {row.model} | {row.runtime} | {times} | {row.relative_error:.1e} | {row.build_s:.1f} |",
                flush=True,
            )
    if arguments.json:
        machine = {"machine": asdict(read_machine()), "state": asdict(read_state())}
        found = {
            "threads": arguments.threads,
            "products": [asdict(one) for one in products],
            "networks": [asdict(row) for row in rows],
        }
        arguments.json.write_text(
            json.dumps({**found, **machine}, indent=1, default=str) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
