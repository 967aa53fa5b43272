"""The claims of publications that a study's rows can decide, computed from its table alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from .expansion import settings_text
from .findings import Differences, Finding, of_differences, paired, share_interval
from .magnitude_claims import NEAR_POINTS, magnitude_findings
from .magnitude_claims import SOURCE as KOLEV
from .summary import Summary, fronts_by_seed, grouped, number, size_axes
from .table import Row

Claim = Callable[[Summary], list[Finding]]
TREDESE = "Tredese 2023, Structured Pruning of Vision Transformers at Training Time"
TANG = "Tang et al. 2022, Patch Slimming for Efficient Vision Transformers"
SHARING, FIXED, METHOD, TOKENS = "masks.sharing", "masks.fixed", "masks.method", "masks.tokens"
LAMBDA, TOLERANCE = "masks.lambda", "masks.token_tolerance"
SLIMMING = "patch-slimming"
MAGNITUDES = ("l1", "l2")


def findings(summary: Summary) -> list[Finding]:
    """Test every claim about what a study varies.

    Args:
        summary: The study, which may be running.

    Returns:
        One finding for each claim; its number is None where rows are missing.
    """
    own = [finding for claim in CLAIMS for finding in claim(summary)]
    return [*own, *magnitude_findings(summary)]


def verdict(finding: Finding) -> str:
    """What a finding says of its claim."""
    if finding.holds is None:
        few = finding.number is None or finding.interval is None
        return "not enough rows" if few else "not decided"
    return "holds" if finding.holds else "does not hold here"


def matched(
    first: Sequence[Row], second: Sequence[Row], same: Sequence[str], figure: str
) -> list[float]:
    """First minus second in points, for each row with a partner of equal values.

    Args:
        first: Rows.
        second: Their possible partners; those of equal values are averaged.
        same: The columns that are equal in a pair.
        figure: A share, 0 to 1.

    Returns:
        A difference for each group of equal rows in `first` that has a partner.
    """
    found = []
    partners = {tuple(group.cells.values()): group for group in grouped(second, same)}
    for group in grouped(first, same):
        other = partners.get(tuple(group.cells.values()))
        one, two = group.mean(figure), None if other is None else other.mean(figure)
        if one is not None and two is not None:
            found.append(100.0 * (one - two))
    return found


def sizes(summary: Summary) -> list[str]:
    """The axes that set the size."""
    return [axis for axis in summary.axes if axis in size_axes()]


def values(summary: Summary, axis: str) -> set[object]:
    """The values of an axis in any row; none where it does not vary."""
    return {row[axis] for row in summary.rows} if axis in summary.axes else set()


def penalised(summary: Summary) -> list[Row]:
    """The finished runs with a fixed weight of the size penalty, as in Tredese's grid."""
    rows = learned(summary.done)
    if LAMBDA not in summary.axes:
        return rows
    return [row for row in rows if row[LAMBDA] is not None]


def learned(rows: Iterable[Row]) -> list[Row]:
    """The rows whose masks were learned by gates."""
    return [row for row in rows if row.get(METHOD) in (None, "learned")]


def _front(summary: Summary) -> list[Finding]:
    """Which sharing and fixed dimensions are on the fronts."""
    if not {"head", "embed"} <= values(summary, FIXED) or "residual" not in values(
        summary, SHARING
    ):
        return []
    claim = "a shared residual with heads or embed fixed is most often on the front"
    rows = [row for row in penalised(summary) if row[SHARING] in ("residual", "full")]
    favoured = {
        row["id"] for row in rows if row[SHARING] == "residual" and row[FIXED] in ("head", "embed")
    }
    fronts = fronts_by_seed(rows, "params", summary.quality)
    places = [run for front in fronts.values() for run in front]
    if not places or not favoured:
        return [Finding(claim, TREDESE, None, None, None, "% of the places")]
    hits, chance = sum(run in favoured for run in places), len(favoured) / len(rows)
    low, high = share_interval(hits, len(places))
    counts = sorted(
        (
            (sum(row["id"] in places for row in group.rows), settings_text(group.cells))
            for group in grouped(rows, (SHARING, FIXED))
        ),
        reverse=True,
    )
    note = (
        f"{hits} of {len(places)} places on the fronts of {len(fronts)} seeds; {100 * chance:.0f} "
        f"% of the runs are of these settings; most often: {counts[0][1]} ({counts[0][0]})"
    )
    holds = True if low > chance else False if high < chance else None
    share = 100.0 * hits / len(places)
    interval = (100.0 * low, 100.0 * high)
    return [Finding(claim, TREDESE, share, interval, holds, "% of the places", note)]


