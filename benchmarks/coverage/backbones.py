"""Whether timm's interface returns the same for every plain Vision Transformer, dense and cut.

`python -m benchmarks.coverage.backbones` lifts every name, built small, and compares
`forward_features`, `forward_head` and `forward_intermediates` with timm's own; then it cuts half of
the residual stream and compares with the network that computes with the mask. A name is *equal* if
all differ by less than 1e-5 of the largest value in fp32. Writes `results/backbones.json`.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from vitrim import StructuredMask, compact, lift, masked
from vitrim.compress.masks.masked import MaskedModel
from vitrim.compress.masks.masked_parameters import masked_tensors

from ..results_file import RESULTS, save_result
from .small_models import names, small

TOLERANCE = 1e-5
FACTS = ("num_classes", "num_features", "embed_dim", "head_hidden_size", "num_prefix_tokens")
Call = Callable[[Any], Any]


def main() -> None:
    """Print a line a name and the sums, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names to examine (default: all)")
    parser.add_argument("--json", type=Path, default=RESULTS / "backbones.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in arguments.names or names():
        row = {"name": name, **examine(name)}
        rows.append(row)
        print(*row.values(), flush=True)
    print(dict(Counter(row["result"] for row in rows)), "of", len(rows))
    save_result(arguments.json, {"schema": "vitrim.backbones/1", "rows": rows})


def examine(name: str) -> dict[str, Any]:
    """The result, the largest errors of the dense and of the cut network, and the reason."""
    dense_error = cut_error = 0.0
    try:
        source: Any = small(name)
        lifted = lift(source)
        different = [fact for fact in FACTS if getattr(lifted, fact) != getattr(source, fact)]
        mask = StructuredMask.random(lifted, 0.5, "residual")
        cut, reference = compact(lifted, mask), masked(lifted, mask)
        images = torch.randn(1, *lifted.architecture.image)
        with torch.no_grad():
            for call in calls(images):
                dense_error = max(dense_error, error(call(lifted), call(source)))
                cut_error = max(cut_error, error(call(cut), with_mask(reference, call)))
    except Exception as problem:  # any failure is a finding
        return _row("failed", dense_error, cut_error, f"{type(problem).__name__}: {problem}")
    equal = max(dense_error, cut_error) < TOLERANCE and not different
    return _row("equal" if equal else "different", dense_error, cut_error, ", ".join(different))


def _row(result: str, dense_error: float, cut_error: float, reason: str) -> dict[str, Any]:
    return {"result": result, "dense": dense_error, "cut": cut_error, "reason": reason}


def calls(images: Tensor) -> list[Call]:
    """The calls that are compared."""

    def last(model: Any) -> Any:
        return model.forward_intermediates(
            images, indices=1, norm=True, stop_early=True, output_fmt="NLC"
        )

    def every(model: Any) -> Any:
        prefix = model.num_prefix_tokens > 0
        return model.forward_intermediates(images, return_prefix_tokens=prefix)

    return [
        lambda model: model.forward_features(images),
        lambda model: model.forward_head(model.forward_features(images)),
        lambda model: model.forward_head(model.forward_features(images), pre_logits=True),
        every,
        last,
    ]


class _Calls(nn.Module):
    def __init__(self, inner: nn.Module, call: Call) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self) -> Any:
        return self.call(self.inner)


def with_mask(model: MaskedModel, call: Call) -> Any:
    """What a method of a full-size network returns that computes with a mask."""

    def keep(dimension: str, site: str) -> Tensor | None:
        found = model.mask.get(dimension, site)
        return None if found is None else found.float()

    network = model.network
    changed = masked_tensors(
        network.architecture, dict(network.named_parameters()), keep, model.mask.scale
    )
    named = {f"inner.{name}": tensor for name, tensor in changed.items()}
    return functional_call(_Calls(network, call), named, ())


def error(found: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest wanted value of each tensor."""
    return max(
        float((one - other).abs().max()) / max(float(other.abs().max()), 1e-12)
        for one, other in zip(_tensors(found), _tensors(wanted), strict=True)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


if __name__ == "__main__":
    main()
