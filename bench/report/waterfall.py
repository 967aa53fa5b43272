"""What each step of a stack of optimisations brought: measured latencies as a waterfall."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import InputError
from ...core.storage import replace_file
from ...core.written_kinds import json_kind
from . import wording
from .markup import Markup, element, section
from .plot import bar, line, sheet, shortened, svg, text_at

SCHEMA: Literal["vitrim.waterfall/1"] = "vitrim.waterfall/1"
WATERFALL = json_kind("a waterfall", SCHEMA)
WATERFALL_FILE = "waterfall.json"
WIDTH_PX, ROW_PX, BAR_PX, MARGIN_PX = 900.0, 46.0, 20.0, 28.0
NAMES_PX, FIGURES_PX = 250.0, 190.0
LONGEST_PX = WIDTH_PX - 2 * MARGIN_PX - NAMES_PX - FIGURES_PX
HEADING = "What each step brought"
REMARK = (
    "Latency of one inference after each step, which has all steps above it; the light part of a "
    "bar is what the step saved. Measured in turns in one session."
)
_STYLE = (
    ".plot .sheet{fill:var(--card);stroke:var(--hair)}"
    ".plot .title{font-size:16px;font-weight:650}"
    ".plot .under{font-size:12.5px;fill:var(--soft)}"
)
_BARS = (
    ".plot .left{fill:var(--accent)}.plot .saved{fill:var(--accent-soft)}"
    ".plot .step{font-size:13px;font-weight:600}.plot .note{font-size:11.5px;fill:var(--soft)}"
    ".plot .join{stroke:var(--hair);stroke-width:1;stroke-dasharray:3 3}"
)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class WaterfallStep(_Plain):
    """The stack after one step.

    Attributes:
        name: What was added.
        how: Runtime and precision, or other words below the name.
        latency_ms: p50 of an inference.
        quartiles_ms: Its quartiles.
        samples: Number of inferences.
        top1: Share of the test images; None where the step has no weights of its own.
    """

    name: str
    how: str = ""
    latency_ms: Positive
    quartiles_ms: tuple[Positive, Positive]
    samples: int = Field(ge=1)
    top1: Annotated[float, Field(ge=0, le=1)] | None = None


class Waterfall(_Plain):
    """Steps from the slowest to the fastest stack.

    Attributes:
        title: The model.
        machine: The processor, the threads and the batch size.
        images: Test images of `top1`; 0 without any.
        steps: The first one is what all are compared with.
    """

    schema_: Literal["vitrim.waterfall/1"] = Field(SCHEMA, alias="schema")
    title: str
    machine: str = ""
    images: int = Field(0, ge=0)
    steps: tuple[WaterfallStep, ...] = Field(min_length=2)

    @property
    def speed_up(self) -> float:
        """The latency of the first step over that of the last one."""
        return self.steps[0].latency_ms / self.steps[-1].latency_ms

    def save(self, path: Path | str) -> None:
        """Write it as JSON, atomically."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), indent=1)
        replace_file(path, text + "\n", WATERFALL)

    @classmethod
    def load(cls, path: Path | str) -> Waterfall:
        """Read a saved one.

        Raises:
            InputError: The file is damaged; the message has the key.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(
                f"{path}: {key}: {first['msg']}; measure it again with "
                "`python -m benchmarks.speed.waterfall`"
            ) from None


def cells(found: Waterfall) -> list[tuple[str, ...]]:
    """The rows of a table: step, how, p50 with quartiles, times faster than before, in all, top-1.

    Args:
        found: The steps.
    """
    rows: list[tuple[str, ...]] = []
    before = found.steps[0].latency_ms
    for number, step in enumerate(found.steps):
        low, high = step.quartiles_ms
        rows.append(
            (
                step.name,
                step.how,
                f"{step.latency_ms:.3f} ms [{low:.3f}, {high:.3f}]",
                wording.times(before / step.latency_ms) if number else "–",
                wording.times(found.steps[0].latency_ms / step.latency_ms),
                "–" if step.top1 is None else wording.percent(step.top1, 2),
            )
        )
        before = step.latency_ms
    return rows


COLUMNS = ("step", "runtime", "p50 [quartiles]", "times faster", "in all", "top-1")


def waterfall_picture(found: Waterfall) -> str:
    """A stand-alone SVG of the steps."""
    height = 84 + ROW_PX * len(found.steps) + 22
    title = f"{found.title}: {wording.times(found.speed_up)} faster"
    picture = sheet(
        WIDTH_PX,
        height,
        title,
        _STYLE + _BARS,
        text_at(MARGIN_PX, 36, shortened(title, 80), class_="title"),
        text_at(MARGIN_PX, 57, shortened(found.machine, 120), class_="under"),
        *_rows(found.steps, 84),
    )
    return f"{picture}\n"


def waterfall_section(found: Waterfall | None) -> Markup | None:
    """The section of report.html."""
    if found is None:
        return None
    height = 12 + ROW_PX * len(found.steps)
    label = "; ".join(f"{step.name} {step.latency_ms:.3f} ms" for step in found.steps)
    plot = svg(
        WIDTH_PX,
        height,
        element("style", Markup(_BARS)),
        *_rows(found.steps, 8),
        label=label,
    )
    remark = f"{REMARK} {found.machine}."
    return section(HEADING, remark, plot, id_="waterfall")


def _rows(steps: Sequence[WaterfallStep], top: float) -> list[Markup]:
    start, longest = MARGIN_PX + NAMES_PX, max(step.latency_ms for step in steps)
    parts: list[Markup] = []
    before: float | None = None
    for number, step in enumerate(steps):
        y = top + ROW_PX * number
        here = LONGEST_PX * step.latency_ms / longest
        hint = element("title", f"{step.name}: {step.latency_ms:.3f} ms")
        parts += [
            text_at(MARGIN_PX, y + 12, shortened(step.name, 34), class_="step"),
            text_at(MARGIN_PX, y + 27, shortened(step.how, 40), class_="note"),
        ]
        if before is not None and before > here:
            parts.append(bar(start + here, y, before - here, BAR_PX, class_="saved"))
        parts.append(bar(start, y, max(1.0, here), BAR_PX, hint, class_="left"))
        if number + 1 < len(steps):
            parts.append(line(start + here, y + BAR_PX, start + here, y + ROW_PX, "join"))
        parts += _figures(steps, number, start + LONGEST_PX + 12, y)
        before = here
    return parts


def _figures(steps: Sequence[WaterfallStep], number: int, x: float, y: float) -> list[Markup]:
    step = steps[number]
    ratio = steps[0].latency_ms / step.latency_ms
    text = f"{step.latency_ms:.3f} ms"
    if number:
        brought = steps[number - 1].latency_ms / step.latency_ms
        text += f", {wording.times(brought)}"
    under = [f"{wording.times(ratio)} in all"] if number else []
    if step.top1 is not None:
        under.append(f"top-1 {wording.percent(step.top1, 2)}")
    return [
        text_at(x, y + 12, text, class_="step"),
        text_at(x, y + 27, ", ".join(under), class_="note"),
    ]
