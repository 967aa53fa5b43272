"""The text of a study's article: numbers as macros, tables, figures, references, and a skeleton.

The skeleton main.tex is the author's: it is written once. The files in generated/ are replaced with
every report, and main.tex takes its numbers from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ...bench.report import wording
from ..recipe import Recipe
from .article_methods import method_text, objective_text
from .bibliography import keys_of, with_own_keys
from .expansion import settings_text
from .grids import Entry, Grid, figure_text
from .pictures import ACCURACY, cost_caption, costs, quality_title
from .summary import Group, Summary, number
from .table import RUNS

# Rows of one table; longer tables continue in the next one.
MOST_ROWS = 42
_SPECIAL = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "×": r"$\times$", "−": r"$-$", "λ": r"$\lambda$", "µ": r"$\mu$"},
    **{"<": r"$<$", ">": r"$>$", "|": r"$|$", '"': "''", "–": "--", "→": r"$\to$"},
}
MAIN = r"""\documentclass[10pt,twocolumn,letterpaper]{article}
% Written once by `vitrim study report --latex`; this file is yours to edit. The numbers, tables and
% figures are in generated/, which every report replaces.
\usepackage[letterpaper,margin=0.75in,columnsep=0.3125in]{geometry}
\usepackage{graphicx}
\usepackage{amsmath}
\usepackage{booktabs}
\usepackage{longtable}
\usepackage[hidelinks]{hyperref}
\input{generated/numbers}
% What is left to the authors.
\newcommand{\judgement}[1]{\emph{[#1]}}

\title{\Large\bfseries \studyname}
\author{\judgement{authors and affiliations}}
\date{}

\begin{document}
\maketitle

\begin{abstract}
\studyabout{} We compare \studyruns{} runs over the seeds \studyseeds{}. \studybaseline{}
\studybest{} \studysmallest{} \judgement{what follows from this}
\end{abstract}

\section{Introduction}
\judgement{the question, and why it is open}
We follow the protocol of \studysources{}. Networks are Vision Transformers~\cite{dosovitskiy2021}.

\section{Method}
\studymethod{}
\judgement{what else is needed to understand the compared settings}

\section{Experimental setup}
\studysetup{} \studymachine{} For each setting we report the mean and the sample standard deviation
over $n$ seeds,
\begin{equation}
  \bar{x} = \frac{1}{n} \sum_{i=1}^{n} x_i, \qquad
  s = \sqrt{\frac{1}{n - 1} \sum_{i=1}^{n} (x_i - \bar{x})^2} .
  \label{eq:deviation}
\end{equation}
A run is on the Pareto front of its seed if no other run of that seed is at most as large and more
accurate.

\section{Results}
\input{generated/figures}
\input{generated/findings}
\input{generated/means}
\input{generated/fronts}
\input{generated/beside}
\input{generated/failures}
\input{generated/stopped}
\studyfigurelist{} \studytables{} Tab.~\ref{tab:runs} has all runs.
\judgement{which settings are better, and whether by more than the deviation of
Eq.~\ref{eq:deviation}}

\section{Discussion}
\studyfailures{} \judgement{limits of the protocol, and where the findings agree with the sources}

\section{Conclusion}
\judgement{one paragraph}

{\small
\bibliographystyle{plain}
\bibliography{generated/references}
}

\onecolumn
\appendix
\section{All runs}
\input{generated/runs}
\end{document}
"""


@dataclass(frozen=True)
class Figure:
    """A figure of the article.

    Attributes:
        file: Name of its PDF in generated/ without the suffix, and its label.
        about: What it shows, in words that figures of a kind have in common.
        caption: In LaTeX.
    """

    file: str
    about: str
    caption: str


def escaped(text: str) -> str:
    """A text in LaTeX; what is not ASCII and has no command there becomes `?`."""
    spelled = "".join(_SPECIAL.get(sign, sign) for sign in " ".join(text.split()))
    return spelled.encode("ascii", "replace").decode("ascii")


def breakable(text: str) -> str:
    """Settings in LaTeX, where a line may end within a long name or list."""
    shown = escaped(text)
    for sign in ("+", r"\_"):
        shown = shown.replace(sign, rf"{sign}\allowbreak{{}}")
    return shown


def report_link(run: str, text: str | None = None) -> str:
    """A text, or the id of a run, that leads to the report of the run, in LaTeX."""
    return rf"\href{{../{RUNS}/{run}/report.html}}{{{escaped(text or run)}}}"


def numbers(
    summary: Summary, base: Recipe | None, machine: str | None, shown: Sequence[Figure]
) -> str:
    """generated/numbers.tex: the macros that main.tex uses.

    Args:
        summary: The study.
        base: The recipe of its first run.
        machine: Where latencies were measured.
        shown: The figures.

    Returns:
        LaTeX.
    """
    seeds = sorted({int(number(row["seed"])) for row in summary.rows})
    macros = {
        "studyname": escaped(summary.name),
        "studyabout": escaped(summary.facts.get("about", "")),
        "studyruns": str(len(summary.rows)),
        "studyseeds": escaped(wording.listed([str(seed) for seed in seeds])),
        "studysources": _sources(summary),
        "studybaseline": escaped(_baseline(summary)),
        "studybest": _best(summary),
        "studysmallest": _smallest(summary),
        "studymethod": method_text(summary, base),
        # Of main.tex of earlier versions.
        "studyobjective": objective_text(summary, base),
        "studysetup": _setup(summary, base),
        "studymachine": escaped(
            f"Latencies are medians on one machine: {machine}." if machine else ""
        ),
        "studyfailures": escaped(_failures(summary)),
        "studyfigurelist": _figure_list(shown),
        "studytables": _table_list(summary),
    }
    lines = [f"\\newcommand{{\\{name}}}{{{text}}}" for name, text in macros.items()]
    text = "% Written by vitrim.\n" + "\n".join(lines) + "\n"
    return with_own_keys(text, summary.facts.get("bibtex", ""))


def table(grid: Grid, label: str) -> str:
    """A table over both columns, in parts where it is long."""
    parts = [grid.lines[at : at + MOST_ROWS] for at in range(0, len(grid.lines), MOST_ROWS)]
    return "% Written by vitrim.\n" + "\n".join(
        _part(grid, lines, label, place, len(parts)) for place, lines in enumerate(parts, 1)
    )


def cost_figures(summary: Summary) -> list[Figure]:
    """The figures of accuracy and cost, in the order of `costs`."""
    return [
        Figure(cost.file, ACCURACY, escaped(cost_caption(summary, cost))) for cost in costs(summary)
    ]


def figures(shown: Sequence[Figure]) -> str:
    """generated/figures.tex."""
    parts = ["% Written by vitrim."]
    for figure in shown:
        # A tall figure leaves room for its caption.
        size = "width=\\linewidth,height=0.8\\textheight,keepaspectratio"
        parts.append(
            "\\begin{figure}[t]\n  \\centering\n"
            f"  \\includegraphics[{size}]{{generated/{figure.file}.pdf}}\n"
            f"  \\caption{{{figure.caption}}}\n"
            f"  \\label{{fig:{figure.file}}}\n\\end{{figure}}"
        )
    return "\n".join(parts) + "\n"


def _part(grid: Grid, lines: Sequence[Sequence[Entry]], label: str, place: int, count: int) -> str:
    columns = ["l"] * grid.texts + ["r"] * (len(grid.heads) - grid.texts)
    for column, share in grid.sentences:
        columns[column] = f"p{{{share:g}\\linewidth}}"
    alignment = "".join(columns)
    rows = [" & ".join(map(table_cell, line)) + r" \\" for line in lines]
    continued = f" (part {place} of {count})" if count > 1 else ""
    return "\n".join(
        [
            "\\begin{table*}[t]\n  \\centering\\small",
            f"  \\caption{{{escaped(grid.title)}{continued}. {escaped(grid.remark)}}}",
            f"  \\label{{tab:{label}{'' if place == 1 else place}}}",
            # A table of many columns becomes smaller, and does not leave the page.
            "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"  \\begin{{tabular}}{{{alignment}}}",
            "    \\toprule",
            "    " + " & ".join(map(escaped, grid.heads)) + r" \\",
            "    \\midrule",
            *(f"    {row}" for row in rows),
            "    \\bottomrule\n  \\end{tabular}}\n\\end{table*}",
        ]
    )


def table_cell(entry: Entry) -> str:
    """A cell of a table with its links, in LaTeX."""
    if entry.links:
        return " ".join(report_link(run, text) for text, run in entry.links)
    if entry.run is None or not entry.text:
        return escaped(entry.text)
    return report_link(entry.run, entry.text)


def _sources(summary: Summary) -> str:
    keys = keys_of(summary.facts.get("bibtex", ""))
    named = escaped(summary.facts.get("source", "").rstrip(". "))
    cited = f"~\\cite{{{','.join(keys)}}}" if keys else ""
    return f"{named or 'this study'}{cited}"


def _baseline(summary: Summary) -> str:
    done = [row for row in summary.done if row["top1_dense"] is not None]
    if not done:
        return ""
    mean = sum(number(row["top1_dense"]) for row in done) / len(done)
    params = wording.count(number(done[0]["params_dense"]))
    return f"The dense baseline has {params} parameters and {wording.percent(mean, 2)} top-1."


def _described(summary: Summary, group: Group) -> str:
    """A setting with its accuracy and size, in LaTeX."""
    accuracy = figure_text(
        summary.quality, group.mean(summary.quality), group.deviation(summary.quality)
    )
    settings = breakable(settings_text(group.cells) or "the only setting")
    figures = [f"{accuracy} %", wording.count(group.mean("params") or 0.0)]
    # The numbers of several runs are in the table, where their seeds lead to them.
    run = str(group.rows[0]["id"]) if len(group.rows) == 1 else None
    top1, params = (escaped(text) if run is None else report_link(run, text) for text in figures)
    return f"{settings}, with {top1} {quality_title(summary)} and {params} parameters"


def _known(summary: Summary) -> list[Group]:
    return [group for group in summary.groups if group.mean(summary.quality) is not None]


def _best(summary: Summary) -> str:
    groups = _known(summary)
    if not groups:
        return ""
    best = max(groups, key=lambda group: group.mean(summary.quality) or 0.0)
    return f"The most accurate setting is {_described(summary, best)}."


def _smallest(summary: Summary) -> str:
    """The smallest setting within a point of the baseline."""
    found = []
    for group in _known(summary):
        dense = group.mean("top1_dense")
        if dense is not None and (group.mean(summary.quality) or 0.0) >= dense - 0.01:
            found.append(group)
    if not found:
        return ""
    smallest = min(found, key=lambda group: group.mean("params") or 0.0)
    return f"The smallest within one point of the baseline is {_described(summary, smallest)}."


def _setup(summary: Summary, base: Recipe | None) -> str:
    parts = []
    if base is not None:
        parts.append(
            f"The base recipe trains {escaped(base.model.name)} on {escaped(base.data.name)} with "
            r"PyTorch~\cite{paszke2019} and timm~\cite{wightman2019}."
        )
    values = []
    for axis in summary.axes:
        cells = dict.fromkeys(row[axis] for row in summary.rows)
        shown = [settings_text({"": cell}).removeprefix("=") for cell in cells if cell is not None]
        values.append(breakable(f"{axis} in {{{', '.join(shown)}}}"))
    if values:
        parts.append(f"Varied are {'; '.join(values)}.")
    if summary.latencies:
        parts.append(r"Artifacts run in ONNX Runtime~\cite{onnxruntime}.")
    return " ".join(parts)


def _failures(summary: Summary) -> str:
    if not summary.failed:
        return "No run failed."
    reasons = list(dict.fromkeys(str(row["reason"]) for row in summary.failed))
    return f"{wording.plural(len(summary.failed), 'run')} failed; the first reason: {reasons[0]}."


def _figure_list(shown: Sequence[Figure]) -> str:
    parts = []
    for about, each in itertools.groupby(shown, lambda figure: figure.about):
        listed = ", ".join(f"\\ref{{fig:{figure.file}}}" for figure in each)
        parts.append(f"{about} are in Fig.~{listed}. ")
    return f"{''.join(parts)}Tab.~\\ref{{tab:means}} has the means of all settings."


def _table_list(summary: Summary) -> str:
    """Where the tables are that not every study has."""
    known = {
        "beside": (summary.beside, "has dense models that were timed beside the runs"),
        "failures": (summary.failed, "lists the runs that failed"),
        "stopped": (summary.stopped, "lists the runs that were stopped"),
    }
    parts = [f"Tab.~\\ref{{tab:{name}}} {what}." for name, (rows, what) in known.items() if rows]
    return " ".join(parts)
