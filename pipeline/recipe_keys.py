"""The reference of a recipe's keys, made from the recipe itself so that it cannot fall behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .recipe import Recipe
from .recipe_errors import wanted

Row = tuple[str, str, str]


def rows() -> Iterator[tuple[str, str, list[Row]]]:
    """For each table: its name (empty at the top), what it is for, and its keys as (key, default,
    meaning).
    """
    top = [_row(name, field) for name, field in Recipe.model_fields.items() if not _table(field)]
    yield "", "A recipe is a TOML file. At its top:", top
    for name, field in Recipe.model_fields.items():
        table = _table(field)
        if table is not None:
            yield (
                name,
                (table.__doc__ or "").strip(),
                [_row(key, inner) for key, inner in table.model_fields.items()],
            )


def _row(name: str, field: FieldInfo) -> Row:
    default = field.get_default(call_default_factory=True)
    return field.alias or name, _shown(default), f"{field.description} ({wanted(field.annotation)})"


def _shown(value: Any) -> str:
    if value is None:
        return "(absent)"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return repr(value)


def _table(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
