"""The five claims of Kolev et al. about zeros by magnitude, tested on the rows of a study.

Rows are paired that differ in one setting alone. A claim holds where the exact 95 % interval of the
median difference decides it; `findings` has the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .findings import Differences, Finding, of_differences, paired, share_interval
from .summary import Summary, number
from .table import Row

SOURCE = "Kolev et al., Evaluating Neural Network Pruning Techniques on Vision Transformers"
SPARSITY, GRANULARITY = "masks.weight_sparsity", "masks.weight_granularity"
RANKING, SCOPE, ROUNDS = "masks.weight_ranking", "masks.weight_scope", "masks.weight_rounds"
# What a recipe means where a key is absent.
DEFAULTS: dict[str, str | int] = {
    GRANULARITY: "weight",
    RANKING: "global",
    SCOPE: "all",
    ROUNDS: 1,
}
# Keys that give one-shot and iterative runs equally many epochs.
SCHEDULE = (
    *(ROUNDS, "masks.weight_rewind", "masks.epochs"),
    *("finetune.epochs", "finetune.rewind"),
)
MAGNITUDE, CHANCE = ("global", "layerwise"), ("random", "shuffled")
# "Little loss", "barely": less than this, in points.
NEAR_POINTS = 2.0
HIGH = 0.95


def magnitude_findings(summary: Summary) -> list[Finding]:
    """Test the five claims.

    Args:
        summary: A study that varies `masks.weight_sparsity`; none of another.

    Returns:
        One finding for each claim whose settings the study varies.
    """
    if SPARSITY not in summary.axes:
        return []
    rows = [row for row in summary.done if row.get(SPARSITY) is not None]
    claims = (_little_loss, _ffn, _iterative, _structured, _heads)
    return [finding for claim in claims for finding in claim(summary, rows)]


def setting(row: Row, key: str) -> str | int | float | None:
    """The value of a key in a row, or what its absence means."""
    value = row.get(key)
    return DEFAULTS.get(key) if value is None else value


def differences(
    summary: Summary,
    first: Iterable[Row],
    second: Iterable[Row],
    varied: Sequence[str],
) -> list[float]:
    """First minus second in points of accuracy, for rows that agree in everything else.

    Args:
        summary: The study.
        first: Rows.
        second: Their partners.
        varied: The keys in which partners may differ.

    Returns:
        One difference for each row of `first`; several partners are averaged.
    """
    keys = [key for key in summary.axes if key not in varied]

    def place(row: Row) -> tuple[object, ...]:
        return (row["seed"], *(setting(row, key) for key in keys))

    partners: dict[tuple[object, ...], list[float]] = {}
    for row in second:
        if row.get(summary.quality) is not None:
            partners.setdefault(place(row), []).append(number(row[summary.quality]))
    found = []
    for row in first:
        others = partners.get(place(row))
        if others and row.get(summary.quality) is not None:
            found.append(100.0 * (number(row[summary.quality]) - sum(others) / len(others)))
    return found


def _little_loss(summary: Summary, rows: Sequence[Row]) -> list[Finding]:
    claim = f"{100 * HIGH:.0f} % of single weights can go with a loss under {NEAR_POINTS:g} points"
    chosen = [
        row
        for row in single_weights(rows, MAGNITUDE)
        if setting(row, SCOPE) == "all" and number(row[SPARSITY]) >= HIGH
    ]
    if not chosen:
        return []
    lost = {
        str(row["id"]): 100.0 * (number(row["top1_dense"]) - number(row["top1"]))
        for row in chosen
        if row.get("top1") is not None and row.get("top1_dense") is not None
    }
    found = paired(list(lost.values()))
    sparsities = sorted({number(row[SPARSITY]) for row in chosen})
    at = " and ".join(f"{100 * sparsity:g}" for sparsity in sparsities)
    note = f"baseline minus masked, at {at} % of all matrices"
    if lost:
        note += f", least loss of a run {min(lost.values()):.2f} points"
    return [of_differences(claim, SOURCE, found, note, _near)]


def _ffn(summary: Summary, rows: Sequence[Row]) -> list[Finding]:
    ffn, attention = (
        [row for row in rows if setting(row, SCOPE) == scope] for scope in ("ffn", "attention")
    )
    if not ffn or not attention:
        return []
    found = paired(differences(summary, ffn, attention, [SCOPE]))
    note = "the share of zeros in FFNs minus the same share in attentions"
    return [of_differences("FFN is more prunable than attention", SOURCE, found, note)]


def _iterative(summary: Summary, rows: Sequence[Row]) -> list[Finding]:
    several = [row for row in rows if number(setting(row, ROUNDS)) > 1]
    one = [row for row in rows if number(setting(row, ROUNDS)) == 1]
    if not several or not one:
        return []
    found = paired(differences(summary, several, one, SCHEDULE))
    note = "iterative minus one-shot"
    return [of_differences("iterative beats one-shot", SOURCE, found, note)]


def _structured(summary: Summary, rows: Sequence[Row]) -> list[Finding]:
    whole = [row for row in rows if setting(row, GRANULARITY) in ("row", "column")]
    if not whole:
        return []
    ranked, drawn = (
        [row for row in whole if setting(row, RANKING) in names] for names in (MAGNITUDE, CHANCE)
    )
    found = paired(differences(summary, ranked, drawn, [RANKING]))
    note = "rows and columns by magnitude minus at random"
    single = paired(
        differences(
            summary, single_weights(rows, MAGNITUDE), single_weights(rows, CHANCE), [RANKING]
        )
    )
    if single is not None:
        note += f" (single weights: {single.median:.2f} points)"
    claim = f"structured magnitude barely beats random: by less than {NEAR_POINTS:g} points"
    return [of_differences(claim, SOURCE, found, note, _barely)]


def _heads(summary: Summary, rows: Sequence[Row]) -> list[Finding]:
    del summary
    chosen = [
        row
        for row in single_weights(rows, MAGNITUDE)
        if setting(row, SCOPE) != "ffn" and abs(number(row[SPARSITY]) - HIGH) < 1e-9
    ]
    known = [row for row in chosen if row.get("heads_dead") is not None]
    if not known:
        return []
    hits = sum(number(row["heads_dead"]) > 0 for row in known)
    low, high = share_interval(hits, len(known))
    dead, heads = (sum(number(row[name]) for row in known) for name in ("heads_dead", "heads"))
    note = (
        f"runs in which a head died, {hits} of {len(known)}; {dead / len(known):.2f} of "
        f"{heads / len(known):g} heads a run on average"
    )
    holds = True if low > 0.5 else False if high < 0.5 else None
    claim = f"at {100 * HIGH:.0f} % whole heads die, in most runs"
    return [
        Finding(
            claim,
            SOURCE,
            100.0 * hits / len(known),
            (100.0 * low, 100.0 * high),
            holds,
            "% of the runs",
            note,
        )
    ]


def single_weights(rows: Iterable[Row], rankings: Sequence[str]) -> list[Row]:
    """The rows with single weights at zero, of some rankings."""
    return [
        row
        for row in rows
        if setting(row, GRANULARITY) == "weight" and setting(row, RANKING) in rankings
    ]


def _near(found: Differences) -> bool | None:
    assert found.interval is not None
    low, high = found.interval
    return True if high < NEAR_POINTS else False if low > NEAR_POINTS else None


def _barely(found: Differences) -> bool | None:
    assert found.interval is not None
    low, high = found.interval
    if low > NEAR_POINTS or high < 0.0:
        return False
    return True if high < NEAR_POINTS else None