def _unshared(summary: Summary) -> list[Finding]:
    """How much accuracy the shared residual stream costs."""
    if not {"unshared", "residual"} <= values(summary, SHARING):
        return []
    rows = [row for row in learned(summary.done) if row.get(FIXED) in (None, "none")]
    unshared = [row for row in rows if row[SHARING] == "unshared"]
    residual = [row for row in rows if row[SHARING] == "residual"]
    same = [*sizes(summary), "seed"]
    found = paired(matched(unshared, residual, same, summary.quality))
    note = "unshared minus residual, of equal size setting and seed"
    smaller = matched_ratio(residual, unshared, same)
    if smaller is not None:
        note += f"; residual has {smaller:.2f} of the parameters"
    claim = f"unshared masks are within {NEAR_POINTS:.0f} points of a shared residual"
    return [of_differences(claim, TREDESE, found, note, _near)]


def matched_ratio(first: Sequence[Row], second: Sequence[Row], same: Sequence[str]) -> float | None:
    """The median ratio of parameters of pairs of equal values; None without a pair."""
    partners = {
        tuple(group.cells.values()): group.mean("params") for group in grouped(second, same)
    }
    ratios = [
        (group.mean("params") or 0.0) / other
        for group in grouped(first, same)
        if (other := partners.get(tuple(group.cells.values())))
    ]
    return statistics.median(ratios) if ratios else None


def _ffn(summary: Summary) -> list[Finding]:
    """Whether learned masks remove more of the FFNs than of the attentions."""
    if not values(summary, FIXED) or not values(summary, SHARING):
        return []
    rows = [row for row in learned(summary.done) if row[FIXED] == "none"]
    note = "kept share of the attentions minus that of the FFNs, of learned masks, a run each"
    found = paired(_within(rows, "kept_attention", "kept_ffn"))
    return [of_differences("FFN is more prunable than attention", KOLEV, found, note)]


def _depth(summary: Summary) -> list[Finding]:
    """Whether learned masks remove more of the deeper half of the network."""
    if not values(summary, FIXED) or not values(summary, SHARING):
        return []
    # One mask for all blocks cannot distinguish them.
    rows = [row for row in learned(summary.done) if row[SHARING] != "full"]
    found = paired(
        [
            statistics.fmean(each)
            for group in grouped(rows, summary.axes)
            if (each := _within(group.rows, "kept_first_half", "kept_second_half"))
        ]
    )
    note = "kept share of the first half of the blocks minus that of the second, a setting each"
    return [of_differences("deeper layers are more redundant", TANG, found, note)]


def _within(rows: Iterable[Row], first: str, second: str) -> list[float]:
    """The difference of two shares of each row, in points."""
    return [
        100.0 * (number(row[first]) - number(row[second]))
        for row in rows
        if row.get(first) is not None and row.get(second) is not None
    ]


def _magnitude(summary: Summary) -> list[Finding]:
    """Whether norms of weights choose units better than chance."""
    methods = values(summary, METHOD)
    if "random" not in methods or not methods & set(MAGNITUDES):
        return []
    rows = {name: [row for row in summary.done if row[METHOD] == name] for name in methods}
    same = [*sizes(summary), "seed"]
    ranked = [row for name in MAGNITUDES for row in rows.get(name, [])]
    found = paired(matched(ranked, rows["random"], same, summary.quality))
    note = (
        "units by the norm of their weights minus units at random, of equal size and seed; "
        f"barely: by less than {NEAR_POINTS:.0f} points"
    )
    claim = "structured magnitude barely beats random"
    return [of_differences(claim, KOLEV, found, note, _barely)]


def _impact(summary: Summary) -> list[Finding]:
    """Whether the impact of patches chooses better than attention and chance."""
    methods = values(summary, TOKENS)
    if SLIMMING not in methods:
        return []
    same = [axis for axis in summary.axes if axis not in (TOKENS, METHOD)] + ["seed"]
    rows = {name: [row for row in summary.done if row[TOKENS] == name] for name in methods}
    others = {
        "class-attention": "attention of the class token",
        "column-attention": "attention of all tokens",
        "random": "random patches",
    }
    return [
        of_differences(
            f"impact beats {title}",
            TANG,
            paired(matched(rows[SLIMMING], rows[name], same, summary.quality)),
            f"{SLIMMING} minus {name}, of equal size and seed",
        )
        for name, title in others.items()
        if name in methods
    ]


def _near(found: Differences) -> bool | None:
    assert found.interval is not None
    low, high = found.interval
    if low >= -NEAR_POINTS and high <= NEAR_POINTS:
        return True
    return False if low > NEAR_POINTS or high < -NEAR_POINTS else None


def _barely(found: Differences) -> bool | None:
    assert found.interval is not None
    low, high = found.interval
    if high < 0.0 or low > NEAR_POINTS:
        return False
    return True if found.median > 0.0 and high <= NEAR_POINTS else None


CLAIMS: tuple[Claim, ...] = (_front, _unshared, _ffn, _magnitude, _impact, _depth)
