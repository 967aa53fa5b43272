"""What the converters share: read the job, load the model by the package's own code, tell the
result. Run in any Python with torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def load_model(job: dict[str, Any]) -> tuple[Any, Any]:
    """(module in eval mode, example images). vitrim is found by its folder, since the converter's
    Python may not have it installed.
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
    torch.nn.functional.scaled_dot_product_attention = plain_attention  # type: ignore[assignment]
    size = 1 if job["batch"] == "dynamic" else int(job["batch"])
    return model, torch.randn(size, *job["shape"], generator=torch.Generator().manual_seed(0))


def plain_attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, scale: float | None = None, **_: Any
) -> Any:
    """softmax(scale q kᵀ + mask) v as two batched products in three dimensions.

    torch's own decomposition guards the softmax against rows of -inf and broadcasts by copies, five
    more operators an attention.
    """
    import torch

    batch, heads, asked, width = q.shape
    factor = width**-0.5 if scale is None else scale
    scores = torch.bmm(
        (q * factor).reshape(batch * heads, asked, width),
        k.reshape(batch * heads, -1, width).transpose(1, 2),
    )
    if attn_mask is not None:
        scores = (scores.reshape(batch, heads, asked, -1) + attn_mask).reshape(
            batch * heads, asked, -1
        )
    found = torch.bmm(scores.softmax(-1), v.reshape(batch * heads, -1, v.shape[-1]))
    return found.reshape(batch, heads, asked, v.shape[-1])


def converter(convert: Callable[[dict[str, Any]], dict[str, str]]) -> int:
    """Carry out the one job on the command line and tell the versions, or the error; what libraries
    print goes to standard error.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        told: dict[str, Any] = {"versions": convert(json.loads(sys.argv[1]))}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    answer.write(json.dumps(told) + "\n")
    answer.close()
    return 3 if "error" in told else 0
