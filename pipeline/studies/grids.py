"""The tables of a study's report, the same in HTML, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...bench.report import wording
from .claims import findings, verdict
from .expansion import Cell, cell_text
from .findings import Finding
from .summary import Group, Summary, number, on_fronts, short_names
from .table import Row


@dataclass(frozen=True)
class Entry:
    """One cell of a table.

    Attributes:
        text: What it shows.
        value: What it is sorted by; None: last.
        links: Texts with the runs that they link to, in place of `text`.
        run: The run that `text` links to.
    """

    text: str
    value: str | float | None = None
    links: tuple[tuple[str, str], ...] = ()
    run: str | None = None


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        id: Its anchor and label.
        title: Its heading.
        remark: Its caption.
        heads: The titles of the columns.
        texts: Number of columns on the left that hold texts; the others hold numbers.
        lines: Its rows.
        sentences: Those of the columns of texts that are long, with their shares of the width of a
            printed page.
    """

    id: str
    title: str
    remark: str
    heads: tuple[str, ...]
    texts: int
    lines: tuple[tuple[Entry, ...], ...]
    sentences: tuple[tuple[int, float], ...] = ()


def grids(summary: Summary) -> list[Grid]:
    """The tables that have rows: claims, means, fronts, runs, models beside, failures, stops."""
    makers = (_findings, _means, _fronts, _runs, _beside, _failures, _stopped)
    return [grid for grid in (make(summary) for make in makers) if grid.lines]


def figure_names(summary: Summary) -> dict[str, str]:
    """The main figures that some run has, with their titles."""
    names = {
        "top1": "top-1",
        "val_top1": "validation top-1",
        "params": "parameters",
        "macs": "MACs",
        "params_nonzero": "nonzero parameters",
        "params_exact": "parameters after exact removal",
        "heads_dead": "dead heads",
    }
    for column in summary.latencies:
        kind = column.removeprefix("compact_").removesuffix("_ms").replace("_", " ")
        names[column] = f"{kind}, ms"
    for column in summary.memories:
        kind = column.removeprefix("compact_").removesuffix("_memory_bytes").replace("_", " ")
        names[column] = f"{kind}, MB"
    known = {name for row in summary.done for name in names if row.get(name) is not None}
    return {name: title for name, title in names.items() if name in known}


def figure_text(name: str, value: Cell, deviation: float | None = None) -> str:
    """A figure in its unit, with its deviation over seeds."""
    if value is None:
        return ""
    mean, spread = number(value), None if deviation is None else abs(deviation)
    if "top1" in name:
        return f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
    if name == "heads_dead":
        return f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
    if name.endswith("_ms"):
        text = wording.three_digits(mean)
        decimals = len(text.partition(".")[2])
        return text if spread is None else f"{text} ± {spread:.{decimals}f}"
    if name.endswith("_bytes"):
        return f"{mean / 1e6:.1f}" + ("" if spread is None else f" ± {spread / 1e6:.1f}")
    return wording.count(mean) + ("" if not spread else f" ± {wording.count(spread)}")


def _settings(cells: dict[str, Cell], keys: Sequence[str]) -> list[Entry]:
    return [Entry(cell_text(cells[key]), cells[key]) for key in keys]


def _title(name: str, title: str) -> str:
    return f"{title}, %" if "top1" in name else title


def _findings(summary: Summary) -> Grid:
    remark = (
        "What the runs of this study show of claims in publications: a median or a share, with its "
        "exact 95 % interval. A claim that the interval does not decide is left open."
    )
    heads = ("claim", "source", "verdict", "what is measured", "here", "95 % interval")
    lines = tuple(_finding_line(finding) for finding in findings(summary))
    sentences = ((0, 0.2), (1, 0.2), (3, 0.24))
    return Grid("findings", "Claims of the sources", remark, heads, 4, lines, sentences)


def _finding_line(finding: Finding) -> tuple[Entry, ...]:
    texts = (finding.claim, finding.source, verdict(finding), finding.note)
    entries = [Entry(text, text) for text in texts]
    here = "" if finding.number is None else f"{finding.number:.2f} {finding.unit}"
    entries.append(Entry(here, finding.number))
    if finding.interval is None:
        return (*entries, Entry(""))
    low, high = finding.interval
    return (*entries, Entry(f"{low:.2f} to {high:.2f}", low))


def _means(summary: Summary) -> Grid:
    axes, figures = summary.axes, figure_names(summary)
    titles = short_names(axes)
    heads = (*(titles[axis] for axis in axes), "seeds", *(_title(*f) for f in figures.items()))
    lines = tuple(_mean_line(group, axes, list(figures)) for group in summary.groups)
    remark = (
        "Mean and sample standard deviation over the seeds of each setting. Accuracies are those "
        "of the test images, latencies are medians of one inference."
    )
    return Grid("means", "Means over seeds", remark, heads, len(axes), lines)


def _mean_line(group: Group, axes: Sequence[str], figures: Sequence[str]) -> tuple[Entry, ...]:
    seeds = tuple((str(row["seed"]), str(row["id"])) for row in group.rows)
    entries = _settings(group.cells, axes)
    entries.append(Entry(" ".join(text for text, _ in seeds), float(len(seeds)), links=seeds))
    # Numbers of several runs have none of their own: the seeds link to them.
    run = seeds[0][1] if len(seeds) == 1 else None
    for name in figures:
        mean = group.mean(name)
        entries.append(Entry(figure_text(name, mean, group.deviation(name)), mean, run=run))
    return tuple(entries)


