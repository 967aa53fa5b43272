"""The rows of `benchmarks.accuracy.oneshot`: methods, budgets, images, and the table of results."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..results_file import markdown_head, markdown_row, spread

SHARES = (0.9, 0.8, 0.7, 0.5)
IMAGES = (64, 256, 1024)
# The number of images for rows that compare criteria.
USUAL_IMAGES = 256
# Criteria that need gradients.
FROM_IMAGES = ("taylor", "fisher")
SCOPES = ("layer", "global", "isomorphic")


@dataclass(frozen=True)
class Method:
    """How a row is cut and repaired.

    Attributes:
        criterion: l1, l2, taylor, fisher, closed form; of Torch-Pruning l2 or Taylor.
        scope: Which units are ranked against each other; "" for the closed form.
        repair: nothing, mean or least squares.
        rotated: Whether the network is rotated before units are ranked.
        tool: vitrim or Torch-Pruning.
    """

    criterion: str
    scope: str = ""
    repair: str = "nothing"
    rotated: bool = False
    tool: str = "vitrim"

    @property
    def uses_images(self) -> bool:
        """Whether the row depends on the images, and so on the seed."""
        found = (*FROM_IMAGES, "closed form")
        return self.criterion in found or self.repair != "nothing"


@dataclass(frozen=True)
class Case:
    """One row: a method, a budget, and the images that it sees."""

    method: Method
    share: float
    images: int
    seed: int

    @property
    def key(self) -> str:
        """Identifies the row in the result file."""
        return json.dumps(asdict(self), sort_keys=True)


# Methods that are measured with every number of images; others with the usual one.
WITH_EVERY_COUNT = (
    Method("closed form", repair="least squares"),
    Method("taylor", "isomorphic", "least squares"),
)


def methods(*, torch_pruning: bool) -> list[Method]:
    """All methods, those that are compared first in front."""
    found = [Method("closed form", repair=repair) for repair in ("least squares", "mean")]
    found.append(Method("closed form"))
    tools = ("Torch-Pruning",) if torch_pruning else ()
    for criterion, scope, tool in itertools.product(("l2", "taylor"), SCOPES, tools):
        found.append(Method(criterion, scope, tool=tool))
    ours = list(itertools.product((*FROM_IMAGES, "l2", "l1"), SCOPES))
    for repair in ("nothing", "least squares", "mean"):
        found += [Method(criterion, scope, repair) for criterion, scope in ours]
    for criterion, scope in ours:
        if criterion != "l1":
            found.append(Method(criterion, scope, "least squares", rotated=True))
    return found


def cases(images: Sequence[int], seeds: Sequence[int], *, torch_pruning: bool) -> list[Case]:
    """All rows, seed by seed; those that depend on no image occur once."""
    usual = USUAL_IMAGES if USUAL_IMAGES in images else images[0]
    counts = (usual, *(count for count in images if count != usual))
    found: list[Case] = []
    for seed, count in itertools.product(seeds, counts):
        for method in methods(torch_pruning=torch_pruning):
            if count != usual and method not in WITH_EVERY_COUNT:
                continue
            if method.uses_images or seed == seeds[0]:
                found += [Case(method, share, count, seed) for share in SHARES]
    return found


def table(rows: Iterable[dict[str, Any]], images: Sequence[int]) -> str:
    """Mean points lost over the seeds, with the spread; one line a method and number of images.

    Methods that were not measured at every share yet are left out. "no heads": every cut that meets
    the share leaves an attention without heads, and the model does not run.
    """
    lines = markdown_head(
        *("tool", "criterion", "scope", "rotation", "repair", "images", "draws"),
        *(f"{share:g} of the MACs" for share in SHARES),
        numbers=len(SHARES) + 2,
    )
    grouped: dict[str, dict[float, list[float | None]]] = {}
    for row in rows:
        method = row["method"]
        key = json.dumps([*method.values(), row["images"] if _sees_images(method) else 0])
        grouped.setdefault(key, {}).setdefault(row["share"], []).append(row["points_lost"])
    complete = [key for key in grouped if len(grouped[key]) == len(SHARES)]
    order = sorted(complete, key=lambda key: _worst(grouped[key]))
    for key in order:
        criterion, scope, repair, rotated, tool, count = json.loads(key)
        draws = max(map(len, grouped[key].values()))
        cells = [_spread(grouped[key].get(share, [])) for share in SHARES]
        turned = "yes" if rotated or criterion == "closed form" else ""
        lines.append(
            markdown_row(tool, criterion, scope, turned, repair, count or "", draws, *cells)
        )
    return "\n".join(lines)


def _sees_images(method: dict[str, Any]) -> bool:
    return Method(**method).uses_images


def _worst(points: dict[float, list[float | None]]) -> float:
    """The mean of the points lost over all budgets, for the order of the table."""
    known = [[each for each in values if each is not None] for values in points.values()]
    return statistics.mean(map(statistics.mean, known)) if all(known) else float("inf")


def _spread(found: Sequence[float | None]) -> str:
    values = [each for each in found if each is not None]
    if not values:
        return "no heads" if found else ""
    return spread(values)


def key_of(row: dict[str, Any]) -> str:
    """The key of the case that a row of the result file was measured for."""
    return Case(Method(**row["method"]), row["share"], row["images"], row["seed"]).key
