"""An adb device on the loopback interface: Android's adbd in Debian's build, and an adb server."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from loopback_ssh import free_port

# The first release of Debian with the package. On older machines it is downloaded from there with
# its libraries, and unpacked without being installed.
RELEASE = "trixie"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitrim" / "adbd"


def adbd_command() -> list[str] | None:
    """Return the command that starts adbd; None where it is not available."""
    if found := shutil.which("adbd"):
        return [found]
    root = CACHE / "root"
    if not root.is_dir():
        try:
            _fetch(root)
        except Exception:
            return None
    libraries = sorted(root.glob("usr/lib/*-linux-gnu"))
    loaders = [path for folder in libraries for path in folder.glob("ld-linux-*")]
    if not loaders:
        return None
    folders = ":".join(str(path) for folder in libraries for path in (folder, folder / "android"))
    program = root / "usr/lib/android-sdk/platform-tools/adbd"
    return [str(loaders[0]), "--library-path", folders, str(program)]


def _fetch(root: Path) -> None:
    from vitrim.core.storage import replace_folder
    from vitrim.targets.emulation import debian

    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    packages = debian.fetch(
        ["adbd"],
        machine,
        CACHE / "apt",
        dependencies=True,
        what="adbd",
        progress=lambda share, text: None,
        release=RELEASE,
    )
    with replace_folder(root, overwrite=True) as new_root:
        for package in packages:
            debian.unpack(package, new_root)
    shutil.rmtree(CACHE / "apt")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def adb_device() -> Iterator[str]:
    """Yield the address of a running device, with an adb server that ends with it."""
    import pytest

    if shutil.which("adb") is None:
        pytest.skip("adb is not installed (Debian: apt-get install adb)")
    if os.geteuid() != 0:
        pytest.skip("adbd runs as root only")
    command = adbd_command()
    if command is None:
        pytest.skip("adbd is not available here (Debian 13: apt-get install adbd)")
    port = free_port()
    own_server = {"ANDROID_ADB_SERVER_PORT": str(free_port())}
    before = {key: os.environ.get(key) for key in own_server}
    os.environ.update(own_server)
    device = subprocess.Popen(
        [*command],
        env={**os.environ, "ADBD_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # On a machine that does other work, many seconds.
        deadline = time.monotonic() + 120
        while not _listens(port):
            assert device.poll() is None, f"adbd ended with {device.returncode}"
            assert time.monotonic() < deadline, "adbd does not listen"
            time.sleep(0.1)
        # The first command starts the adb server, which the tests then find.
        subprocess.run(["adb", "start-server"], capture_output=True, timeout=120, check=True)
        yield f"adb://127.0.0.1:{port}"
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True, timeout=20)
        device.terminate()
        device.wait(timeout=10)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
