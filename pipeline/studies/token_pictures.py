"""The charts of a study of tokens: counts by depth, the tolerance, and blocks of the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...bench.report import wording
from ...bench.report.plot import padded
from ...compress.network.files import TOKENS_FILE
from ...core.written_kinds import json_object
from .article_text import escaped, report_link
from .claims import SLIMMING, TOKENS, TOLERANCE
from .expansion import settings_text
from .line_charts import Chart, Line, Panel
from .pictures import BY_DEPTH, quality_title
from .summary import Group, Summary, grouped, number, numbers
from .table import RUNS, Row
from .token_figures import BlockAccuracy, TokenFigures, read_token_figures

MOST = 5
_NOUNS = {
    "patch-slimming": "impact",
    "class-attention": "attention of the class token",
    "column-attention": "attention of all tokens",
    "power-bert": "rank of the attention",
    "scop": "trained gates",
    "radial": "distance from the center",
}


@dataclass(frozen=True)
class Course:
    """The tokens of one run.

    Attributes:
        method: How they were chosen.
        name: The other settings of the run.
        run: Its id.
        counts: The tokens after the stem and after each sub-layer.
    """

    method: str
    name: str
    run: str
    counts: tuple[int, ...]


def token_charts(summary: Summary, folder: Path) -> list[Chart]:
    """The charts that a study has data for, in the order of the figures of Tang et al. 2022.

    Args:
        summary: The study.
        folder: The study folder.

    Returns:
        Of what was measured of the dense network: similarity by depth (Figure 3), and a pruned
        block by its depth and by scores (6 and 7); of its runs: the tolerance (4), and the tokens
        by depth (5).
    """
    found: list[Chart] = []
    dense = read_token_figures(folder)
    if dense is not None and dense.similarity is not None:
        found.append(similarity_chart(dense, dense.similarity))
    tolerance = tolerance_chart(summary)
    if tolerance is not None:
        found.append(tolerance)
    shown = courses(summary, folder)
    if shown:
        found.append(courses_chart(shown))
    if dense is not None and dense.blocks:
        found.append(depth_chart(dense, dense.blocks))
    if dense is not None and dense.scores:
        found.append(scores_chart(dense, dense.scores))
    return found


def courses(summary: Summary, folder: Path) -> list[Course]:
    """The tokens of one method and seed, a run for each other setting.

    Args:
        summary: The study.
        folder: The study folder.

    Returns:
        At most five; of Patch Slimming where the study has it, else of the first method. None
        where no finished run has one set of tokens for all images.
    """
    # Where the method does not vary, only Patch Slimming has a tolerance.
    slimmed = SLIMMING if TOLERANCE in summary.axes else None
    named = [(row, row.get(TOKENS, slimmed)) for row in summary.done]
    methods = dict.fromkeys(name for _, name in named if name is not None)
    for method in sorted(methods, key=lambda name: name != SLIMMING):
        chosen = [row for row, name in named if name == method]
        first = min(number(row["seed"]) for row in chosen)
        found: dict[str, Course] = {}
        for row in chosen:
            if row["seed"] != first:
                continue
            others = {axis: row[axis] for axis in summary.axes if axis != TOKENS}
            name, run = settings_text(others), str(row["id"])
            counts = _counts(folder / RUNS / run / TOKENS_FILE)
            if counts:
                found.setdefault(name, Course(str(method), name, run, counts))
        if found:
            return list(found.values())[:MOST]
    return []


def courses_chart(shown: Sequence[Course]) -> Chart:
    """The tokens by depth, a line for each run that links to its report."""
    lines = tuple(
        Line(
            each.name,
            tuple((float(depth), float(count)) for depth, count in enumerate(each.counts)),
            hints=(f"run {each.run}: {each.counts[0]} to {each.counts[-1]} tokens",)
            * len(each.counts),
            run=each.run,
        )
        for each in shown
    )
    panel = Panel(
        "sub-layers passed; 0: behind the stem",
        "tokens",
        lines,
        (0.0, max(len(each.counts) for each in shown) - 1.0),
        (0.0, 1.05 * max(each.counts[0] for each in shown)),
        whole=True,
    )
    about = f"Tokens by depth, chosen by {shown[0].method}"
    runs = [each.run for each in shown]
    are = "The run is" if len(runs) == 1 else "The runs are"
    return Chart(
        "study-tokens",
        BY_DEPTH,
        "Tokens by depth",
        f"{about}. {are} {wording.listed(runs)}.",
        (panel,),
        latex=f"{escaped(about)}. {are} {wording.listed([report_link(run) for run in runs])}.",
    )


def tolerance_chart(summary: Summary) -> Chart | None:
    """Accuracy and multiply-adds by the tolerance; None with fewer than two of its values."""
    if TOLERANCE not in summary.axes:
        return None
    rows = [row for row in summary.done if row[TOLERANCE] is not None]
    values = {number(row[TOLERANCE]) for row in rows}
    if len(values) < 2:
        return None
    others = [
        axis for axis in summary.axes if axis != TOLERANCE and len({row[axis] for row in rows}) > 1
    ]
    groups = grouped(rows, others)[:MOST]
    accuracy = tuple(_by_tolerance(group, summary.quality) for group in groups)
    macs = tuple(_by_tolerance(group, "macs") for group in groups)
    dense = None
    if summary.quality == "top1":
        known = [100 * number(row["top1_dense"]) for row in rows if row["top1_dense"] is not None]
        dense = sum(known) / len(known) if known else None
    heights = [y for each in accuracy for _, y in each.points]
    heights += [] if dense is None else [dense]
    if not heights:
        return None
    low, high = padded(min(heights), max(heights), share=0.15, min_span=2.0)
    span = (0.0, 1.12 * max(values))
    most = max(y for each in macs for _, y in each.points)
    quality = quality_title(summary)
    panels = (
        Panel("tolerance", f"{quality}, %", accuracy, span, (low, high), level=dense),
        Panel("tolerance", "multiply-adds, % of dense", macs, span, (0.0, max(105.0, 1.05 * most))),
    )
    caption = (
        f"{quality[0].upper()}{quality[1:]} and multiply-adds by the tolerance of Patch Slimming. "
        "Means over the seeds of each setting, with the sample standard deviation."
    )
    caption += " Dashed: the dense network." if dense is not None else ""
    return Chart("study-tolerance", BY_DEPTH, "Accuracy by the tolerance", caption, panels)


def _by_tolerance(group: Group, column: str) -> Line:
    """The means of one setting in percent, by rising tolerance."""
    points, hints, spreads = [], [], []
    for each in sorted(grouped(group.rows, [TOLERANCE]), key=_tolerance):
        percents = Group({}, tuple({**row, column: _percent(row, column)} for row in each.rows))
        mean, count = percents.mean(column), len(numbers(percents.rows, column))
        if mean is None:
            continue
        points.append((_tolerance(each), mean))
        spreads.append(percents.deviation(column) or 0.0)
        hints.append(f"tolerance {_tolerance(each):g}: {mean:.2f} %, {count} runs")
    return Line(settings_text(group.cells), tuple(points), tuple(hints), tuple(spreads))


def _tolerance(group: Group) -> float:
    return number(group.cells[TOLERANCE])


def _percent(row: Row, column: str) -> float | None:
    """An accuracy, or the multiply-adds as a share of those of the dense network."""
    value = row.get(column)
    if column == "macs" and row.get("macs_dense"):
        return 100 * number(value) / number(row["macs_dense"])
    return None if value is None else 100 * number(value)


def similarity_chart(dense: TokenFigures, similarity: dict[str, float | None]) -> Chart:
    """How alike the patches of an image become, by depth."""
    points = [
        (float(depth), value)
        for depth, value in enumerate(similarity.values())
        if value is not None
    ]
    names = list(similarity)
    hints = tuple(f"after {names[int(depth)]}: {value:.3f}" for depth, value in points)
    low = min([0.0, *(value for _, value in points)])
    panel = Panel(
        "blocks passed; 0: behind the stem",
        "cosine similarity",
        (Line("", tuple(points), hints),),
        (0.0, max(1.0, len(names) - 1.0)),
        (1.05 * low, 1.05),
        whole=True,
    )
    caption = (
        "Mean cosine similarity of two patches of an image, by depth. "
        f"{_measured(dense)}; 1 is equal directions."
    )
    return Chart("study-similarity", BY_DEPTH, "Similarity of patches", caption, (panel,))


def depth_chart(dense: TokenFigures, rows: Sequence[BlockAccuracy]) -> Chart:
    """The accuracy where one block alone computes some of its patches, by block."""
    points = tuple((float(place), 100 * row.accuracy) for place, row in enumerate(rows))
    hints = tuple(f"{row.block}: {100 * row.accuracy:.2f} %" for row in rows)
    share = f"{100 * rows[0].share:g} % of its patches"
    line, span = Line("", points, hints), (0.0, max(1.0, len(rows) - 1.0))
    panel = _accuracy_panel(dense, rows, "block, counted from 0", (line,), span, whole=True)
    caption = (
        f"Validation top-1 where one block alone computes {share}, by block. "
        f"{_measured(dense)}; the patches of highest {_noun(rows[0].method)} are computed, the "
        "others pass the block unchanged and return. Dashed: the dense network."
    )
    return Chart("study-blocks", BY_DEPTH, "Single pruned blocks", caption, (panel,))


def scores_chart(dense: TokenFigures, rows: Sequence[BlockAccuracy]) -> Chart:
    """The accuracy where one block computes some of its patches, by share and score."""
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.share)
        points = tuple((100 * row.share, 100 * row.accuracy) for row in own)
        hints = tuple(f"{row.tokens} tokens: {100 * row.accuracy:.2f} %" for row in own)
        lines.append(Line(f"{method} ({_noun(method)})", points, hints))
    title = "patches that the block computes, %"
    panel = _accuracy_panel(dense, rows, title, tuple(lines), (0.0, 100.0))
    caption = (
        f"Validation top-1 by the share of its patches that {rows[0].block} computes. "
        f"{_measured(dense)}; the patches of highest score are computed, the others pass this one "
        "block unchanged and return. Dashed: the dense network."
    )
    return Chart("study-scores", BY_DEPTH, "Scores in one block", caption, (panel,))


def _measured(dense: TokenFigures) -> str:
    images = wording.plural(dense.images, "validation image")
    return f"The dense network of run {dense.run} on {images} of {dense.data}"


def _noun(method: str) -> str:
    return _NOUNS.get(method, "chance")


def _accuracy_panel(
    dense: TokenFigures,
    rows: Sequence[BlockAccuracy],
    x_title: str,
    lines: tuple[Line, ...],
    span: tuple[float, float],
    *,
    whole: bool = False,
) -> Panel:
    """Accuracies of one pruned block beside that of the dense network."""
    level = 100 * dense.accuracy
    values = [level, *(100 * row.accuracy for row in rows)]
    low, high = padded(min(values), max(values), share=0.1, min_span=2.0)
    heights = (max(0.0, low), min(101.0, high))
    return Panel(x_title, "validation top-1, %", lines, span, heights, whole=whole, level=level)


def _counts(file: Path) -> tuple[int, ...]:
    """The counts of tokens.json in the order of depth; none where it is missing or damaged."""
    counts = (json_object(file) or {}).get("counts")
    found = tuple(counts.values()) if isinstance(counts, dict) else ()
    return found if all(isinstance(count, int) for count in found) else ()
