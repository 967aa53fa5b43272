"""`vitrim doctor`: what is installed, what is missing, and what the missing parts would enable."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer
from rich.markup import escape

from ..core.console import show
from ..targets.catalog import targets_here
from ..targets.detect import detect_host
from ..targets.instruction_sets import machine_name

State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the result; `needed` marks what `vitrim run` cannot work without."""

    name: str
    state: State
    detail: str
    needed: bool = False


# (distribution, module, needed, purpose)
PACKAGES = (
    ("torch", "torch", True, "training and compression"),
    ("timm", "timm", True, "models, augmentation and schedules"),
    ("onnx", "onnx", True, "export"),
    ("onnxscript", "onnxscript", True, "export from torch"),
    ("onnxsim", "onnxsim", True, "simplifying exported graphs"),
    ("onnxruntime", "onnxruntime", True, "running and measuring artifacts"),
    ("datasets", "datasets", True, "data sets of the Hugging Face hub"),
    ("matplotlib", "matplotlib", True, "plots"),
    (
        "apache-tvm",
        "tvm",
        False,
        "compiling for targets without ONNX Runtime (pip install 'vitrim[tvm]')",
    ),
    ("openvino", "openvino", False, "artifacts for OpenVINO (pip install openvino)"),
    ("ncnn", "ncnn", False, "artifacts for ncnn (pip install ncnn)"),
    (
        "ziglang",
        "ziglang",
        False,
        "compiling for this machine and for ARM without g++ (pip install 'vitrim[zig]')",
    ),
    ("torchvision", "torchvision", True, "the transforms of timm"),
    ("transformers", "transformers", False, "reading ViTs of the transformers library"),
    (
        "torch-pruning",
        "torch_pruning",
        False,
        "the comparison with Torch-Pruning (pip install 'vitrim[benchmarks]')",
    ),
)
PROGRAMS = (
    (
        ("chromium", "chromium-browser", "google-chrome"),
        "the tests of reports in a browser (Debian: chromium)",
    ),
    (("ssh",), "measuring on another machine (Debian: openssh-client)"),
    (("g++", "c++"), "the native runner (Debian: g++)"),
    (("cmake",), "building the native runner (Debian: cmake)"),
    (
        ("aarch64-linux-gnu-g++",),
        "cross-compiling the native example for ARM (Debian: g++-aarch64-linux-gnu)",
    ),
)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def doctor() -> None:
    """List what is installed, one per line, and what the missing parts would enable.

    The exit code is 1 if something that vitrim needs is missing or broken.

    [bold]Example[/bold]

      vitrim doctor
    """
    marks = {
        "ok": "[green]ok     [/green]",
        "missing": "[yellow]missing[/yellow]",
        "broken": "[red]broken [/red]",
    }
    failed = False
    for finding in examine():
        line = f"{marks[finding.state]} {finding.name}: {escape(finding.detail)}"
        show(line, markup=True)
        failed |= finding.needed and finding.state != "ok"
    if failed:
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Yield every finding, the machine first."""
    yield Finding("machine", "ok", _machine())
    yield _processor()
    yield _python()
    for distribution, module, needed, purpose in PACKAGES:
        yield _package(distribution, module, needed, purpose)
    yield _matching_builds()
    yield _gpu()
    yield _energy()
    for names, purpose in PROGRAMS:
        found = next((path for path in map(shutil.which, names) if path), None)
        yield Finding(names[0], "ok" if found else "missing", found or f"would enable {purpose}")
    yield _emulation()
    here = FASHION_MNIST.is_dir()
    yield Finding(
        "Fashion-MNIST",
        "ok" if here else "missing",
        str(FASHION_MNIST)
        if here
        else "would enable the full set without the network (Debian: dataset-fashion-mnist)",
    )
    yield _disk(Path.cwd())


def _machine() -> str:
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = f", {memory_bytes / 2**30:.0f} GiB of memory"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{memory}"


def _processor() -> Finding:
    host = detect_host()
    if not host.features:
        detail = "its instruction sets are unknown; programs for any processor are exported"
        return Finding("processor", "missing", detail)
    saturates = machine_name(host.architecture) == "x86_64" and not host.vector.int8_dot
    weights = "seven bits, since its products saturate" if saturates else "eight bits"
    detail = (
        f"{host.vector.kind} vectors, int8 weights of {weights}; "
        f"runs code for {', '.join(['host', *targets_here()])}"
    )
    return Finding("processor", "ok", detail)


def _python() -> Finding:
    version = platform.python_version()
    if tuple(map(int, version.split(".")[:2])) >= (3, 11):
        return Finding("python", "ok", version, needed=True)
    return Finding("python", "broken", f"{version}, but vitrim needs 3.11 or newer", needed=True)


def _package(distribution: str, module: str, needed: bool, purpose: str) -> Finding:
    # They are not imported, which would take half a minute.
    if importlib.util.find_spec(module) is None:
        detail = f"would enable {purpose}"
        if needed:
            detail = f"needed for {purpose}; pip install {distribution}"
        return Finding(distribution, "missing", detail, needed)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    return Finding(distribution, "ok", f"{version}, {purpose.split(' (')[0]}", needed)


def _matching_builds() -> Finding:
    try:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "torch and torchvision",
            "missing",
            "both are needed; pip install torch torchvision",
            needed=True,
        )
    local = {name: version.partition("+")[2] for name, version in versions.items()}
    if local["torch"] != local["torchvision"]:
        detail = (
            f"torch {versions['torch']} and torchvision {versions['torchvision']} are different "
            "builds; install both from one index"
        )
        return Finding("torch and torchvision", "broken", detail, needed=True)
    return Finding("torch and torchvision", "ok", "matching builds", needed=True)


def _emulation() -> Finding:
    from ..targets.emulation import ready

    found = ready()
    if found is None:
        return Finding(
            "emulation",
            "missing",
            "would enable running ARM artifacts without a board (vitrim targets emulate)",
        )
    versions = [f"{name} {found.versions.get(name)}" for name in ("python", "onnxruntime")]
    return Finding("emulation", "ok", ", ".join([found.name, *versions]))


def _gpu() -> Finding:
    from ..bench.local.options import gpu_providers, why_no_gpu

    reason = why_no_gpu()
    return Finding(
        "GPU",
        "missing" if reason else "ok",
        reason.removeprefix("no GPU is measured here: ") if reason else ", ".join(gpu_providers()),
    )


def _energy() -> Finding:
    from ..bench.local.energy import open_meter

    meter = open_meter()
    if meter is None:
        return Finding(
            "energy",
            "missing",
            "no energy meter is readable (RAPL, which may need root, or an INA sensor); "
            "measurements have no energy",
        )
    meter.close()
    return Finding("energy", "ok", f"{meter.source}, {meter.scope}")


def _disk(folder: Path) -> Finding:
    free_gib = shutil.disk_usage(folder).free / 2**30
    enough = free_gib >= 1.0
    return Finding(
        "disk",
        "ok" if enough else "broken",
        f"{free_gib:.1f} GiB free here" + ("" if enough else "; a run needs about 1 GiB"),
    )
