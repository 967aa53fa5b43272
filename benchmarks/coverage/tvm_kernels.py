"""Which of timm's plain Vision Transformers our TVM kernels compute exactly, cut by token masks.

`python -m benchmarks.coverage.tvm_kernels` builds every name small (`small_models`), cuts it by a
random token mask, alone and together with widths, compiles the result for this machine and compares
its outputs for two images with torch's. A name is *exact* if the outputs of both masks differ by
less than 2e-5 of the largest value, *uncovered* if no kernel of ours computes a part (TVM's ONNX
front end compiles such a network), *wrong* otherwise. Writes `results/tvm_kernels_tokens.json`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tvm
from tvm import relax
from vitrim import StructuredMask, compact, lift
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.parity import relative_error
from vitrim.export.tvm_kernels.build import build_network
from vitrim.export.tvm_kernels.coverage import uncovered_part
from vitrim.targets.catalog import load_target
from vitrim.targets.profile import TargetProfile

from ..results_file import RESULTS, save_result
from .graph_forms import MASKS, TOLERANCE
from .small_models import names, small


@dataclass
class Row:
    """One name."""

    name: str
    result: str = "exact"
    reason: str = ""
    error: float = 0.0
    seconds: float = 0.0


def examine(name: str, profile: TargetProfile) -> Row:
    """Examine one name."""
    start, row = time.perf_counter(), Row(name)
    try:
        lifted = lift(small(name))
        part = uncovered_part(lifted.architecture)
        if part is not None:
            row.result, row.reason = "uncovered", part
        else:
            for seed, settings in enumerate(MASKS[True]):
                mask = StructuredMask.random(lifted, seed=seed, **settings)
                error = error_of(compact(lifted, mask).eval(), profile)
                row.error = max(row.error, error if error == error else float("inf"))
            row.result = "exact" if row.error <= TOLERANCE else "wrong"
    except Exception as error:  # any failure is a finding
        row.result, row.reason = "wrong", f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - start
    return row


def error_of(model: CompactModel, profile: TargetProfile) -> float:
    """The largest error of the compiled network, relative to torch's largest output."""
    images = torch.randn(2, *model.architecture.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).numpy()
    compiled = build_network(model, profile, batch=2).compile()
    main = relax.VirtualMachine(compiled, tvm.cpu())["main"]
    found = main(tvm.runtime.tensor(images.numpy())).numpy()
    return float(relative_error(expected, found).max())


def main() -> None:
    """Print a line a name and the sums, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names to examine (default: all)")
    parser.add_argument("--json", type=Path, default=RESULTS / "tvm_kernels_tokens.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    profile, rows = load_target("host"), []
    for name in arguments.names or names():
        row = examine(name, profile)
        rows.append(row)
        content = {"schema": "vitrim.tvm_kernels/1", "rows": [asdict(row) for row in rows]}
        save_result(arguments.json, content)
        print(
            f"{row.name:52s} {row.result:9s} {row.error:.1e} ({row.seconds:.1f} s) "
            f"{row.reason[:100]}",
            flush=True,
        )
    print(dict(Counter(row.result for row in rows)), "of", len(rows))


if __name__ == "__main__":
    main()
