"""Get what runs aarch64 programs here: each part is written aside and renamed, those that are there
are kept, so a broken run goes on.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import InputError
from ...core.storage import replace_file, replace_folder
from . import debian, wheels
from .debian import RELEASE, Progress
from .emulator import RECORD, Emulator, read, record
from .place import locked, place

QEMU_VARIABLE = "VITRIM_QEMU_AARCH64"
ROOT_VARIABLE = "VITRIM_AARCH64_ROOT"
# qemu 7.2 crashes ONNX Runtime 1.28 to 1.31; 10.0 is the oldest that was seen to run them.
OLDEST_QEMU = (10, 0)
USER_LAND = ("python3", "libstdc++6", "libgomp1")
# Documents and locales, which no program here reads.
LEFT_OUT = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/bug",
    "var",
)
# Runtime -> (distribution, the parts of its wheel, all where none is named). TVM's compiler is 240
# MB and stays away: the runtime is enough.
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
    """Prepare the emulation in `folder` (the default: see `place`), and prove that it starts
    python3 with the runtimes in it.

    Takes half a minute and 210 MB the first time, less than a second of checking later. runtimes:
    `onnxruntime`, `tvm`; what was prepared before stays. progress(share, text) is told of every
    step. Errors: InputError, one line with the way out: offline, not Debian, disk full.
    """
    tell = progress or (lambda share, text: None)
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise InputError(
            f"emulation: no aarch64 runtime called {unknown[0]!r}; take one of {', '.join(RUNTIMES)}"
        )
    if platform.machine() in ("aarch64", "arm64"):
        raise InputError(
            "this machine is aarch64 itself and needs no emulation: measure and run here (--on host)"
        )
    home = folder or place()
    with locked(home):
        before = read(home)
        qemu, version = _qemu(home, tell)
        root = _root(home, tell)
        python = _python(root)
        number = python.name.removeprefix("python")
        wanted = [
            *runtimes,
            *(
                name
                for name in RUNTIMES
                if before is not None and RUNTIMES[name][0][0] in before.versions
            ),
        ]
        packages, versions = _packages(home, number, list(dict.fromkeys(wanted)), tell)
        found = Emulator(
            qemu, root, python, packages, {"qemu": version, "python": number, **versions}
        )
        if found != before:
            tell(0.9, "starting the user land's python3 under qemu")
            _prove(found)
            replace_file(home / RECORD, record(home, found))
    tell(1.0, "ready")
    return found


def _qemu(home: Path, tell: Progress) -> tuple[Path, str]:
    """qemu-aarch64 and its version: the one that is named, else one on the PATH that is new enough,
    else Debian's, fetched.
    """
    if named := os.environ.get(QEMU_VARIABLE):
        version = qemu_version(Path(named))
        if version is None:
            raise InputError(
                f"{QEMU_VARIABLE}={named}: not a qemu-aarch64 that runs; name the program, or unset the variable to have it fetched"
            )
        return Path(named).absolute(), version
    for name in ("qemu-aarch64", "qemu-aarch64-static"):
        on_path = shutil.which(name)
        version = qemu_version(Path(on_path)) if on_path else None
        if on_path and version and tuple(map(int, version.split(".")[:2])) >= OLDEST_QEMU:
            return Path(on_path), version
    final = home / "qemu" / "qemu-aarch64"
    if not final.is_file():
        host = {"x86_64": "amd64", "AMD64": "amd64"}.get(platform.machine(), platform.machine())
        aside = home / "apt-qemu"
        package = next(
            iter(
                debian.fetch(
                    ["qemu-user"],
                    host,
                    aside,
                    dependencies=False,
                    what="qemu",
                    progress=_part(tell, 0.0, 0.4),
                )
            )
        )
        with replace_folder(final.parent, overwrite=True) as folder:
            debian.unpack(package, aside / "unpacked")
            shutil.copy2(
                aside / "unpacked" / "usr" / "bin" / "qemu-aarch64", folder / "qemu-aarch64"
            )
        shutil.rmtree(aside)
    version = qemu_version(final)
    if version is None:
        raise InputError(
            f"{final}: does not run on this machine; remove that folder, or name another qemu-aarch64 in {QEMU_VARIABLE}"
        )
    return final, version


def qemu_version(program: Path) -> str | None:
    """`10.0.13` of a qemu-aarch64; None for what is no such program."""
    try:
        done = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"qemu-aarch64\S* version (\d+\.\d+[\d.]*)", done.stdout)
    return found[1] if found and done.returncode == 0 else None


def _root(home: Path, tell: Progress) -> Path:
    """The arm64 user land: the one that is named, else Debian's python3 and what it depends on,
    unpacked.
    """
    if named := os.environ.get(ROOT_VARIABLE):
        if not Path(named).is_dir():
            raise InputError(
                f"{ROOT_VARIABLE}={named}: no such folder; name the root folder of an aarch64 system, or unset the variable"
            )
        return Path(named).absolute()
    final = home / f"root-{RELEASE}"
    if not final.is_dir():
        aside = home / "apt-root"
        packages = debian.fetch(
            USER_LAND,
            "arm64",
            aside,
            dependencies=True,
            what="an arm64 user land",
            progress=_part(tell, 0.4, 0.6),
        )
        with replace_folder(final) as folder:
            for number, package in enumerate(packages):
                tell(
                    0.6 + 0.1 * number / len(packages),
                    f"unpacking the user land: {package.stem.partition('_')[0]}",
                )
                debian.unpack(package, folder)
            for name in ("bin", "lib", "sbin"):
                # Debian's base-files has these links; programs name their loader as
                # /lib/ld-linux-aarch64.so.1.
                if not (folder / name).exists():
                    (folder / name).symlink_to(f"usr/{name}")
            for name in LEFT_OUT:
                shutil.rmtree(folder / name, ignore_errors=True)
        shutil.rmtree(aside)
    return final


def _python(root: Path) -> Path:
    found = [
        path for path in root.glob("usr/bin/python3.*") if re.fullmatch(r"python3\.\d+", path.name)
    ]
    if not found:
        raise InputError(
            f"{root}: has no usr/bin/python3.X; install python3 into that root folder, or name another one in {ROOT_VARIABLE}"
        )
    return max(found, key=lambda path: int(path.name.removeprefix("python3.")))


def _packages(
    home: Path, python: str, runtimes: Sequence[str], tell: Progress
) -> tuple[tuple[Path, ...], dict[str, str]]:
    wanted = [("numpy", ()), *(part for name in runtimes for part in RUNTIMES[name])]
    folders, versions = [], {}
    for number, (distribution, only) in enumerate(wanted):
        version = wheels.wanted_version(distribution)
        final = home / f"python{python}" / f"{distribution}-{version or 'newest'}"
        if not final.is_dir():
            tell(
                0.7 + 0.2 * number / len(wanted), f"downloading the aarch64 wheel of {distribution}"
            )
            wheels.install(distribution, version, python, final, only=only)
        folders.append(final)
        versions[distribution] = wheels.unpacked_version(final)
    return tuple(folders), versions


def _prove(emulator: Emulator) -> None:
    """Errors: InputError where the user land's python3 does not start, or cannot import what was
    prepared.
    """
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
    told = json.loads(done.stdout) if done.returncode == 0 else {}
    if told.get("machine") != "aarch64":
        said = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        raise InputError(
            f"{emulator.qemu.name} {emulator.versions['qemu']} cannot run the user land's python3: {said}; name a qemu 10 or newer in {QEMU_VARIABLE}"
        )


def _part(tell: Progress, low: float, high: float) -> Progress:
    return lambda share, text: tell(low + (high - low) * share, text)
