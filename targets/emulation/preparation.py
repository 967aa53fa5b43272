"""Prepare the emulation of aarch64 programs.

Each part is written under a temporary name and renamed. Parts that exist are kept, so a second call
continues an interrupted one.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...core.errors import InputError
from ...core.progress import Progress
from ...core.staging import recover_all
from ...core.storage import replace_file, replace_folder
from . import debian, wheels
from .debian import RELEASE
from .emulator import RECORD, Emulator, emulation_folder, read_record, record_text

QEMU_VARIABLE = "VITRIM_QEMU_AARCH64"
ROOT_VARIABLE = "VITRIM_AARCH64_ROOT"
# ONNX Runtime 1.28 to 1.31 crashes under qemu 7.2; 10.0 is the oldest one that was tested.
OLDEST_QEMU = (10, 0)
USER_LAND = ("python3", "libstdc++6", "libgomp1")
# Documents and locales, which no program reads here.
LEFT_OUT = (
    *("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"),
    *("usr/share/lintian", "usr/share/bug", "var"),
)
# Runtime -> its distributions, each with the parts of its wheel (all of them where none is named).
# TVM's compiler (240 MB) is left out, since its runtime is enough.
RUNTIMES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "onnxruntime": (("onnxruntime", ()),),
    "tvm": (
        ("apache-tvm-ffi", ()),
        ("typing_extensions", ()),
        ("apache-tvm", ("tvm/lib/libtvm_runtime", "apache_tvm-")),
    ),
}
CHECK = """
import json, platform, sys
import numpy
for name in sys.argv[1:]:
    __import__(name)
print(json.dumps({"machine": platform.machine()}))
"""


def prepare(
    progress: Progress | None = None,
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    folder: Path | None = None,
) -> Emulator:
    """Prepare the emulation, and verify that it runs python3 with the runtimes.

    The first call takes half a minute and 210 MB, later ones less than a second.

    Args:
        progress: Called with the share done (0 to 1) and a text, for every step.
        runtimes: `onnxruntime`, `tvm`; those of earlier calls are kept.
        folder: Where to prepare it, by default `emulation_folder()`.

    Raises:
        InputError: The machine is offline or not Debian, its disk is full, or the emulation does
            not run.
    """
    progress = progress or (lambda share, text: None)
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise InputError(
            f"emulation: no aarch64 runtime called {unknown[0]!r}; "
            f"take one of {', '.join(RUNTIMES)}"
        )
    if platform.machine() in ("aarch64", "arm64"):
        raise InputError(
            "this machine is aarch64 itself and needs no emulation: measure here (--on host)"
        )
    folder = folder or emulation_folder()
    with locked(folder):
        before = read_record(folder)
        qemu, version = _qemu(folder, progress)
        root = _root(folder, progress)
        python = _python(root)
        number = python.name.removeprefix("python")
        earlier = before.versions if before is not None else {}
        kept = [name for name in RUNTIMES if RUNTIMES[name][0][0] in earlier]
        wanted = list(dict.fromkeys([*runtimes, *kept]))
        packages, versions = _packages(folder, number, wanted, progress)
        versions = {"qemu": version, "python": number, **versions}
        found = Emulator(qemu, root, python, packages, versions)
        if found != before:
            progress(0.9, "starting the user land's python3 under qemu")
            _verify(found)
            replace_file(folder / RECORD, record_text(folder, found))
    progress(1.0, "ready")
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a preparation, and remove what an interrupted one left behind.

    Raises InputError on systems other than Linux.
    """
    if sys.platform != "linux":
        raise InputError(
            "aarch64 emulation needs Linux (qemu's user emulation); "
            "measure on the device itself with --on ssh://user@host"
        )
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        recover_all(folder)
        yield


def _qemu(folder: Path, progress: Progress) -> tuple[Path, str]:
    """Return qemu-aarch64 and its version.

    It is the one named by the environment, else one on the PATH that is new enough, else Debian's.
    """
    if named := os.environ.get(QEMU_VARIABLE):
        version = qemu_version(Path(named))
        if version is None:
            raise InputError(
                f"{QEMU_VARIABLE}={named}: not a qemu-aarch64 that runs; "
                "name the program, or unset the variable to download one"
            )
        return Path(named).absolute(), version
    for name in ("qemu-aarch64", "qemu-aarch64-static"):
        on_path = shutil.which(name)
        version = qemu_version(Path(on_path)) if on_path else None
        if on_path and version and tuple(map(int, version.split(".")[:2])) >= OLDEST_QEMU:
            return Path(on_path), version
    final = folder / "qemu" / "qemu-aarch64"
    if not final.is_file():
        host = {"x86_64": "amd64", "AMD64": "amd64"}.get(platform.machine(), platform.machine())
        downloads = folder / "apt-qemu"
        package, *_ = debian.fetch(
            ["qemu-user"],
            host,
            downloads,
            dependencies=False,
            what="qemu",
            progress=_part(progress, 0.0, 0.4),
        )
        with replace_folder(final.parent) as new:
            debian.unpack(package, downloads / "unpacked")
            program = downloads / "unpacked" / "usr" / "bin" / "qemu-aarch64"
            shutil.copy2(program, new / "qemu-aarch64")
        shutil.rmtree(downloads)
    version = qemu_version(final)
    if version is None:
        raise InputError(
            f"{final}: does not run on this machine; "
            f"remove that folder, or name another qemu-aarch64 in {QEMU_VARIABLE}"
        )
    return final, version


