"""Commands whose options are grouped into dataclasses, and the options that commands share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

Command = Callable[..., None]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def with_option_groups(function: Command) -> Command:
    """Replace every parameter that is a dataclass by the fields of that dataclass.

    typer reads one option from each parameter of a command, so a command with many options would
    have as many parameters. A field is declared like a parameter: `Annotated` with a
    `typer.Option`, and a default. The help text is the docstring up to `Args:`.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    groups = {name: hints[name] for name in parameters if dataclasses.is_dataclass(hints[name])}
    fields = {name: _fields(group) for name, group in groups.items()}
    flat: dict[str, inspect.Parameter] = {}
    for name, parameter in parameters.items():
        own = {name: parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)}
        flat |= fields.get(name, own)

    def command(**values: Any) -> None:
        arguments = {
            name: group(**{field: values.pop(field) for field in fields[name]})
            for name, group in groups.items()
        }
        function(**arguments, **values)

    command.__name__, command.__module__ = function.__name__, function.__module__
    command.__doc__ = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")[0]
    command.__annotations__ = {name: parameter.annotation for name, parameter in flat.items()}
    command.__signature__ = inspect.Signature(list(flat.values()))  # type: ignore[attr-defined]
    return command


def _fields(group: Any) -> dict[str, inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    found = {}
    for field in dataclasses.fields(group):
        missing = field.default is dataclasses.MISSING
        found[field.name] = inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if missing else field.default,
            annotation=hints[field.name],
        )
    return found
