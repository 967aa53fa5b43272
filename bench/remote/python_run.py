"""Measure on a device that has Python, in a run that is detached from the link.

Runner, engines and artifacts are copied to the device, and the samples come back. The folder on the
device is named after what is measured, so the same call after a lost link finds the run and waits
for it instead of starting another. The folder is removed once the samples have arrived.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.progress import Progress
from ...runtimes import requirement
from ..local.artifact_facts import ArtifactFacts
from ..local.options import DeviceOptions
from .device_link import DeviceLink, LinkLost, disk_full, is_disk_full, quote, size_bytes

# The files of bench/local that a device runs, next to the folder `runtimes`.
DEVICE_FILES = ("runner.py", "conductor.py", "environment.py", "energy.py")
PACKAGE = Path(__file__).parents[2]
RUNTIMES = PACKAGE / "runtimes"
MARGIN_BYTES = 1_000_000
# Whether the device was not restarted since a run began there, in the run's folder. Process ids are
# reused after a restart; the boot id shows one.
SAME_BOOT = '[ "$(cat boot)" = "$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)" ]'


@dataclass(frozen=True)
class Probe:
    """The state of a device before anything is sent.

    Attributes:
        machine: The output of `uname -m`.
        android: Whether it is an Android system.
        free_bytes: Free space; None where it is unknown.
        python: NOPYTHON, NORUNTIME (Python lacks a runtime or numpy) or READY.
    """

    machine: str
    android: bool
    free_bytes: int | None
    python: str

    @property
    def has_python(self) -> bool:
        """Whether the device has Python."""
        return self.python != "NOPYTHON"


def probe(link: DeviceLink, parent: str, python: str, runtimes: Sequence[str]) -> Probe:
    """Examine a device, and create the folder `parent` on it.

    Args:
        link: The link to the device.
        parent: The folder for runs on the device.
        python: The interpreter on the device.
        runtimes: The runtimes that it must be able to import.

    Raises:
        InputError: Its shell is not that of a Linux system.
    """
    program, folder = shlex.quote(python), quote(parent)
    modules = ", ".join(["sys", "numpy", *(requirement(runtime).module for runtime in runtimes)])
    check = f"import {modules}; assert sys.version_info >= (3, 9)"
    script = (
        f"umask 077; mkdir -p {folder} || exit 1; uname -m; "
        "if [ -e /system/bin/linker ]; then echo android; else echo linux; fi; "
        f"df -Pk {folder} | tail -n 1; "
        f"command -v {program} >/dev/null || {{ echo NOPYTHON; exit 0; }}; "
        f"{program} -c '{check}' >/dev/null 2>&1 && echo READY || echo NORUNTIME"
    )
    output = link.run(script).decode(errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if len(lines) < 3 or lines[-1] not in ("NOPYTHON", "NORUNTIME", "READY"):
        raise InputError(
            f"{link.label}: its shell does not behave like a Linux system's; "
            "log in by hand and look at what it prints"
        )
    columns = lines[2].split()
    free = int(columns[3]) * 1024 if len(columns) >= 4 and columns[3].isdigit() else None
    return Probe(lines[0], lines[1] == "android", free, lines[-1])


def require_space(link: DeviceLink, found: Probe, files: Mapping[str, Path | bytes]) -> None:
    """Raise InputError where the files do not fit on the device."""
    needed = sum(size_bytes(source) for source in files.values()) + MARGIN_BYTES
    if found.free_bytes is not None and found.free_bytes < needed:
        raise InputError(
            f"{link.label}: its disk is full: {found.free_bytes} bytes are free, {needed} are "
            "needed; free some space there, then measure again"
        )


def require_python(link: DeviceLink, found: Probe, python: str, runtimes: Sequence[str]) -> None:
    """Raise InputError with what to install, where Python or one of the runtimes is missing.

    Args:
        link: The link to the device.
        found: The state of the device.
        python: The interpreter on the device.
        runtimes: The runtimes that the artifacts need.
    """
    if not found.has_python:
        raise InputError(
            f"{link.label}: there is no {python}; "
            "install Python 3.9 or newer there, or name its path "
            "(--python; in a recipe bench.python)"
        )
    if found.python == "NORUNTIME":
        install = " ".join(requirement(runtime).install for runtime in runtimes)
        only_onnxruntime = tuple(runtimes) == ("onnxruntime",)
        native = "; or send the native runner (--runner native)" if only_onnxruntime else ""
        raise InputError(
            f"{link.label}: its {python} has no {', '.join(runtimes)} and numpy; "
            f"install them there: {python} -m pip install {install} numpy{native}"
        )


def run_on_device(
    link: DeviceLink,
    folder: str,
    files: Mapping[str, Path | bytes],
    options: DeviceOptions,
    progress: Progress,
    *,
    begun: bool,
) -> dict[str, Any]:
    """Run the plan in a folder on the device, which is removed at the end.

    Args:
        link: The link to the device.
        folder: The run's folder on the device.
        files: What the run needs, by its names in the folder.
        options: The interpreter, and how long to retry after a lost link.
        progress: Called with the share done (0 to 1) and a text.
        begun: Whether the run was started by an earlier call, and is only waited for.

    Returns:
        The conductor's raw result.

    Raises:
        LinkLost: The device did not respond for long. The run goes on there, and the same call
            returns its result.
        InputError: The run failed.
    """
    if not begun:
        link.copy(files, folder)
        _start(link, folder, options.python)
    try:
        raw = _wait(link, folder, options, progress)
    except KeyboardInterrupt:
        remove_run(link, folder)
        raise
    remove_run(link, folder)
    return raw


def files_to_send(
    plan: dict[str, Any], facts: Mapping[str, ArtifactFacts]
) -> dict[str, Path | bytes]:
    """Return all files of a run by their names on the device; the plan's paths become those."""
    files: dict[str, Path | bytes] = {
        name: PACKAGE / "bench" / "local" / name for name in DEVICE_FILES
    }
    files |= {f"runtimes/{file.name}": file for file in sorted(RUNTIMES.glob("*.py"))}
    files |= model_files(plan, facts)
    if plan["dataset"]:
        dataset = Path(plan["dataset"])
        if dataset.is_dir():
            files |= {f"dataset/{name}": dataset / name for name in ("images.npy", "labels.npy")}
            plan["dataset"] = "dataset"
        else:
            files["dataset.npz"] = dataset
            plan["dataset"] = "dataset.npz"
    files["plan.json"] = json.dumps(plan).encode()
    return files


