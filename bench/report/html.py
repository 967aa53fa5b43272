"""report.html: one file without scripts and requests, for phones and desktops, light and dark."""

from __future__ import annotations

from .facts import Facts, environment_facts, run_facts
from .html_figures import (
    curves_section,
    fronts_section,
    kept_section,
    latency_section,
    operators_section,
)
from .html_tables import (
    buckets_section,
    cut_section,
    estimates_section,
    figures_section,
    latency_budget_section,
    parity_section,
    zeros_section,
)
from .markup import Markup, document, element, joined, keep_units, section
from .overview import Change, Overview, baseline_name, overview
from .run import Run
from .style import page_style
from .token_map import token_section
from .waterfall import waterfall_section

# Nothing is loaded and no script runs, whatever a label contains.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
FOOTER = (
    "Written by vitrim. Every statistic on this page is derived from the raw samples in the run's "
    "measurement files."
)


def render_html(run: Run, view: Overview | None = None) -> str:
    """The whole page; `view` avoids computing the figures again."""
    view = view or overview(run)
    body = element(
        "main",
        _header(run, view),
        figures_section(view),
        buckets_section(view),
        fronts_section(view),
        latency_section(view),
        operators_section(view),
        estimates_section(run),
        kept_section(run),
        token_section(run),
        cut_section(run),
        latency_budget_section(run),
        waterfall_section(run.waterfall),
        zeros_section(run),
        curves_section(run),
        parity_section(run),
        _environment(view),
        _warnings(run, view),
        _reproduce(run),
        element("footer", FOOTER),
    )
    title = f"{view.title}: {view.headline}"
    return document(title, POLICY, page_style(), element("body", body))


def _header(run: Run, view: Overview) -> Markup:
    eyebrow = [element("b", "vitrim"), element("span", view.title)]
    if run.report.created_at:
        eyebrow.append(element("span", run.report.created_at[:10]))
    lead = run.report.data
    if view.chosen:
        compared = f"{view.chosen} compared with the {baseline_name(run)} on the same device."
        lead = f"{compared} {lead}." if lead else compared
    tiles = [_tile(change) for change in view.changes]
    return element(
        "header",
        element("div", *eyebrow, class_="eyebrow"),
        element("h1", *_headline(view.headline)),
        element("p", lead, class_="lead") if lead else None,
        element("ul", *tiles, class_="tiles") if tiles else None,
    )


def _headline(text: str) -> list[Markup]:
    """The parts of the headline, each on one line where the window is wide enough."""
    *parts, last = keep_units(text).split(", ")
    return [joined(element("span", part), " ") for part in (*(f"{p}," for p in parts), last)]


def _tile(change: Change) -> Markup:
    meter = None
    if change.share is not None:
        fill = element("i", style=f"width:{100 * min(1.0, change.share):.1f}%")
        label = f"{100 * change.share:.0f} percent of the baseline's"
        meter = element("div", fill, class_="meter", role="img", aria_label=label)
    return element(
        "li",
        element("span", change.name, class_="what"),
        element("span", change.after, class_="after"),
        element("span", f"from {change.before}", class_="before") if change.before else None,
        meter,
        element("span", change.remark, class_="remark"),
        class_="card tile",
    )


def _environment(view: Overview) -> Markup | None:
    cards = []
    for device in view.devices:
        facts = environment_facts(device)
        if facts:
            title = element("h3", device.title) if len(view.devices) > 1 else None
            cards.append(element("div", title, _facts(facts), class_="card"))
    if not cards:
        return None
    return section("Environment", None, element("div", *cards, class_="stack"), id_="environment")


def _facts(facts: Facts) -> Markup:
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    return element("dl", *rows)


def _warnings(run: Run, view: Overview) -> Markup | None:
    lines = [element("li", warning) for warning in view.warnings]
    lines += [element("li", note, class_="note") for note in run.missing]
    if not lines:
        return None
    return section("Warnings", None, element("ul", *lines, class_="warnings"), id_="warnings")


def _reproduce(run: Run) -> Markup | None:
    facts, command = run_facts(run), run.report.command
    if command is None and run.report.recipe:
        command = f"vitrim run {run.report.recipe}"
    elif command is None and run.recipe_toml:
        command = "vitrim run recipe.toml"
    if not command and not facts:
        return None
    recipe = None
    if run.recipe_toml:
        summary = element("summary", "The recipe with all values")
        recipe = element("details", summary, element("pre", run.recipe_toml))
    card = element(
        "div",
        element("pre", command, tabindex="0") if command else None,
        _facts(facts) if facts else None,
        recipe,
        class_="card",
    )
    return section("How to reproduce", None, card, id_="reproduce")
