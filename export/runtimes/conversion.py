"""A converter in a process of its own: in this Python, or in the one that VITRIM_PYTHON_<RUNTIME>
names for packages that suit no other torch.

The converter is a file that is run with one argument, JSON: {"vitrim": folder of this package,
"model": folder of a saved model, "out": folder, "precision", "batch", "shape"}. It writes into
`out` and prints one last line of JSON: {"versions": {...}} or {"error": "one line"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compress.network.files import save
from ...core.errors import InputError
from ...runtimes import EngineError
from ...runtimes.subprocess_inference import interpreter, interpreter_variable
from ..forms import Form
from .installed import lacking
from .runtime import Source, Written
from .saved_source import for_inference

PACKAGE = Path(__file__).resolve().parents[2]
LIMIT_S = 3600


def lacking_here_or_there(runtime: str, extra: str, module: str) -> str | None:
    """Why a runtime cannot be used, in the Python that the user named for it or in this one."""
    try:
        named = interpreter(runtime)
    except EngineError as error:
        return str(error)
    if named is None:
        reason = lacking(runtime, extra, module)
        return reason and f"{reason}, here or in a Python that {interpreter_variable(runtime)} names"
    found = subprocess.run(
        [
            named,
            "-c",
            f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)",
        ],
        check=False,
    )
    return (
        None
        if found.returncode == 0
        else f"runtime {runtime!r}: the Python of {interpreter_variable(runtime)} has no {module}; install vitrim[{extra}] there"
    )


@dataclass
class ConvertedApart:
    """A runtime whose converter, `converter` of this folder, makes `main` of the torch module in a
    process of its own.

    module: what must be importable there. int8 has weights in eight bits, a scale a channel, and
    inputs quantized as they come.
    """

    name: str
    extra: str
    module: str
    converter: str
    main: str
    precisions: tuple[str, ...] = ("fp32", "int8")
    dynamic_batch: bool = False
    form: Form | None = None

    def missing(self) -> str | None:
        return lacking_here_or_there(self.name, self.extra, self.module)

    def write(self, source: Source, folder: Path) -> Written:
        if source.options:
            raise InputError(
                f"runtime {self.name}: has no options, and {', '.join(sorted(source.options))} was given; leave it out"
            )
        told = convert_apart(self.name, self.converter, source, folder)
        return Written(self.main, versions=told["versions"])


def convert_apart(runtime: str, converter: str, source: Source, folder: Path) -> dict[str, Any]:
    """Run a converter of this folder on the source; what it told. Errors: InputError, one line."""
    with tempfile.TemporaryDirectory(prefix=f"vitrim-{runtime}-") as aside:
        save(for_inference(source, runtime), Path(aside) / "model")
        asked = {
            "vitrim": str(PACKAGE),
            "model": str(Path(aside) / "model"),
            "out": str(folder.resolve()),
            "precision": source.precision,
            "batch": source.batch,
            "shape": list(source.shape),
        }
        try:
            done = subprocess.run(
                [
                    interpreter(runtime) or sys.executable,
                    str(Path(__file__).with_name(converter)),
                    json.dumps(asked),
                ],
                capture_output=True,
                timeout=LIMIT_S,
                check=False,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"runtime {runtime}: the conversion took longer than {LIMIT_S} s and was stopped; export a smaller model"
            ) from None
    try:
        told: dict[str, Any] = json.loads(
            done.stdout.decode(errors="replace").strip().splitlines()[-1]
        )
    except (ValueError, IndexError):
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise InputError(
            f"runtime {runtime}: the converter ended with {done.returncode} ({said or 'it said nothing'})"
        ) from None
    if "error" in told:
        raise InputError(f"runtime {runtime}: {told['error']}")
    return told
