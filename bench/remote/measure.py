"""Measure on a device by its address (`--on ADDRESS`): this machine, ssh, adb, TVM RPC or qemu."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ...core.progress import Progress, progress_bar
from ...targets.profile import TargetProfile
from ..local.measure import Measurable, assemble, make_plan, measure_here, target_name
from ..local.options import DeviceOptions, MeasureOptions, split_options
from ..results.measurement import Measurement
from .device_link import DeviceLink
from .native_run import require_native, run_native
from .python_run import (
    files_to_send,
    probe,
    require_python,
    require_space,
    run_name,
    run_on_device,
    run_state,
)
from .reach import open_link, unknown_address


def measure_on(
    address: str, artifacts: Mapping[str, Measurable], threads: int = 1, **options: Any
) -> dict[str, Measurement]:
    """Measure artifacts, interleaved, on the device at an address.

    Args:
        address: `host`, ssh://user@host[:port], adb://SERIAL, tvm-rpc://tracker:port/key or
            qemu-aarch64.
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        threads: Threads of the runtime.
        **options: `target`, `quiet`, `progress`, and the fields of `MeasureOptions` and
            `DeviceOptions`.

    Returns:
        {name: measurement}.

    Raises:
        InputError: The address, an artifact or an option is invalid, or the run failed.
        LinkLost: The device does not respond. A run that was started there goes on, and the same
            call returns its result.
    """
    rest = {key: options.pop(key) for key in ("target", "quiet", "progress") if key in options}
    measure_options, device = split_options({"threads": threads, **options})
    return measure_at(address, artifacts, measure_options, device, **rest)


def measure_at(
    address: str,
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    device: DeviceOptions | None = None,
    *,
    target: TargetProfile | str = "host",
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Run `measure_on` with its options as values.

    Args:
        address: See `measure_on`.
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        options: What is measured, and for how long.
        device: How to reach the device, and what to run there.
        target: The device profile that the measurements name, or its name in the catalog.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.

    Returns:
        {name: measurement}.

    Raises:
        InputError: See `measure_on`.
    """
    device = device or DeviceOptions()
    shared: dict[str, Any] = {"target": target, "quiet": quiet, "progress": progress}
    if address == "host":
        return measure_here(artifacts, options, **shared)
    if address.startswith(("ssh://", "adb://")):
        return measure_over_link(open_link(address, device), artifacts, options, device, **shared)
    if address.startswith("tvm-rpc://"):
        from .tvm_rpc import measure_over_tvm_rpc

        return measure_over_tvm_rpc(address, artifacts, options, device, **shared)
    if address == "qemu-aarch64":
        from ..local.emulated import measure_emulated

        return measure_emulated(artifacts, options, **shared)
    raise unknown_address(address)


def measure_over_link(
    link: DeviceLink,
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    device: DeviceOptions,
    *,
    target: TargetProfile | str = "host",
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Measure artifacts over a link, with the device's Python or the native runner.

    The device must accept the login without a password.

    Args:
        link: The link to the device, which is closed at the end.
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        options: What is measured, and for how long.
        device: What to run on the device.
        target: The device profile that the measurements name, or its name in the catalog.
        quiet: Show no progress bar.
        progress: Called with the share done (0 to 1) and a text, in place of the bar.

    Returns:
        {name: measurement}.

    Raises:
        InputError: A changed or unknown host key, a refused login, a full disk, a missing runtime,
            a restarted device, or a failed runner.
        LinkLost: The device does not respond.
    """
    try:
        title = target_name(target)
        plan, facts = make_plan(artifacts, options)
        runtimes = sorted({about.runtime for about in facts.values()})
        parent = device.folder or link.default_folder()
        sent = copy.deepcopy(plan)
        files = files_to_send(sent, facts)
        folder = f"{parent}/{run_name(link, sent, facts)}"
        begun = device.runner != "native" and run_state(link, folder) != "ABSENT"
        found = None if begun else probe(link, parent, device.python, runtimes)
        native = found is not None and (
            device.runner == "native" or (device.runner == "auto" and not found.has_python)
        )
        with progress_bar(quiet=quiet, replacement=progress) as report:
            if native and found is not None:
                for name, about in facts.items():
                    require_native(name, about, options)
                raw = run_native(link, parent, found, plan, facts, device, report)
            else:
                if found is not None:
                    require_python(link, found, device.python, runtimes)
                    require_space(link, found, files)
                raw = run_on_device(link, folder, files, device, report, begun=begun)
    finally:
        link.close()
    return assemble(raw, plan, facts, target=title, device=link.kind)
