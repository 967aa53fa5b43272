"""Measure on a device over ssh: the runner, the engines and the artifacts go there, the run is detached from the link, the samples come back.

The folder on the device is named after what is measured, so asking again after a dropped link finds the run and waits for it instead of
starting another. When the samples are here the folder is removed.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtimes import requirement
from ..targets.profile import TargetProfile, load_target
from .measure import Measurable, assemble, make_plan
from .measurement import Measurement
from .progress import Progress, progress_bar
from .ssh_link import LinkLost, SshAddress, SshLink, quote
from .subject import Subject

TRAVELLERS = ("runner.py", "conductor.py", "environment.py")
HERE = Path(__file__).parent
RUNTIMES = HERE.parent / "runtimes"
MARGIN_BYTES = 1_000_000


def measure_over_ssh(
    url: str,
    artifacts: Mapping[str, Measurable],
    threads: int = 1,
    *,
    target: TargetProfile | str = "host",
    python: str = "python3",
    ssh_options: Sequence[str] = (),
    folder: str = "$HOME/.cache/vitrim",
    patience_s: float = 300.0,
    poll_s: float = 1.0,
    quiet: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Measurement]:
    """Measure artifacts, interleaved, on the device at ssh://user@host[:port], and return {name: Measurement}.

    python: the interpreter there, with onnxruntime and numpy; folder: where the files lie there while it runs; patience_s: how long a lost
    link is tried again; options: those of `make_plan` (dataset, time_limit_s, ...). The device must accept a key: no password is asked for.
    Errors: InputError, one line: changed or unknown host key, refused login, full disk, missing runtime, restarted device, failed runner;
    LinkLost when the device does not answer; the run goes on there, and the same call again brings its result.
    """
    address = SshAddress.parse(url)
    profile = target if isinstance(target, TargetProfile) else load_target(target) if target != "host" else None
    plan, subjects = make_plan(artifacts, threads=threads, **options)
    files = _travel(plan, subjects)
    place = f"{folder}/{_identity(address, plan, subjects)}"
    link = SshLink(address, ssh_options)
    try:
        if _state(link, place) == "ABSENT":
            wanted = sorted({subject.runtime for subject in subjects.values()})
            _require(link, place, python, sum(_size(source) for source in files.values()), wanted)
            link.copy(files, place)
            _start(link, place, python)
        with progress_bar(quiet=quiet, replacement=progress) as tell:
            try:
                raw = _wait(link, place, tell, patience_s=patience_s, poll_s=poll_s)
            except KeyboardInterrupt:
                _remove(link, place)
                raise
        _remove(link, place)
    finally:
        link.close()
    return assemble(raw, plan, subjects, target=profile.name if profile else "host", device="ssh")


def _travel(plan: dict[str, Any], subjects: Mapping[str, Subject]) -> dict[str, Path | bytes]:
    """The files by their names on the device; the paths in the plan are changed to those names."""
    files: dict[str, Path | bytes] = {name: HERE / name for name in TRAVELLERS}
    files |= {f"runtimes/{file.name}": file for file in sorted(RUNTIMES.glob("*.py"))}
    for number, (name, subject) in enumerate(subjects.items()):
        for file in subject.files:
            files[f"model-{number}/{file.relative_to(subject.root).as_posix()}"] = file
        # An interpreter of this machine is none of the device's.
        plan["jobs"][name]["python"] = None
        plan["jobs"][name]["model"] = f"model-{number}/{subject.model.relative_to(subject.root).as_posix()}"
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


def _identity(address: SshAddress, plan: dict[str, Any], subjects: Mapping[str, Subject]) -> str:
    what = [address.host, plan, {name: subject.sha256 for name, subject in subjects.items()}]
    return "run-" + hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _require(link: SshLink, place: str, python: str, needed_bytes: int, runtimes: Sequence[str]) -> None:
    where, program = link.address.shown, shlex.quote(python)
    needs = [requirement(runtime) for runtime in runtimes]
    modules = ", ".join(["sys", "numpy", *(need.module for need in needs)])
    parent = place.rsplit("/", 1)[0]
    told = link.run(
        f"mkdir -p {quote(parent)} || exit 1; df -Pk {quote(parent)} | tail -n 1; "
        f"command -v {program} >/dev/null || {{ echo NOPYTHON; exit 0; }}; "
        f"{program} -c 'import {modules}; assert sys.version_info >= (3, 9)' >/dev/null 2>&1 && echo READY || echo NORUNTIME"
    ).decode(errors="replace")
    lines = told.strip().splitlines()
    state = lines[-1] if lines else ""
    if state == "NOPYTHON":
        raise InputError(f"{where}: there is no {python}; install Python 3.9 or newer there, or name its path")
    if state == "NORUNTIME":
        install = " ".join(need.install for need in needs)
        raise InputError(f"{where}: its {python} has no {', '.join(runtimes)} and numpy; install them there: {python} -m pip install {install} numpy")
    columns = lines[0].split() if len(lines) > 1 else []
    if len(columns) >= 4 and columns[3].isdigit() and int(columns[3]) * 1024 < needed_bytes + MARGIN_BYTES:
        free = int(columns[3]) * 1024
        raise InputError(
            f"{where}: its disk is full: {free} bytes are free, {needed_bytes + MARGIN_BYTES} are needed; free some space, then measure again"
        )


def _start(link: SshLink, place: str, python: str) -> None:
    # The shell writes its own number and becomes the run; in a session of its own it does not hear the link's hang-up. The boot's number
    # tells later whether the device was restarted, since process numbers come again.
    body = f"echo $$ > pid; cat /proc/sys/kernel/random/boot_id > boot 2>/dev/null; exec {shlex.quote(python)} -B conductor.py plan.json result.json"
    link.run(
        f"cd {quote(place)} && starter=$(command -v setsid || command -v nohup) && "
        f"{{ $starter sh -c {shlex.quote(body)} > progress.jsonl 2> noise.txt < /dev/null & }} && "
        "for i in 1 2 3 4 5 6 7 8 9 10; do [ -s pid ] && exit 0; sleep 0.2; done; echo 'the run did not start' >&2; exit 1"
    )


def _state(link: SshLink, place: str) -> str:
    return _look(link, place)[0]


def _look(link: SshLink, place: str) -> tuple[str, str]:
    """ABSENT, RUNNING, DONE or GONE, and the last line of progress."""
    told = link.run(
        f"cd {quote(place)} 2>/dev/null || {{ echo ABSENT; exit 0; }}; [ -s pid ] || {{ echo ABSENT; exit 0; }}; "
        "if [ -f result.json ]; then echo DONE; "
        'elif kill -0 "$(cat pid)" 2>/dev/null && [ "$(cat boot)" = "$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)" ]; then echo RUNNING; '
        "else echo GONE; fi; tail -n 1 progress.jsonl"
    ).decode(errors="replace")
    lines = told.splitlines() or ["GONE"]
    return lines[0].strip(), lines[1] if len(lines) > 1 else ""


def _wait(link: SshLink, place: str, tell: Progress, *, patience_s: float, poll_s: float) -> dict[str, Any]:
    where = link.address.shown
    heard = time.monotonic()
    while True:
        try:
            state, line = _look(link, place)
            if state == "DONE":
                content: dict[str, Any] = json.loads(link.run(f"cat {quote(place + '/result.json')}"))
                break
            heard = time.monotonic()
        except LinkLost as error:
            if time.monotonic() - heard >= patience_s:
                raise LinkLost(f"{error}; the run goes on there: give the same command again for its result") from None
            tell(0.0, f"the link to {where} is lost, trying again")
            time.sleep(poll_s)
            continue
        if state != "RUNNING":
            noise = link.run(f"tail -c 200 {quote(place + '/noise.txt')} 2>/dev/null || true").decode(errors="replace")
            _remove(link, place)
            why = f" ({' '.join(noise.split())})" if noise.strip() else ""
            raise InputError(
                f"{where}: the run ended there without a result{why}: the device was restarted, or killed it for memory; measure again"
            )
        _pass_on(line, tell)
        time.sleep(poll_s)
    if "error" in content:
        _remove(link, place)
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


def _remove(link: SshLink, place: str) -> None:
    # A run that is still there is ended first; its runners end with their conductor.
    link.run(f'cd {quote(place)} 2>/dev/null || exit 0; [ -f result.json ] || kill "$(cat pid)" 2>/dev/null; cd / && rm -rf {quote(place)}')
