"""study.html: one file whose tables sort in the browser and whose figures link to the runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from ...bench.report import wording
from ...bench.report.markup import Markup, document, element, joined, section
from ...bench.report.run import without_address
from ...bench.report.style import packed, page_style
from .grids import Entry, Grid, grids
from .pictures import ACCURACY, BY_DEPTH, Picture
from .summary import Summary, number

# Sorts a table by the column whose head is clicked: numbers by value, empty cells last.
SCRIPT = packed("""
document.addEventListener("click",function(event){
const head=event.target.closest("th[data-sort]");
if(!head)return;
const body=head.closest("table").tBodies[0],heads=[...head.parentNode.children];
const place=heads.indexOf(head),up=head.getAttribute("aria-sort")!=="ascending";
heads.forEach(function(other){other.removeAttribute("aria-sort")});
head.setAttribute("aria-sort",up?"ascending":"descending");
const read=function(row){
const text=row.children[place].dataset.v;
return text===undefined||text===""?null:isNaN(text)?text:Number(text)};
const rows=[...body.rows].map(function(row,index){return[read(row),index,row]});
rows.sort(function(a,b){
if(a[0]===null||b[0]===null)return(a[0]===null)-(b[0]===null)||a[1]-b[1];
const order=typeof a[0]===typeof b[0]?(a[0]<b[0]?-1:a[0]>b[0]?1:0):typeof a[0]==="number"?-1:1;
return(up?order:-order)||a[1]-b[1]});
rows.forEach(function(item){body.append(item[2])})});
""")
STYLE = packed("""
.rows th button{all:unset;cursor:pointer;font:inherit}
.rows th button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.rows th[aria-sort=ascending] button:after{content:" ↑"}
.rows th[aria-sort=descending] button:after{content:" ↓"}
.rows .text{text-align:left}
.rows td.text{white-space:normal}
.rows{max-height:80vh;overflow:auto}
.plot a{cursor:pointer}
figcaption.under{margin:.6rem .2rem 0;color:var(--soft);font-size:.9rem}
""")
REMARKS = {
    ACCURACY: "Every point is a run and links to its report. Each seed has a front of its own.",
    BY_DEPTH: "How many tokens networks carry, and what the patches of the dense one contribute.",
}
FOOTER = (
    "Written by vitrim from study.sqlite. Links lead to the reports of the runs, in runs/ beside "
    "this file."
)


def render_page(summary: Summary, machine: str | None, pictures: Sequence[Picture]) -> str:
    """The whole page.

    Args:
        summary: The study.
        machine: Where latencies were measured.
        pictures: The figures.

    Returns:
        HTML.
    """
    body = element(
        "main",
        _header(summary, machine),
        *(_figures(title, remark, shown) for title, remark, shown in by_section(pictures)),
        *map(_section, grids(summary)),
        _protocol(summary),
        element("footer", FOOTER),
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # Nothing is loaded, and only this script runs, whatever a name in the study contains.
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    script = element("script", Markup(SCRIPT))
    title, style = f"{summary.name}: {headline(summary)}", page_style() + STYLE
    return document(title, policy, style, element("body", body, script))


def headline(summary: Summary) -> str:
    """The state of the study in one line."""
    parts = [f"{len(summary.done)} of {wording.plural(len(summary.rows), 'run')} done"]
    if summary.failed:
        parts.append(f"{len(summary.failed)} failed")
    if summary.stopped:
        parts.append(f"{len(summary.stopped)} stopped early")
    return ", ".join(parts)


def lead(summary: Summary, machine: str | None) -> list[str]:
    """Sentences about the study: subject, source, baseline, machine."""
    facts = summary.facts
    found = [text for text in (facts.get("about", ""), facts.get("source", "")) if text]
    dense = [number(row["top1_dense"]) for row in summary.done if row["top1_dense"] is not None]
    if dense:
        mean, params = sum(dense) / len(dense), number(summary.done[0]["params_dense"])
        text = f"The baselines have {wording.count(params)} parameters and a mean top-1 of "
        found.append(f"{text}{wording.percent(mean, 2)}.")
    if machine:
        found.append(f"Latencies: {machine}.")
    return found


def _header(summary: Summary, machine: str | None) -> Markup:
    eyebrow = element("div", element("b", "vitrim"), element("span", "study"), class_="eyebrow")
    sentences = [element("p", text, class_="lead") for text in lead(summary, machine)]
    title = element("h1", element("span", summary.name))
    return element(
        "header", eyebrow, title, element("p", headline(summary), class_="lead"), *sentences
    )


def by_section(pictures: Sequence[Picture]) -> list[tuple[str, str, list[Picture]]]:
    """Pictures by the part of the report that they belong to: title, remark, and the pictures."""
    titles = dict.fromkeys(each.section for each in pictures)
    return [
        (title, REMARKS[title], [each for each in pictures if each.section == title])
        for title in titles
    ]


def _figures(title: str, remark: str, pictures: Sequence[Picture]) -> Markup:
    cards = [
        element(
            "figure",
            Markup(each.svg.strip()),
            element("figcaption", each.caption, class_="under"),
            class_="card",
        )
        for each in pictures
    ]
    stack = element("div", *cards, class_="stack")
    return section(title, remark, stack, id_="figures" if title == ACCURACY else title.lower())


def _section(grid: Grid) -> Markup:
    heads = [
        element(
            "th",
            element("button", title, type="button"),
            scope="col",
            data_sort=True,
            class_="text" if place < grid.texts else None,
        )
        for place, title in enumerate(grid.heads)
    ]
    rows = [_row(line, grid.texts) for line in grid.lines]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    card = element("div", element("div", table, class_="scroll rows"), class_="card")
    return section(grid.title, grid.remark, card, id_=grid.id)


def _row(line: Sequence[Entry], texts: int) -> Markup:
    return element(
        "tr",
        *(
            element(
                "td",
                _content(entry),
                class_="text" if place < texts else None,
                data_v="" if entry.value is None else _sortable(entry.value),
            )
            for place, entry in enumerate(line)
        ),
    )


def _sortable(value: str | float) -> str:
    return value if isinstance(value, str) else repr(value)


def _content(entry: Entry) -> Markup:
    if entry.links:
        linked = [_link(text, run) for text, run in entry.links]
        return joined(*(part for each in linked for part in (each, " ")))
    return joined(entry.text) if entry.run is None else _link(entry.text, entry.run)


def _link(text: str, run: str) -> Markup:
    return element("a", text, href=f"runs/{run}/report.html")


def _protocol(summary: Summary) -> Markup:
    parts: list[Markup] = [element("pre", without_address(summary.facts.get("toml", "")))]
    base = summary.facts.get("base", "")
    if base:
        title = element("summary", "The recipe of the first run with all values")
        parts.append(element("details", title, element("pre", without_address(base))))
    card = element("div", *parts, class_="card")
    return section("The study file", None, card, id_="protocol")
