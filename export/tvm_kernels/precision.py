"""In which numbers a program's products read their rows: fp32, or codes of eight bits with ranges
found at every inference or beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from ...targets.vector import VectorUnit
from .codes import Coding, Range
from .dot import Dot
from .matrices import Stream

Name = Literal["fp32", "int8", "int8-static"]


class Precision(Protocol):
    """Asked in the order in which a program is written; the n-th rows that products read are the
    same rows in every precision.
    """

    def for_products(self, *, whole_rows: bool) -> tuple[Coding | None, Range | None]:
        """How a kernel should write rows that only products read; (None, None): in fp32.
        whole_rows: the kernel has a whole row at hand.
        """
        ...

    def read(self, rows: Stream) -> tuple[Coding | None, Range | None]:
        """How fp32 rows, which other kernels may read too, are written anew for a product; (None,
        None): not at all.
        """
        ...


class Float:
    """fp32 throughout."""

    def for_products(self, *, whole_rows: bool) -> tuple[Coding | None, Range | None]:
        return None, None

    def read(self, rows: Stream) -> tuple[Coding | None, Range | None]:
        return None, None


class Observed(Float):
    """fp32, and remembers which rows products read."""

    def __init__(self) -> None:
        self.rows: list[Stream] = []

    def read(self, rows: Stream) -> tuple[Coding | None, Range | None]:
        if not any(rows.value.same_as(known.value) for known in self.rows):
            self.rows.append(rows)
        return None, None


class Dynamic:
    """Codes of each row's own range."""

    def __init__(self, dot: Dot) -> None:
        self.coding = Coding(dot, static=False)

    def for_products(self, *, whole_rows: bool) -> tuple[Coding | None, Range | None]:
        # The range of a row is known only when all of it is.
        return (self.coding if whole_rows else None), None

    def read(self, rows: Stream) -> tuple[Coding | None, Range | None]:
        return self.coding, None


class Static:
    """Codes of ranges that were found beforehand, one for each place where products read rows."""

    def __init__(self, dot: Dot, ranges: Sequence[Range]) -> None:
        self.coding, self._ranges = Coding(dot, static=True), iter(ranges)

    def for_products(self, *, whole_rows: bool) -> tuple[Coding | None, Range | None]:
        return self.coding, next(self._ranges)

    def read(self, rows: Stream) -> tuple[Coding | None, Range | None]:
        return self.coding, next(self._ranges)


def precision_named(name: Name, unit: VectorUnit, ranges: Sequence[Range] | None) -> Precision:
    """A new one for each program that is written. ranges: what `find_ranges` found, for
    int8-static.
    """
    if name == "fp32":
        return Float()
    if name == "int8":
        return Dynamic(Dot.of(unit))
    assert ranges is not None
    return Static(Dot.of(unit), ranges)