def _fronts(summary: Summary) -> Grid:
    keys = summary.configurations
    costs = list(summary.fronts)
    found: dict[tuple[Cell, ...], dict[str, int]] = {}
    groups: dict[tuple[Cell, ...], Group] = {}
    for cost in costs:
        for group, count in on_fronts(summary, cost):
            place = tuple(group.cells.values())
            groups.setdefault(place, group)
            found.setdefault(place, {})[cost] = count
    titles, figures = short_names(keys), figure_names(summary)
    lines = []
    for place, counts in found.items():
        entries = _settings(groups[place].cells, keys)
        entries.append(Entry(str(len(groups[place].rows)), len(groups[place].rows)))
        entries += [Entry(str(counts.get(cost, 0)), counts.get(cost, 0)) for cost in costs]
        lines.append(tuple(entries))
    heads = (*(titles[key] for key in keys), "runs", *(f"by {figures[cost]}" for cost in costs))
    remark = (
        "How many runs of each configuration are on the Pareto front of their seed: no other run "
        "of the seed is both at most as large, or as slow, and more accurate."
    )
    # A study that varies the size alone has one configuration.
    return Grid(
        "fronts", "On the Pareto fronts", remark, heads, len(keys), tuple(lines if keys else [])
    )


def _runs(summary: Summary) -> Grid:
    return runs_grid(summary, summary.axes, list(figure_names(summary)))


def runs_grid(summary: Summary, axes: Sequence[str], figures: Sequence[str]) -> Grid:
    """The table of all runs.

    Args:
        summary: The study.
        axes: Those that it has; they follow the run, and the seed and the state follow them.
        figures: Those that it has, of `figure_names`.

    Returns:
        The table; the figures of finished runs link to their report.
    """
    titles, named = short_names(summary.axes), figure_names(summary)
    heads = ("run", *(titles[axis] for axis in axes), "seed", "state")
    heads = (*heads, *(_title(name, named[name]) for name in figures))
    lines = tuple(_run_line(row, axes, figures) for row in summary.rows)
    remark = "Every run; its figures link to its own report."
    return Grid("runs", "All runs", remark, heads, len(axes) + 1, lines)


def _run_line(row: Row, axes: Sequence[str], figures: Sequence[str]) -> tuple[Entry, ...]:
    run = str(row["id"]) if row["state"] == "done" else None
    entries = [Entry(str(row["id"]), row["number"], run=run)]
    entries += _settings({axis: row[axis] for axis in axes}, axes)
    entries += [Entry(str(row["seed"]), row["seed"]), Entry(str(row["state"]), row["state"])]
    entries += [Entry(figure_text(name, row[name]), row[name], run=run) for name in figures]
    return tuple(entries)


def _failures(summary: Summary) -> Grid:
    remark = "Runs that failed, with the reason; their output is in logs/."
    return _reasons(summary, summary.failed, "failures", "Failed runs", remark)


def _stopped(summary: Summary) -> Grid:
    remark = (
        "Runs that were stopped during their fine-tuning, since others of their size were better."
    )
    return _reasons(summary, summary.stopped, "stopped", "Stopped runs", remark)


def _reasons(summary: Summary, rows: Sequence[Row], id_: str, title: str, remark: str) -> Grid:
    """Runs that did not end, with the reasons."""
    axes = summary.axes
    titles = short_names(axes)
    heads = ("run", *(titles[axis] for axis in axes), "seed", "reason")
    lines = []
    for row in rows:
        entries = [Entry(str(row["id"]), row["number"])]
        entries += _settings({axis: row[axis] for axis in axes}, axes)
        entries += [Entry(str(row["seed"]), row["seed"])]
        entries += [Entry(str(row["reason"] or ""), row["reason"])]
        lines.append(tuple(entries))
    sentences = ((len(heads) - 1, 0.3),)
    return Grid(id_, title, remark, heads, len(heads), tuple(lines), sentences)


def _beside(summary: Summary) -> Grid:
    remark = (
        "Dense models of timm with random weights, exported unchanged in fp32 for ONNX Runtime and "
        "timed as the runs are; their accuracy is not measured. MB is memory beyond the runtime's."
    )
    heads = ["model", "image", "remark", "parameters", "MACs", "fp32, ms", "fp32, MB"]
    shown = {"params": "params", "macs": "macs", "ms": "_ms", "memory_bytes": "_bytes"}
    published = summary.published_top1
    if published:
        heads.append("published top-1, %")
        remark += " Published accuracies are those of the study file, not measured here."
    lines = []
    for row in summary.beside:
        texts = [Entry(str(row[name] or ""), row[name]) for name in ("name", "image", "reason")]
        figures = [Entry(figure_text(kind, row[name]), row[name]) for name, kind in shown.items()]
        if published:
            top1 = published.get(str(row["name"]))
            figures.append(Entry(figure_text("top1", top1), top1))
        lines.append((*texts, *figures))
    # Why there are no figures may be a long line.
    sentences = ((2, 0.25),) if any(row["reason"] for row in summary.beside) else ()
    return Grid(
        *("beside", "Dense models beside", remark, tuple(heads), 3, tuple(lines)), sentences
    )
