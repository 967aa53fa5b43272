"""The keys of a recipe: their reference, and one-line errors that name the key and a way out.

Both are derived from the pydantic models of the recipe, so they always match it.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_PLAIN_TYPES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "a table",
}
_OUT_OF_RANGE = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "string_too_short",
    "too_short",
    "finite_number",
}


@dataclass(frozen=True)
class Key:
    """One key of a table as the reference shows it."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table of a recipe as the reference shows it; the name of the top level is empty."""

    name: str
    meaning: str
    keys: list[Key]


def key_reference(root: type[BaseModel]) -> Iterator[Table]:
    """Yield every table of a recipe with its keys, the top level first."""
    fields = root.model_fields.items()
    top = [_key(name, field) for name, field in fields if _table_of(field) is None]
    yield Table("", "A recipe is a TOML file. At its top level:", top)
    for name, field in fields:
        table = _table_of(field)
        if table is not None:
            keys = [_key(key, inner) for key, inner in table.model_fields.items()]
            yield Table(name, _meaning(table), keys)


def all_keys(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key with its dotted path, tables included, in the order of the file."""
    for name, field in root.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key, field
        table = _table_of(field)
        if table is not None:
            yield from all_keys(table, f"{key}.")


def type_in_words(annotation: Any) -> str:
    """A type in words: `a whole number`, `one of residual, unshared, full`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        several = len(arguments) > 1
        return f"one of {', '.join(map(str, arguments))}" if several else str(arguments[0])
    if origin in (types.UnionType, typing.Union):
        options = [argument for argument in arguments if argument is not type(None)]
        return " or ".join(map(type_in_words, options))
    if origin in (tuple, list):
        inner = type_in_words(arguments[0])
        if origin is tuple and Ellipsis not in arguments:
            return f"a list of {len(arguments)}, each {inner}"
        plain = inner.startswith("a ")
        return f"a list of {inner.removeprefix('a ')}s" if plain else f"a list, each {inner}"
    if origin is dict or _is_table(annotation):
        return "a table"
    return _PLAIN_TYPES.get(annotation, str(annotation))


def first_error(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake of `error` in one line, and the number of further ones."""
    problems = error.errors(include_url=False)
    # An unknown key comes first: it is often the reason why a required one is missing.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    lines: dict[str, str] = {}
    for problem in problems:
        keys = _keys_in_file(problem["loc"], root)
        lines.setdefault(".".join(keys), _describe(dict(problem), keys, root))
    first, *others = lines.values()
    more = f" (and {len(others)} more like this)" if others else ""
    return " ".join(f"{first}{more}".split())


def _key(name: str, field: FieldInfo) -> Key:
    default = _default_text(field.get_default(call_default_factory=True))
    meaning = f"{field.description} ({type_in_words(field.annotation)})"
    return Key(field.alias or name, default, meaning)


def _default_text(value: Any) -> str:
    if value is None:
        return "(absent)"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_default_text(item) for item in value)}]"
    return repr(value)


def _meaning(table: type[BaseModel]) -> str:
    return " ".join((table.__doc__ or "").split())


def _is_table(annotation: Any) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a field is, also one that may be absent."""
    annotation = field.annotation
    union = get_origin(annotation) in (types.UnionType, typing.Union)
    options = get_args(annotation) if union else (annotation,)
    return next((each for each in options if _is_table(each)), None)


def _keys_in_file(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The part of pydantic's location that is in the file.

    Branches of a union and positions in a list are internal to pydantic.
    """
    keys: list[str] = []
    model: type[BaseModel] | None = root
    for part in location:
        if model is None:
            break
        keys.append(str(part))
        field = _field(model, str(part))
        model = _table_of(field) if field else None
    return keys


def _field(model: type[BaseModel], key: str) -> FieldInfo | None:
    fields = model.model_fields.items()
    return next((field for name, field in fields if key in (field.alias or name, name)), None)


def _field_at(root: type[BaseModel], keys: list[str]) -> FieldInfo | None:
    model: Any = root
    field: FieldInfo | None = None
    for key in keys:
        field = _field(model, key) if _is_table(model) else None
        if field is None:
            return None
        model = _table_of(field)
    return field


def _describe(problem: dict[str, Any], keys: list[str], root: type[BaseModel]) -> str:
    path, kind, value = ".".join(keys), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"unknown key `{path}`; {_nearest(path, root)}"
    field = _field_at(root, keys)
    if kind == "missing":
        table = _table_of(field) if field else None
        if table is not None:
            return f"the table [{path}] is missing; {_meaning(table)}"
        return f"`{path}` is missing; {field.description if field else 'it is required'}"
    reason = str(problem.get("ctx", {}).get("error", "")) if kind == "value_error" else ""
    if reason:
        # A check of a whole table has the table as its value, which is too long for a line.
        whole_table = isinstance(value, dict | BaseModel)
        return f"[{path}]: {reason}" if whole_table else f"`{path}` = {_short(value)}: {reason}"
    if kind in _OUT_OF_RANGE:
        return f"`{path}` = {_short(value)} is out of range: {str(problem['msg']).lower()}"
    expected = type_in_words(field.annotation) if field else problem["msg"]
    return f"`{path}` = {_short(value)} has the wrong type or value: expected {expected}"


def _nearest(path: str, root: type[BaseModel]) -> str:
    known = [key for key, _ in all_keys(root)]
    section, _, last = path.rpartition(".")
    inside = [key for key in known if key.rpartition(".")[0] == section]
    names = [key.rpartition(".")[2] for key in inside]
    if by_name := difflib.get_close_matches(last, names, n=1, cutoff=0.6):
        return f"the nearest valid key is `{section + '.' if section else ''}{by_name[0]}`"
    # The right key in the wrong table is as common as a typing error.
    elsewhere = (
        [key for key in known if key.rpartition(".")[2] == last]
        or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
        or difflib.get_close_matches(path, inside, n=1, cutoff=0.0)
    )
    return f"the nearest valid key is `{elsewhere[0]}`"


def _short(value: Any) -> str:
    if isinstance(value, str):
        text = f'"{value}"'
    else:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
