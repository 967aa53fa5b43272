"""Processes that begin with torch and vitrim imported: forks of one that has computed nothing.

An import of torch takes seconds, and tests that kill a process are about what it leaves behind.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["timm", "vitrim.pipeline.run", "vitrim.cli", "vitrim.commands.run"])


class Running:
    """A process, with the names that `subprocess.Popen` has for its state."""

    def __init__(self, process: Any, output: Path, errors: Path) -> None:
        self._process, self._output, self._errors = process, output, errors

    @property
    def pid(self) -> int:
        """The number of the process."""
        number: int = self._process.pid
        return number

    def poll(self) -> int | None:
        """Return the exit code; negative: the signal that ended it; None: it runs."""
        code: int | None = self._process.exitcode
        return code

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, sign)

    def wait_until(self, ready: Callable[[], bool], limit_s: float = 400.0) -> None:
        """Wait for something that the process does; fail if it ends, or takes too long."""
        deadline = time.monotonic() + limit_s
        while not ready():
            assert self.poll() is None, self.errors()
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.005)

    def wait(self, limit_s: float = 400.0) -> int:
        """Wait for the end and return the exit code."""
        self._process.join(limit_s)
        code = self.poll()
        assert code is not None, f"it still runs after {limit_s:.0f} s"
        return code

    def output(self) -> str:
        """What was written to standard output so far."""
        return self._output.read_text(encoding="utf-8")

    def errors(self) -> str:
        """What was written to standard error so far."""
        return self._errors.read_text(encoding="utf-8")


def start(function: Callable[..., object], *arguments: object, log: Path) -> Running:
    """Call a function of a test module in a new process, with this one's environment and folder.

    Args:
        function: A function at the top level of its module.
        *arguments: What can be pickled.
        log: Without ending, the files that get what the process writes.
    """
    output, errors = (log.with_name(f"{log.name}.{ending}") for ending in ("out", "err"))
    place = (sys.modules[function.__module__].__file__, function.__name__)
    before = os.environ.get("OMP_NUM_THREADS")
    # The process that is forked starts here, unless it runs.
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        process = _FORKS.Process(
            target=_call,
            args=(place, arguments, (output, errors), dict(os.environ), Path.cwd()),
        )
        process.start()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return Running(process, output, errors)


def start_vitrim(*arguments: object, log: Path) -> Running:
    """Start the command line with arguments; see `start`."""
    return start(_command_line, [str(argument) for argument in arguments], log=log)


def _command_line(arguments: list[str]) -> None:
    from vitrim.cli import call

    raise SystemExit(call(arguments))


def _call(
    place: tuple[str, str],
    arguments: tuple[object, ...],
    files: tuple[Path, Path],
    environment: dict[str, str],
    folder: Path,
) -> None:
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    # As in any other process of this system; workers of a loader notice the end of their parent.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # A shell that starts the tests in the background makes children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path, name = place
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_in_a_process", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    getattr(module, name)(*arguments)
