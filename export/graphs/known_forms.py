"""The best known graph form of each target, for exports without `tune`.

Every row states where it was measured; benchmarks/results/forms.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..capabilities import EIGHT_BITS, is_host, needs_qdq_pairs
from ..forms.form import Form
from ..manifest import Batch

# From here on a convolution is faster than Reshape and product: it was with 196 patches of 16 x 16,
# and was not with 49 of 4 x 4.
MANY_TOKENS = 100
NOT_MEASURED = "--tune on the device may find a better one"


@dataclass(frozen=True)
class KnownForm:
    """The fastest forms measured on a target.

    Attributes:
        target: Name of the profile.
        one_image: Form for batch 1.
        batches: Form for other batches.
        measured: Where it was measured, for the notes.
        measured_int8: The same for eight bits.
    """

    target: str
    one_image: Form
    batches: Form
    measured: str
    measured_int8: str = (
        "not measured on this target; the fastest eight-bit form on x86-64-v4-vnni is used, "
        f"{NOT_MEASURED}"
    )


_BEST = Form(attention="opset23", stem="matrix")
_BATCH = Form(rows="batch", attention="split", stem="matrix")

_ROWS = (
    KnownForm(
        "x86-64-v4-vnni",
        _BEST,
        _BATCH,
        "AMD EPYC (Zen 5, AVX-512 VNNI), ONNX Runtime 1.31.1, one thread: 395 us against 407 "
        "(split attention), 416 (LayerNorm), 435 (batch rows) and 614 (torch's own graph) on the "
        "0.8 M parameter demo model; DeiT-Tiny 25 ms against 32 (batch rows, all queries)",
        "eight bits on AMD EPYC (Zen 5, AVX-512 VNNI), ONNX Runtime 1.31.1, DeiT-Tiny and its "
        "half: batch rows need 0.97-0.99 of the time of matrix rows, patches in eight bits too "
        "0.95-0.96; on two threads the runtime's attention 0.82-0.92 of the standard's, which is "
        "used on one",
    ),
)

_OTHER = KnownForm(
    "any",
    _BEST,
    _BATCH,
    f"not measured on this target; the fastest form on x86-64-v4-vnni is used, {NOT_MEASURED}",
)


def known_form(target: str) -> KnownForm:
    """Return the row of a target, or one that states that it was not measured."""
    for row in _ROWS:
        if target == row.target or (target == "host" and is_host(row.target)):
            return row
    return _OTHER


def best_form(
    target: str, batch: Batch, tokens: int = 0, *, precision: str = "fp32", threads: int = 1
) -> tuple[Form, str]:
    """Return the best known form for a target.

    Args:
        target: Name of a device profile.
        batch: Images in a batch, or "dynamic".
        tokens: Tokens of the network; 0 for few.
        precision: The precision of the artifact.
        threads: Threads that it runs on.

    Returns:
        The form, and where it was measured.
    """
    row = known_form(target)
    if precision in EIGHT_BITS:
        pairs = precision == "int8-static" and needs_qdq_pairs(target)
        return _int8_form(row, batch, tokens, threads, pairs=pairs)
    if batch != 1:
        return row.batches, row.measured
    if tokens >= MANY_TOKENS:
        return (
            replace(row.one_image, stem="conv"),
            f"{row.measured}; patches by convolution: 0.967-0.994 of the time on DeiT-T, DeiT-S "
            "and their halves",
        )
    return row.one_image, row.measured


def _int8_form(
    row: KnownForm, batch: Batch, tokens: int, threads: int, *, pairs: bool
) -> tuple[Form, str]:
    if pairs:
        return (
            replace(row.batches, norm="layer", qdq=True),
            "eight bits in pairs of the standard's operators, as TensorRT reads them; not measured",
        )
    if batch != 1:
        return row.batches, row.measured_int8
    # Eight-bit products accept rows of any rank, while a float Gemm needs a matrix, and Reshapes
    # around attention. Patches of a few pixels are too little work for eight bits to pay off.
    form = replace(row.one_image, rows="batch", stem="int8" if tokens >= MANY_TOKENS else "matrix")
    return (replace(form, attention="runtime") if threads > 1 else form), row.measured_int8
