"""HTML and SVG built from values, so that every text and attribute is escaped by construction."""

from __future__ import annotations

import html
import re

# Characters that XML forbids, or that change the direction of the text around them.
_UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_VOID = frozenset({"meta", "br", "hr", "img", "link"})
# The space between a number and its unit.
_UNIT_SPACE = re.compile(r"(?<=\d) (?=(?:[GMk]?B|[GMk]|ms|s|µs)\b|%)")


class Markup(str):
    """Text that is markup already; all other strings are escaped."""

    __slots__ = ()


Child = str | Markup | None
Attribute = str | float | int | bool | None


def escaped(value: str) -> Markup:
    """Escape a string for element content and attribute values."""
    return Markup(html.escape(_UNWANTED.sub("\ufffd", value), quote=True))


def element(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """`<name attributes>children</name>`.

    A trailing `_` of an attribute is dropped and every other `_` becomes `-`. Attributes that are
    None or False are left out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escaped(_attribute(value))}"')
    opening = " ".join(parts)
    inside = joined(*children)
    return Markup(f"<{opening}>" if name in _VOID else f"<{opening}>{inside}</{name}>")


def joined(*children: Child) -> Markup:
    """Concatenate children; plain strings are escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escaped(child)
            for child in children
            if child is not None
        )
    )


def document(title: str, policy: str, style: str, body: Markup) -> str:
    """A self-contained HTML page.

    Args:
        title: The title of the window.
        policy: The content security policy.
        style: The style sheet.
        body: The body element.

    Returns:
        The page as text.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="vitrim"),
        element("title", title),
        element("style", Markup(style)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def section(title: str, remark: str | None, *content: Markup | None, id_: str) -> Markup:
    """A section of the page: heading, optional remark, content.

    Args:
        title: The heading.
        remark: One or two sentences below it.
        content: What follows.
        id_: Anchor of the heading.

    Returns:
        The section element.
    """
    return element(
        "section",
        element("h2", title, id=id_),
        element("p", remark, class_="soft") if remark else None,
        *content,
        aria_labelledby=id_,
    )


def keep_units(text: str) -> str:
    """Replace the space between a number and its unit by one that does not break."""
    return _UNIT_SPACE.sub("\u00a0", text)


def _attribute(value: str | float | int) -> str:
    if isinstance(value, float):
        # A hundredth of a pixel is enough, and keeps the page small and reproducible.
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
