"""Processor time of one orthogonalized update of Muon, in bfloat16 and in float32.

    python -m benchmarks.speed.newton_schulz
    ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python -m benchmarks.speed.newton_schulz

Five Newton-Schulz steps on one thread, the median of 25.
"""

from __future__ import annotations

import statistics
import time

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from vitrim.bench.local.environment import read_machine
from vitrim.compress.train.optimizers import cpu_matrix_dtype

from ..results_file import markdown_head, markdown_row

SHAPES = ((128, 384), (384, 384), (384, 1536))
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]
STEPS, REPEATS = 5, 25


def processor_s(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Median processor time of one update, in seconds."""
    gradient, samples = torch.randn(*shape), []
    for _ in range(REPEATS):
        start = time.process_time()
        zeropower_via_newtonschulz(gradient, STEPS, COEFFICIENTS, dtype=dtype)
        samples.append(time.process_time() - start)
    return statistics.median(samples)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    lines = markdown_head("matrix", "bfloat16 (ms)", "float32 (ms)", numbers=2)
    for shape in SHAPES:
        times = [1e3 * processor_s(shape, dtype) for dtype in (torch.bfloat16, torch.float32)]
        lines.append(markdown_row(f"{shape[0]} x {shape[1]}", *(f"{ms:.2f}" for ms in times)))
    print(f"{read_machine()['cpu_model']}, {torch.backends.cpu.get_cpu_capability()} code")
    print("\n".join(lines))
    print(f"chosen here: {str(cpu_matrix_dtype()).removeprefix('torch.')}")


if __name__ == "__main__":
    main()
