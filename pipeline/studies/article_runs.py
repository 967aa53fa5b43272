"""The appendix of a study's article: a table of all runs over pages of one column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .article_text import breakable, escaped, table_cell
from .expansion import settings_text
from .grids import Entry, figure_names, runs_grid
from .summary import Summary, short_names

# In points: the width of the text of main.tex, that of a sign of \scriptsize, and the space around
# a column.
PAGE, SIGN, SPACE = 505.0, 4.1, 6.0
# Of the width of the page, for settings in one column.
LEAST_SHARE = 0.2


@dataclass(frozen=True)
class _Column:
    """A column of the table.

    Attributes:
        head: Its title.
        entries: Its cells, one for each run.
        alignment: In LaTeX.
    """

    head: str
    entries: tuple[Entry, ...]
    alignment: str

    @property
    def width(self) -> float:
        """About its width in points."""
        return SIGN * max(map(len, (self.head, *(entry.text for entry in self.entries)))) + SPACE

    def cells(self) -> list[str]:
        """Its cells in LaTeX."""
        if not self.alignment.startswith("p"):
            return [table_cell(entry) for entry in self.entries]
        return [rf"\raggedright {breakable(entry.text)}" for entry in self.entries]


def runs_table(summary: Summary) -> str:
    """generated/runs.tex: the table of all runs, which needs `longtable` and a page of one column.

    Args:
        summary: The study.

    Returns:
        LaTeX. Of the axes the table has those that vary, in one column where they would leave the
        page; of the figures the accuracy, the sizes and the first latency.
    """
    axes = [axis for axis in summary.axes if len({row[axis] for row in summary.rows}) > 1]
    known = figure_names(summary)
    wanted = (summary.quality, *summary.sizes, *summary.latencies[:1])
    grid = runs_grid(summary, axes, [name for name in wanted if name in known])
    first, *columns = [
        _Column(head, tuple(entries), "l" if place < grid.texts else "r")
        for place, (head, *entries) in enumerate(zip(grid.heads, *grid.lines, strict=True))
    ]
    settings, (seed, state, *figures) = columns[: len(axes)], columns[len(axes) :]
    unfinished = len(summary.done) < len(summary.rows)
    rest = [seed, *([state] if unfinished else []), *figures]
    left = PAGE - sum(column.width for column in (first, *rest))
    if sum(column.width for column in settings) > left:
        settings = [_together(summary, axes, left)]
    return _longtable([first, *settings, *rest], grid.title, grid.remark)


def _together(summary: Summary, axes: Sequence[str], width: float) -> _Column:
    """Axes as one column of paragraphs."""
    names = short_names(summary.axes)
    texts = [settings_text({names[axis]: row[axis] for axis in axes}) for row in summary.rows]
    share = max((width - SPACE) / PAGE, LEAST_SHARE)
    return _Column("settings", tuple(map(Entry, texts)), f"p{{{share:.2f}\\linewidth}}")


def _longtable(columns: Sequence[_Column], title: str, remark: str) -> str:
    heads = " & ".join(escaped(column.head) for column in columns) + r" \\"
    rows = zip(*(column.cells() for column in columns), strict=True)
    return "\n".join(
        [
            "% Written by vitrim.",
            "{\\scriptsize\\setlength{\\tabcolsep}{3pt}\\setlength{\\LTcapwidth}{\\linewidth}",
            f"\\begin{{longtable}}{{{''.join(column.alignment for column in columns)}}}",
            f"  \\caption{{{escaped(title)}. {escaped(remark)}}}\\label{{tab:runs}}\\\\",
            f"  \\toprule\n  {heads}\n  \\midrule\n  \\endfirsthead",
            f"  \\toprule\n  {heads}\n  \\midrule\n  \\endhead",
            "  \\bottomrule\n  \\endfoot",
            *(f"  {' & '.join(row)} \\\\" for row in rows),
            "\\end{longtable}}\n",
        ]
    )
