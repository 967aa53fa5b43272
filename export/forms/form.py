"""The choices that make one graph form, and the names of those worth measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import InputError


@dataclass(frozen=True)
class Form:
    """How the network is written. Every form computes the same function; the exporter proves that for each artifact.

    rows: `matrix` keeps tokens as a (tokens, width) matrix, so that each Linear is one Gemm with its bias (batch 1 only);
        `batch` keeps (batch, tokens, width).
    attention: `split` has a product each for q, k and v; `fused-qkv` one for the three; `runtime` hands q, k and v to ONNX Runtime's
        MultiHeadAttention; `opset23` to the standard's Attention.
    residual: `add`, or `skip-norm` for ONNX Runtime's SkipLayerNormalization (residual, bias and norm in one node).
    norm: `layer`, or `centred-rms`: what writes to the stream is centred once, in the weights, so that each LayerNorm becomes the cheaper RMSNorm.
    activation: `gelu` (opset 20), or `bias-gelu` for ONNX Runtime's BiasGelu.
    stem: `conv`, or `matrix` (patches cut out by reshaping, then one Gemm).
    last_queries: the last block computes only the tokens that the head reads.
    """

    rows: Literal["matrix", "batch"] = "matrix"
    attention: Literal["split", "fused-qkv", "runtime", "opset23"] = "split"
    residual: Literal["add", "skip-norm"] = "add"
    norm: Literal["layer", "centred-rms"] = "centred-rms"
    activation: Literal["gelu", "bias-gelu"] = "gelu"
    stem: Literal["conv", "matrix"] = "conv"
    last_queries: bool = True

    @property
    def name(self) -> str:
        """The parts, joined: what a manifest records and `form_named` reads."""
        parts = [self.rows, self.attention, self.residual, self.norm, self.activation, f"{self.stem}-stem"]
        return "/".join([*parts, "last-queries"] if self.last_queries else parts)

    @property
    def opset(self) -> int:
        """Lowest opset of the standard that has its operators."""
        return 23 if "opset23" in (self.attention, self.norm) else 20

    @property
    def runtime_operators(self) -> bool:
        """Whether it needs ONNX Runtime's own operators."""
        return self.attention == "runtime" or self.residual == "skip-norm" or self.norm == "centred-rms" or self.activation == "bias-gelu"


# The forms that `tune` measures, likely winners first.
FORMS: tuple[Form, ...] = (
    Form(attention="opset23", stem="matrix"),
    Form(stem="matrix"),
    Form(attention="opset23"),
    Form(attention="fused-qkv", stem="matrix"),
    Form(attention="opset23", stem="matrix", norm="layer"),
    Form(residual="skip-norm", norm="layer"),
    Form(rows="batch", stem="matrix"),
    Form(rows="batch", attention="opset23", norm="layer"),
    Form(rows="batch", attention="runtime", residual="skip-norm", norm="layer", activation="bias-gelu"),
)


def form_named(name: str) -> Form:
    """The form of a name made by `Form.name`. Errors: InputError with the names that `tune` knows."""
    parts = name.split("/")
    last = parts[-1] == "last-queries"
    parts = parts[:-1] if last else parts
    if len(parts) == 6:
        rows, attention, residual, norm, activation, stem = parts
        form = Form(rows, attention, residual, norm, activation, stem.removesuffix("-stem"), last)  # type: ignore[arg-type]
        known = (
            rows in ("matrix", "batch")
            and attention in ("split", "fused-qkv", "runtime", "opset23")
            and residual in ("add", "skip-norm")
            and norm in ("layer", "centred-rms")
            and activation in ("gelu", "bias-gelu")
            and stem in ("conv-stem", "matrix-stem")
        )
        if known:
            return form
    names = ", ".join(["plain", *(form.name for form in FORMS)])
    raise InputError(f"form {name!r} is unknown; take one of {names}, or leave it out for the best known one of the target")
