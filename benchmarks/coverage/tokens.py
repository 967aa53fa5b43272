"""Token masks on all of timm's plain Vision Transformers, by ONNX Runtime and by our TVM kernels.

`python -m benchmarks.coverage.tokens` does for each name what `graph_forms --tokens` and
`tvm_kernels` do, and writes their files, `graph_forms_tokens.json` and `tvm_kernels_tokens.json`.
The same command resumes; `--minutes 60` does an hour's part of it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from vitrim.targets.catalog import load_target

from ..results_file import RESULTS
from . import graph_forms, tvm_kernels
from .result_rows import add_arguments, coverage_rows
from .small_models import names


def main() -> None:
    """Print a line a name and runtime, and the sums, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the files are")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    minutes, profile = arguments.minutes, load_target("host")
    until = None if minutes is None else time.monotonic() + 60 * minutes
    wanted = arguments.names or names()
    coverage_rows(
        wanted,
        partial(graph_forms.examine, tokens=True),
        arguments.folder / "graph_forms_tokens.json",
        graph_forms.settings(tokens=True),
        again=arguments.again,
        until=until,
    )
    coverage_rows(
        wanted,
        partial(tvm_kernels.examine, profile=profile),
        arguments.folder / "tvm_kernels_tokens.json",
        tvm_kernels.settings(profile),
        again=arguments.again,
        until=until,
    )


if __name__ == "__main__":
    main()
