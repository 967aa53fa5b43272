"""The processes of one training, on one machine or several: one process alone, or accelerate's.

Every process computes the gradients of its share of each batch, and all of them take the same step
with the mean. They decide on equal numbers, so that masks and shapes stay the same in each.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ...core.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")
INSTALL = "pip install 'vitrim[distributed]'"
# What launchers (torchrun, accelerate launch) set for each process.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Processes:
    """A training in this process alone; the base of `AcceleratedProcesses`.

    Attributes:
        rank: The number of this process, 0 for the main one, which alone writes files.
        count: The number of processes on all machines.
        local_rank: The number of this process on its machine.
    """

    rank, count, local_rank = 0, 1, 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the output."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients that `backward` averages over the processes."""
        return module

    def without_sum(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """A context in which `backward` adds to the gradients of this process only."""
        return contextlib.nullcontext()

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over the processes."""
        return list(values)

    def from_main(self, value: Value) -> Value:
        """The value that the main process passed: plain data."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes in their order: plain data."""
        return [value]

    def wait(self) -> None:
        """Wait until every process is here."""

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in the main process before the others run it."""
        yield

    def require_equal(self, digest: str, what: str) -> None:
        """Validate that all processes have the same state.

        Args:
            digest: Of the state of this process.
            what: The state, for the message.

        Raises:
            InputError: This process has another state than the main one.
        """
        if self.from_main(digest) != digest:
            raise InputError(
                f"process {self.rank}: its {what} differ from those of the main process; use equal "
                "machines and versions of torch, and --resume continues from the last epoch"
            )

    def close(self) -> None:
        """End the connection of the processes."""


class AcceleratedProcesses(Processes):
    """The processes that accelerate, or torchrun, has started: gloo on CPUs, NCCL on GPUs.

    Args:
        accelerator: The accelerator of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.local_rank = accelerator.local_process_index

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel."""
        # Of earlier modules only; without it their memory is kept.
        self.accelerator.free_memory()
        with warnings.catch_warnings():
            # An option of DistributedDataParallel has a new name in newer versions of torch.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def without_sum(self, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """A context in which `backward` adds to the gradients of this process only."""
        context: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return context

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over the processes."""
        own = torch.tensor(list(values), dtype=torch.float64, device=self.accelerator.device)
        return [float(value) for value in self.accelerator.reduce(own, "sum").tolist()]

    def from_main(self, value: Value) -> Value:
        """The value that the main process passed: plain data."""
        from accelerate.utils import broadcast_object_list

        found: list[Value] = broadcast_object_list([value])
        return found[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes in their order: plain data."""
        from accelerate.utils import gather_object

        found: list[Value] = gather_object([value])
        return found

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in the main process before the others run it."""
        with self.accelerator.main_process_first():
            yield

    def close(self) -> None:
        """End the connection of the processes."""
        self.accelerator.end_training()


ALONE = Processes()


def launched_processes() -> int:
    """The number of processes that a launcher has started this one among; 1 without one."""
    if not all(os.environ.get(name, "").isdecimal() for name in _LAUNCHED):
        return 1
    return int(os.environ["WORLD_SIZE"])


def join_processes(device: str) -> Processes:
    """Connect to the other processes of a launcher.

    Args:
        device: "cpu", or the kind of the GPUs.

    Returns:
        `ALONE` where no launcher started this process among others.

    Raises:
        InputError: accelerate is not installed.
    """
    if launched_processes() < 2:
        return ALONE
    require_accelerate("a training in several processes")
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # A sub-layer that mask learning removed has parameters without gradients. Buffers are indices,
    # which are equal everywhere.
    options = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    # The others wait while the main process decodes images. A process that ends is noticed by the
    # launcher.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[options, patience])
    return AcceleratedProcesses(accelerator)


def require_accelerate(what: str) -> None:
    """Validate that accelerate is installed.

    Raises:
        InputError: It is not; the message has the command that installs it.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise InputError(f"{what} needs accelerate, which is not installed; {INSTALL}") from None


def require_shares(batch_size: int, images: int, processes: int) -> None:
    """Validate that every process gets the same share of each batch.

    Args:
        batch_size: The number of images in a step, of all processes.
        images: The number of training images.
        processes: The number of processes.

    Raises:
        InputError: A process would get no image, or another number than the others.
    """
    if batch_size % processes or min(batch_size, images) < processes:
        raise InputError(
            f"train.batch_size = {batch_size} and {images} training images cannot be divided "
            f"among {processes} processes; choose a batch_size that is a multiple of their number"
        )
