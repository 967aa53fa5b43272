"""Token masks on all of timm's plain Vision Transformers, by ONNX Runtime and by our TVM kernels.

`python -m benchmarks.coverage.tokens` does for each name what `graph_forms --tokens` and
`tvm_kernels` do, and writes their files, `graph_forms_tokens.json` and `tvm_kernels_tokens.json`.
The same command resumes; `--minutes 60` does an hour's part of it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from vitrim.targets.catalog import load_target

from ..results_file import RESULTS
from . import graph_forms, tvm_kernels
from .result_rows import coverage_rows, parsed


def main() -> None:
    """Print a line a name and runtime, and the sums, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the files are")
    arguments, profile = parsed(parser), load_target("host")
    coverage_rows(
        arguments.names,
        partial(graph_forms.examine, tokens=True),
        arguments.folder / "graph_forms_tokens.json",
        graph_forms.settings(tokens=True),
        again=arguments.again,
        until=arguments.until,
    )
    coverage_rows(
        arguments.names,
        partial(tvm_kernels.examine, profile=profile),
        arguments.folder / "tvm_kernels_tokens.json",
        tvm_kernels.settings(profile),
        again=arguments.again,
        until=arguments.until,
    )


if __name__ == "__main__":
    main()
