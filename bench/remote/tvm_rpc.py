"""Measure on the boards of a TVM tracker: TVM artifacts, several boards of a kind at a time."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import InputError
from ...export.artifact import Artifact, read_manifest
from ...targets.catalog import load_target
from ...targets.profile import TargetProfile
from ..local.measure import Measurable, assemble, make_plan
from ..local.options import DeviceOptions, MeasureOptions
from ..local.progress import Progress, progress_bar
from ..results.measurement import Measurement
from .device_link import LinkLost
from .tvm_tracker import free_boards

DEVICE = "tvm-rpc"
NOTHING_TOLD = (
    "TVM's protocol tells nothing of the board's state, and its rpc_server decides on the threads (TVM_NUM_THREADS); "
    "look by hand that it is idle and cool, and give --target"
)


@dataclass(frozen=True)
class TrackerAddress:
    """Which boards: tvm-rpc://tracker[:port]/key."""

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, url: str) -> TrackerAddress:
        """Errors: InputError for what is no such address."""
        match = re.fullmatch(
            r"tvm-rpc://(\[[0-9a-fA-F:.%]+\]|[^@/:\s]+)(?::(\d{1,5}))?/([^/\s]+)", url
        )
        if not match or not 1 <= int(match[2] or 9190) <= 65535:
            raise InputError(
                f"--on {url!r}: not an address; write tvm-rpc://tracker:port/key, such as tvm-rpc://localhost:9190/rpi4"
            )
        return cls(match[1].strip("[]"), int(match[2] or 9190), match[3])


def measure_over_tvm_rpc(
    url: str,
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    device: DeviceOptions | None = None,
    *,
    target: TargetProfile | str = "host",
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Measure TVM artifacts on the boards registered under the key; returns {name: Measurement}.

    Every free board gets a share of the artifacts, and the first artifact besides, so that each
    share is held against it in turns on one board. Errors: InputError, one line: no tracker, no
    such board, another runtime's artifact, a board that stopped; LinkLost where no board became
    free.
    """
    address = TrackerAddress.parse(url)
    profile = (
        target
        if isinstance(target, TargetProfile)
        else load_target(target)
        if target != "host"
        else None
    )
    plan, subjects = make_plan(artifacts, options)
    for name, subject in subjects.items():
        if subject.runtime != "tvm":
            raise InputError(
                f"{name}: is made for {subject.runtime}, and TVM's boards run TVM artifacts; export it with --runtime tvm"
            )
    # A board keeps what was sent until its server ends; equal files get equal names, so nothing
    # heaps up.
    for number, (name, job) in enumerate(plan["jobs"].items()):
        job["upload"] = f"vitrim-{number}-{subjects[name].sha256[:12]}"
        job["classes"] = _classes(artifacts[name])
    question = {"tracker": [address.host, address.port], "key": address.key}
    shares = shared_out(
        list(plan["jobs"]), max(1, free_boards(address.host, address.port, address.key))
    )
    plans = [{**plan, "jobs": {name: plan["jobs"][name] for name in share}} for share in shares]
    with progress_bar(quiet=quiet, replacement=progress) as tell:
        results = _all_at_once(
            [{**question, "plan": one} for one in plans],
            tell,
            (device or DeviceOptions()).patience_s,
        )
    found: dict[str, Measurement] = {}
    for raw, one in zip(results, plans, strict=True):
        made = assemble(
            raw,
            one,
            subjects,
            target=profile.name if profile else "host",
            device=f"{DEVICE} {address.key}",
        )
        for name, measured in made.items():
            found.setdefault(
                name, measured.model_copy(update={"warnings": (*measured.warnings, NOTHING_TOLD)})
            )
    return {name: found[name] for name in plan["jobs"]}


def shared_out(names: list[str], boards: int) -> list[list[str]]:
    """The artifacts of each board, the first one with all: ["a", "b", "c"] on two boards is [["a",
    "b"], ["a", "c"]].
    """
    first, *rest = names
    count = max(1, min(boards, len(rest)))
    return [[first, *rest[start::count]] for start in range(count)]


def _classes(artifact: Measurable) -> int:
    manifest = artifact.manifest if isinstance(artifact, Artifact) else read_manifest(artifact)
    last = manifest.outputs[0].shape[-1]
    if not isinstance(last, int):
        raise InputError(
            f"{manifest.name}: its manifest leaves the number of classes open; export it again"
        )
    return last


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.tvm_board"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _all_at_once(
    questions: list[dict[str, Any]], tell: Progress, patience_s: float
) -> list[dict[str, Any]]:
    """Each question to a process of its own; the results in their order. Errors: InputError of the
    first that failed.
    """
    heard: queue.Queue[tuple[int, bytes | None]] = queue.Queue()
    processes = [_start() for _ in questions]

    def listen(number: int) -> None:
        stream = processes[number].stdout
        if stream is not None:
            for line in stream:
                heard.put((number, line))
        heard.put((number, None))

    results: dict[int, dict[str, Any]] = {}
    shares = [0.0] * len(questions)
    try:
        for number, (process, question) in enumerate(zip(processes, questions, strict=True)):
            if process.stdin is not None:
                process.stdin.write(json.dumps(question).encode())
                process.stdin.close()
            threading.Thread(target=listen, args=(number,), daemon=True).start()
        while len(results) < len(questions):
            try:
                number, line = heard.get(timeout=patience_s)
            except queue.Empty:
                key = questions[0]["key"]
                raise LinkLost(
                    f"{key}: no board became free, or answered, for {patience_s:.0f} s; look who uses it: python -m tvm.exec.query_rpc_tracker"
                ) from None
            told: dict[str, Any] = (
                {"error": "the board's process ended without a result; measure again"}
                if line is None
                else json.loads(line)
            )
            if "result" in told:
                results[number] = told["result"]
            elif "error" in told and number not in results:
                raise InputError(told["error"])
            elif "share" in told:
                shares[number] = told["share"]
                tell(
                    min(shares),
                    told["text"]
                    if len(questions) == 1
                    else f"board {number + 1} of {len(questions)}: {told['text']}",
                )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [results[number] for number in range(len(questions))]
