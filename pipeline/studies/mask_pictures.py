"""The picture of a magnitude study: masks of the attention matrices, and the heads that died."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from .article import COLOURS, pdf
from .article_text import Figure, escaped, report_link
from .magnitude_claims import HIGH, MAGNITUDE, ROUNDS, SCOPE, SPARSITY, setting, single_weights
from .pictures import Picture
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


@dataclass(frozen=True)
class Masks:
    """What the picture shows.

    Attributes:
        mask: The mask of single weights.
        architecture: The network.
        dead: The numbers of the dead heads by attention.
        run: The run that it is of.
    """

    mask: WeightMask
    architecture: Architecture
    dead: dict[str, list[int]]
    run: str

    @property
    def attentions(self) -> list[tuple[str, AttentionSpec, str]]:
        """Name, core and prefix of the parameters of each attention."""
        return [
            (branch.name, branch.core, f"steps.{number}.{position}.core.")
            for number, step in enumerate(self.architecture.steps)
            for position, branch in enumerate(step)
            if isinstance(branch.core, AttentionSpec)
        ]

    @property
    def counts(self) -> str:
        """The share of zeros and the number of dead heads in one sentence."""
        lost = sum(map(len, self.dead.values()))
        heads = sum(core.heads for _, core, _ in self.attentions)
        zeros = f"{100 * self.mask.sparsity:.1f} % of the weights in scope are zero"
        return f"{zeros}; {lost} of {heads} heads are dead (bands)"


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the picture."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Matrix:
    """One drawn matrix.

    Attributes:
        frame: Its place.
        cells: The kept weights by shade, 1 to `SHADES`; neighbours in a row are one rectangle.
        between: What is between two heads: boxes without width, or without height.
        dead: The dead heads by number.
    """

    frame: Box
    cells: dict[int, list[Box]]
    between: list[Box]
    dead: dict[int, Box]


def shown_masks(summary: Summary, folder: Path) -> Masks | None:
    """What is shown of a study; None where it has no such run, or its files are gone."""
    row = shown_run(summary)
    if row is None:
        return None
    run = folder / RUNS / str(row["id"])
    try:
        mask, record = WeightMask.load(run / WEIGHT_MASK), read_dead(run)
        architecture = read_architecture(run / COMPACT / ARCHITECTURE)
    except InputError:
        return None
    if record is None:
        return None
    dead = {each["name"]: each.get("heads", []) for each in record["rows"]}
    return Masks(mask, architecture, dead, str(row["id"]))


def mask_picture(masks: Masks) -> str:
    """A stand-alone SVG of the masks of all attentions, a row each.

    Large matrices are drawn in cells, the darker the more weights they keep.
    """
    width, height = _size(masks)
    title = f"Kept weights of the attentions, run {masks.run}"
    parts: list[Markup] = [
        text_at(26, 34, title, class_="title"),
        text_at(26, 54, masks.counts, class_="under"),
    ]
    for text, x, y, anchor in _labels(masks):
        parts.append(text_at(x, y, text, class_="tick", anchor=anchor))
    for matrix in _matrices(masks):
        parts += _markup(matrix)
    return str(sheet(width, height, f"{title}.", _STYLE, *parts)) + "\n"


def shown_picture(masks: Masks) -> Picture:
    """The picture with its caption."""
    caption = f"Kept weights of the attentions, run {masks.run}. {masks.counts}."
    return Picture(PICTURE_FILE, mask_picture(masks), caption)


def mask_pdf(masks: Masks) -> bytes:
    """The same without the heading, as a PDF of one column's width; equal for equal masks."""
    width, height = _size(masks)
    # The headings of the columns stay.
    top = HEAD_PX - 28
    return pdf(lambda axes: _draw(axes, masks, width, height, top), (height - top) / width)


def masks_figure(masks: Masks) -> dict[Figure, bytes]:
    """The figure of an article."""
    about, counts = "Kept weights of the attentions of run", escaped(masks.counts)
    caption = f"{about} {report_link(masks.run)}: {counts}."
    return {Figure(Path(PICTURE_FILE).stem, "Masks of the attentions", caption): mask_pdf(masks)}


def _draw(axes: Any, masks: Masks, width: float, height: float, top: float) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline

    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, top)
    for text, x, y, anchor in _labels(masks):
        sides = {"ha": "center" if anchor == "middle" else "left", "va": "bottom"}
        axes.text(x, y, text.replace("$", r"\$"), fontsize=6, **sides)
    frame: dict[str, Any] = {"facecolor": "none", "edgecolor": "0.7", "linewidth": 0.4}
    band: dict[str, Any] = {"facecolor": COLOURS[1], "alpha": 0.28, "linewidth": 0}
    for matrix in _matrices(masks):
        for shade, boxes in sorted(matrix.cells.items()):
            outline = Outline.make_compound_path_from_polys(np.array([_corners(b) for b in boxes]))
            look = {"facecolor": COLOURS[0], "alpha": shade / SHADES, "linewidth": 0}
            axes.add_patch(PathPatch(outline, **look))
        lines = [((b.x, b.y), (b.x + b.width, b.y + b.height)) for b in matrix.between]
        axes.add_collection(LineCollection(lines, colors="0.8", linewidths=0.25))
        for box in matrix.dead.values():
            axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, **band))
        box = matrix.frame
        axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, **frame))