def model_files(
    plan: dict[str, Any], facts: Mapping[str, ArtifactFacts]
) -> dict[str, Path | bytes]:
    """Return the artifacts' files by their names on the device; the plan's paths become those."""
    files: dict[str, Path | bytes] = {}
    # The buckets of one artifact have the same files.
    numbers: dict[Path, int] = {}
    for name, about in facts.items():
        number = numbers.setdefault(about.model, len(numbers))
        for file in about.files:
            files[f"model-{number}/{file.relative_to(about.root).as_posix()}"] = file
        model = about.model.relative_to(about.root).as_posix()
        # The interpreter of the job is one of this machine.
        plan["jobs"][name] |= {"python": None, "model": f"model-{number}/{model}"}
    return files


def run_name(link: DeviceLink, plan: dict[str, Any], facts: Mapping[str, ArtifactFacts]) -> str:
    """Return the folder's name, equal for the same artifacts, plan and device."""
    parts = [link.label, plan, {name: about.sha256 for name, about in facts.items()}]
    return "run-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def run_state(link: DeviceLink, folder: str) -> str:
    """Return ABSENT, RUNNING, DONE or GONE (ended without a result)."""
    return _query(link, folder)[0]


def remove_run(link: DeviceLink, folder: str) -> None:
    """Remove a run's folder; a run in progress is ended first, and its runners end with it."""
    link.run(
        f"cd {quote(folder)} 2>/dev/null || exit 0; "
        f"[ -f result.json ] || [ ! -s pid ] || ! {SAME_BOOT} || "
        'kill "$(cat pid)" 2>/dev/null; '
        f"cd / && rm -rf {quote(folder)}"
    )


