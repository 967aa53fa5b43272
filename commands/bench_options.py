"""The options of `vitrim bench`: where artifacts run, how they are timed, what else is measured."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..core.errors import InputError

if TYPE_CHECKING:
    from ..bench.local.options import DeviceOptions, MeasureOptions

WHERE, HOW, MORE = "Where it runs", "How it is measured", "What else is measured"
TIME_LIMIT_S, COST_TABLE_TIME_LIMIT_S = 60.0, 120.0
PROFILE_RUNS = 20
PROVIDERS = {
    "cpu": "CPU",
    "cuda": "CUDA",
    "tensorrt": "Tensorrt",
    "openvino": "OpenVINO",
    "coreml": "CoreML",
    "xnnpack": "Xnnpack",
    "qnn": "QNN",
}
BLOCK_KEYS = (
    *("tokens", "embed", "heads", "head_width", "ffn"),
    *("depth", "patch", "channels", "classes"),
)
COST_TABLES = "A cost table"

On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="ADDRESS",
        help="`host`, ssh://user@host[:port], adb://SERIAL, tvm-rpc://tracker:port/key, or "
        "qemu-aarch64 (emulated: outputs, but no latency).",
        rich_help_panel=WHERE,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        help="The kind of machine: a target's name or TOML (vitrim targets list).",
        rich_help_panel=WHERE,
    ),
]
Python = Annotated[
    str,
    typer.Option(
        "--python",
        help="Python interpreter on the device, with numpy and the runtime.",
        rich_help_panel=WHERE,
    ),
]
Runner = Annotated[
    Literal["auto", "python", "native"],
    typer.Option(
        "--runner",
        help="The runner on the device; auto: the C++ runner where there is no Python.",
        rich_help_panel=WHERE,
    ),
]
RunnerFile = Annotated[
    Path | None,
    typer.Option(
        "--runner-file",
        help="A native runner that you built for the device.",
        show_default=False,
        rich_help_panel=WHERE,
    ),
]
RuntimeLibrary = Annotated[
    Path | None,
    typer.Option(
        "--runtime-library",
        help="libonnxruntime.so for the device.",
        show_default=False,
        rich_help_panel=WHERE,
    ),
]
SshOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ssh-option",
        help="Options for ssh, such as -i key or -F config; may be repeated.",
        show_default=False,
        rich_help_panel=WHERE,
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="Threads of the runtime.", rich_help_panel=HOW)
]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="N[,N…]",
        help="Images per inference; several sizes are swept. Needs a dynamic batch.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Bucket = Annotated[
    int | None,
    typer.Option(
        "--bucket",
        metavar="N",
        help="Measure one bucket of an artifact with buckets: the patches that every image keeps. "
        "Absent: all of them.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Pin = Annotated[
    str | None,
    typer.Option(
        "--pin",
        metavar="CPUS",
        help="CPUs to pin the process to, such as 0 or 4-7 or 0,2.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Spinning = Annotated[
    bool,
    typer.Option(
        "--spinning",
        help="Threads spin while they wait within an inference: faster, at more energy.",
        rich_help_panel=HOW,
    ),
]
Provider = Annotated[
    list[str] | None,
    typer.Option(
        "--provider",
        help="Execution provider of onnxruntime, such as cuda; may be repeated, preferred first.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Copies = Annotated[
    bool,
    typer.Option(
        "--copies/--no-copies",
        help="On a GPU: include the copies of images to it and of logits from it.",
        rich_help_panel=HOW,
    ),
]
CudaGraph = Annotated[
    bool,
    typer.Option(
        "--cuda-graph",
        help="On a GPU: replay a recorded graph instead of launching each kernel.",
        rich_help_panel=HOW,
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        help="Time limit in seconds of the timing of all artifacts together. Default: 60.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Dataset = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        help="An .npz with `images` and `labels`: measure top-1 in the process that is timed.",
        show_default=False,
        rich_help_panel=MORE,
    ),
]
DatasetLimit = Annotated[
    int | None,
    typer.Option(
        "--dataset-limit",
        min=1,
        help="Maximum number of images of --dataset.",
        show_default=False,
        rich_help_panel=MORE,
    ),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Profile by operator and by block; with --out also as a picture.",
        rich_help_panel=MORE,
    ),
]
CostTableFile = Annotated[
    Path | None,
    typer.Option(
        "--cost-table",
        metavar="FILE",
        help="Instead of artifacts, export and measure networks of several sizes, fit the costs "
        "of their sub-layers for latency budgets (vitrim compact --latency-ms), and report the "
        "errors. The same command continues after an interruption.",
        show_default=False,
        rich_help_panel=COST_TABLES,
    ),
]
Block = Annotated[
    str,
    typer.Option(
        "--block",
        help="Sizes of the dense network; smaller ones are measured, too. depth, patch, channels "
        "and classes describe its ends; default: the quickstart's model.",
        rich_help_panel=COST_TABLES,
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="MODEL",
        help="Take the sizes of this saved model, whose cuts then check the table, instead of "
        "--block.",
        show_default=False,
        rich_help_panel=COST_TABLES,
    ),
]
TableRuntime = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="The runtime of the cost table: onnxruntime, tvm, openvino, ...",
        rich_help_panel=COST_TABLES,
    ),
]
TablePrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="The precision of the cost table: fp32, int8, int8-static, ...",
        rich_help_panel=COST_TABLES,
    ),
]
MostPoints = Annotated[
    int,
    typer.Option(
        "--points",
        help="Largest number of networks for the fit and its error. It stops earlier when those "
        "held out of the fit are predicted within 2 % (median) and 6 % (95th percentile); if they "
        "are not, the same command with a larger number and --overwrite continues.",
        rich_help_panel=COST_TABLES,
    ),
]
Checks = Annotated[
    int,
    typer.Option(
        "--checks",
        min=0,
        help="Number of random compact networks that check the sums of sub-layers, and from which "
        "a correction is learned.",
        rich_help_panel=COST_TABLES,
    ),
]
DEFAULT_BLOCK = (
    "tokens=50,embed=128,heads=4,head_width=32,ffn=512,depth=6,patch=4,channels=1,classes=10"
)


@dataclass(frozen=True)
class Where:
    """The machine that runs the artifacts, and how it is reached."""

    on: On = "host"
    target: Target = "host"
    python: Python = "python3"
    runner: Runner = "auto"
    runner_file: RunnerFile = None
    runtime_library: RuntimeLibrary = None
    ssh_option: SshOption = None

    def device(self) -> DeviceOptions:
        """The options of the device."""
        from ..bench.local.options import DeviceOptions

        return DeviceOptions(
            python=self.python,
            runner=self.runner,
            runner_file=self.runner_file,
            runtime_library=self.runtime_library,
            ssh_options=tuple(
                option for text in self.ssh_option or () for option in shlex.split(text)
            ),
        )


@dataclass(frozen=True)
class How:
    """How artifacts are timed."""

    threads: Threads = 1
    batch: Batch = None
    bucket: Bucket = None
    pin: Pin = None
    spinning: Spinning = False
    provider: Provider = None
    copies: Copies = True
    cuda_graph: CudaGraph = False
    time_limit_s: TimeLimit = None

    def batch_sizes(self) -> list[int | None]:
        """The sizes of `--batch` in order, or [None] without it.

        Raises:
            InputError: The text has another form.
        """
        if self.batch is None:
            return [None]
        sizes = [size.strip() for size in self.batch.split(",")]
        if not all(size.isdigit() and int(size) >= 1 for size in sizes):
            raise InputError(
                f"--batch {self.batch!r}: expected whole numbers above 0, such as 1,4,16"
            )
        return list(dict.fromkeys(int(size) for size in sizes))


@dataclass(frozen=True)
class What:
    """What is measured besides latency and memory."""

    dataset: Dataset = None
    dataset_limit: DatasetLimit = None
    profile: Profile = False


@dataclass(frozen=True)
class Table:
    """The cost table that is measured in place of artifacts."""

    cost_table: CostTableFile = None
    block: Block = DEFAULT_BLOCK
    like: Like = None
    runtime: TableRuntime = "onnxruntime"
    precision: TablePrecision = "fp32"
    points: MostPoints = 72
    checks: Checks = 20

    def block_sizes(self) -> dict[str, int]:
        """The sizes of `--block` by name.

        Raises:
            InputError: The text has another form.
        """
        found: dict[str, int] = {}
        for item in self.block.split(","):
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in BLOCK_KEYS or not value.isdigit() or int(value) < 1:
                form = ", ".join(f"{name}=N" for name in BLOCK_KEYS)
                raise InputError(
                    f"--block {self.block!r}: {item.strip()!r} is not valid; write {form}"
                )
            found[key] = int(value)
        return found


def measure_options(how: How, what: What) -> MeasureOptions:
    """The options of a measurement of artifacts.

    Raises:
        InputError: A value is out of range or has another form.
    """
    from ..bench.local.options import CPU, MeasureOptions

    return MeasureOptions(
        threads=how.threads,
        dataset=what.dataset,
        dataset_limit=what.dataset_limit,
        time_limit_s=TIME_LIMIT_S if how.time_limit_s is None else how.time_limit_s,
        bucket=how.bucket,
        pinning=_cpus(how.pin),
        spinning=how.spinning,
        providers=tuple(map(_provider, how.provider)) if how.provider else (CPU,),
        copies=how.copies,
        cuda_graph=how.cuda_graph,
        profile_runs=PROFILE_RUNS if what.profile else 0,
    )


def _cpus(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", item)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(
                f"--pin {text!r}: {item.strip()!r} is no CPU or range of CPUs; "
                "write 0 or 4-7 or 0,2"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(found))


def _provider(name: str) -> str:
    """The name that onnxruntime uses, from it or from the short form."""
    short = PROVIDERS.get(name.lower())
    return name if short is None else f"{short}ExecutionProvider"
