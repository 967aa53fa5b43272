"""The picture of a magnitude study: masks of the attention matrices, and the heads that died."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...bench.report.markup import Markup, element
from ...bench.report.plot import sheet, text_at
from ...bench.report.style import packed
from ...compress.masks.weight_mask import WeightMask
from ...compress.network.architecture import Architecture, AttentionSpec
from ...compress.network.files import ARCHITECTURE, read_architecture
from ...core.errors import InputError
from ..magnitude_step import WEIGHT_MASK, read_dead
from ..training_steps import COMPACT
from .magnitude_claims import HIGH, MAGNITUDE, ROUNDS, SCOPE, SPARSITY, setting, single_weights
from .summary import Summary, number
from .table import RUNS, Row

PICTURE_FILE = "study-masks.svg"
LEAVES = ("q", "k", "v", "out")
# Pixels of a matrix, of the gap beside it, and of the heading; cells on a side at most.
SIDE_PX, GAP_PX, HEAD_PX, LEFT_PX, CELLS = 128.0, 18.0, 96.0, 150.0, 64
# Densities of a cell, as shares of the densest one, that have shades of their own.
SHADES = 4
_STYLE = packed(
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}"
    ".plot .title{font-size:16px;font-weight:650}"
    ".plot .under{font-size:12.5px;fill:var(--soft)}"
    ".plot .matrix{fill:none;stroke:var(--hair)}"
    ".plot .kept{fill:var(--s1)}"
    ".plot .between{stroke:var(--hair);stroke-width:.75}"
    ".plot .dead{fill:var(--s2);fill-opacity:.28;stroke:var(--s2);stroke-width:.75}"
)


def shown_run(summary: Summary) -> Row | None:
    """The run whose masks are shown: single weights by magnitude, the nearest to 95 % zeros.

    Of several, one over all matrices, then one with the most rounds, then the first.
    """
    rows = [row for row in single_weights(summary.done, MAGNITUDE) if setting(row, SCOPE) != "ffn"]
    rows = [row for row in rows if row.get(SPARSITY) is not None]

    def order(row: Row) -> tuple[float, bool, float, float]:
        away = abs(number(row[SPARSITY]) - HIGH)
        rounds = -number(setting(row, ROUNDS))
        return away, setting(row, SCOPE) != "all", rounds, number(row["number"])

    return min(rows, key=order, default=None)


def mask_pictures(summary: Summary, folder: Path) -> dict[str, str]:
    """The picture by file name; none where the study has no such run, or its files are gone."""
    row = shown_run(summary)
    if row is None:
        return {}
    run = folder / RUNS / str(row["id"])
    try:
        mask, record = WeightMask.load(run / WEIGHT_MASK), read_dead(run)
        architecture = read_architecture(run / COMPACT / ARCHITECTURE)
    except InputError:
        return {}
    if record is None:
        return {}
    dead = {each["name"]: each.get("heads", []) for each in record["rows"]}
    return {PICTURE_FILE: mask_picture(mask, architecture, dead, f"run {row['id']}")}


def mask_picture(
    mask: WeightMask, architecture: Architecture, dead: dict[str, list[int]], name: str
) -> str:
    """A stand-alone SVG of the masks of all attentions, a row each.

    Args:
        mask: The mask of single weights.
        architecture: The network.
        dead: The numbers of the dead heads by attention.
        name: What is shown, for the title.

    Returns:
        The SVG. Large matrices are drawn in cells, the darker the more weights they keep.
    """
    rows = [
        (branch.name, branch.core, f"steps.{number}.{position}.core.")
        for number, step in enumerate(architecture.steps)
        for position, branch in enumerate(step)
        if isinstance(branch.core, AttentionSpec)
    ]
    width = LEFT_PX + len(LEAVES) * (SIDE_PX + GAP_PX)
    height = HEAD_PX + len(rows) * (SIDE_PX + GAP_PX)
    lost, heads = sum(map(len, dead.values())), sum(core.heads for _, core, _ in rows)
    parts: list[Markup] = [
        text_at(26, 34, f"Kept weights of the attentions, {name}", class_="title"),
        text_at(
            26,
            54,
            f"{100 * mask.sparsity:.1f} % of the weights in scope are zero; {lost} of {heads} "
            "heads are dead (bands)",
            class_="under",
        ),
    ]
    for column, leaf in enumerate(LEAVES):
        x = LEFT_PX + column * (SIDE_PX + GAP_PX) + SIDE_PX / 2
        parts.append(text_at(x, HEAD_PX - 10, leaf, class_="tick", anchor="middle"))
    for place, (branch, core, prefix) in enumerate(rows):
        y = HEAD_PX + place * (SIDE_PX + GAP_PX)
        parts.append(text_at(26, y + SIDE_PX / 2, branch, class_="tick"))
        for column, leaf in enumerate(LEAVES):
            x = LEFT_PX + column * (SIDE_PX + GAP_PX)
            keep = mask.kept.get(f"{prefix}{leaf}.weight")
            parts += _matrix(keep, core, leaf, dead.get(branch, []), x, y)
    title = f"masks of the attention matrices, {name}"
    return str(sheet(width, height, title, _STYLE, *parts)) + "\n"


def _matrix(
    keep: Tensor | None, core: AttentionSpec, leaf: str, dead: Sequence[int], x: float, y: float
) -> list[Markup]:
    """One matrix with its heads: rows of q, k and v, columns of the output projection."""
    parts = [element("rect", x=x, y=y, width=SIDE_PX, height=SIDE_PX, class_="matrix")]
    if keep is not None:
        parts += _cells(keep, x, y)
    heads = core.heads if leaf in ("q", "out") else core.kv_heads
    band = SIDE_PX / heads
    for head in range(1, heads):
        at = head * band
        line = (
            {"x1": x + at, "x2": x + at, "y1": y, "y2": y + SIDE_PX}
            if leaf == "out"
            else {"x1": x, "x2": x + SIDE_PX, "y1": y + at, "y2": y + at}
        )
        parts.append(element("line", **line, class_="between"))
    for head in dead if heads == core.heads else ():
        at, title = head * band, element("title", f"head {head} is dead")
        place = (
            {"x": x + at, "y": y, "width": band, "height": SIDE_PX}
            if leaf == "out"
            else {"x": x, "y": y + at, "width": SIDE_PX, "height": band}
        )
        parts.append(element("rect", title, **place, class_="dead"))
    return parts


def _cells(keep: Tensor, x: float, y: float) -> list[Markup]:
    """The kept weights: a path for each shade, of rectangles that join neighbours in a row."""
    density = _density(keep)
    rows, columns = density.shape
    across, down = SIDE_PX / columns, SIDE_PX / rows
    top = float(density.max())
    if top == 0.0:
        return []
    shades = (density * SHADES / top).ceil().int().tolist()
    paths: dict[int, list[str]] = {}
    for place, line in enumerate(shades):
        start = 0
        while start < columns:
            end = start + 1
            while end < columns and line[end] == line[start]:
                end += 1
            if line[start]:
                left, upper = x + start * across, y + place * down
                paths.setdefault(line[start], []).append(
                    f"M{left:.5g} {upper:.5g}h{(end - start) * across:.4g}v{down:.4g}H{left:.5g}z"
                )
            start = end
    return [
        element("path", d="".join(found), class_="kept", fill_opacity=round(shade / SHADES, 3))
        for shade, found in sorted(paths.items())
    ]


def _density(keep: Tensor) -> Tensor:
    """(rows, columns) the share of kept weights in each cell, with at most CELLS on a side."""
    sides = (min(CELLS, keep.shape[0]), min(CELLS, keep.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(keep.float()[None], sides)[0]
