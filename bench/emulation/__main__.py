"""`python -m vitrim.bench.emulation`: prepare the running of aarch64 programs, as `vitrim targets
emulate` does.
"""

from __future__ import annotations

import argparse
import sys

from ...core.errors import InputError
from .preparation import RUNTIMES, prepare
from ..local.progress import step_lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vitrim.bench.emulation",
        description="Prepare what runs aarch64 programs on this machine.",
    )
    parser.add_argument(
        "--runtime",
        action="append",
        choices=sorted(RUNTIMES),
        help="an aarch64 runtime to have in it; may be given again",
    )
    options = parser.parse_args()
    try:
        found = prepare(step_lines(sys.stderr), runtimes=options.runtime or ["onnxruntime"])
    except InputError as error:
        sys.stderr.write(f"vitrim: {error}\n")
        return 2
    print(
        f"{found.name}: "
        + ", ".join(f"{name} {version}" for name, version in found.versions.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
