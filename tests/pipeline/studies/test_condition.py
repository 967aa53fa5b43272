"""Conditions of `--where`: what they select, and that nothing of them is SQL."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrim.core.errors import InputError
from vitrim.pipeline.studies.condition import quoted, read_condition

COLUMNS = ("params", "top1", "masks.sharing", "reason")
ROWS = [
    (100, 0.9, "full", None),
    (200, 0.8, "residual", None),
    (300, None, "it's", "budget"),
]


def selected(condition: str) -> list[int]:
    found = read_condition(condition, COLUMNS)
    with sqlite3.connect(":memory:") as link:
        link.execute(f"CREATE TABLE runs ({', '.join(map(quoted, COLUMNS))})")
        link.executemany("INSERT INTO runs VALUES (?, ?, ?, ?)", ROWS)
        query = f"SELECT params FROM runs WHERE {found.sql} ORDER BY params"
        return [row[0] for row in link.execute(query, found.parameters)]


@pytest.mark.parametrize(
    ("condition", "params"),
    [
        ("params < 2e2", [100]),
        ("params <= 200 and top1 >= .8", [100, 200]),
        ("params > 100 and not top1 = 0.8", []),
        ("reason is null", [100, 200]),
        ("reason IS NOT NULL", [300]),
        ("masks.sharing = 'full' or masks.sharing = \"residual\"", [100, 200]),
        ("masks.sharing = 'it''s'", [300]),
        ("masks.sharing in ('full', 'unshared') or params in (300)", [100, 300]),
        ("masks.sharing not in ('full')", [200, 300]),
        ("params != 100 and (top1 < 0.5 or reason = 'budget')", [300]),
        ("params == -1", []),
    ],
)
def test_a_condition_selects_rows(condition: str, params: list[int]) -> None:
    assert selected(condition) == params


@given(low=st.integers(0, 400), high=st.integers(0, 400), negated=st.booleans())
def test_a_condition_is_that_of_python(low: int, high: int, negated: bool) -> None:
    text = f"{'not ' * negated}(params >= {low} and params < {high})"
    expected = [row[0] for row in ROWS if (low <= row[0] < high) != negated]
    assert selected(text) == expected


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("parms < 3", "no column 'parms'; the nearest is params"),
        ("sharing = 'full'", "no column 'sharing'; the nearest is masks.sharing"),
        ("params <", "expected a number or a quoted text in place of 'the end'"),
        ("params < 3 top1", "unexpected 'top1'"),
        ("masks.sharing = full", "write the text full in quotes"),
        ("3 < params", "expected the name of a column in place of '3'"),
        ("params 3", "expected a comparison in place of '3'"),
        ("(params < 3", r"expected '\)' in place of 'the end'"),
        ("params in 3", r"expected '\(' in place of '3'"),
        ("", "expected the name of a column in place of 'the end'"),
        ("params < 3; drop table runs", "cannot read '; drop table runs'"),
        ("params = 'open", "cannot read"),
        ("(" * 60 + "params < 3" + ")" * 60, "too many parentheses"),
    ],
)
def test_an_invalid_condition_is_one_line(condition: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read_condition(condition, COLUMNS)
    assert "\n" not in str(raised.value)


@given(st.text(max_size=40))
def test_no_text_is_executed(text: str) -> None:
    try:
        found = read_condition(text, COLUMNS)
    except InputError:
        return
    assert set(found.sql.lower()) <= set('abcdefghijklmnopqrstuvwxyz0123456789"._ ()=<>!?,')
    assert found.sql.count("?") == len(found.parameters)


def test_a_quoted_value_is_a_parameter() -> None:
    found = read_condition("reason = 'x\" OR 1=1 --'", COLUMNS)
    assert found.parameters == ('x" OR 1=1 --',)
    assert "OR" not in found.sql
