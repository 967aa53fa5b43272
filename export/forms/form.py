"""The choices that make one graph form, and the names of those worth measuring."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from ...core.errors import InputError


@dataclass(frozen=True)
class Form:
    """How the network is written. Every form computes the same function.

    The exporter checks that for each artifact.

    Attributes:
        rows: `matrix` keeps tokens as a (tokens, width) matrix, so that each Linear is one Gemm
            with its bias (batch 1 only); `batch` keeps (batch, tokens, width).
        attention: `split` has one product each for q, k and v; `fused-qkv` one for the three;
            `runtime` uses ONNX Runtime's MultiHeadAttention; `opset23` the standard's Attention.
        residual: `add`, or `skip-norm` for ONNX Runtime's SkipLayerNormalization (residual, bias
            and norm in one node).
        norm: `layer`, or `centred-rms`: what writes to the stream is centred once, in the weights,
            so that each LayerNorm becomes the cheaper RMSNorm.
        activation: `gelu` (opset 20), or `bias-gelu` for ONNX Runtime's BiasGelu.
        stem: `conv`, or `matrix` (patches cut out by a Reshape, then one Gemm); `int8` is `matrix`,
            in eight bits where the other products are. `conv` becomes `matrix` where many patches
            are never embedded, see `stem.FEW_PATCHES`.
        last_queries: The last block computes only the tokens that the head reads.
        last_keys: The last block computes no keys and values either, where a few queries are
            cheaper to multiply with the tokens themselves.
        stream: How branches write (or, without a norm, read) only some channels of the stream,
            which unshared masks leave: as a matrix with zeros for the others (`dense`), by index
            (`index`), or each as a measured cost model decides (`cheaper`).
        tile: Token rows are padded to a multiple of it; no query attends to the padding.
        qdq: Static eight bits are written as QuantizeLinear and DequantizeLinear pairs around
            float products, for execution providers that do not use ONNX Runtime's own eight-bit
            products. No effect on other precisions.
        operators: All of the standard's operators, or those that pnnx converts to ncnn: it has no
            Gather of channels, no reduction over tokens, and no norm without a bias.
    """

    rows: Literal["matrix", "batch"] = "matrix"
    attention: Literal["split", "fused-qkv", "runtime", "opset23"] = "split"
    residual: Literal["add", "skip-norm"] = "add"
    norm: Literal["layer", "centred-rms"] = "centred-rms"
    activation: Literal["gelu", "bias-gelu"] = "gelu"
    stem: Literal["conv", "matrix", "int8"] = "conv"
    last_queries: bool = True
    last_keys: bool = True
    stream: Literal["cheaper", "dense", "index"] = "cheaper"
    tile: int = 1
    qdq: bool = False
    operators: Literal["standard", "pnnx"] = "standard"

    @property
    def name(self) -> str:
        """The parts, joined, as manifests record it and `form_named` parses it."""
        parts: list[str] = [self.rows, self.attention, self.residual, self.norm, self.activation]
        parts += [f"{self.stem}-stem"]
        parts += ["last-queries"] if self.last_queries else []
        parts += ["last-keys"] if self.last_keys else []
        parts += [f"{self.stream}-stream"] if self.stream != "cheaper" else []
        parts += [f"tile-{self.tile}"] if self.tile > 1 else []
        parts += [self.operators] if self.operators != "standard" else []
        return "/".join([*parts, "qdq"] if self.qdq else parts)

    @property
    def opset(self) -> int:
        """The lowest opset of the standard that has its operators."""
        return 23 if self.attention == "opset23" or self.operators == "pnnx" else 20

    @property
    def runtime_operators(self) -> bool:
        """Whether it needs ONNX Runtime's own operators."""
        return (
            self.attention == "runtime"
            or self.residual == "skip-norm"
            or self.norm == "centred-rms"
            or self.activation == "bias-gelu"
        )


# The forms that `tune` measures, the most promising first.
FORMS: tuple[Form, ...] = (
    Form(attention="opset23", stem="matrix"),
    Form(stem="matrix"),
    Form(attention="opset23"),
    Form(attention="fused-qkv", stem="matrix"),
    Form(attention="opset23", stem="matrix", norm="layer"),
    Form(residual="skip-norm", norm="layer"),
    Form(rows="batch", stem="matrix"),
    Form(rows="batch", attention="opset23", norm="layer"),
    Form(
        rows="batch",
        attention="runtime",
        residual="skip-norm",
        norm="layer",
        activation="bias-gelu",
    ),
    Form(attention="opset23", stem="matrix", last_keys=False),
    # A kernel for AVX-512 multiplies twelve rows of a matrix at a time.
    Form(attention="opset23", stem="matrix", tile=12),
)
# More in eight bits, whose products accept rows of any rank.
INT8_FORMS: tuple[Form, ...] = (
    Form(rows="batch", attention="opset23", stem="int8"),
    Form(rows="batch", attention="opset23", stem="matrix"),
    Form(rows="batch", attention="runtime", stem="int8"),
)
# Two more where masks are not shared.
STREAM_FORMS: tuple[Form, ...] = tuple(
    Form(attention="opset23", stem="matrix", stream=kind) for kind in ("dense", "index")
)


def form_named(name: str) -> Form:
    """Return the form of a name made by `Form.name`.

    Raises:
        InputError: The name is unknown; the message lists the forms that `tune` measures.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        names = ", ".join(["plain", *(form.name for form in FORMS)])
        raise InputError(
            f"form {name!r} is unknown; use one of {names}, or leave it out for the best known "
            "one of the target"
        )
    choices: dict[str, Any] = {
        part: match[part]
        for part in ("rows", "attention", "residual", "norm", "activation", "stem")
    }
    choices |= {"last_queries": bool(match["queries"]), "last_keys": bool(match["keys"])}
    return Form(
        **choices,
        stream=match["stream"] or "cheaper",  # type: ignore[arg-type]
        tile=int(match["tile"] or 1),
        qdq=bool(match["qdq"]),
        operators="pnnx" if match["pnnx"] else "standard",
    )


_NAME = re.compile(
    "(?P<rows>matrix|batch)/(?P<attention>split|fused-qkv|runtime|opset23)"
    "/(?P<residual>add|skip-norm)/(?P<norm>layer|centred-rms)/(?P<activation>gelu|bias-gelu)"
    "/(?P<stem>conv|matrix|int8)-stem(?P<queries>/last-queries)?(?P<keys>/last-keys)?"
    "(/(?P<stream>dense|index)-stream)?(/tile-(?P<tile>[1-9][0-9]{0,3}))?"
    "(?P<pnnx>/pnnx)?(?P<qdq>/qdq)?"
)
