"""A sample run folder with the sizes of the demo model, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """name = "fashion_mnist"

[data]
name = "fashion-mnist"

[masks]
params = 0.3
epochs = 20
"""
HEADS = [3, 2, 3, 1]
QK = [12, 16, 10, 14]
V = [20, 24, 16, 18]
FFN = [148, 96, 172, 60]


def environment(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "cpu_model": "Intel(R) Xeon(R) Platinum 8488C",
        "architecture": "x86_64",
        "cpu_features": ["avx2", "avx512f", "avx512_vnni"],
        "cores": 2,
        "frequency_hz": 2.4e9,
        "virtual_machine": "kvm",
        "load_before": 0.21,
        "load_after": 0.64,
        "busy_cores_before": 0.1,
        "memory_total_bytes": 24_000_000_000,
        "memory_available_bytes": 19_500_000_000,
        "os": "Debian GNU/Linux 12",
        "kernel": "6.1.0",
        "python": "3.11.2",
        "libraries": {"onnxruntime": "1.31.0", "numpy": "2.4.0"},
    }
    return {**fields, **changes}


def measurement(
    name: str,
    precision: str,
    p50_s: float,
    file_bytes: int,
    top1: float,
    *,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    # A body a few percent wide, and a tail of interruptions.
    body = p50_s * (1 + 0.02 * rng.standard_normal(1200) + 0.015 * rng.standard_gamma(1.2, 1200))
    tail = rng.random(1200) < 0.02
    body[tail] *= 1 + rng.gamma(2, 0.12, tail.sum())
    correct = round(top1 * 10_000)
    fields: dict[str, Any] = {
        "schema": "vitrim.measurement/1",
        "name": name,
        "target": "x86-64",
        "started_at": "2026-01-01T10:00:00Z",
        "session": "one",
        "artifact_sha256": f"{seed:064x}",
        "file_bytes": file_bytes,
        "precision": precision,
        "runtime": "onnxruntime",
        "runtime_version": "1.31.0",
        "provider": "CPUExecutionProvider",
        "input_shape": [1, 1, 28, 28],
        "input_type": "float32",
        "threads": 1,
        "latency_s": [round(float(value), 9) for value in body],
        "samples_per_turn": [60] * 20,
        "first_inference_s": p50_s * 3,
        "load_s": 0.031 + file_bytes * 4e-9,
        "warm_up_count": 50,
        "warm_up_stable": True,
        "floor_rss_bytes": 61_000_000,
        "peak_rss_bytes": 61_000_000 + int(file_bytes * 2.2) + 3_400_000,
        "top1": correct / 10_000,
        "correct": correct,
        "total": 10_000,
        "environment": environment(),
        "warnings": [
            "The processor is a virtual machine's; neighbours may slow it. "
            "Compare variants measured in turn, not absolute times."
        ],
    }
    return {**fields, **changes}


def artifact(measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "runtime": measured["runtime"],
        "precision": measured["precision"],
        "target": measured["target"],
        "bytes": measured["file_bytes"],
        "measurement": measured,
    }


def measurements(**changes: Any) -> dict[str, dict[str, Any]]:
    return {
        "baseline-fp32": measurement(
            "baseline-fp32", "fp32", 0.001046, 3_292_000, 0.9131, seed=1, **changes
        ),
        "compact-fp32": measurement(
            "compact-fp32", "fp32", 0.000371, 961_000, 0.9103, seed=2, **changes
        ),
        "compact-int8": measurement(
            "compact-int8", "int8", 0.000302, 318_000, 0.9096, seed=3, **changes
        ),
    }


def report() -> dict[str, Any]:
    made = measurements()
    return {
        "schema": "vitrim.report/1",
        "models": {
            "baseline": {
                "params": 803_466,
                "macs": 40_141_312,
                "top1": 0.9131,
                "artifacts": [artifact(made["baseline-fp32"])],
            },
            "compact": {
                "params": 231_904,
                "macs": 11_603_200,
                "top1": 0.9103,
                "artifacts": [artifact(made["compact-fp32"]), artifact(made["compact-int8"])],
            },
        },
        "parity": {
            "masked → compact": 3.1e-7,
            "compact-fp32: form matrix/opset23/add/centred-rms/gelu/matrix-stem/last-queries "
            "against torch": 8.4e-7,
            "ONNX → simplified ONNX": 0.0,
            "fp32 → int8": 0.0312,
        },
        "estimates": estimates(),
        "recipe": "fashion_mnist",
        "command": "vitrim run recipes/fashion_mnist.toml",
        "created_at": "2026-01-01T10:04:12Z",
        "data": "Fashion-MNIST: 54,000 training, 6,000 validation, 10,000 test images",
        "seed": 7,
    }


NEAR = [
    "Raspberry Pi 4 Model B at 1.8 GHz, four Cortex-A72",
    "Intel Core i9-10940X, 14 cores with AVX-512",
]
FAR = [*NEAR, "Jetson Nano, its four Cortex-A57"]


def estimates() -> list[dict[str, Any]]:
    """Two devices with different error bars, and one that the baseline does not fit."""
    made = []
    for target, device, p50_s, factor in (
        ("rpi4", "Raspberry Pi 4 Model B (4 GB)", 0.0091, 2.36),
        ("x86", "Generic x86-64", 0.00042, 1.57),
    ):
        for model, precision, share in (
            ("baseline", "fp32", 1.0),
            ("baseline", "int8", 0.9),
            ("compact", "fp32", 0.4),
            ("compact", "int8", 0.39),
        ):
            likely_s = p50_s * share
            latency = {
                "estimated_s": likely_s,
                "low_s": likely_s / factor,
                "high_s": likely_s * factor,
                "factor": factor,
                "level": 0.8,
                "runtime": "onnxruntime",
                "threads": 4,
                "rests_on": "other runtimes on aarch64" if factor > 2 else "onnxruntime on x86_64",
                "held_against": FAR if factor > 2 else NEAR,
            }
            made.append(
                {**_needs(model, precision, target, device, 3_220_000_000), "latency": latency}
            )
    for model, precision in (
        ("baseline", "fp32"),
        ("baseline", "int8"),
        ("compact", "fp32"),
        ("compact", "int8"),
    ):
        why = (
            "it does not fit"
            if (model, precision) == ("baseline", "fp32")
            else "no microcontroller was measured to calibrate one with"
        )
        made.append(
            {
                **_needs(model, precision, "stm32h7", "STMicroelectronics STM32H743", 2_097_152),
                "no_latency": why,
            }
        )
    return made


def _needs(model: str, precision: str, target: str, device: str, space: int) -> dict[str, Any]:
    params = 803_466 if model == "baseline" else 231_904
    width = 4 if precision == "fp32" else 1
    return {
        "model": model,
        "precision": precision,
        "target": target,
        "device": device,
        "weight_bytes": params * width,
        "weight_space_bytes": space,
        "activation_bytes": 38_400 * width,
        "activation_space_bytes": 786_432,
    }


def kept(depth: int = 4, *, embed: tuple[int, int] = (80, 128)) -> list[dict[str, Any]]:
    branches: list[dict[str, Any]] = []
    for i in range(depth):
        j = i % 4
        attention = {
            "head": [HEADS[j], 4],
            "qk": [QK[j], 32],
            "v": [V[j], 32],
            "embed": list(embed),
        }
        branches.append({"branch": f"blocks.{i}.attn", "kind": "attention", "dims": attention})
        branches.append(
            {
                "branch": f"blocks.{i}.mlp",
                "kind": "ffn",
                "dims": {"ffn": [FFN[j], 512], "embed": list(embed)},
            }
        )
    return branches


def history() -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    lines: list[dict[str, Any]] = []
    for epoch in range(1, 31):
        lines.append(
            _epoch(
                "baseline",
                epoch,
                0.62 + 1.1 * math.exp(-epoch / 4),
                91.6 - 22 * math.exp(-epoch / 3.5),
                1.0,
                1.0,
                640,
                rng,
            )
        )
    for epoch in range(1, 21):
        share = 0.285 + 0.715 / (1 + math.exp((epoch - 8) / 1.8))
        lines.append(
            _epoch(
                "masks",
                epoch,
                0.7 + 0.35 * (1 - share),
                91.4 - 5.2 * (1 - share),
                share,
                share * 0.98,
                560 / (0.4 + 0.6 * share),
                rng,
            )
        )
    for epoch in range(1, 21):
        top1 = 91.2 - 4.2 * math.exp(-epoch / 3)
        lines.append(
            _epoch(
                "finetune",
                epoch,
                0.66 + 0.25 * math.exp(-epoch / 4),
                top1,
                0.2886,
                0.289,
                1480,
                rng,
            )
        )
    return lines


def _epoch(
    phase: str,
    epoch: int,
    loss: float,
    top1: float,
    params: float,
    macs: float,
    speed: float,
    rng: Any,
) -> dict[str, Any]:
    return {
        "phase": phase,
        "epoch": epoch,
        "loss": loss + 0.008 * rng.standard_normal(),
        "train_top1": top1 - 1.5 + 0.15 * rng.standard_normal(),
        "val_top1": top1 + 0.18 * rng.standard_normal(),
        "params": round(803_466 * params),
        "macs": round(40_141_312 * macs),
        "images_per_s": speed * (1 + 0.02 * rng.standard_normal()),
        "loader_share": 0.03,
        "lr": 1e-3,
        "seconds": 54_000 / speed,
    }


def write_run(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write the sample run without some files; `changes` replace keys of report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "report.json": json.dumps({**report(), **changes}),
        "kept.json": json.dumps(kept()),
        "history.jsonl": "".join(f"{json.dumps(line)}\n" for line in history()),
        "recipe.toml": RECIPE,
    }
    for name, content in files.items():
        if name not in without:
            (folder / name).write_text(content, encoding="utf-8")
    return folder
