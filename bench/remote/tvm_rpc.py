"""Measure TVM artifacts on the boards of a TVM tracker, on several boards at a time."""

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
from ...core.progress import Progress, progress_bar
from ...export.artifact import Artifact, read_manifest
from ...targets.profile import TargetProfile
from ..local.measure import Measurable, assemble, make_plan, target_name
from ..local.options import DeviceOptions, MeasureOptions
from ..results.measurement import Measurement
from .device_link import LinkLost
from .tvm_tracker import free_boards

DEVICE = "tvm-rpc"
STATE_UNKNOWN = (
    "TVM's protocol reports nothing about the board's state, and its rpc_server sets the number of "
    "threads (TVM_NUM_THREADS); check by hand that it is idle and cool, and give --target"
)
ENDED = "the board's process ended without a result; measure again"


@dataclass(frozen=True)
class TrackerAddress:
    """The address tvm-rpc://tracker[:port]/key of a kind of board."""

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, url: str) -> TrackerAddress:
        """Parse an address; raises InputError for anything else."""
        match = re.fullmatch(
            r"tvm-rpc://(\[[0-9a-fA-F:.%]+\]|[^@/:\s]+)(?::(\d{1,5}))?/([^/\s]+)", url
        )
        if not match or not 1 <= int(match[2] or 9190) <= 65535:
            raise InputError(
                f"--on {url!r}: not an address; write tvm-rpc://tracker:port/key, "
                "such as tvm-rpc://localhost:9190/rpi4"
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
    """Measure TVM artifacts on the boards that are registered under the address's key.

    Each free board gets a part of the artifacts and also the first artifact, so that on every board
    the others are compared with it in turns.

    Args:
        url: The address of tracker and boards.
        artifacts: {name: an `Artifact` or its folder}.
        options: What is measured, and for how long.
        device: Only `patience_s` is used: how long to wait for a board.
        target: The device profile that the measurements name, or its name in the catalog.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.

    Returns:
        {name: measurement}.

    Raises:
        InputError: There is no tracker or no such board, an artifact is of another runtime, or a
            board stopped.
        LinkLost: No board became free.
    """
    address = TrackerAddress.parse(url)
    title = target_name(target)
    plan, facts = make_plan(artifacts, options)
    for name, about in facts.items():
        if about.runtime != "tvm":
            raise InputError(
                f"{name}: is made for {about.runtime}, and TVM's boards run TVM artifacts; "
                "export it with --runtime tvm"
            )
        if about.buckets:
            raise InputError(
                f"{name}: has buckets, and TVM's protocol cannot choose one; measure it over ssh, "
                "or export one count: BucketedModel.fixed(count)"
            )
    # A board keeps uploaded files until its server ends; equal files get equal names, so that they
    # do not pile up.
    for number, (name, job) in enumerate(plan["jobs"].items()):
        job["upload"] = f"vitrim-{number}-{facts[name].sha256[:12]}"
        job["classes"] = _classes(artifacts[name])
    boards = free_boards(address.host, address.port, address.key)
    plans = [
        {**plan, "jobs": {name: plan["jobs"][name] for name in part}}
        for part in split_artifacts(list(plan["jobs"]), max(1, boards))
    ]
    tracker = {"tracker": [address.host, address.port], "key": address.key}
    with progress_bar(quiet=quiet, replacement=progress) as report:
        results = _measure_on_boards(
            [{**tracker, "plan": part} for part in plans],
            report,
            (device or DeviceOptions()).patience_s,
        )
    found: dict[str, Measurement] = {}
    for raw, part in zip(results, plans, strict=True):
        measurements = assemble(raw, part, facts, target=title, device=f"{DEVICE} {address.key}")
        for name, measured in measurements.items():
            warnings = (*measured.warnings, STATE_UNKNOWN)
            found.setdefault(name, measured.model_copy(update={"warnings": warnings}))
    return {name: found[name] for name in plan["jobs"]}


def split_artifacts(names: list[str], boards: int) -> list[list[str]]:
    """Return the artifacts of each board; the first artifact is on every board.

    ["a", "b", "c"] on two boards becomes [["a", "b"], ["a", "c"]].
    """
    first, *rest = names
    count = max(1, min(boards, len(rest)))
    return [[first, *rest[start::count]] for start in range(count)]


def _classes(artifact: Measurable) -> int:
    manifest = artifact.manifest if isinstance(artifact, Artifact) else read_manifest(artifact)
    last = manifest.outputs[0].shape[-1]
    if not isinstance(last, int):
        raise InputError(
            f"{manifest.name}: its manifest does not fix the number of classes; export it again"
        )
    return last


def _start_board() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.tvm_board"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _measure_on_boards(
    requests: list[dict[str, Any]], progress: Progress, patience_s: float
) -> list[dict[str, Any]]:
    """Run each request in a subprocess; return the results in the order of the requests.

    Raises the first InputError of them, and LinkLost where nothing was received for `patience_s`.
    """
    lines: queue.Queue[tuple[int, bytes | None]] = queue.Queue()
    processes = [_start_board() for _ in requests]

    def read_lines(number: int) -> None:
        for line in processes[number].stdout or ():
            lines.put((number, line))
        lines.put((number, None))

    results: dict[int, dict[str, Any]] = {}
    shares = [0.0] * len(requests)
    try:
        for number, (process, request) in enumerate(zip(processes, requests, strict=True)):
            if process.stdin is not None:
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            threading.Thread(target=read_lines, args=(number,), daemon=True).start()
        while len(results) < len(requests):
            try:
                number, line = lines.get(timeout=patience_s)
            except queue.Empty:
                raise LinkLost(
                    f"{requests[0]['key']}: no board became free, or responded, for "
                    f"{patience_s:.0f} s; look who uses it: python -m tvm.exec.query_rpc_tracker"
                ) from None
            event: dict[str, Any] = json.loads(line) if line else {"error": ENDED}
            if "result" in event:
                results[number] = event["result"]
            elif "error" in event and number not in results:
                raise InputError(event["error"])
            elif "share" in event:
                shares[number] = event["share"]
                board = f"board {number + 1} of {len(requests)}: " if len(requests) > 1 else ""
                progress(min(shares), board + event["text"])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [results[number] for number in range(len(requests))]
