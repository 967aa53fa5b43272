"""The frame of converter scripts: read the job, load the model, print the result.

It runs in any Python with torch, without the rest of `vitrim.export`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def run_converter(convert: Callable[[dict[str, Any]], dict[str, str]]) -> int:
    """Run the job of the command line and print the versions of the tools, or the error.

    Args:
        convert: Writes the files of a job and returns the versions.

    Returns:
        The exit code. What libraries print goes to standard error.
    """
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result: dict[str, Any] = {"versions": convert(json.loads(sys.argv[1]))}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    output.write(json.dumps(result) + "\n")
    output.close()
    return 3 if "error" in result else 0


def load_model(job: dict[str, Any]) -> tuple[Any, Any]:
    """The job's model in eval mode, which returns the job's outputs, and example images.

    vitrim is imported from its folder: the interpreter need not have it installed.
    """
    import torch

    folder = job["vitrim"]
    spec = importlib.util.spec_from_file_location(
        "vitrim", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["vitrim"] = package
    spec.loader.exec_module(package)
    model = package.load(job["model"])
    if job.get("outputs"):
        outputs = importlib.import_module("vitrim.compress.network.named_outputs")
        model = outputs.NamedOutputs(model, job["outputs"]).eval()
    torch.nn.functional.scaled_dot_product_attention = plain_attention  # type: ignore[assignment]
    size = 1 if job["batch"] == "dynamic" else int(job["batch"])
    return model, torch.randn(size, *job["shape"], generator=torch.Generator().manual_seed(0))


def plain_attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, scale: float | None = None, **_: Any
) -> Any:
    """Compute softmax(scale q kᵀ + mask) v as two batched products in three dimensions.

    torch's own decomposition guards the softmax against rows of -inf and broadcasts by copies,
    which are five more operators an attention.

    Args:
        q: Queries (batch, heads, queries, width).
        k: Keys (batch, heads, tokens, width).
        v: Values (batch, heads, tokens, value width).
        attn_mask: Added to the scores; its shape broadcasts to theirs.
        scale: By default 1 / √width.

    Returns:
        Shape (batch, heads, queries, value width).
    """
    import torch

    batch, heads, queries, width = q.shape
    flat = batch * heads
    factor = width**-0.5 if scale is None else scale
    scores = torch.bmm(
        (q * factor).reshape(flat, queries, width), k.reshape(flat, -1, width).transpose(1, 2)
    )
    if attn_mask is not None:
        masked = scores.reshape(batch, heads, queries, -1) + attn_mask
        scores = masked.reshape(flat, queries, -1)
    found = torch.bmm(scores.softmax(-1), v.reshape(flat, -1, v.shape[-1]))
    return found.reshape(batch, heads, queries, v.shape[-1])
