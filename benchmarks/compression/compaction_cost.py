"""Cost of compacting ViT-B, L and H to half, by vitrim and by Torch-Pruning's own recipe.

`python -m benchmarks.compression.compaction_cost` runs each tool on each model in a process of its
own, on one thread, the tools taking turns. `cpu_s` and `wall_s` are of the compaction alone (for
Torch-Pruning: building its pruner, which traces the model, and pruning). `peak_of_model` is the
peak memory of the process during compaction, above what it had without the model, in multiples of
the model's own bytes: 1 is the model itself. Writes `results/compaction_cost.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from torch import nn
from vitrim import StructuredMask, compact
from vitrim.bench.local.environment import read_machine

from ..results_file import RESULTS, save_result

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
TOOLS = ("vitrim", "torch-pruning")
LIMIT_S = 3600
# What the peer's recipe removes: heads, FFN and embedding at half, the heads' widths unchanged.
HALF = {"embed": 0.5, "head": 0.5, "ffn": 0.5}


def main() -> None:
    """Run the pairs, print a table, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--repeat", type=int, default=1, help="turns; the fastest counts")
    parser.add_argument("--json", type=Path, default=RESULTS / "compaction_cost.json")
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.models[0])))
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        turns = [{tool: _child(tool, name) for tool in TOOLS} for _ in range(arguments.repeat)]
        best = {
            tool: min((turn[tool] for turn in turns), key=lambda row: row.get("cpu_s", LIMIT_S))
            for tool in TOOLS
        }
        rows += best.values()
        for tool in TOOLS:
            print(f"{name:24s} {tool:14s} {_text(best[tool])}", flush=True)
        ours, theirs = best["vitrim"], best["torch-pruning"]
        if "cpu_s" in ours and "cpu_s" in theirs:
            factor = theirs["cpu_s"] / ours["cpu_s"]
            print(f"{name:24s} vitrim is {factor:.0f} x faster", flush=True)
        result = {
            "schema": "vitrim.compaction-cost/1",
            "command": "python -m benchmarks.compression.compaction_cost",
            "machine": _machine(),
            "rows": rows,
        }
        save_result(arguments.json, result)


def _machine() -> str:
    machine = read_machine()
    virtual = " of a virtual machine" if machine["virtual_machine"] else ""
    return f"{machine['cpu_model']}, {machine['cores']} cores{virtual}, one thread"


def measure(tool: str, name: str) -> dict[str, Any]:
    """Compact one model by one tool in this process."""
    torch.set_num_threads(1)
    if tool == "torch-pruning":
        from ..coverage.torch_pruning_recipe import prune_half
    process = psutil.Process()
    # Libraries are loaded before the model, so that they are not counted as its memory.
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))
    without_model = process.memory_info().rss
    model = _filled(name)
    tensors = model.state_dict().values()
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    inputs = torch.randn(1, 3, 224, 224)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    wall, cpu = time.perf_counter(), time.process_time()
    pruned = model
    if tool == "vitrim":
        pruned = compact(model, StructuredMask.random(model, HALF, "residual"))
    else:
        prune_half(model, inputs)
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    peak = _peak_rss_bytes() - without_model
    return {
        "model": name,
        "tool": tool,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "model_bytes": model_bytes,
        "peak_rss_bytes": peak,
        "peak_of_model": peak / model_bytes,
        "parameters": sum(parameter.numel() for parameter in pruned.parameters()),
    }


def _filled(name: str) -> nn.Module:
    """A timm model with constants for weights, which are quicker than random numbers."""
    with torch.device("meta"):
        empty = timm.create_model(name)
    model: nn.Module = empty.to_empty(device="cpu").eval()
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(0.001 * (number % 7 + 1))
    return model


def _peak_rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _child(tool: str, name: str) -> dict[str, Any]:
    module = "benchmarks.compression.compaction_cost"
    command = [sys.executable, "-m", module, "--child", tool, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except subprocess.TimeoutExpired:
        return {"model": name, "tool": tool, "failed": f"no result within {LIMIT_S} s"}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit {error.returncode}"]
        return {"model": name, "tool": tool, "failed": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _text(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    memory = f"{row['peak_of_model']:.2f} x the model ({row['peak_rss_bytes'] / 1e6:.0f} MB)"
    times = f"{row['cpu_s']:8.2f} s CPU  {row['wall_s']:8.2f} s wall"
    return f"{times}  {memory}  {row['parameters'] / 1e6:.1f} M left"


if __name__ == "__main__":
    main()