def qemu_version(program: Path) -> str | None:
    """Return the version of a qemu-aarch64, such as `10.0.13`; None for any other program."""
    try:
        done = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"qemu-aarch64\S* version (\d+\.\d+[\d.]*)", done.stdout)
    return found[1] if found and done.returncode == 0 else None


def _root(folder: Path, progress: Progress) -> Path:
    """Return the arm64 user land: the one named by the environment, else Debian's packages."""
    if named := os.environ.get(ROOT_VARIABLE):
        if not Path(named).is_dir():
            raise InputError(
                f"{ROOT_VARIABLE}={named}: no such folder; "
                "name the root folder of an aarch64 system, or unset the variable"
            )
        return Path(named).absolute()
    final = folder / f"root-{RELEASE}"
    if not final.is_dir():
        downloads = folder / "apt-root"
        packages = debian.fetch(
            USER_LAND,
            "arm64",
            downloads,
            dependencies=True,
            what="an arm64 user land",
            progress=_part(progress, 0.4, 0.6),
        )
        with replace_folder(final) as new:
            for number, package in enumerate(packages):
                title = package.stem.partition("_")[0]
                share = 0.6 + 0.1 * number / len(packages)
                progress(share, f"unpacking the user land: {title}")
                debian.unpack(package, new)
            for name in ("bin", "lib", "sbin"):
                # These links belong to base-files, which is not installed; the loader of programs
                # is /lib/ld-linux-aarch64.so.1.
                if not (new / name).exists():
                    (new / name).symlink_to(f"usr/{name}")
            for name in LEFT_OUT:
                shutil.rmtree(new / name, ignore_errors=True)
        shutil.rmtree(downloads)
    return final


def _python(root: Path) -> Path:
    found = [
        path for path in root.glob("usr/bin/python3.*") if re.fullmatch(r"python3\.\d+", path.name)
    ]
    if not found:
        raise InputError(
            f"{root}: has no usr/bin/python3.X; "
            f"install python3 into that root folder, or name another one in {ROOT_VARIABLE}"
        )
    return max(found, key=lambda path: int(path.name.removeprefix("python3.")))


def _packages(
    folder: Path, python: str, runtimes: Sequence[str], progress: Progress
) -> tuple[tuple[Path, ...], dict[str, str]]:
    wanted = [("numpy", ()), *(part for name in runtimes for part in RUNTIMES[name])]
    folders, versions = [], {}
    for number, (distribution, only) in enumerate(wanted):
        version = wheels.wanted_version(distribution)
        final = folder / f"python{python}" / f"{distribution}-{version or 'newest'}"
        if not final.is_dir():
            share = 0.7 + 0.2 * number / len(wanted)
            progress(share, f"downloading the aarch64 wheel of {distribution}")
            wheels.install(distribution, version, python, final, only=only)
        folders.append(final)
        versions[distribution] = wheels.unpacked_version(final)
    return tuple(folders), versions


def _verify(emulator: Emulator) -> None:
    """Raise InputError where the user land's python3 cannot import the prepared runtimes."""
    modules = [
        module
        for name, module in (("onnxruntime", "onnxruntime"), ("apache-tvm-ffi", "tvm_ffi"))
        if name in emulator.versions
    ]
    done = subprocess.run(
        emulator.command(["python3", "-c", CHECK, *modules]),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    output = json.loads(done.stdout) if done.returncode == 0 else {}
    if output.get("machine") != "aarch64":
        reason = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        raise InputError(
            f"{emulator.qemu.name} {emulator.versions['qemu']} cannot run the user land's python3: "
            f"{reason}; name a qemu 10 or newer in {QEMU_VARIABLE}"
        )


def _part(progress: Progress, low: float, high: float) -> Progress:
    return lambda share, text: progress(low + (high - low) * share, text)
