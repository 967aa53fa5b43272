"""The interface of runtimes besides ONNX Runtime: convert one verified source into files."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import onnx
from torch import nn

from ...compress.network.modules.model import CompactModel, build
from ...compress.network.named_outputs import OutputSpec
from ...compress.tokens.buckets import BucketedModel
from ...core.errors import InputError, UnsupportedModel
from ..forms import Form
from ..manifest import Array, Batch, Parity, Precision
from ..parity import Probe
from .limits import FIXED_BATCH, Limit, only_precisions

Role = Literal["model", "weights", "operators", "source", "other"]

MakeGraph = Callable[[], onnx.ModelProto]


@dataclass(frozen=True)
class Source:
    """What an export converts, in every form that a converter reads.

    Attributes:
        model: The torch module, in eval mode.
        compact: The same as a `CompactModel`; None where `lift` does not support the module.
        make_graph: Returns ONNX in standard operators, in the runtime's form, equal to torch.
        shape: (channels, height, width).
        batch: The batch size.
        target: A profile's name.
        threads: For how many threads code is compiled.
        precision: The number format.
        images: Calibration images float32 (count, *shape), or None.
        probe: The inputs on which parity is computed.
        options: The runtime's own settings, as the caller gave them.
        outputs: The named outputs; empty for the logits alone.
        buckets: The same with buckets, for runtimes that run them; `compact` then has the largest.
    """

    model: nn.Module
    compact: CompactModel | None
    make_graph: MakeGraph
    shape: tuple[int, int, int]
    batch: Batch
    target: str
    threads: int
    precision: Precision
    images: Array | None
    probe: Probe
    options: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[OutputSpec, ...] = ()
    buckets: BucketedModel | None = None

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """ONNX in standard operators; made when a converter reads it first."""
        return self.make_graph()

    def inference_model(self, runtime: str) -> CompactModel:
        """The model for converters that read a torch module.

        Its last block computes only the tokens that the head reads, which changes no output.

        Args:
            runtime: The runtime's name, for the message.

        Raises:
            UnsupportedModel: `lift` does not support the model.
        """
        compact = self.compact
        if compact is None:
            raise UnsupportedModel(
                f"runtime {runtime!r} converts models that vitrim can lift, "
                f"which {type(self.model).__name__} is not; export for onnxruntime"
            )
        architecture = compact.architecture
        if not architecture.pooled_prefix or architecture.last_queries:
            return compact
        shorter = architecture.model_copy(update={"last_queries": True})
        return build(shorter, compact.state_dict()).eval()


@dataclass(frozen=True)
class RuntimeFiles:
    """The files that a runtime wrote into a folder, and how to open them.

    Attributes:
        main: The file that the engine opens, relative to the folder.
        files: (path, role) of the other files; `weights` are those that the device needs too.
        notes: One line each, for the manifest.
        versions: Of the tools that wrote the files.
        session: Settings that the engine gets with every job.
        needs: The instruction sets that the files' code uses, see `CpuFeatures`.
        assumes: Those without which the outputs would be wrong.
        stages: Parity of intermediate results.
        command: What runs a Python file where the running interpreter cannot open the files (an
            emulator, another interpreter).
        parity_skipped: Why this machine cannot run the files; None if it can.
        choices: Reads which tokens the files' selections choose: (main file, names of the choices,
            images) -> one array (images, kept) for each, or None. Absent for runtimes that do not
            show inner values; they are assumed to choose as the model does.
        engine_choices: Whether the engine reads them instead, see `Engine.infer_choices`, also
            under `command`.
        first_difference: Locates the first inner value that differs from the source's by more than
            a tolerance: (source, main file, tolerance) -> a description, or None. Absent for
            runtimes that do not show inner values.
    """

    main: str
    files: tuple[tuple[str, Role], ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()
    stages: tuple[Parity, ...] = ()
    command: tuple[str, ...] | None = None
    parity_skipped: str | None = None
    choices: Callable[[Path, Sequence[str], Array], tuple[Array, ...] | None] | None = None
    engine_choices: bool = False
    first_difference: Callable[[Source, Path, float], str | None] | None = None


class Runtime(Protocol):
    """One runtime: `<name>_runtime.py` defines it as RUNTIME.

    `vitrim.runtimes.<name>_engine` opens the files that it writes.

    Attributes:
        name: The runtime's name.
        extra: The extra of `pip install 'vitrim[...]'` that installs it.
        precisions: The precisions that it exports.
        dynamic_batch: Whether one file takes any number of images.
        form: The default form of the graph; None where the torch module itself is converted.
        options: The names of its own settings.
        limits: What it cannot do besides other precisions and free batches.
    """

    name: str
    extra: str
    precisions: tuple[str, ...]
    options: tuple[str, ...]
    dynamic_batch: bool
    form: Form | None
    limits: tuple[Limit, ...]

    def missing(self) -> str | None:
        """Why the runtime cannot be used here and what to install, in one line, or None."""
        ...

    def write(self, source: Source, folder: Path) -> RuntimeFiles:
        """Write the files of the artifact into an empty folder.

        Raises:
            InputError: The conversion failed; the message is one line.
        """
        ...


def limits_of(runtime: Runtime) -> tuple[Limit, ...]:
    """All limits of a runtime, those of its attributes first."""
    batch = () if runtime.dynamic_batch else (FIXED_BATCH,)
    return (only_precisions(runtime.precisions), *batch, *runtime.limits)


def require_options(runtime: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InputError for a setting that the runtime does not have; it names the nearest."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"it has {', '.join(known)}" if known else "it has none; leave it out"
            hint = f"did you mean {near[0]!r}?" if near else hint
            raise InputError(f"runtime {runtime}: no option {key!r}; {hint}")


def missing_module(runtime: str, extra: str, *modules: str) -> str | None:
    """Why a runtime cannot be used here, or None.

    Args:
        runtime: The runtime's name.
        extra: The extra that installs it.
        modules: The modules that must be importable.

    Returns:
        A line that names the first missing module and the extra.
    """
    for module in modules:
        try:
            if importlib.util.find_spec(module) is not None:
                continue
        except (ImportError, ValueError):
            pass
        return (
            f"runtime {runtime!r}: {module} is not installed; "
            f"install it with `pip install 'vitrim[{extra}]'`"
        )
    return None
