"""Numbers for readers: three significant digits and a unit that fits."""

from __future__ import annotations

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: 0.352, 3.52, 35.2, 352."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    digits = len(text.replace(".", "").replace("-", "").lstrip("0"))
    # 9.996 is rounded up to 10.00, with a digit too many.
    return f"{value:,.{decimals - 1}f}" if decimals and digits > 3 else text


def count(value: float) -> str:
    """Parameters or MACs: 0.80 M, 40.1 M, 4.61 G, 56.0 k, 640."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # Counts from 0.1 M are written in millions, so that small models have the same unit.
        if value >= size or (unit == "M" and value >= 1e5):
            scaled = value / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{value:.0f}"


def size(value_bytes: float) -> str:
    """Bytes in decimal units: 3.26 MB, 412 kB."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value_bytes >= one:
            return f"{three_digits(value_bytes / one)} {unit}"
    return f"{value_bytes:.0f} B"


def duration(value_s: float) -> str:
    """Seconds in the unit that fits: 85.0 µs, 1.02 ms, 28.4 ms, 1.20 s."""
    if value_s >= 1:
        return f"{three_digits(value_s)} s"
    if value_s >= 1e-4:
        return f"{three_digits(value_s * 1e3)} ms"
    return f"{three_digits(value_s * 1e6)} µs"


def estimated(value_s: float) -> str:
    """An estimated time with at most two digits: 280 µs, 3.6 ms, 120 ms, 1.9 s."""
    unit, factor = _estimated_unit(value_s)
    return f"{_two_digits(value_s * factor)} {unit}"


def estimated_range(low_s: float, high_s: float) -> str:
    """The error bar of an estimate, in the unit of its upper end: 0.63 to 3.5 ms."""
    unit, factor = _estimated_unit(high_s)
    return f"{_two_digits(low_s * factor)} to {_two_digits(high_s * factor)} {unit}"


def _estimated_unit(value_s: float) -> tuple[str, float]:
    return ("s", 1.0) if value_s >= 0.995 else ("ms", 1e3) if value_s >= 0.995e-3 else ("µs", 1e6)


def _two_digits(value: float) -> str:
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


def long_duration(value_s: float) -> str:
    """Training time: 48 s, 3 min 12 s, 2 h 05 min."""
    whole = round(value_s)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float, decimals: int = 1) -> str:
    """A share from 0 to 1 in percent: 91.3 %."""
    return f"{100 * share:.{decimals}f} %"


def share_of(part: float, whole: float) -> str:
    """`part` of `whole` in percent, with one decimal below 10 %: 30 %, 9.1 %."""
    value = 100 * part / whole
    return f"{value:.{1 if 0 < value < 9.95 else 0}f} %"


def relative_error(value: float | None) -> str:
    """A relative difference: exact, 3.1 × 10⁻⁷, 0.0312; `not checked` for None."""
    if value is None:
        return "not checked"
    if value == 0 or not math.isfinite(value):
        return "exact" if value == 0 else "not finite"
    if value >= 1e-3:
        return three_digits(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def share_error(share: float) -> str:
    """An error as a share of a variance: `0.31 %`, or `2e-05 %` where it is tiny."""
    percents = 100 * share
    return f"{percents:.2g} %" if percents < 0.1 else f"{percents:.2f} %"


def times(ratio: float) -> str:
    """A ratio: 2.9×, 12×."""
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f}×"


def faster(ratio: float) -> str:
    """A ratio of times in words: 2.9× faster, 1.20× slower."""
    return f"{times(ratio)} faster" if ratio >= 1 else f"{times(1 / ratio)} slower"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign: −0.35 points."""
    rounded = round(100 * difference, 2)
    return f"{'−' if rounded < 0 else '+' if rounded > 0 else '±'}{abs(rounded):.2f} points"


def plural(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 epoch, 2 epochs."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(items: list[str]) -> str:
    """An enumeration: `a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
