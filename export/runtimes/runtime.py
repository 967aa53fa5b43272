"""What a runtime besides ONNX Runtime does for an export: turn one proven source into the files
that it opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import onnx
from torch import nn

from ...compress.network.modules.model import CompactModel
from ..artifact import Array, Batch, Parity, Precision
from ..forms import Form
from ..parity import Probe

Role = Literal["model", "weights", "operators", "source", "other"]


@dataclass(frozen=True)
class Source:
    """What is to be written, in every shape that a converter may read it from.

    model: the torch module, in eval mode. compact: the same as `CompactModel`, where `lift` reads
    it. graph: ONNX in the standard's own operators, in the runtime's form, already proven against
    torch. shape: (channels, height, width). target: a profile's name. images: float32 (count,
    *shape) for calibration, None where nobody gave any. probe: what parity is asked with. options:
    the runtime's own settings, as the caller gave them.
    """

    model: nn.Module
    compact: CompactModel | None
    graph: onnx.ModelProto
    shape: tuple[int, int, int]
    batch: Batch
    target: str
    threads: int
    precision: Precision
    images: Array | None
    probe: Probe
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What lies in the folder now.

    main: the path of the file that the engine opens; files: (path, role) of the others (`weights`:
    what the device needs besides main), relative to the folder. session: settings that the engine
    gets with every job. stages: parity of steps on the way. command: what runs a Python file where
    this one cannot (an emulator, another interpreter). unasked: why the result cannot be asked on
    this machine, if it cannot. where: the first inner value of the written file that differs from
    the source's by more than a tolerance, in words, or None; absent for runtimes that show nothing
    of their inside.
    """

    main: str
    files: tuple[tuple[str, Role], ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[Parity, ...] = ()
    command: tuple[str, ...] | None = None
    unasked: str | None = None
    where: Callable[[Source, Path, float], str | None] | None = None


class Runtime(Protocol):
    """One runtime. The module `<name>_runtime.py` of this folder holds it as RUNTIME, and
    `vitrim.runtimes.<name>_engine` opens what it writes.

    extra: what `pip install 'vitrim[...]'` is given. precisions: those it writes. dynamic_batch:
    whether one file takes any number of images. form: how the graph is written for it unless the
    caller says; None where the torch module itself is converted.
    """

    name: str
    extra: str
    precisions: tuple[str, ...]
    dynamic_batch: bool
    form: Form | None

    def missing(self) -> str | None:
        """Why it cannot be used here, in one line with what to install, or None."""
        ...

    def write(self, source: Source, folder: Path) -> Written:
        """Write the files of the artifact into an empty folder. Errors: InputError, one line."""
        ...
