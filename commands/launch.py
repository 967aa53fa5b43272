"""`vitrim run --processes N`: the command in several processes, started by accelerate."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Set for the processes that this module starts.
_STARTED = "VITRIM_PROCESSES"
# Where torchrun expects the error of a process.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
INTERRUPTED = 130


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run a vitrim command in several processes of this machine, and wait for them.

    Args:
        processes: Their number, at least 2.
        arguments: The command and its options, without `--processes`.

    Returns:
        The exit code of the command: 0, or that of the process that failed first, whose error is
        printed as one line; 1 after a process was killed, 130 after Ctrl-C.

    Raises:
        InputError: accelerate is not installed.
    """
    from ..compress.train.processes import require_accelerate

    require_accelerate("--processes")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = max(1, (os.cpu_count() or 1) // processes)
    options = [
        *("--multi_gpu", "--num_machines", "1", "--num_processes", str(processes)),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        # The first port that is free.
        *("--main_process_port", "0", "--num_cpu_threads_per_process", str(threads)),
    ]
    os.environ[_STARTED] = str(processes)
    # Of its warnings in C++, none is about the user's input.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Its reports of a failure are several lines each.
    logging.disable(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args([*options, "-m", "vitrim", *arguments]))
    except ChildFailedError as error:
        return _report(error.failures, processes, arguments)
    except (KeyboardInterrupt, SignalException):
        return INTERRUPTED
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[_STARTED]
    return 0


def _report(failures: Mapping[int, Any], processes: int, arguments: Sequence[str]) -> int:
    """Print the first failure in one line, and return the exit code."""
    by_time = sorted(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    # A process whose partner was killed fails too, and may be noticed first.
    killed = [item for item in by_time if item[1].exitcode < 0 and not _was_stopped(item[1])]
    rank, failure = (killed or by_time)[0]
    if failure.exitcode == INTERRUPTED:
        return INTERRUPTED
    if failure.exitcode >= 0 and isinstance(failure.message, str) and failure.message:
        print(f"vitrim: {failure.message}", file=sys.stderr)
        return int(failure.exitcode)
    name = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    resumed = [word for word in arguments if word not in ("--resume", "--overwrite")]
    again = " ".join([*resumed, "--processes", str(processes), "--resume"])
    print(
        f"vitrim: process {rank} of {processes} ended ({name}), and the others were stopped; "
        f"continue with: vitrim {again}",
        file=sys.stderr,
    )
    return 1


def _was_stopped(failure: Any) -> bool:
    """Whether the launcher ended a process because of another one."""
    return bool(failure.exitcode == -signal.SIGTERM)


def passed_to_launcher(line: str) -> bool:
    """Pass an error line to `launch` if it started this process; it prints the first one."""
    if _STARTED not in os.environ or _ERROR_FILE not in os.environ:
        return False
    content = {"message": line, "timestamp": int(time.time())}
    Path(os.environ[_ERROR_FILE]).write_text(json.dumps(content), encoding="utf-8")
    return True
