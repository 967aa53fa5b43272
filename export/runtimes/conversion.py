"""Conversion in another Python process: the running interpreter, or VITRIM_PYTHON_<RUNTIME>.

Some converters need packages that conflict with vitrim's torch, and run in a separate Python.

`<runtime>_runtime.py` is run there as a script, with one argument of JSON: {"vitrim": folder of
this package, "model": folder of a saved model, "out": folder, "precision", "batch", "shape",
"outputs": names, empty for the logits alone}. It writes into `out` and prints one last line of
JSON: {"versions": {...}} or {"error": "one line"}.
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
from .limits import SELECTIONS, UNREAD_MODELS, Limit
from .runtime import RuntimeFiles, Source, missing_module

PACKAGE = Path(__file__).resolve().parents[2]
LIMIT_S = 3600


@dataclass
class SubprocessRuntime:
    """A runtime whose converter reads the torch module, in another process.

    int8 quantizes weights to eight bits with one scale a channel, and activations dynamically.

    Attributes:
        module: What must be importable in that process.
        script: The file that is run there.
        main: The file that the converter writes.
    """

    name: str
    extra: str
    module: str
    script: str
    main: str
    precisions: tuple[str, ...] = ("fp32", "int8")
    options: tuple[str, ...] = ()
    dynamic_batch: bool = False
    form: Form | None = None
    # Their kernels for TopK have not been verified.
    limits: tuple[Limit, ...] = (UNREAD_MODELS, SELECTIONS)

    def missing(self) -> str | None:
        """Why the runtime cannot be used, in the interpreter that the environment names or here."""
        variable = interpreter_variable(self.name)
        try:
            named = interpreter(self.name)
        except EngineError as error:
            return str(error)
        if named is None:
            reason = missing_module(self.name, self.extra, self.module)
            return reason and f"{reason}, here or in a Python that {variable} names"
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({self.module!r}) is None)"
        if subprocess.run([named, "-c", code], check=False).returncode == 0:
            return None
        return (
            f"runtime {self.name!r}: the Python of {variable} has no {self.module}; "
            f"install vitrim[{self.extra}] there"
        )

    def write(self, source: Source, folder: Path) -> RuntimeFiles:
        """Convert the source; see `Runtime.write`."""
        return RuntimeFiles(self.main, versions=self._convert(source, folder)["versions"])

    def _convert(self, source: Source, folder: Path) -> dict[str, Any]:
        """Run the script on the source, and return its line of JSON."""
        with tempfile.TemporaryDirectory(prefix=f"vitrim-{self.name}-") as temporary:
            saved = Path(temporary) / "model"
            save(source.inference_model(self.name), saved)
            job = {
                "vitrim": str(PACKAGE),
                "model": str(saved),
                "out": str(folder.resolve()),
                "precision": source.precision,
                "batch": source.batch,
                "shape": list(source.shape),
                "outputs": [output.name for output in source.outputs],
            }
            try:
                done = subprocess.run(
                    [interpreter(self.name) or sys.executable, self.script, json.dumps(job)],
                    capture_output=True,
                    timeout=LIMIT_S,
                    check=False,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                )
            except subprocess.TimeoutExpired:
                raise InputError(
                    f"runtime {self.name}: the conversion took longer than {LIMIT_S} s "
                    "and was stopped; export a smaller model"
                ) from None
        try:
            result: dict[str, Any] = json.loads(
                done.stdout.decode(errors="replace").strip().splitlines()[-1]
            )
        except (ValueError, IndexError):
            output = " ".join(done.stderr.decode(errors="replace").split())[-300:]
            raise InputError(
                f"runtime {self.name}: the converter ended with {done.returncode} "
                f"({output or 'no error output'})"
            ) from None
        if "error" in result:
            raise InputError(f"runtime {self.name}: {result['error']}")
        return result
