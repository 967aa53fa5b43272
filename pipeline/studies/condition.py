"""Conditions on rows, such as `params < 1e6 and top1 >= 0.9`, as SQL with parameters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass

from ...core.errors import InputError

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
      | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
      | (?P<name>[A-Za-z_][\w.]*)
      | (?P<sign><=|>=|!=|<>|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE,
)
_COMPARISONS = {"<", "<=", ">", ">=", "=", "==", "!=", "<>"}
_WORDS = {"and", "or", "not", "in", "is", "null"}
_DEEPEST = 50
EXAMPLE = "params < 1e6 and masks.sharing = 'full'"


@dataclass(frozen=True)
class Condition:
    """A condition in SQL.

    Attributes:
        sql: Its text; values are `?`.
        parameters: The values in order.
    """

    sql: str
    parameters: tuple[str | float, ...]


def read_condition(text: str, columns: Collection[str]) -> Condition:
    """Parse a condition on the columns of a table.

    Comparisons (`<`, `<=`, `>`, `>=`, `=`, `!=`), `in (...)`, `is null` and `is not null` are
    joined by `and`, `or`, `not` and parentheses. Values are numbers and quoted texts.

    Args:
        text: The condition.
        columns: The names that it may contain.

    Returns:
        The condition; no part of `text` is in its SQL but names of columns, in quotes.

    Raises:
        InputError: The text is no condition, or names an unknown column.
    """
    parser = _Parser(text, columns)
    sql = parser.disjunction(0)
    if parser.kind != "end":
        raise parser.error(f"unexpected {parser.token!r}")
    return Condition(sql, tuple(parser.parameters))


def quoted(column: str) -> str:
    """A column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'


def require_column(name: str, columns: Collection[str], option: str) -> str:
    """The name, if there is such a column.

    Raises:
        InputError: There is none; the message has the nearest name.
    """
    if name in columns:
        return name
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.4)
    last = [column for column in columns if column.rpartition(".")[2] == name]
    nearest = (last or near or [", ".join(columns)])[0]
    raise InputError(f"{option}: no column {name!r}; the nearest is {nearest}")


class _Parser:
    """Recursive descent; the current token is in `kind` and `token`."""

    def __init__(self, text: str, columns: Collection[str]) -> None:
        self.text, self.columns = text, columns
        self.place = 0
        self.parameters: list[str | float] = []
        self.kind, self.token = "", ""
        self.advance()

    def error(self, what: str) -> InputError:
        return InputError(f"--where {self.text!r}: {what}; write e.g. --where {EXAMPLE!r}")

    def advance(self) -> None:
        rest = self.text[self.place :]
        if not rest.strip():
            self.kind, self.token = "end", "the end"
            return
        found = _TOKEN.match(rest)
        if found is None:
            raise self.error(f"cannot read {rest.strip()[:20]!r}")
        self.place += found.end()
        self.kind, self.token = str(found.lastgroup), found[str(found.lastgroup)]
        if self.kind == "name" and self.token.lower() in _WORDS:
            self.kind, self.token = "word", self.token.lower()

    def accept(self, *tokens: str) -> bool:
        if self.kind in ("word", "sign") and self.token in tokens:
            self.advance()
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.error(f"expected {token!r} in place of {self.token!r}")

    def disjunction(self, depth: int) -> str:
        parts = [self.conjunction(depth)]
        while self.accept("or"):
            parts.append(self.conjunction(depth))
        return f"({' OR '.join(parts)})"

    def conjunction(self, depth: int) -> str:
        parts = [self.term(depth)]
        while self.accept("and"):
            parts.append(self.term(depth))
        return f"({' AND '.join(parts)})"

    def term(self, depth: int) -> str:
        if depth > _DEEPEST:
            raise self.error("too many parentheses")
        if self.accept("not"):
            return f"(NOT {self.term(depth + 1)})"
        if self.accept("("):
            inside = self.disjunction(depth + 1)
            self.expect(")")
            return inside
        return self.comparison()

    def comparison(self) -> str:
        if self.kind != "name":
            raise self.error(f"expected the name of a column in place of {self.token!r}")
        option = f"--where {self.text!r}"
        name = quoted(require_column(self.token, self.columns, option))
        self.advance()
        if self.accept("is"):
            negated = "NOT " if self.accept("not") else ""
            self.expect("null")
            return f"{name} IS {negated}NULL"
        negated = "NOT " if self.accept("not") else ""
        if self.accept("in"):
            return f"{name} {negated}IN ({self.list()})"
        if negated or self.kind != "sign" or self.token not in _COMPARISONS:
            raise self.error(f"expected a comparison in place of {self.token!r}")
        sign = self.token
        self.advance()
        self.value()
        return f"{name} {sign} ?"

    def list(self) -> str:
        self.expect("(")
        count = 1
        self.value()
        while self.accept(","):
            self.value()
            count += 1
        self.expect(")")
        return ", ".join("?" * count)

    def value(self) -> None:
        if self.kind == "number":
            self.parameters.append(float(self.token))
        elif self.kind == "text":
            sign = self.token[0]
            self.parameters.append(self.token[1:-1].replace(2 * sign, sign))
        elif self.kind == "name":
            raise self.error(f"write the text {self.token} in quotes")
        else:
            raise self.error(f"expected a number or a quoted text in place of {self.token!r}")
        self.advance()
