"""TVM kernels compared with ONNX Runtime on AVX2 code: `python -m benchmarks.speed.avx2`.

DeiT-T, dense and cut to half of its multiply-adds, in fp32, int8 (dynamic) and int8-static, one
thread, batch 1: artifacts for the target x86-64-v3. On a processor that has more than AVX2, ONNX
Runtime is limited by limited_cpu.py; its saturating eight-bit product, which a processor with VNNI
does not have, proves it before anything is timed. All rows of a pair run in turns in one process;
the processor time of the computing thread is measured, which other programs do not lengthen. Each
pair is measured several times, at different moments: the table shows the median of all turns, the
10th percentile (nearest to an undisturbed call), and the smallest and largest ratio of the passes.

    python -m benchmarks.speed.avx2 [--passes 3] [--limit-s 4] [--work FOLDER] [--json FILE]

Artifacts stay in the work folder, and a later run uses them again. Writes `results/avx2.json` and
`avx2.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from vitrim.bench.local.artifact_facts import artifact_facts
from vitrim.bench.local.environment import read_machine
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export
from vitrim.runtimes import open_engine
from vitrim.targets.catalog import load_target

from ..models import calibration_noise, lifted
from ..results_file import RESULTS, markdown_head, markdown_row, publish
from ..turns import in_turns, least, until
from .limited_cpu import LIMITED, limited_environment
from .runtimes import half_of

TARGET, MODEL = "x86-64-v3", "deit_tiny_patch16_224"
KINDS, PRECISIONS = ("dense", "half"), ("fp32", "int8", "int8-static")
THEIRS, OURS = "onnxruntime", "tvm"
SCHEMA = "vitrim.benchmark-avx2/1"


def write_artifacts(work: Path) -> None:
    """Export every row into `work`, unless the folder has it."""
    dense = lifted(MODEL)
    models = {"dense": dense, "half": half_of(dense, load_target(TARGET).round_to)}
    for kind, precision, runtime in itertools.product(KINDS, PRECISIONS, (THEIRS, OURS)):
        folder = place(work, kind, precision, runtime)
        if (folder / "manifest.json").is_file():
            continue
        print(f"exporting {folder.name}", file=sys.stderr, flush=True)
        model = models[kind]
        images = None if precision == "fp32" else calibration_noise(model, 16)
        export(
            model,
            folder,
            target=TARGET,
            runtime=runtime,
            precision=precision,  # type: ignore[arg-type]
            images=images,
        )


def place(work: Path, kind: str, precision: str, runtime: str) -> Path:
    """The folder of one artifact."""
    return work / f"{kind}-{precision}-{runtime}"


def saturates() -> bool:
    """Whether ONNX Runtime's product of eight bits adds pairs in 16 bits, as AVX2's does."""
    import onnx
    import onnxruntime

    value, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [value("x", kinds.UINT8, [32, 64])],
        [value("y", kinds.INT32, [32, 64])],
        [onnx.numpy_helper.from_array(np.full((64, 64), 127, np.int8), "w")],
    )
    opset = onnx.helper.make_opsetid("", 20)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"x": np.full((32, 64), 255, np.uint8)})[0]
    return bool((found != 64 * 255 * 127).any())


def measure(work: Path, passes: int, limit_s: float) -> dict[str, Any]:
    """Time all pairs, in a process in which ONNX Runtime is limited.

    Args:
        work: The folder of the artifacts.
        passes: How often all pairs are measured, one after the other.
        limit_s: Seconds of one pair in one pass.

    Returns:
        The result, to be saved.
    """
    if not saturates():
        raise SystemExit("onnxruntime's eight-bit product is exact: it is not limited to AVX2")
    # Where it is allowed: other programs should not empty the caches in the middle of a call.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    pairs = list(itertools.product(KINDS, PRECISIONS))
    calls = {
        pair: {runtime: opened(place(work, *pair, runtime)) for runtime in (THEIRS, OURS)}
        for pair in pairs
    }
    turns: dict[Any, list[dict[str, list[float]]]] = {pair: [] for pair in pairs}
    for number, pair in itertools.product(range(passes), pairs):
        print(f"pass {number + 1} of {passes}: {' '.join(pair)}", file=sys.stderr, flush=True)
        found = in_turns(calls[pair], until(limit_s), clock=time.thread_time, shuffle=True)
        turns[pair].append(least(found))
    return {
        "schema": SCHEMA,
        "machine": read_machine(),
        "limited": os.environ.get(LIMITED, ""),
        "rows": [row_of(work, pair, found) for pair, found in turns.items()],
    }


def opened(folder: Path) -> Any:
    """One inference of an artifact, to be timed."""
    facts = artifact_facts(folder)
    engine = open_engine(
        {
            "model": str(facts.model.resolve()),
            "runtime": facts.runtime,
            "threads": 1,
            "session": facts.session,
            "input": facts.input,
            "output": facts.output,
        }
    )
    engine.load()
    image = np.random.default_rng(0).standard_normal(engine.input_shape, dtype=np.float32)
    return engine.timed_call(image)


def row_of(
    work: Path, pair: tuple[str, str], passes: list[dict[str, list[float]]]
) -> dict[str, Any]:
    """One line of the table, in plain numbers with their units."""
    kind, precision = pair
    row: dict[str, Any] = {"model": MODEL, "kind": kind, "precision": precision}
    for runtime in (THEIRS, OURS):
        seconds = [second for found in passes for second in found[runtime]]
        parity = Artifact.load(place(work, *pair, runtime)).manifest.parity[-1]
        row[runtime] = {
            "processor_s": statistics.median(seconds),
            "processor_p10_s": float(np.percentile(seconds, 10)),
            "turns": len(seconds),
            "max_relative_error": parity.max_relative_error,
        }
    ratios = [statistics.median(found[OURS]) / statistics.median(found[THEIRS]) for found in passes]
    row["ratio"] = row[OURS]["processor_s"] / row[THEIRS]["processor_s"]
    row["ratio_p10"] = row[OURS]["processor_p10_s"] / row[THEIRS]["processor_p10_s"]
    row["ratio_of_passes"] = [min(ratios), max(ratios)]
    return row


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    machine = result["machine"]
    limited = (
        f"ONNX Runtime limited to AVX2 by masking CPUID on {machine['cpu_model']}; "
        "not an AVX2 machine"
        if result["limited"]
        else str(machine["cpu_model"])
    )
    lines = [
        f"`python -m benchmarks.speed.avx2`, {limited}. {MODEL}, target {TARGET}, batch 1, one "
        "thread, rows of a pair in turns: processor time, the median and in brackets the 10th "
        "percentile; the spread is that of the passes' ratios. Errors are the largest, relative "
        "to the largest logit of torch.",
        "",
        *markdown_head(
            "model",
            "precision",
            "ONNX Runtime (ms)",
            "TVM, our kernels (ms)",
            "ours / ONNX Runtime's",
            "spread",
            "error of ONNX Runtime",
            "error of ours",
            numbers=6,
        ),
    ]
    for row in result["rows"]:
        times = [
            f"{row[runtime]['processor_s'] * 1e3:.2f} ({row[runtime]['processor_p10_s'] * 1e3:.2f})"
            for runtime in (THEIRS, OURS)
        ]
        errors = [f"{row[runtime]['max_relative_error']:.1e}" for runtime in (THEIRS, OURS)]
        low, high = row["ratio_of_passes"]
        ratios = f"{row['ratio']:.3f} ({row['ratio_p10']:.3f})", f"{low:.3f} to {high:.3f}"
        lines.append(markdown_row(row["kind"], row["precision"], *times, *ratios, *errors))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Export, measure in a limited process, and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=3, help="how often all pairs are measured")
    parser.add_argument("--limit-s", type=float, default=4.0, help="seconds of a pair in a pass")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-avx2"))
    parser.add_argument("--out", type=Path, default=RESULTS / "avx2")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        found = measure(options.work, options.passes, options.limit_s)
        options.measure.write_text(json.dumps(found))
        return 0
    write_artifacts(options.work)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.speed.avx2", "--measure", str(raw)]
        command += ["--work", str(options.work), "--passes", str(options.passes)]
        command += ["--limit-s", str(options.limit_s)]
        has_more = {"avx512f", "avx512_vnni", "avx_vnni"} & set(read_machine()["cpu_features"])
        with limited_environment([THEIRS] if has_more else []) as environment:
            subprocess.run(command, env=environment, check=True)
        result = json.loads(raw.read_text())
    publish(options.out, result, markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
