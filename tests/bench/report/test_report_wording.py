"""Formatted numbers keep their value, and markup escapes hostile text."""

from __future__ import annotations

import html
import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrim.bench.report import wording
from vitrim.bench.report.markdown import code, safe
from vitrim.bench.report.markup import Markup, element, escaped
from vitrim.bench.report.plot import tick_format, ticks


@given(st.floats(1e-6, 1e9))
def test_three_digits_are_within_half_a_percent_and_have_no_exponent(value: float) -> None:
    written = wording.three_digits(value)
    assert "e" not in written
    assert float(written.replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.three_digits(0.9996), "1.00"),
        (wording.three_digits(9.996), "10.0"),
        (wording.three_digits(99.96), "100"),
        (wording.count(803_466), "0.80 M"),
        (wording.count(40_141_312), "40.1 M"),
        (wording.count(4_608_338_304), "4.61 G"),
        (wording.count(56_000), "56.0 k"),
        (wording.count(640), "640"),
        (wording.size(318_000), "318 kB"),
        (wording.size(3_292_000), "3.29 MB"),
        (wording.duration(0.000302), "0.302 ms"),
        (wording.duration(0.0000850), "85.0 µs"),
        (wording.duration(1.2), "1.20 s"),
        (wording.long_duration(192), "3 min 12 s"),
        (wording.long_duration(7500), "2 h 05 min"),
        (wording.points(-0.0035), "−0.35 points"),
        (wording.points(-0.00001), "±0.00 points"),
        (wording.faster(2.9), "2.9× faster"),
        (wording.faster(0.8), "1.25× slower"),
        (wording.relative_error(3.1e-7), "3.1 × 10⁻⁷"),
        (wording.relative_error(0.0), "exact"),
        (wording.relative_error(0.0312), "0.0312"),
        (wording.relative_error(math.nan), "not finite"),
        (wording.relative_error(None), "not checked"),
        (wording.share_of(9.66, 100), "9.7 %"),
        (wording.share_of(29, 100), "29 %"),
    ],
)
def test_formatted_numbers(written: str, expected: str) -> None:
    assert written == expected


@given(st.text())
def test_text_is_escaped_and_parsed_back(words: str) -> None:
    written = element("p", words, title=words)
    tree = ElementTree.fromstring(written)
    expected = html.unescape(escaped(words))
    # XML parsers turn carriage returns into line feeds, and white space in attributes into spaces.
    assert (tree.text or "") == expected.replace("\r\n", "\n").replace("\r", "\n")
    assert not len(tree)
    assert set(tree.attrib) == {"title"}


def test_characters_that_reverse_text_or_break_xml_are_replaced() -> None:
    assert escaped("a\u202eb\x00c\ud800") == "a\ufffdb\ufffdc\ufffd"


def test_markup_is_not_escaped_twice() -> None:
    assert element("b", element("i", "<"), Markup("<br>")) == "<b><i>&lt;</i><br></b>"


@given(st.text(min_size=1))
def test_safe_markdown_is_on_one_line_and_has_no_tag(words: str) -> None:
    written = safe(words)
    assert "<" not in written
    assert "\n" not in written
    assert written.count("|") == written.count("\\|")


def test_a_back_tick_does_not_end_a_code_span() -> None:
    assert code("a `` b\nc") == "``` a `` b c ```"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_in_their_range_and_equally_spaced(low: float, span: float, count: int) -> None:
    values = ticks(low, low + span, count)
    slack = 1e-6 * span
    assert all(low - slack <= value <= low + span + slack for value in values)
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(step == pytest.approx(steps[0], rel=1e-4) for step in steps)
    assert len(values) <= count + 1


def test_tick_labels_are_distinct() -> None:
    values = ticks(90.7, 91.9, 5)
    assert [tick_format(values)(value) for value in values] == [
        "90.75",
        "91.00",
        "91.25",
        "91.50",
        "91.75",
    ]
