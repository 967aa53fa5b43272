"""What a live sub-layer costs however small it is: `python -m benchmarks.compression.sublayer_cost`.

Copies of a small network with and without one sub-layer of the least width run interleaved in ONNX
Runtime fp32 at batch 1; the difference, less the time of its few multiply-adds at the dense
network's rate, is the fixed cost: starting operators, the norm, the softmax. Divided by that rate
it is the `masks.attention_overhead_macs` and `masks.ffn_overhead_macs` of a recipe.

    python -m benchmarks.compression.sublayer_cost [--threads 1] [--limit-s 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
import vitrim
from vitrim.bench.local.environment import read_machine, read_state
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import write_network
from vitrim.export.graphs.known_forms import best_form
from vitrim.export.sessions import open_session

from ..speed.proportionality import DEMO, computed_macs

# Blocks 1 and 2 of four, so that neither the first nor the last attention, which the forms treat
# apart, is looked at.
LOOKED_AT = {
    "attention": ("blocks.1.attn", "blocks.2.attn"),
    "ffn": ("blocks.1.ffn", "blocks.2.ffn"),
}


def models() -> dict[str, CompactModel]:
    """The dense network, one whose looked-at sub-layers are least, and one for each kind that is
    without them; only shapes matter.
    """
    torch.manual_seed(0)
    dense = vitrim.lift(timm.create_model("vit_tiny_patch16_224", **DEMO).eval())
    least: dict[str, dict[str, torch.Tensor]] = {"qk": {}, "v": {}, "ffn": {}}
    for name in LOOKED_AT["attention"]:
        least["qk"][name] = least["v"][name] = torch.arange(32) < 4
    for name in LOOKED_AT["ffn"]:
        least["ffn"][name] = torch.arange(512) < 16
    found = {"dense": dense, "least": vitrim.compact(dense, vitrim.StructuredMask(least)).eval()}
    for kind, names in LOOKED_AT.items():
        gone = {name: torch.zeros(1, dtype=torch.bool) for name in names}
        found[f"no {kind}"] = vitrim.compact(
            dense, vitrim.StructuredMask({**least, "block": gone})
        ).eval()
    return found


def measure(built: dict[str, CompactModel], threads: int, limit_s: float) -> dict[str, list[float]]:
    """Latencies in seconds, one a round and network; each the least of three runs after one that
    brings the caches back.
    """
    form = best_form("x86-64", 1)[0]
    image = np.random.default_rng(0).standard_normal(
        (1, *built["dense"].architecture.image), dtype=np.float32
    )
    sessions = {
        name: open_session(write_network(model, form).SerializeToString(), threads=threads)
        for name, model in built.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    names, start, rounds = list(sessions), time.perf_counter(), 0
    while rounds < 10 or time.perf_counter() - start < limit_s:
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            sessions[name].run(None, {"images": image})
            timed = []
            for _ in range(3):
                before = time.perf_counter()
                sessions[name].run(None, {"images": image})
                timed.append(time.perf_counter() - before)
            samples[name].append(min(timed))
        rounds += 1
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    built = models()
    samples = measure(built, options.threads, options.limit_s)
    macs = {name: computed_macs(model) for name, model in built.items()}
    # The rate of what is large in the dense network, with its own fixed costs taken as they are: a
    # lower bound of the rate, so of the answer too.
    macs_per_s = (macs["dense"] - macs["least"]) / (
        statistics.median(samples["dense"]) - statistics.median(samples["least"])
    )
    machine, state = read_machine(), read_state()
    print(
        f"{machine.get('cpu_model')}, busy beside us {state.get('busy_cores')}, onnxruntime {onnxruntime.__version__}, {options.threads} thread(s)"
    )
    print(f"{macs_per_s / 1e9:.1f} G multiply-adds a second")
    figures = {"macs_per_s": macs_per_s}
    for kind, names in LOOKED_AT.items():
        differences = [
            (one - other) / len(names)
            for one, other in zip(samples["least"], samples[f"no {kind}"], strict=True)
        ]
        low, fixed_s, high = (
            value - (macs["least"] - macs[f"no {kind}"]) / len(names) / macs_per_s
            for value in statistics.quantiles(differences, n=4)
        )
        figures |= {f"{kind}_s": fixed_s, f"{kind}_macs": fixed_s * macs_per_s}
        print(
            f"{kind}: {1e6 * fixed_s:.1f} µs ({1e6 * low:.1f} - {1e6 * high:.1f}), as long as {fixed_s * macs_per_s / 1e6:.2f} M multiply-adds"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
