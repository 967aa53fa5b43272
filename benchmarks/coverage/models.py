"""Which of timm's plain Vision Transformers are compacted exactly, and which are refused and why.

`python -m benchmarks.coverage.models` reports a name as *exact* if the lifted network computes what
the source computes, and the compact one what the masked one computes, to a relative 1e-5 in fp32,
for random masks of every dimension (tokens alone and with all widths, too), three sharings and keep
ratios from 0.15 to 0.9; as *refused*
if the error names the module without a rule; as *wrong* otherwise. Torch-Pruning, in the same run,
gets its own Vision Transformer recipe (heads, FFN and embedding at half), and passes if the pruned
network still runs a forward pass. Models are built small (`small_models`), or at their published
size with `--full`. Writes `results/coverage.json`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from vitrim import InputError, StructuredMask, UnsupportedModel, compact, lift, masked

from ..results_file import RESULTS, save_result
from .small_models import names, perturb, small, source_images

TOLERANCE = 1e-5
PEER_LIMIT_S = 60
RATIOS = (0.15, 0.5, 0.9)
TOKENS = 0.4
SINGLE = {"embed": 0.3, "head": 0.6, "qk": 0.25, "v": 0.4, "ffn": 0.15, "block": 0.5}
WRONG = (
    *(InputError, RuntimeError, ValueError, TypeError, AttributeError),
    *(AssertionError, KeyError, IndexError),
)


@dataclass
class Row:
    """One name."""

    name: str
    vitrim: str
    vitrim_reason: str = ""
    lift_error: float = 0.0
    compact_error: float = 0.0
    masks: int = 0
    peer: str = ""
    peer_reason: str = ""
    seconds: float = 0.0


def main() -> None:
    """Print a line a name and the sums, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names to examine (default: all)")
    parser.add_argument(
        "--full", action="store_true", help="at the published size, one mask a sharing"
    )
    parser.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--json", type=Path, default=RESULTS / "coverage.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in arguments.names or names():
        row = examine(name, full=arguments.full, peer=not arguments.no_peer)
        rows.append(row)
        content = {"schema": "vitrim.coverage/1", "rows": [asdict(row) for row in rows]}
        save_result(arguments.json, content)
        peer = f"  torch-pruning: {row.peer} {row.peer_reason[:60]}" if row.peer else ""
        print(
            f"{row.name:52s} {row.vitrim:8s} {row.compact_error:.1e} ({row.masks} masks, "
            f"{row.seconds:.1f} s) {row.vitrim_reason[:100]}{peer}",
            flush=True,
        )
    print("vitrim:", dict(Counter(row.vitrim for row in rows)), "of", len(rows))
    if not arguments.no_peer:
        print("torch-pruning:", dict(Counter(row.peer for row in rows)), "of", len(rows))


def examine(name: str, *, full: bool = False, peer: bool = True) -> Row:
    """Examine one name by vitrim, and by the peer on a fresh copy."""
    start = time.perf_counter()
    row = Row(name, "exact")
    try:
        _vitrim(_build(name, full), row, full=full)
    except UnsupportedModel as error:
        row.vitrim, row.vitrim_reason = "refused", str(error)
    except WRONG as error:
        row.vitrim, row.vitrim_reason = "wrong", f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - start
    if peer:
        row.peer, row.peer_reason = _peer(name, full)
    return row


def _peer(name: str, full: bool) -> tuple[str, str]:
    """The peer in a process of its own, which may hang or die."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_peer_process, args=(name, full, theirs))
    process.start()
    theirs.close()
    limit_s = PEER_LIMIT_S * (10 if full else 1)
    found = ("failed", f"no result within {limit_s} s")
    try:
        if ours.poll(limit_s):
            found = ours.recv()
    except EOFError:
        found = ("failed", "the process died")
    process.kill()
    process.join()
    return found


def _peer_process(name: str, full: bool, output: Connection) -> None:
    from .torch_pruning_recipe import prune_half

    try:
        model = _build(name, full)
        inputs = source_images(model)
        prune_half(model, inputs)
        with torch.no_grad():
            model(inputs)
        output.send(("ran", ""))
    except Exception as error:  # any failure of the peer is a finding
        output.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))


def _build(name: str, full: bool) -> nn.Module:
    if not full:
        return small(name)
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    perturb(model, 0.01)
    return model.eval()


def _vitrim(model: nn.Module, row: Row, *, full: bool) -> None:
    lifted = lift(model)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1 if full else 2, *lifted.architecture.image, generator=generator)
    with torch.no_grad():
        row.lift_error = _error(lifted(inputs), model(inputs))
        for number, settings in enumerate(_masks(full)):
            mask = StructuredMask.random(lifted, seed=number, **settings)
            error = _error(compact(model, mask)(inputs), masked(lifted, mask)(inputs))
            row.compact_error = max(row.compact_error, error)
            row.masks += 1
    if max(row.lift_error, row.compact_error) > TOLERANCE:
        reason = f"lift {row.lift_error:.1e}, compact {row.compact_error:.1e}"
        row.vitrim, row.vitrim_reason = "wrong", reason


def _masks(full: bool) -> list[dict[str, Any]]:
    """Arguments of `StructuredMask.random`."""
    found: list[dict[str, Any]] = []
    for sharing in ("unshared", "residual", "full"):
        widths = dict.fromkeys(("embed", "head", "qk", "v", "ffn"), 0.5)
        found.append({"keep_ratio": {**widths, "token": TOKENS}, "sharing": sharing})
        if full:
            continue
        found += [
            {
                "keep_ratio": ratio,
                "sharing": sharing,
                "per_head": ratio == 0.5,
                "scale": "original" if ratio == 0.9 else "kept",
            }
            for ratio in RATIOS
        ]
        found += [
            {
                "keep_ratio": {dimension: ratio},
                "sharing": sharing,
                "per_head": dimension in ("qk", "v"),
            }
            for dimension, ratio in SINGLE.items()
        ]
    if not full:
        found += [{"keep_ratio": {"token": ratio, "block": 0.8}} for ratio in (0.1, TOKENS)]
    return found


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted magnitude; infinite if that is not a number."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return error if error == error and found.shape == wanted.shape else float("inf")


if __name__ == "__main__":
    main()
