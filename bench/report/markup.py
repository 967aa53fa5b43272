"""HTML and SVG built from values, so that every text and attribute is escaped by construction."""

from __future__ import annotations

import html
import re

# Not allowed in XML, or able to turn the order of the text around them.
_UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_VOID = frozenset({"meta", "br", "hr", "img", "link"})


class Markup(str):
    """Text that is markup already; all other strings are escaped."""

    __slots__ = ()


Child = str | Markup | None
Attribute = str | float | int | bool | None


def text(value: str) -> Markup:
    """A string made safe for element content and attribute values."""
    return Markup(html.escape(_UNWANTED.sub("\ufffd", value), quote=True))


def element(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """`<name attributes>children</name>`; a trailing `_` of an attribute is dropped, other `_`
    become `-`, None and False are left out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{text(_attribute(value))}"')
    opening = " ".join(parts)
    inside = joined(*children)
    return Markup(f"<{opening}>" if name in _VOID else f"<{opening}>{inside}</{name}>")


def joined(*children: Child) -> Markup:
    """Children one after the other, plain strings escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else text(child)
            for child in children
            if child is not None
        )
    )


def _attribute(value: str | float | int) -> str:
    if isinstance(value, float):
        # A hundredth of a pixel is enough, and keeps the page small and its bytes stable.
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
