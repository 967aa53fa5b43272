"""One line for a mistake in a recipe: which key, what is wrong, and the nearest thing that would be
right.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "a table",
}


def first_line(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake of `error` in one line, and how many more there are."""
    problems = error.errors(include_url=False)
    # An unknown key comes first: it is often why a required one is missing.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    seen: dict[str, str] = {}
    for problem in problems:
        keys = _keys(problem["loc"], root)
        seen.setdefault(".".join(keys), _describe(dict(problem), keys, root))
    first, *others = seen.values()
    more = f" (and {len(others)} more like this)" if others else ""
    return " ".join(f"{first}{more}".split())


def all_keys(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a recipe with its dotted path, tables included, in the order of the file."""
    for name, field in root.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_keys(field.annotation, f"{key}.")


def wanted(annotation: Any) -> str:
    """A type in words: `a whole number`, `one of residual, unshared, full`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return (
            f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
        )
    if origin in (types.UnionType, typing.Union):
        return " or ".join(wanted(argument) for argument in arguments if argument is not type(None))
    if origin in (tuple, list):
        inner = wanted(arguments[0])
        if origin is tuple and Ellipsis not in arguments:
            return f"a list of {len(arguments)}, each {inner}"
        return f"a list, each {inner}" if inner.startswith("one of") else f"a list of {inner}"
    if origin is dict:
        return "a table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a table"
    return _PLAIN.get(annotation, str(annotation))


def _keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The part of pydantic's location that the user wrote: union branches and list positions are
    pydantic's own.
    """
    keys: list[str] = []
    model: type[BaseModel] | None = root
    for part in location:
        if model is None:
            break
        keys.append(str(part))
        field = _field(model, str(part))
        annotation = field.annotation if field else None
        model = (
            annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel)
            else None
        )
    return keys


def _field(model: type[BaseModel], key: str) -> FieldInfo | None:
    return next(
        (
            field
            for name, field in model.model_fields.items()
            if (field.alias or name) == key or name == key
        ),
        None,
    )


def _field_at(root: type[BaseModel], keys: list[str]) -> FieldInfo | None:
    model: Any = root
    field: FieldInfo | None = None
    for key in keys:
        field = (
            _field(model, key) if isinstance(model, type) and issubclass(model, BaseModel) else None
        )
        if field is None:
            return None
        model = field.annotation
    return field


def _describe(problem: dict[str, Any], keys: list[str], root: type[BaseModel]) -> str:
    path, kind, value = ".".join(keys), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"unknown key `{path}`; {_nearest(path, root)}"
    field = _field_at(root, keys)
    if kind == "missing":
        if (
            field is not None
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        ):
            return f"the table [{path}] is missing; {field.annotation.__doc__}"
        return f"`{path}` is missing; {field.description if field else 'it is required'}"
    reason = str(problem.get("ctx", {}).get("error", "")) if kind == "value_error" else ""
    if reason:
        # A check over a whole table has the table as its value, which would not fit a line.
        shown = (
            f"`{path}` = {_short(value)}"
            if not isinstance(value, dict | BaseModel)
            else f"[{path}]"
        )
        return f"{shown}: {reason}"
    if kind in (
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "string_too_short",
        "too_short",
        "finite_number",
    ):
        return f"`{path}` = {_short(value)} is out of range: {str(problem['msg']).lower()}"
    return f"`{path}` = {_short(value)} has the wrong type or value: wanted {wanted(field.annotation) if field else problem['msg']}"


def _nearest(path: str, root: type[BaseModel]) -> str:
    known = [key for key, _ in all_keys(root)]
    section, _, last = path.rpartition(".")
    inside = [key for key in known if key.rpartition(".")[0] == section]
    close = difflib.get_close_matches(path, inside, n=1, cutoff=0.0)
    by_name = difflib.get_close_matches(
        last, [key.rpartition(".")[2] for key in inside], n=1, cutoff=0.6
    )
    if by_name:
        return f"the nearest valid key is `{section + '.' if section else ''}{by_name[0]}`"
    # The right key in the wrong table is as common as a slip of the finger.
    elsewhere = (
        [key for key in known if key.rpartition(".")[2] == last]
        or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
        or close
    )
    return f"the nearest valid key is `{elsewhere[0]}`"


def _short(value: Any) -> str:
    text = (
        f'"{value}"'
        if isinstance(value, str)
        else str(value).lower()
        if isinstance(value, bool)
        else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
