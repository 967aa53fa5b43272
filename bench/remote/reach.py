"""The addresses of `--on`: their form, the link to a device, and whether it can be measured at."""

from __future__ import annotations

from collections.abc import Iterable

from ...core.errors import InputError
from ..local.options import DeviceOptions
from .adb_link import AdbAddress, AdbLink
from .device_link import DeviceLink
from .ssh_link import SshAddress, SshLink

ADDRESSES = "host, ssh://user@host[:port], adb://SERIAL, tvm-rpc://tracker:port/key or qemu-aarch64"
HERE, EMULATED, TRACKER = "host", "qemu-aarch64", "tvm-rpc://"


def require_address(address: str) -> None:
    """Check the form of an address, without a connection.

    Raises:
        InputError: It is none of `ADDRESSES`, or holds a password; the line begins with `--on`.
    """
    if address.startswith("ssh://"):
        SshAddress.parse(address)
    elif address.startswith("adb://"):
        AdbAddress.parse(address)
    elif address.startswith(TRACKER):
        from .tvm_rpc import TrackerAddress

        TrackerAddress.parse(address)
    elif address not in (HERE, EMULATED):
        raise unknown_address(address)


def unknown_address(address: str) -> InputError:
    """Return the error for an address of another kind."""
    return InputError(f"--on {address!r}: not a known kind of address; write {ADDRESSES}")


def open_link(address: str, device: DeviceOptions) -> DeviceLink:
    """Open the link of an ssh:// or adb:// address; raises InputError and LinkLost."""
    if address.startswith("adb://"):
        return AdbLink(AdbAddress.parse(address))
    return SshLink(SshAddress.parse(address), device.ssh_options)


def require_reachable(
    address: str, runtimes: Iterable[str], device: DeviceOptions | None = None
) -> None:
    """Check that a device responds and has what files of these runtimes need. Nothing is sent.

    Args:
        address: See `measure_on`.
        runtimes: The runtimes of the files that will be measured there.
        device: How to reach the device, and what to run there.

    Raises:
        InputError: The address is invalid, the device or its tracker refuses the login or lacks
            Python, a runtime or a board.
        LinkLost: The device does not respond.
    """
    require_address(address)
    names = sorted(set(runtimes))
    if address.startswith(TRACKER):
        _require_boards(address, names)
    elif address not in (HERE, EMULATED):
        _require_device(address, names, device or DeviceOptions())


def _require_boards(address: str, runtimes: list[str]) -> None:
    from .tvm_rpc import TrackerAddress
    from .tvm_tracker import free_boards

    others = [name for name in runtimes if name != "tvm"]
    if others:
        raise InputError(
            f"{address}: TVM's boards run TVM artifacts only, and none of {', '.join(others)}; "
            "leave these runtimes out, or measure over ssh"
        )
    tracker = TrackerAddress.parse(address)
    free_boards(tracker.host, tracker.port, tracker.key)


def _require_device(address: str, runtimes: list[str], device: DeviceOptions) -> None:
    from .python_run import probe, require_python

    link = open_link(address, device)
    try:
        parent = device.folder or link.default_folder()
        found = probe(link, parent, device.python, runtimes)
        # The C++ runner is sent where there is no Python; it runs ONNX Runtime alone.
        native = device.runner == "native" or (device.runner == "auto" and not found.has_python)
        if not native or runtimes != ["onnxruntime"]:
            require_python(link, found, device.python, runtimes)
    finally:
        link.close()
