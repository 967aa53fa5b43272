"""Fixed cost of a sub-layer, however small: `python -m benchmarks.compression.sublayer_cost`.

Copies of a small network with and without one sub-layer of the least width run interleaved in ONNX
Runtime fp32 at batch 1. The difference, less the time of its few multiply-adds at the dense
network's rate, is the fixed cost: starting operators, the norm, the softmax. Multiplied by that
rate it is `masks.attention_overhead_macs` and `masks.ffn_overhead_macs` of a recipe.

    python -m benchmarks.compression.sublayer_cost [--threads 1] [--limit-s 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import onnxruntime
import torch
import vitrim
from vitrim.bench.local.environment import read_machine, read_state
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.sessions import open_session

from ..models import computed_macs, lifted, noise
from ..results_file import save_result
from ..speed.graph_sessions import call_of
from ..turns import in_turns, least, until

# Blocks 1 and 2 of four: the forms treat the first and the last attention differently.
SUBLAYERS = {
    "attention": ("blocks.1.attn", "blocks.2.attn"),
    "ffn": ("blocks.1.ffn", "blocks.2.ffn"),
}


def models() -> dict[str, CompactModel]:
    """The dense network, one with sub-layers of the least width, and one without each kind."""
    dense = lifted("demo")
    narrow: dict[str, dict[str, torch.Tensor]] = {"qk": {}, "v": {}, "ffn": {}}
    for name in SUBLAYERS["attention"]:
        narrow["qk"][name] = narrow["v"][name] = torch.arange(32) < 4
    for name in SUBLAYERS["ffn"]:
        narrow["ffn"][name] = torch.arange(512) < 16
    masks = {"least": vitrim.StructuredMask(narrow)}
    for kind, names in SUBLAYERS.items():
        removed = {name: torch.zeros(1, dtype=torch.bool) for name in names}
        masks[f"no {kind}"] = vitrim.StructuredMask({**narrow, "block": removed})
    cuts = {name: vitrim.compact(dense, mask).eval() for name, mask in masks.items()}
    return {"dense": dense, **cuts}


def measure(built: dict[str, CompactModel], threads: int, limit_s: float) -> dict[str, list[float]]:
    """Latencies in seconds, one a round for each network."""
    form, image = best_form("x86-64-v4-vnni", 1)[0], noise(built["dense"])
    calls = {}
    for name, model in built.items():
        content = write_network(model, form).SerializeToString()
        calls[name] = call_of(open_session(content, threads=threads), image)
    return least(in_turns(calls, until(limit_s)))


def main() -> int:
    """Measure, and print the costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    built = models()
    samples = measure(built, options.threads, options.limit_s)
    macs = {name: computed_macs(model) for name, model in built.items()}
    # The rate of the wide sub-layers, their own fixed costs included: a lower bound of the rate,
    # and so of the costs.
    dense_s, least_s = (statistics.median(samples[name]) for name in ("dense", "least"))
    macs_per_s = (macs["dense"] - macs["least"]) / (dense_s - least_s)
    machine, state = read_machine(), read_state()
    print(
        f"{machine.get('cpu_model')}, {state.get('busy_cores')} busy with other work, "
        f"onnxruntime {onnxruntime.__version__}, {options.threads} thread(s)"
    )
    print(f"{macs_per_s / 1e9:.1f} G multiply-adds a second")
    figures = {"macs_per_s": macs_per_s}
    for kind, names in SUBLAYERS.items():
        pairs = zip(samples["least"], samples[f"no {kind}"], strict=True)
        differences = [(present - absent) / len(names) for present, absent in pairs]
        computed_s = (macs["least"] - macs[f"no {kind}"]) / len(names) / macs_per_s
        quartiles = statistics.quantiles(differences, n=4)
        low, fixed_s, high = (value - computed_s for value in quartiles)
        fixed_macs = fixed_s * macs_per_s
        figures |= {f"{kind}_s": fixed_s, f"{kind}_macs": fixed_macs}
        print(
            f"{kind}: {1e6 * fixed_s:.1f} µs ({1e6 * low:.1f} - {1e6 * high:.1f}), "
            f"as long as {fixed_macs / 1e6:.2f} M multiply-adds"
        )
    if options.json:
        save_result(options.json, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
