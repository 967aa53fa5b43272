"""Which of timm's plain Vision Transformers our TVM kernels compute exactly, cut by token masks.

`python -m benchmarks.coverage.tvm_kernels` builds every name small (`small_models`), cuts it by
random token masks (of patches, of patches and widths, and of patches and learned tokens that the
head does not read), compiles the result for this machine and compares its outputs for two images
with torch's. A name is *exact* if the outputs of all masks differ by less than 2e-5 of the largest
value, *uncovered* if no kernel of ours computes a part (TVM's ONNX front end compiles such a
network), *wrong* otherwise. Writes `results/tvm_kernels_tokens.json`, and resumes there.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import tvm
from tvm import relax
from vitrim import compact, lift
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.parity import relative_error
from vitrim.export.tvm_kernels.build import build_network
from vitrim.export.tvm_kernels.coverage import uncovered_part
from vitrim.targets.catalog import load_target
from vitrim.targets.profile import TargetProfile

from ..results_file import RESULTS
from .graph_forms import LEARNED, MASKS, TOLERANCE, masks
from .result_rows import Row, coverage_rows, parsed
from .small_models import small


def examine(name: str, profile: TargetProfile) -> Row:
    """Examine one name."""
    row = Row(name)
    try:
        lifted = lift(small(name))
        part = uncovered_part(lifted.architecture)
        if part is not None:
            row.result, row.reason = "uncovered", part
        else:
            for label, mask in masks(lifted.architecture, tokens=True):
                row.add_error(label, error_of(compact(lifted, mask).eval(), profile))
                row.graphs += 1
            row.result = "exact" if row.error <= TOLERANCE else "wrong"
    except Exception as error:  # any failure is a finding
        row.result, row.reason = "wrong", f"{type(error).__name__}: {error}"
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
    parser.add_argument("--json", type=Path, default=RESULTS / "tvm_kernels_tokens.json")
    arguments, profile = parsed(parser), load_target("host")
    coverage_rows(
        arguments.names,
        partial(examine, profile=profile),
        arguments.json,
        settings(profile),
        again=arguments.again,
        until=arguments.until,
    )


def settings(profile: TargetProfile) -> dict[str, object]:
    """What the rows depend on."""
    features = sorted(profile.features)
    return {"masks": MASKS[True], "learned": LEARNED, "features": features}


if __name__ == "__main__":
    main()
