"""What it costs to compact ViT-B, L and H at half, against Torch-Pruning's own recipe: `python -m
benchmarks.compression.compaction_cost`.

Each tool cuts each model in a process of its own, one thread, the tools taking turns. `cpu_s` and
`wall_s` are of the compaction alone (for Torch-Pruning: building its pruner, which traces the
model, and pruning). `peak_of_model` is the highest memory of the process during compaction, above
what it had without the model, in multiples of the model's own bytes: 1 is the model that is there
anyway.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
TOOLS = ("vitrim", "torch-pruning")
LIMIT_S = 3600


def main() -> None:
    """Run the pairs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--repeat", type=int, default=1, help="turns; the fastest counts")
    parser.add_argument("--json", type=Path, default=Path("compaction_cost.json"))
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.models[0])))
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(arguments.repeat):
            for tool in TOOLS:
                found = _child(tool, name)
                if (
                    "cpu_s" not in best.get(tool, {})
                    or found.get("cpu_s", float("inf")) < best[tool]["cpu_s"]
                ):
                    best[tool] = found
        rows += best.values()
        for tool in TOOLS:
            print(f"{name:24s} {tool:14s} {_told(best[tool])}", flush=True)
        ours, theirs = best["vitrim"], best["torch-pruning"]
        if "cpu_s" in ours and "cpu_s" in theirs:
            print(
                f"{name:24s} vitrim is {theirs['cpu_s'] / ours['cpu_s']:.0f} x faster", flush=True
            )
        arguments.json.write_text(
            json.dumps({"schema": "vitrim.compaction-cost/1", "rows": rows}, indent=1) + "\n"
        )


def measure(tool: str, name: str) -> dict[str, Any]:
    """Cut one model with one tool in this process."""
    import psutil
    import timm
    import torch
    from torch import nn

    torch.set_num_threads(1)
    if tool == "vitrim":
        from vitrim import StructuredMask, compact
    else:
        from ..coverage.torch_pruning_recipe import prune_half

    process = psutil.Process()
    # Loaded before the model, so that libraries are not counted as its memory.
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))
    without_model = process.memory_info().rss
    with torch.device("meta"):
        empty = timm.create_model(name)
    model: nn.Module = empty.to_empty(device="cpu").eval()
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(0.001 * (number % 7 + 1))
    model_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()
    )
    inputs = torch.randn(1, 3, 224, 224)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    wall, cpu = time.perf_counter(), time.process_time()
    if tool == "vitrim":
        parameters = sum(
            p.numel()
            for p in compact(model, StructuredMask.random(model, HALF, "residual")).parameters()
        )
    else:
        prune_half(model, inputs)
        parameters = sum(p.numel() for p in model.parameters())
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return {
        "model": name,
        "tool": tool,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "model_bytes": model_bytes,
        "peak_rss_bytes": peak - without_model,
        "peak_of_model": (peak - without_model) / model_bytes,
        "parameters": parameters,
    }


# What the peer's recipe cuts: heads, FFN and embedding at half, the heads' widths left alone.
HALF = {"embed": 0.5, "head": 0.5, "ffn": 0.5}


def _child(tool: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compression.compaction_cost", "--child", tool, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except subprocess.TimeoutExpired:
        return {"model": name, "tool": tool, "failed": f"no answer within {LIMIT_S} s"}
    except subprocess.CalledProcessError as error:
        return {
            "model": name,
            "tool": tool,
            "failed": error.stderr.strip().splitlines()[-1]
            if error.stderr.strip()
            else f"exit {error.returncode}",
        }
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _told(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    megabytes = row["peak_rss_bytes"] / 1e6
    times = f"{row['cpu_s']:8.2f} s CPU  {row['wall_s']:8.2f} s wall"
    return f"{times}  {row['peak_of_model']:.2f} x the model ({megabytes:.0f} MB)  {row['parameters'] / 1e6:.1f} M left"


if __name__ == "__main__":
    main()
