"""Target profiles by name or path: the shipped ones, the detected `host`, and .toml files."""

from __future__ import annotations

import difflib
import platform
import re
import tomllib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..core.console import status
from ..core.errors import InputError
from .detect import detect_host, missing_features
from .instruction_sets import machine_name
from .profile import Cluster, Memory, Peak, TargetProfile

FOLDER = Path(__file__).parent
# Names that are accepted for others.
ALIASES = {"x86-64-avx2": "x86-64-v3", "x86-64-v2": "x86-64"}
# What names meant in files that were written before x86-64 was any x86-64-v2 processor.
EARLIER_NAMES = {"x86-64": "x86-64-v4-vnni", "x86-64-avx2": "x86-64-v3"}
_CHANGED = {
    "x86-64-avx2": "target x86-64-avx2 is named x86-64-v3 now",
    "x86-64": "target x86-64 means any x86-64-v2 processor (SSE4.2) now; its former meaning, "
    "AVX-512 VNNI, is x86-64-v4-vnni, and AVX2 is x86-64-v3",
}
_reported: set[str] = set()


def list_targets() -> list[str]:
    """Names of the shipped profiles, sorted, without `host`."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def shipped_targets() -> list[TargetProfile]:
    """The shipped profiles, sorted by name."""
    return [_read(FOLDER / f"{name}.toml") for name in list_targets()]


def targets_here() -> list[str]:
    """Names of the shipped profiles whose instruction sets this processor has."""
    return [profile.name for profile in shipped_targets() if fits_here(profile)]


def fits_here(profile: TargetProfile) -> bool:
    """Whether this processor is of a profile's architecture and has its instruction sets."""
    return profile.kind == "cpu" and of_this_architecture(profile) and not missing_features(profile)


def of_this_architecture(profile: TargetProfile) -> bool:
    """Whether this machine runs the instructions that all processors of a profile's kind have."""
    return machine_name(profile.architecture) == machine_name(platform.machine())


def present_name(earlier: str) -> str:
    """The present name of a target that a file of an earlier version names."""
    return EARLIER_NAMES.get(earlier, earlier)


def load_target(name_or_path: str | Path) -> TargetProfile:
    """Load a shipped profile by name, the detected `host`, or a profile from a .toml file.

    Args:
        name_or_path: A name, or a path: a `Path`, or text that contains a slash or ends in .toml.

    Raises:
        InputError: No profile has the name, or the file is malformed; the message contains the
            nearest name, or the file, line and key.
    """
    text = str(name_or_path)
    if text == "host":
        return detect_host()
    path = Path(text)
    if isinstance(name_or_path, Path) or path.suffix == ".toml" or "/" in text:
        return _read(path)
    name = ALIASES.get(text, text)
    if name not in list_targets():
        hint = _near_name(text) or f"known are {', '.join([*list_targets(), 'host'])}"
        raise InputError(
            f"target {text!r}: no such profile; {hint} (or give the path of a .toml file)"
        )
    if text in _CHANGED and text not in _reported:
        _reported.add(text)
        status(_CHANGED[text])
    return _read(FOLDER / f"{name}.toml")


def _near_name(text: str) -> str | None:
    known = [*list_targets(), *ALIASES, "host"]
    near = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {ALIASES.get(near[0], near[0])!r}?" if near else None


def _near_file(path: Path) -> str | None:
    names = [entry.name for entry in path.parent.glob("*.toml")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"did you mean {path.with_name(near[0])}?" if near else None


def _read(path: Path) -> TargetProfile:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        hint = "give the path of a target's .toml file, or a name of `vitrim targets list`"
        if not path.exists():
            hint = _near_file(path) or _near_name(path.stem) or hint
        raise InputError(f"{path}: cannot be read ({error.strerror}); {hint}") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not UTF-8 text; give the path of a target's .toml file"
        ) from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}; correct that line") from None
    try:
        return TargetProfile.model_validate(data)
    except ValidationError as error:
        # A misspelt key is both unknown and missing; the unknown one is more informative.
        first = next(
            (entry for entry in error.errors() if entry["type"] == "extra_forbidden"),
            error.errors()[0],
        )
        raise InputError(
            _explain(path, text, first["loc"], str(first["type"]), first["msg"])
        ) from None


def _explain(path: Path, text: str, where: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in where)
    message = message.removeprefix("Value error, ")
    if not where and (found := re.search(r"the number ([\w.]+) has no source", message)):
        where = tuple(int(part) if part.isdigit() else part for part in found[1].split("."))
    line = line_of(text, where)
    place = f"{path}:{line}" if line else str(path)
    if kind == "missing":
        return (
            f"{place}: {key}: this key is missing; add it (a shipped profile in targets/ shows how)"
        )
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), _keys_of(where[:-1]), n=1, cutoff=0.5)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"known here are {', '.join(_keys_of(where[:-1]))}"
        )
        return f"{place}: {key}: no such key; {hint}"
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"


def _keys_of(table: tuple[int | str, ...]) -> list[str]:
    models: dict[str, type[BaseModel]] = {"clusters": Cluster, "memory": Memory, "peak": Peak}
    model = models.get(str(table[0]), TargetProfile) if table else TargetProfile
    return [field.alias or name for name, field in model.model_fields.items()]


def line_of(text: str, where: tuple[int | str, ...]) -> int | None:
    """The line (from 1) of a key in TOML text, or of the innermost table that contains it.

    Args:
        text: TOML as people write it: one header or key a line.
        where: The path of the key; numbers are positions in arrays of tables.

    Returns:
        None where the text contains neither the key nor a table around it.
    """
    best: tuple[int, int] | None = None
    table: list[int | str] = []
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.split("#")[0].strip()
        if header := re.match(r"^\[\[(.+)\]\]$", bare):
            counts[header[1].strip()] = counts.get(header[1].strip(), -1) + 1
            table = [*header[1].strip().split("."), counts[header[1].strip()]]
            path = list(table)
        elif header := re.match(r"^\[(.+)\]$", bare):
            path = table = [part.strip().strip("\"'") for part in header[1].split(".")]
        elif entry := re.match(r"^([\w\-\"'.]+)\s*=", bare):
            path = [*table, *(part.strip("\"'") for part in entry[1].split("."))]
        else:
            continue
        if list(where[: len(path)]) == path and (best is None or len(path) > best[0]):
            best = (len(path), number)
    return best[1] if best else None
