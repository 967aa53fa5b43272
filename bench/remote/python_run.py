"""Measure on a device that has Python: runner, engines and artifacts go there, the run is detached
from the link, the samples come back.

The folder on the device is named after what is measured, so asking again after a dropped link finds
the run and waits for it instead of starting another. When the samples are here the folder is
removed.
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
from ...runtimes import requirement
from ..local.artifact_facts import ArtifactFacts
from ..local.options import DeviceOptions
from ..local.progress import Progress
from .device_link import DeviceLink, LinkLost, disk_full, is_disk_full, quote, size_bytes

TRAVELLERS = ("runner.py", "conductor.py", "environment.py", "energy.py")
PACKAGE = Path(__file__).parents[2]
RUNTIMES = PACKAGE / "runtimes"
MARGIN_BYTES = 1_000_000


@dataclass(frozen=True)
class Probe:
    """What a device says before anything is sent: `uname -m`, whether it is Android, the free bytes
    (None if it does not tell), its Python's state.
    """

    machine: str
    android: bool
    free_bytes: int | None
    python: str

    @property
    def has_python(self) -> bool:
        return self.python != "NOPYTHON"


def probe(link: DeviceLink, parent: str, python: str, runtimes: Sequence[str]) -> Probe:
    """Look at a device; makes the folder `parent`. Python's state is NOPYTHON, NORUNTIME or
    READY.
    """
    program = shlex.quote(python)
    modules = ", ".join(["sys", "numpy", *(requirement(runtime).module for runtime in runtimes)])
    told = link.run(
        f"umask 077; mkdir -p {quote(parent)} || exit 1; uname -m; if [ -e /system/bin/linker ]; then echo android; else echo linux; fi; "
        f"df -Pk {quote(parent)} | tail -n 1; command -v {program} >/dev/null || {{ echo NOPYTHON; exit 0; }}; "
        f"{program} -c 'import {modules}; assert sys.version_info >= (3, 9)' >/dev/null 2>&1 && echo READY || echo NORUNTIME"
    ).decode(errors="replace")
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    if len(lines) < 3 or lines[-1] not in ("NOPYTHON", "NORUNTIME", "READY"):
        raise InputError(
            f"{link.shown}: its shell does not answer as a Linux system's does; log in by hand and look what it prints"
        )
    columns = lines[2].split()
    free = int(columns[3]) * 1024 if len(columns) >= 4 and columns[3].isdigit() else None
    return Probe(lines[0], lines[1] == "android", free, lines[-1])


def require_space(link: DeviceLink, found: Probe, files: Mapping[str, Path | bytes]) -> None:
    """Errors: InputError where the files do not fit."""
    needed = sum(size_bytes(source) for source in files.values()) + MARGIN_BYTES
    if found.free_bytes is not None and found.free_bytes < needed:
        line = disk_full(link.shown)
        raise InputError(
            str(line).replace(
                "its disk is full;",
                f"its disk is full: {found.free_bytes} bytes are free, {needed} are needed;",
            )
        )


def require_python(link: DeviceLink, found: Probe, python: str, runtimes: Sequence[str]) -> None:
    """Errors: InputError saying what to install where the device's Python is missing, or has no
    such runtime.
    """
    if not found.has_python:
        raise InputError(
            f"{link.shown}: there is no {python}; install Python 3.9 or newer there, or name its path (--python)"
        )
    if found.python == "NORUNTIME":
        install = " ".join(requirement(runtime).install for runtime in runtimes)
        other = (
            "; or send the native runner (--runner native)"
            if tuple(runtimes) == ("onnxruntime",)
            else ""
        )
        raise InputError(
            f"{link.shown}: its {python} has no {', '.join(runtimes)} and numpy; install them there: {python} -m pip install {install} numpy{other}"
        )


def run_there(
    link: DeviceLink,
    place: str,
    files: Mapping[str, Path | bytes],
    options: DeviceOptions,
    tell: Progress,
    *,
    begun: bool,
) -> dict[str, Any]:
    """The conductor's raw result of the run in `place`, which is started unless it is `begun`, and
    removed at the end.

    Errors: LinkLost when the device does not answer for long (the run goes on there, and the same
    call brings its result); InputError.
    """
    if not begun:
        link.copy(files, place)
        _start(link, place, options.python)
    try:
        raw = _wait(link, place, tell, patience_s=options.patience_s, poll_s=options.poll_s)
    except KeyboardInterrupt:
        remove(link, place)
        raise
    remove(link, place)
    return raw


def travel(plan: dict[str, Any], subjects: Mapping[str, ArtifactFacts]) -> dict[str, Path | bytes]:
    """The files by their names on the device; the paths in the plan are changed to those names."""
    files: dict[str, Path | bytes] = {
        name: PACKAGE / "bench" / "local" / name for name in TRAVELLERS
    }
    files |= {f"runtimes/{file.name}": file for file in sorted(RUNTIMES.glob("*.py"))}
    files |= models(plan, subjects)
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


def models(plan: dict[str, Any], subjects: Mapping[str, ArtifactFacts]) -> dict[str, Path | bytes]:
    """The artifacts' files by their names on the device, which the plan's jobs are told."""
    files: dict[str, Path | bytes] = {}
    for number, (name, subject) in enumerate(subjects.items()):
        for file in subject.files:
            files[f"model-{number}/{file.relative_to(subject.root).as_posix()}"] = file
        # An interpreter of this machine is none of the device's.
        plan["jobs"][name]["python"] = None
        plan["jobs"][name]["model"] = (
            f"model-{number}/{subject.model.relative_to(subject.root).as_posix()}"
        )
    return files


def identity(link: DeviceLink, plan: dict[str, Any], subjects: Mapping[str, ArtifactFacts]) -> str:
    """The folder's name: the same for the same artifacts, measured in the same way, on the same
    device.
    """
    what = [link.shown, plan, {name: subject.sha256 for name, subject in subjects.items()}]
    return "run-" + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]


def state(link: DeviceLink, place: str) -> str:
    """ABSENT, RUNNING, DONE or GONE."""
    return _look(link, place)[0]


def remove(link: DeviceLink, place: str) -> None:
    """Remove the run's folder; a run that is still there is ended first, and its runners end with
    their conductor.
    """
    link.run(
        f'cd {quote(place)} 2>/dev/null || exit 0; [ -f result.json ] || [ ! -f pid ] || kill "$(cat pid)" 2>/dev/null; cd / && rm -rf {quote(place)}'
    )


def _start(link: DeviceLink, place: str, python: str) -> None:
    # The shell writes its own number and becomes the run; in a session of its own it does not hear
    # the link's hang-up. The boot's number tells later whether the device was restarted, since
    # process numbers come again.
    body = f"echo $$ > pid; cat /proc/sys/kernel/random/boot_id > boot 2>/dev/null; exec {shlex.quote(python)} -B conductor.py plan.json result.json"
    link.run(
        f"cd {quote(place)} && starter=$(command -v setsid || command -v nohup) && "
        f"{{ $starter sh -c {shlex.quote(body)} > progress.jsonl 2> noise.txt < /dev/null & }} && "
        "for i in 1 2 3 4 5 6 7 8 9 10; do [ -s pid ] && exit 0; sleep 0.2; done; echo 'the run did not start' >&2; exit 1"
    )


def _look(link: DeviceLink, place: str) -> tuple[str, str]:
    """The state, and the last line of progress."""
    told = link.run(
        f"cd {quote(place)} 2>/dev/null || {{ echo ABSENT; exit 0; }}; [ -s pid ] || {{ echo ABSENT; exit 0; }}; "
        "if [ -f result.json ]; then echo DONE; "
        # In a container without an init a process that ended stays as a zombie, which can be
        # signalled still.
        'elif kill -0 "$(cat pid)" 2>/dev/null && ! grep -q "^State:.*zombie" "/proc/$(cat pid)/status" 2>/dev/null '
        '&& [ "$(cat boot)" = "$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)" ]; then echo RUNNING; '
        "else echo GONE; fi; tail -n 1 progress.jsonl"
    ).decode(errors="replace")
    lines = told.splitlines() or ["GONE"]
    return lines[0].strip(), lines[1] if len(lines) > 1 else ""


def _wait(
    link: DeviceLink, place: str, tell: Progress, *, patience_s: float, poll_s: float
) -> dict[str, Any]:
    where = link.shown
    heard = time.monotonic()
    while True:
        try:
            now, line = _look(link, place)
            if now == "DONE":
                content: dict[str, Any] = json.loads(
                    link.run(f"cat {quote(place + '/result.json')}")
                )
                break
            heard = time.monotonic()
        except LinkLost as error:
            if time.monotonic() - heard >= patience_s:
                raise LinkLost(
                    f"{error}; the run goes on there: give the same command again for its result"
                ) from None
            tell(0.0, f"the link to {where} is lost, trying again")
            time.sleep(poll_s)
            continue
        if now != "RUNNING":
            # Where nothing can be written any more, not even the reason could be.
            probed = f"cd {quote(place)} && {{ echo > space || echo FULL; tail -c 200 noise.txt; }} 2>/dev/null || true"
            noise = link.run(probed).decode(errors="replace")
            remove(link, place)
            if noise.startswith("FULL") or is_disk_full(noise):
                raise disk_full(where)
            why = f" ({' '.join(noise.split())})" if noise.strip() else ""
            raise InputError(
                f"{where}: the run ended there without a result{why}: the device was restarted, or killed it for memory; measure again"
            )
        _pass_on(line, tell)
        time.sleep(poll_s)
    if "error" in content:
        remove(link, place)
        raise InputError(f"{where}: {content['error']}")
    result: dict[str, Any] = content["result"]
    return result


def _pass_on(line: str, tell: Progress) -> None:
    try:
        told = json.loads(line)
        tell(float(told["share"]), str(told["text"]))
    except (ValueError, KeyError, TypeError):
        # The last line may be half written, or not there yet.
        return
