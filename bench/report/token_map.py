"""Where patches leave a network: the picture over the patch grid and over images, and the pyramid.

The darker a patch, the earlier it leaves; the number in a cell of the large picture is the last
place that carries it.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import wording
from .markup import Markup, element, section
from .model import TokenMap
from .run import Run

# Sides of a picture in pixels, and of the largest grid whose cells have numbers.
MAP_PX, IMAGE_PX, NUMBERED = 300, 150, 16
# Opacity of a patch that is never embedded.
DARKEST = 0.86


def token_section(run: Run) -> Markup | None:
    """Where patches leave the stream; None if the network carries all of them to its end."""
    tokens = run.report.tokens
    if tokens is None:
        return None
    own = tokens.chosen or (tokens.exits,) * len(tokens.images)
    shown = [
        _picture(tokens, exits, IMAGE_PX, image=image)
        for image, exits in zip(tokens.images, own, strict=True)
    ]
    over_images = None
    if shown:
        over_images = element(
            "div",
            element("h3", "Over test images"),
            element("div", *shown, style="display:flex;flex-wrap:wrap;gap:8px"),
        )
    grid = element(
        "figure",
        element("h3", _title(tokens)),
        _picture(tokens, tokens.exits, MAP_PX, numbers=max(tokens.grid) <= NUMBERED),
        element("p", _legend(tokens.sites), class_="soft"),
        over_images,
        class_="card",
    )
    content = element("div", grid, _pyramid(tokens), class_="grid2")
    return section("Tokens", _remark(tokens), content, id_="tokens")


def _title(tokens: TokenMap) -> str:
    if tokens.averaged:
        return f"Last place that carries a patch, mean over {tokens.averaged} test images"
    return "Last place that carries a patch"


def _remark(tokens: TokenMap) -> str:
    patches = wording.plural(len(tokens.exits), "patch", "patches")
    if tokens.averaged:
        return (
            f"Of {patches}, a constant number is chosen for each image. Darker patches leave "
            "earlier."
        )
    never = sum(depth == 0 for depth in tokens.exits)
    to_the_end = sum(depth == len(tokens.sites) for depth in tokens.exits)
    return (
        f"Of {patches}, {never} are never embedded and {to_the_end} are carried to the end. "
        "Darker patches leave earlier."
    )


def _legend(sites: Sequence[str]) -> str:
    named = ", ".join(f"{number} {site}" for number, site in enumerate(sites, start=1))
    return f"0 never embedded, {named}"


def _picture(
    tokens: TokenMap,
    exits: Sequence[int],
    side: int,
    *,
    image: str | None = None,
    numbers: bool = False,
) -> Markup:
    """The grid as SVG, over an image if there is one."""
    rows, columns = tokens.grid
    height = side * rows / columns
    cell_x, cell_y = side / columns, height / rows
    parts: list[Markup] = []
    if image is not None:
        parts.append(
            element(
                "image",
                href=f"data:image/png;base64,{image}",
                width=side,
                height=f"{height:g}",
                preserveAspectRatio="none",
                style="image-rendering:auto",
            )
        )
    for place, depth in enumerate(exits):
        x, y = place % columns * cell_x, place // columns * cell_y
        gone = 1 - depth / len(tokens.sites)
        parts.append(
            element(
                "rect",
                x=f"{x:.2f}",
                y=f"{y:.2f}",
                width=f"{cell_x:.2f}",
                height=f"{cell_y:.2f}",
                style=f"fill:#10141f;fill-opacity:{DARKEST * gone:.3f};stroke:var(--hair);"
                f"stroke-width:{0 if image else 1}",
            )
        )
        if numbers:
            color = "#fff" if gone > 0.4 else "var(--ink)"
            parts.append(
                element(
                    "text",
                    str(depth),
                    x=f"{x + cell_x / 2:.2f}",
                    y=f"{y + cell_y / 2:.2f}",
                    style=f"font-size:{min(cell_x, cell_y) * 0.45:.1f}px;fill:{color};"
                    "text-anchor:middle;dominant-baseline:central",
                )
            )
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {side} {height:g}",
        width=side,
        role="img",
        aria_label=f"{rows} by {columns} patches, and where each leaves the network",
        style="max-width:100%;height:auto",
    )


def _pyramid(tokens: TokenMap) -> Markup:
    """The number of tokens after each place, as bars."""
    most = max(tokens.counts)
    cells: list[Markup] = []
    for site, count in zip(tokens.sites, tokens.counts, strict=True):
        fill = element("i", style=f"width:{100 * count / most:.2f}%")
        label = f"{site}: {count} of {most} tokens"
        cells += [
            element("span", site, class_="soft"),
            element("div", fill, class_="track", role="img", aria_label=label, style="margin:0"),
            element("b", str(count), style="text-align:right"),
        ]
    layout = "display:grid;grid-template-columns:auto 1fr auto;gap:6px 12px;align-items:center"
    bars = element("div", *cells, style=layout)
    return element("figure", element("h3", "Tokens after each sub-layer"), bars, class_="card")
