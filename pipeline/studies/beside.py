"""Dense models beside a study: exported as they are, timed, and never pruned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from torch import nn

from ...core.console import status
from ...core.errors import InputError
from ..bench_device import measured_artifacts
from ..recipe_sections import BenchSection
from .expansion import Cell
from .jobs import unexpected
from .table import StudyTable

FOLDER = "beside"


def require_models(names: Sequence[str]) -> None:
    """Check that timm has the models.

    Raises:
        InputError: It lacks one.
    """
    import timm

    for name in names:
        if not timm.is_model(name):
            raise InputError(
                f"beside: timm {timm.__version__} has no model {name!r}; see timm.list_models()"
            )


def measure_beside(
    names: Sequence[str],
    table: StudyTable,
    folder: Path,
    bench: BenchSection,
    *,
    quiet: bool = False,
) -> None:
    """Export and time the models that the table has no figures of, one after the other.

    Weights are random, which changes neither size nor time; top-1 is not measured.

    Args:
        names: Names of timm models.
        table: Receives a row for each; one with a reason where a model cannot be exported.
        folder: The study folder, which receives beside/NAME.
        bench: Threads, the time limit of each, and the device.
        quiet: Print nothing.
    """
    known = {str(row["name"]) for row in table.beside() if row["ms"] is not None}
    for name in names:
        if name in known:
            continue
        status(f"measuring {escape(name)} beside the study", quiet=quiet)
        try:
            figures = _measured(name, folder / FOLDER / re.sub(r"[^\w.\-]", "-", name), bench)
        except InputError as error:
            figures = {"reason": " ".join(str(error).split())}
        except Exception as error:
            # Whatever torch or timm raises: the report of the runs is written all the same.
            figures = {"reason": unexpected(error)}
        table.set_beside(name, figures)


def _measured(name: str, folder: Path, bench: BenchSection) -> dict[str, Cell]:
    import timm
    from timm.data.config import resolve_model_data_config

    from ...export.exporter import export

    model = timm.create_model(name).eval()
    channels, height, width = resolve_model_data_config(model)["input_size"]
    shape = (channels, height, width)
    artifact = export(model, folder, image=shape, name=name, overwrite=True)
    (measured,) = measured_artifacts({name: artifact}, bench, quiet=True).values()
    return {
        "image": f"{height}x{width}",
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_module_macs(model, shape),
        "ms": round(1e3 * measured.summary().p50_s, 6),
        "memory_bytes": measured.beyond_floor_rss_bytes,
        "bytes": artifact.bytes,
        "reason": None,
    }


def count_module_macs(model: nn.Module, image: tuple[int, int, int]) -> int:
    """Multiply-adds of a module for one image: matrix products and convolutions.

    Args:
        model: Any module in eval mode.
        image: (channels, height, width).
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        # Attention in plain products, which the counter knows.
        model(torch.zeros(1, *image))
    return int(counter.get_total_flops()) // 2
