"""Estimated latencies compared with measured ones: `python -m benchmarks.estimates`.

Every device in bench/estimate/published.toml (published figures, each with its source) and
bench/estimate/measured.json (this project's machine) is predicted by a calibration without that
device. The table shows predicted and measured latency and their ratio; the error bar that `vitrim
targets check` prints is derived from it. Writes `results/estimates.json` and `estimates.md`.

    python -m benchmarks.estimates
    python -m benchmarks.estimates --measure [--python PYTHON]   measure this machine first
    python -m benchmarks.estimates --add ncnn                    add a runtime on that machine

--measure times plain ViTs of random weights in ONNX Runtime and OpenVINO with one and two threads,
in turns, and the clock and multiply-add rate of the core before and after, and calibrates the cost
of each operator. PYTHON is an interpreter that has OpenVINO, where this one has none.

--add measures the processor time of one thread in turns with ONNX Runtime, which other work on the
machine hardly changes, and writes ONNX Runtime's latency times the ratio of the two to
measured.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from vitrim.bench.estimate.calibration import LEVEL, LeftOut, error_factor, fit, leave_one_out
from vitrim.bench.estimate.costs import OperatorCosts
from vitrim.bench.estimate.points import known_points

from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from .measuring import add_ncnn, measure


def table(left_out: list[LeftOut]) -> list[str]:
    """Markdown: one line a figure."""
    lines = markdown_head(
        *("device", "runtime", "model", "precision", "predicted", "measured"),
        *("predicted / measured", "rests on", "measured by"),
    )
    for entry in left_out:
        point = entry.point
        lines.append(
            markdown_row(
                point.label,
                point.family,
                point.workload.name,
                point.machine.precision,
                _ms(entry.predicted_s),
                _ms(point.latency_s),
                f"{entry.ratio:.2f}",
                " on ".join(part for part in entry.cell if part) or "every device",
                point.source,
            )
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _factor(entry: LeftOut) -> float:
    """The error as a factor of at least one."""
    return math.exp(abs(math.log(entry.ratio)))


def summary(left_out: list[LeftOut], without: list[LeftOut]) -> dict[str, Any]:
    """Median and largest error over devices and over figures, as factors.

    Args:
        left_out: Predictions without the device.
        without: Predictions without the device and without its runtime.
    """
    factors = {
        entry.point.label + entry.point.workload.name + entry.point.family: _factor(entry)
        for entry in left_out
    }
    worst = max(left_out, key=_factor)
    published = [entry for entry in left_out if entry.point.machine.device != "host"]
    same_kind = [
        entry
        for entry in left_out
        if entry.cell == (entry.point.family, entry.point.machine.architecture)
    ]
    return {
        "figures": len(left_out),
        "devices": len({entry.point.machine.device for entry in left_out}),
        "median_ratio": statistics.median(entry.ratio for entry in left_out),
        "median_factor": statistics.median(factors.values()),
        "median_factor_published": statistics.median(map(_factor, published)),
        "within_factor_2": sum(factor <= 2 for factor in factors.values()) / len(factors),
        "worst_ratio": worst.ratio,
        "worst": f"{worst.point.label}, {worst.point.workload.name}",
        "error_factor": error_factor(same_kind),
        "error_factor_without_runtime": error_factor(without),
        "level": LEVEL,
    }


def markdown(found: dict[str, Any], lines: list[str], calibrated_on: str) -> str:
    """The table with its summary."""
    text = [
        "# Estimates compared with measured latencies",
        "",
        "`python -m benchmarks.estimates`. Each device is predicted by a calibration without it, "
        "with any runtime, model or number of threads.",
        f"Operator costs were calibrated on `host`: {calibrated_on}. No emulated times are among "
        "them.",
        "",
        *lines,
        "",
        f"{found['figures']} figures of {found['devices']} devices. Median ratio "
        f"{found['median_ratio']:.2f}; the median error is a factor of "
        f"{found['median_factor']:.2f} ({found['median_factor_published']:.2f} on the published "
        f"figures alone), {100 * found['within_factor_2']:.0f} % are within a factor of 2; the "
        f"worst ratio is {found['worst_ratio']:.2f} ({found['worst']}).",
        "",
        f"Error bar of an estimate (split conformal over the devices, {100 * LEVEL:.0f} %): a "
        f"factor of {found['error_factor']:.2f} where the runtime was measured on the kind of "
        f"machine, {found['error_factor_without_runtime']:.2f} where it was not (predicted without "
        "any figure of its runtime).",
    ]
    return "\n".join(text) + "\n"


def row(entry: LeftOut) -> dict[str, Any]:
    """One figure, in plain numbers."""
    point = entry.point
    return {
        "device": point.machine.device,
        "setting": point.setting,
        "threads": point.machine.threads,
        "runtime": point.family,
        "model": point.workload.name,
        "precision": point.machine.precision,
        "predicted_s": entry.predicted_s,
        "measured_s": point.latency_s,
        "ratio": entry.ratio,
        "rests_on": list(entry.cell),
        "source": point.source,
    }


def main() -> int:
    """Measure where requested, predict, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--measure", action="store_true", help="measure this machine and calibrate on it first"
    )
    parser.add_argument(
        "--add", choices=["ncnn"], help="measure this runtime too, in turns with ONNX Runtime"
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter with OpenVINO")
    parser.add_argument("--out", type=Path, default=RESULTS / "estimates")
    options = parser.parse_args()
    if options.measure:
        measure(options.python)
    if options.add:
        add_ncnn()
    points, costs = known_points(), OperatorCosts.load()
    left_out = leave_one_out(points, costs)
    found = summary(left_out, leave_one_out(points, costs, without_runtime=True))
    calibration = fit(points, costs)
    text = markdown(found, table(left_out), costs.calibrated_on)
    print(text, end="")
    levels = {
        " on ".join(part for part in cell if part) or "all": level
        for cell, level in calibration.levels.items()
    }
    result = {
        "summary": found,
        "threads_power": calibration.threads_power,
        "levels": levels,
        "rows": [row(entry) for entry in left_out],
    }
    save_result(options.out, result, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
