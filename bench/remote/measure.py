"""`--on ADDRESS`: which way leads to a device, and the one course that all ways over a link
share.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ...core.errors import InputError
from ...targets.catalog import load_target
from ...targets.profile import TargetProfile
from ..local.measure import Measurable, assemble, make_plan, measure_here
from ..local.options import DeviceOptions, MeasureOptions, split_options
from ..local.progress import Progress, progress_bar
from ..results.measurement import Measurement
from .device_link import DeviceLink
from .native_run import require_native, run_native
from .python_run import identity, probe, require_python, require_space, run_there, state, travel

WAYS = "host, ssh://user@host[:port], adb://SERIAL, tvm-rpc://tracker:port/key or qemu-aarch64"


def measure_on(
    address: str, artifacts: Mapping[str, Measurable], threads: int = 1, **options: Any
) -> dict[str, Measurement]:
    """Measure on `host`, ssh://user@host[:port], adb://SERIAL, tvm-rpc://tracker:port/key or
    qemu-aarch64.

    options: target, quiet, progress, and the fields of `MeasureOptions` and `DeviceOptions` by
    name. Errors: InputError.
    """
    rest = {key: options.pop(key) for key in ("target", "quiet", "progress") if key in options}
    how, device = split_options({"threads": threads, **options})
    return measure_at(address, artifacts, how, device, **rest)


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
    """`measure_on` with its options as values."""
    device = device or DeviceOptions()
    if address == "host":
        return measure_here(artifacts, options, target=target, quiet=quiet, progress=progress)
    if address.startswith(("ssh://", "adb://")):
        return over_link(
            open_link(address, device),
            artifacts,
            options,
            device,
            target=target,
            quiet=quiet,
            progress=progress,
        )
    if address.startswith("tvm-rpc://"):
        from .tvm_rpc import measure_over_tvm_rpc

        return measure_over_tvm_rpc(
            address, artifacts, options, device, target=target, quiet=quiet, progress=progress
        )
    if address == "qemu-aarch64":
        from ..emulation.emulated import measure_emulated

        return measure_emulated(artifacts, options, target=target, quiet=quiet, progress=progress)
    raise InputError(f"--on {address!r}: no way to such a device; write {WAYS}")


def open_link(address: str, device: DeviceOptions) -> DeviceLink:
    """The link of an ssh:// or adb:// address. Errors: InputError for what is no address;
    LinkLost.
    """
    if address.startswith("adb://"):
        from .adb_link import AdbAddress, AdbLink

        return AdbLink(AdbAddress.parse(address))
    from .ssh_link import SshAddress, SshLink

    return SshLink(SshAddress.parse(address), device.ssh_options)


def over_link(
    link: DeviceLink,
    artifacts: Mapping[str, Measurable],
    options: MeasureOptions,
    device: DeviceOptions,
    *,
    target: TargetProfile | str = "host",
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Measure artifacts, interleaved, behind a link, which is closed; with the device's Python, or
    the native runner where there is none.

    The device must let this user in without a password. Errors: InputError, one line: changed or
    unknown host key, refused login, full disk, missing runtime, restarted device, failed runner;
    LinkLost when the device does not answer.
    """
    try:
        profile = (
            target
            if isinstance(target, TargetProfile)
            else load_target(target)
            if target != "host"
            else None
        )
        plan, subjects = make_plan(artifacts, options)
        runtimes = sorted({subject.runtime for subject in subjects.values()})
        parent = device.folder or link.default_folder()
        sent = copy.deepcopy(plan)
        files = travel(sent, subjects)
        place = f"{parent}/{identity(link, sent, subjects)}"
        begun = device.runner != "native" and state(link, place) != "ABSENT"
        found = None if begun else probe(link, parent, device.python, runtimes)
        with progress_bar(quiet=quiet, replacement=progress) as tell:
            if found is not None and (
                device.runner == "native" or (device.runner == "auto" and not found.has_python)
            ):
                for name, subject in subjects.items():
                    require_native(name, subject, options.providers)
                raw = run_native(link, parent, found, plan, subjects, device, tell)
            else:
                if found is not None:
                    require_python(link, found, device.python, runtimes)
                    require_space(link, found, files)
                raw = run_there(link, place, files, device, tell, begun=begun)
    finally:
        link.close()
    return assemble(
        raw, plan, subjects, target=profile.name if profile else "host", device=link.kind
    )
