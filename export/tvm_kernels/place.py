"""Where rows lie in a flat buffer."""

from __future__ import annotations

from dataclasses import dataclass

from .lanes import Expr


@dataclass(frozen=True)
class Rows:
    """Rows of a flat buffer: row r of image b starts at (b * per_image + first + r) * width.
    per_image 0: all images share them.
    """

    per_image: int
    width: int
    first: int = 0

    def start(self, image: Expr, row: Expr) -> Expr:
        """The index of the row's first element."""
        return (image * self.per_image + self.first + row) * self.width

    def size(self, images: int, rows: int) -> int:
        """Elements of a buffer that holds `rows` rows of each image."""
        return self.width * (images * self.per_image if self.per_image else self.first + rows)
