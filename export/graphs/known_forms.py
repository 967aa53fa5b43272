"""The best known graph form of each target, for exports without `tune`. Every row says where it was
measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..capabilities import wants_pairs
from ..forms.form import Form


@dataclass(frozen=True)
class KnownForm:
    """A form and the place where it won."""

    target: str
    one_image: Form
    batches: Form
    measured: str
    measured_int8: str = "not measured on this target; the eight-bit form that won on x86-64 is taken, `--tune` on the device may find a better one"


# From here on a convolution cuts patches faster than a reshape and a product do: so it was with 196
# patches of 16 x 16, and not with 49 of 4 x 4.
MANY_TOKENS = 100
_BEST = Form(
    rows="matrix",
    attention="opset23",
    residual="add",
    norm="centred-rms",
    activation="gelu",
    stem="matrix",
    last_queries=True,
)
_BATCH = Form(
    rows="batch",
    attention="split",
    residual="add",
    norm="centred-rms",
    activation="gelu",
    stem="matrix",
    last_queries=True,
)

_ROWS = (
    KnownForm(
        "x86-64",
        _BEST,
        _BATCH,
        "AMD EPYC (Zen 5, AVX-512 VNNI), ONNX Runtime 1.31.1, one thread: 395 us against 407 (split attention), 416 (LayerNorm), 435 (batch "
        "rows) and 614 (torch's own graph) on the 0.8 M parameter demo model; DeiT-Tiny 25 ms against 32 (batch rows, all queries)",
        "eight bits on AMD EPYC (Zen 5, AVX-512 VNNI), ONNX Runtime 1.31.1, DeiT-Tiny and its half: rows of a batch take 0.97-0.99 of the time of matrix "
        "rows, patches in eight bits too 0.95-0.96; on two threads the runtime's attention 0.82-0.92 of the standard's, which stays on one",
    ),
)

_ELSEWHERE = KnownForm(
    "any",
    _BEST,
    _BATCH,
    "not measured on this target; the form that won on x86-64 is taken, `--tune` on the device may find a better one",
)


def known_form(target: str) -> KnownForm:
    """The row of a target, or one that says that nobody measured there."""
    for row in _ROWS:
        if row.target == target or (
            row.target == "x86-64" and target in ("host", "x86_64", "amd64")
        ):
            return row
    return _ELSEWHERE


def best_form(
    target: str,
    batch: int | Literal["dynamic"],
    tokens: int = 0,
    *,
    precision: str = "fp32",
    threads: int = 1,
) -> tuple[Form, str]:
    """The form to take for a batch size and so many tokens, and where it was measured."""
    row = known_form(target)
    if precision in ("int8", "int8-static"):
        return _eight_bits(
            row, batch, tokens, threads, pairs=precision == "int8-static" and wants_pairs(target)
        )
    if batch != 1:
        return row.batches, row.measured
    if tokens >= MANY_TOKENS:
        # benchmarks/results/forms.md
        return (
            replace(row.one_image, stem="conv"),
            f"{row.measured}; patches by convolution: 0.967-0.994 of the time on DeiT-T, DeiT-S and their halves",
        )
    return row.one_image, row.measured


def _eight_bits(
    row: KnownForm, batch: int | Literal["dynamic"], tokens: int, threads: int, *, pairs: bool
) -> tuple[Form, str]:
    if pairs:
        return replace(
            row.batches, norm="layer", qdq=True
        ), "eight bits in pairs of the standard's operators, as TensorRT reads them; not measured"
    if batch != 1:
        return row.batches, row.measured_int8
    # Eight-bit products take rows of any rank as they are; a float Gemm wants a matrix, and
    # Reshapes around attention. Patches of a few pixels are too little work for eight bits to pay.
    form = replace(row.one_image, rows="batch", stem="int8" if tokens >= MANY_TOKENS else "matrix")
    return (replace(form, attention="runtime") if threads > 1 else form), row.measured_int8