def _corners(box: Box) -> list[tuple[float, float]]:
    right, lower = box.x + box.width, box.y + box.height
    return [(box.x, box.y), (right, box.y), (right, lower), (box.x, lower)]


def _size(masks: Masks) -> tuple[float, float]:
    """Width and height of the picture."""
    step = SIDE_PX + GAP_PX
    return LEFT_PX + len(LEAVES) * step, HEAD_PX + len(masks.attentions) * step


def _labels(masks: Masks) -> list[tuple[str, float, float, str]]:
    """The titles of columns and rows: text, x, y of its baseline, and anchor."""
    step = SIDE_PX + GAP_PX
    columns = [
        (leaf, LEFT_PX + place * step + SIDE_PX / 2, HEAD_PX - 10, "middle")
        for place, leaf in enumerate(LEAVES)
    ]
    rows = [
        (name, 26.0, HEAD_PX + place * step + SIDE_PX / 2, "start")
        for place, (name, _, _) in enumerate(masks.attentions)
    ]
    return columns + rows


def _matrices(masks: Masks) -> Iterator[Matrix]:
    step = SIDE_PX + GAP_PX
    for row, (name, core, prefix) in enumerate(masks.attentions):
        for column, leaf in enumerate(LEAVES):
            keep = masks.mask.kept.get(f"{prefix}{leaf}.weight")
            frame = Box(LEFT_PX + column * step, HEAD_PX + row * step, SIDE_PX, SIDE_PX)
            yield _matrix(keep, core, leaf, masks.dead.get(name, []), frame)


def _matrix(
    keep: Tensor | None, core: AttentionSpec, leaf: str, dead: Sequence[int], frame: Box
) -> Matrix:
    """One matrix with its heads: rows of q, k and v, columns of the output projection."""
    heads = core.heads if leaf in ("q", "out") else core.kv_heads
    band = SIDE_PX / heads

    def across(at: float, thickness: float) -> Box:
        if leaf == "out":
            return Box(frame.x + at, frame.y, thickness, SIDE_PX)
        return Box(frame.x, frame.y + at, SIDE_PX, thickness)

    return Matrix(
        frame,
        {} if keep is None else _cells(keep, frame),
        [across(head * band, 0.0) for head in range(1, heads)],
        {head: across(head * band, band) for head in (dead if heads == core.heads else ())},
    )


def _markup(matrix: Matrix) -> list[Markup]:
    parts = [element("rect", **dataclasses.asdict(matrix.frame), class_="matrix")]
    for shade, boxes in sorted(matrix.cells.items()):
        drawn = "".join(
            f"M{box.x:.5g} {box.y:.5g}h{box.width:.4g}v{box.height:.4g}H{box.x:.5g}z"
            for box in boxes
        )
        opacity = round(shade / SHADES, 3)
        parts.append(element("path", d=drawn, class_="kept", fill_opacity=opacity))
    for box in matrix.between:
        ends = {"x1": box.x, "x2": box.x + box.width, "y1": box.y, "y2": box.y + box.height}
        parts.append(element("line", **ends, class_="between"))
    for head, box in matrix.dead.items():
        title = element("title", f"head {head} is dead")
        parts.append(element("rect", title, **dataclasses.asdict(box), class_="dead"))
    return parts


def _cells(keep: Tensor, frame: Box) -> dict[int, list[Box]]:
    """The kept weights by shade, in rectangles that join neighbours in a row."""
    density = _density(keep)
    rows, columns = density.shape
    across, down = SIDE_PX / columns, SIDE_PX / rows
    top = float(density.max())
    if top == 0.0:
        return {}
    shades = (density * SHADES / top).ceil().int().tolist()
    found: dict[int, list[Box]] = {}
    for place, line in enumerate(shades):
        start = 0
        while start < columns:
            end = start + 1
            while end < columns and line[end] == line[start]:
                end += 1
            if line[start]:
                left, upper = frame.x + start * across, frame.y + place * down
                box = Box(left, upper, (end - start) * across, down)
                found.setdefault(line[start], []).append(box)
            start = end
    return found


def _density(keep: Tensor) -> Tensor:
    """(rows, columns) the share of kept weights in each cell, with at most CELLS on a side."""
    sides = (min(CELLS, keep.shape[0]), min(CELLS, keep.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(keep.float()[None], sides)[0]
