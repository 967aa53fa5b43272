"""Buckets of artifacts whose images keep different numbers of patches, for all kinds of report."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from ..results.buckets import BucketTable
from ..results.measurement import NOT_LATENCY, Measurement
from . import wording
from .table import NONE, Cell, Line

HEADING = "Buckets"
COLUMNS = ("images", "p50", "p90", "p99", "top-1")


def remark(table: BucketTable) -> str:
    """What the bound is, and what the mean rests on."""
    slowest, summary = table.slowest, table.slowest.summary()
    assert slowest.bucket is not None
    parts = [
        f"Each image keeps one of {len(table.measurements)} numbers of patches. The slowest "
        f"bucket, {slowest.bucket.patches} patches, bounds the latency of every image: "
        f"p50 {wording.duration(summary.p50_s)}, p99 {wording.duration(summary.p99_s)}."
    ]
    if table.mean_s is not None:
        parts.append(f"Shares and the mean are those of {table.images}.")
    if slowest.emulated:
        parts.append(f"Emulated: {NOT_LATENCY}.")
    return " ".join(parts)


def lines(table: BucketTable) -> list[Line]:
    """One line for each bucket, one for the mean over the images, and one for the bound."""
    shares = table.shares
    found = [
        Line(
            f"{each.bucket.patches if each.bucket else '?'} patches",
            (
                NONE if shares is None else Cell(wording.percent(shares[place])),
                *_times(each),
                _top1(each.correct, each.total),
            ),
        )
        for place, each in enumerate(table.measurements)
    ]
    if table.mean_s is not None and table.mean_patches is not None:
        counted = table.counted or (None, None)
        name = f"mean: {wording.three_digits(table.mean_patches)} patches"
        mean = Cell(wording.duration(table.mean_s))
        found.append(Line(name, (Cell("100 %"), mean, NONE, NONE, _top1(*counted))))
    return [*found, Line("guarantee: slowest bucket", (NONE, *_times(table.slowest), NONE))]


def bucket_table(found: BucketTable) -> tuple[str, Table]:
    """The buckets of an artifact for a terminal: what they are, and latency and top-1 of each."""
    table = Table(show_edge=False, pad_edge=False)
    for head in ("bucket", *COLUMNS):
        table.add_column(head, justify="left" if head == "bucket" else "right", no_wrap=True)
    for line in lines(found):
        table.add_row(line.name, *("" if cell is NONE else cell.figure for cell in line.cells))
    return f"{found.name}: buckets. {remark(found)}", table


def _times(measured: Measurement) -> Iterable[Cell]:
    summary = measured.summary()
    return [Cell(wording.duration(time)) for time in (summary.p50_s, summary.p90_s, summary.p99_s)]


def _top1(correct: int | None, total: int | None) -> Cell:
    if correct is None or not total:
        return NONE
    return Cell(wording.percent(correct / total, 2), f"{correct:,} of {total:,}")