def _start(link: DeviceLink, folder: str, python: str) -> None:
    # The shell writes its process id and becomes the run, in a session of its own, so that the end
    # of the link does not end it.
    run = (
        "echo $$ > pid; cat /proc/sys/kernel/random/boot_id > boot 2>/dev/null; "
        f"exec {shlex.quote(python)} -B conductor.py plan.json result.json"
    )
    link.run(
        f"cd {quote(folder)} && starter=$(command -v setsid || command -v nohup) && "
        f"{{ $starter sh -c {shlex.quote(run)} > progress.jsonl 2> noise.txt < /dev/null & }} && "
        "for i in 1 2 3 4 5 6 7 8 9 10; do [ -s pid ] && exit 0; sleep 0.2; done; "
        "echo 'the run did not start' >&2; exit 1"
    )


def _query(link: DeviceLink, folder: str) -> tuple[str, str]:
    """Return the state, and the last line of progress."""
    output = link.run(
        f"cd {quote(folder)} 2>/dev/null || {{ echo ABSENT; exit 0; }}; "
        "[ -s pid ] || { echo ABSENT; exit 0; }; "
        "if [ -f result.json ]; then echo DONE; "
        # In a container without an init process an ended process remains as a zombie, which
        # `kill -0` still finds.
        'elif kill -0 "$(cat pid)" 2>/dev/null '
        '&& ! grep -q "^State:.*zombie" "/proc/$(cat pid)/status" 2>/dev/null '
        f"&& {SAME_BOOT}; "
        "then echo RUNNING; else echo GONE; fi; tail -n 1 progress.jsonl"
    ).decode(errors="replace")
    lines = output.splitlines() or ["GONE"]
    return lines[0].strip(), lines[1] if len(lines) > 1 else ""


def _wait(
    link: DeviceLink, folder: str, options: DeviceOptions, progress: Progress
) -> dict[str, Any]:
    last_contact_s = time.monotonic()
    while True:
        try:
            state, line = _query(link, folder)
            if state == "DONE":
                content = json.loads(link.run(f"cat {quote(folder + '/result.json')}"))
                break
            last_contact_s = time.monotonic()
        except LinkLost as error:
            if time.monotonic() - last_contact_s >= options.patience_s:
                raise LinkLost(
                    f"{error}; the run goes on there: give the same command again for its result"
                ) from None
            progress(0.0, f"the link to {link.label} is lost, trying again")
            time.sleep(options.poll_s)
            continue
        if state != "RUNNING":
            raise _ended_without_result(link, folder)
        _report(line, progress)
        time.sleep(options.poll_s)
    if "error" in content:
        remove_run(link, folder)
        raise InputError(f"{link.label}: {content['error']}")
    result: dict[str, Any] = content["result"]
    return result


def _ended_without_result(link: DeviceLink, folder: str) -> InputError:
    # On a full disk the run could not write the reason either, so writing is tried first.
    script = (
        f"cd {quote(folder)} && {{ echo > space || echo FULL; tail -c 200 noise.txt; }} "
        "2>/dev/null || true"
    )
    output = link.run(script).decode(errors="replace")
    remove_run(link, folder)
    if output.startswith("FULL") or is_disk_full(output):
        return disk_full(link.label)
    reason = f" ({' '.join(output.split())})" if output.strip() else ""
    return InputError(
        f"{link.label}: the run ended there without a result{reason}: the device was restarted, "
        "or the run was killed because memory ran out; measure again"
    )


def _report(line: str, progress: Progress) -> None:
    try:
        event = json.loads(line)
        progress(float(event["share"]), str(event["text"]))
    except (ValueError, KeyError, TypeError):
        # The last line may be incomplete or missing.
        return
