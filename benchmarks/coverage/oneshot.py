"""Which of timm's plain Vision Transformers are rotated, cut and compensated without training.

    python -m benchmarks.coverage.oneshot [NAME ...]

For each name, built small with random numbers in every parameter (`small_models`): `vitrim.rotate`
has to keep the function to a relative 1e-5 in fp32, and so has the rotation of the residual stream,
which is refused where something does not commute with it. `vitrim.trim` then cuts to 70 % of the
multiply-adds: the cut has to equal the masked network to 1e-5, and no refit may move a sub-layer
away from the dense stream. A name is *exact*, *refused* with the reason, or *wrong*. Finished names
are kept, so that an interrupted run continues. Writes `results/coverage_oneshot`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from vitrim import InputError, UnsupportedModel, compact, lift, masked, rotate, trim
from vitrim.compress.oneshot.stream_rotation import rotate_stream
from vitrim.compress.oneshot.trim import TrimOptions

from ..results_file import RESULTS, markdown_head, markdown_row, save_result
from .models import TOLERANCE, WRONG
from .small_models import names, small

SCHEMA = "vitrim.coverage-oneshot/1"
IMAGES, SHARE = 32, 0.7


@dataclass
class Row:
    """One name; errors are relative to the largest output."""

    name: str
    result: str = "exact"
    reason: str = ""
    rotation_error: float = 0.0
    stream: str = "exact"
    stream_reason: str = ""
    stream_error: float = 0.0
    cut_error: float = 0.0
    cost_share: float = 0.0
    refits: int = 0
    cosine: float = 0.0
    seconds: float = 0.0


def examine(name: str) -> Row:
    """Rotate, cut and compensate one model."""
    started, row = time.perf_counter(), Row(name)
    try:
        _examine(row)
    except UnsupportedModel as error:
        row.result, row.reason = "refused", str(error)
    except WRONG as error:
        row.result, row.reason = "wrong", f"{type(error).__name__}: {error}"[:300]
    row.seconds = time.perf_counter() - started
    return row


def _examine(row: Row) -> None:
    model = lift(small(row.name))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, *model.architecture.image, generator=generator)
    with torch.no_grad():
        wanted = model(images[:2])
        row.rotation_error = _error(rotate(model, images)(images[:2]), wanted)
        try:
            row.stream_error = _error(rotate_stream(model, images)(images[:2]), wanted)
        except InputError as error:
            row.stream, row.stream_reason = "refused", str(error).partition(": ")[2]
        found = trim(model, images, macs=SHARE, options=TrimOptions(round_to=8))
        cut = compact(found.rotated, found.mask)
        row.cut_error = _error(cut(images[:2]), masked(found.rotated, found.mask)(images[:2]))
    row.cost_share, row.refits, row.cosine = found.cost, len(found.fits), found.check.cosine
    worse = [fit.branch for fit in found.fits if fit.after > fit.before]
    largest = max(row.rotation_error, row.stream_error, row.cut_error)
    if largest > TOLERANCE or worse or found.cost > SHARE + 1e-3:
        row.result = "wrong"
        row.reason = f"largest error {largest:.1e}, worse after the refit: {worse or 'none'}"


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted magnitude; infinite if that is not a number."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return error if error == error and found.shape == wanted.shape else float("inf")


def table(rows: list[Row]) -> str:
    """Counts, the largest errors, and the reasons of refusals, as Markdown."""
    results = Counter(row.result for row in rows)
    streams = Counter(row.stream for row in rows)
    lines = [
        "# Rotation, cut and compensation of timm's Vision Transformers",
        "",
        "`python -m benchmarks.coverage.oneshot`: built small, fp32, relative errors.",
        "",
        f"- {results['exact']} of {len(rows)} names exact, {results['refused']} refused, "
        f"{results['wrong']} wrong",
        f"- rotation of heads: largest error {max(row.rotation_error for row in rows):.1e}",
        f"- rotation of the residual stream: {streams['exact']} exact (largest error "
        f"{max(row.stream_error for row in rows):.1e}), {streams['refused']} refused",
        f"- masked against compact: largest error {max(row.cut_error for row in rows):.1e}",
        "",
        *markdown_head("the stream is not rotated, because", "names", numbers=1),
    ]
    generic = Counter(
        " ".join(
            "N" if part.isdigit() else part
            for part in row.stream_reason.replace(".", " . ").split()
        ).replace(" . ", ".")
        for row in rows
        if row.stream == "refused"
    )
    lines += [markdown_row(reason, count) for reason, count in generic.most_common()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Examine the names that have no row yet; print a line each and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names to examine (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage_oneshot.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done: dict[str, Row] = {}
    if options.out.is_file() and not options.names:
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        done = {row["name"]: Row(**row) for row in rows}
    for name in options.names or names():
        if name in done and done[name].result != "wrong":
            continue
        row = done[name] = examine(name)
        found = sorted(done.values(), key=lambda each: each.name)
        content = {"schema": SCHEMA, "rows": [asdict(each) for each in found]}
        save_result(options.out, content, table(found))
        print(
            f"{name:52s} {row.result:8s} rotate {row.rotation_error:.0e} stream {row.stream} "
            f"{row.stream_error:.0e} cut {row.cut_error:.0e} ({row.seconds:.1f} s) {row.reason}",
            flush=True,
        )
    print(dict(Counter(row.result for row in done.values())), "of", len(done))


if __name__ == "__main__":
    main()
