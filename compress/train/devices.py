"""Where a training runs, and in which precision: CPU, CUDA or MPS; fp32, bf16 or fp16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from .optimizers import cpu_matrix_dtype

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Where a training runs, and how it computes there. Weights are fp32 in every precision.

    Attributes:
        device: The device of the model and the batches.
        precision: The type of matrix products, by autocast. Validation is always in fp32.
        compile: Compile the forward pass with `torch.compile`.
        channels_last: Batches are in the memory format channels-last, which GPUs prefer for the
            patch embedding.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: PrecisionName = "fp32"
    compile: bool = False
    channels_last: bool = False

    @property
    def waits(self) -> bool:
        """Whether reading a value from the device costs nothing, as on a CPU."""
        return self.device.type == "cpu"

    @property
    def short(self) -> bool:
        """Whether autocast computes products in bfloat16 or float16."""
        return self.precision != "fp32"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if not self.short:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """The scaler of gradients; it is disabled, and changes nothing, except with fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def images(self, images: Tensor) -> Tensor:
        """A batch (B, C, H, W) on the device; the copy to a GPU is asynchronous."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.moved(images)

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor on the device."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def choose_placement(
    device: DeviceName = "auto",
    precision: PrecisionName = "fp32",
    *,
    compile: bool = False,
    channels_last: bool = False,
    local_rank: int = 0,
) -> tuple[Placement, str | None]:
    """Choose a device of this machine.

    Args:
        device: "auto" is CUDA, else MPS, else the CPU; another name must be there.
        precision: "bf16" needs a device with its instructions, "fp16" a GPU. With "auto", a CPU
            without bf16 computes in fp32.
        compile: Compile the forward pass.
        channels_last: The memory format of batches.
        local_rank: Which GPU of the machine, for a process among several.

    Returns:
        The placement, and a line for the user where "auto" found no GPU or no bf16, else None.

    Raises:
        InputError: The device is not there, or cannot compute in this precision.
    """
    options = Placement(compile=compile, channels_last=channels_last)
    kind = _best_device() if device == "auto" else device
    _require_device(kind, local_rank)
    note = None
    if device == "auto" and kind == "cpu":
        note = "no GPU is found (CUDA or MPS); training runs on the CPU"
    if precision == "fp16" and kind == "cpu":
        raise InputError(
            'train.precision = "fp16" needs a GPU, and training runs on the CPU; '
            'set train.precision = "bf16" or "fp32"'
        )
    if precision == "bf16" and not has_bf16(kind):
        if device != "auto" or kind != "cpu":
            raise InputError(
                f'train.precision = "bf16": this {"processor" if kind == "cpu" else kind + " GPU"} '
                'has no bf16 instructions; set train.precision = "fp32"'
                + ("" if kind == "cpu" else ' or "fp16"')
            )
        precision, note = "fp32", f"{note}, in fp32: it has no bf16 instructions"
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    return replace(options, device=place, precision=precision), note


def has_bf16(kind: str) -> bool:
    """Whether a kind of device of this machine has instructions for products in bf16."""
    if kind == "cpu":
        return cpu_matrix_dtype() is torch.bfloat16
    return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _best_device() -> Literal["cpu", "cuda", "mps"]:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _require_device(kind: str, local_rank: int) -> None:
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            built = torch.backends.cuda.is_built()
            why = "finds no GPU" if built else "is built without CUDA"
            raise InputError(
                f'train.device = "cuda": torch {torch.__version__} {why}; '
                'set train.device = "auto", or install a driver and a torch with CUDA'
            )
        if local_rank >= count:
            raise InputError(
                f'train.device = "cuda": {local_rank + 1} processes on this machine need as many '
                f"GPUs, and it has {count}; start at most {count}"
            )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError('train.device = "mps": it needs an Apple GPU; set train.device = "auto"')


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model to a device in place, and back to the CPU on exit."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def tensors_to_cpu(value: object) -> object:
    """The same nested lists and dictionaries, with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: tensors_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(tensors_to_cpu, value))
    return value
