"""How vitrim recognises the files and folders that it wrote: only those are ever replaced."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import strict_json
from .staging import is_staging

MAX_JSON_BYTES = 256 * 1024**2
# Entries that systems add by themselves: no reason to refuse a folder.
SYSTEM_ENTRIES = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"}


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        title: As in "a measurement".
        matches: Whether a file is of this kind; it may raise OSError.
    """

    title: str
    matches: Callable[[Path], bool]


# From the path of a file within a folder to its kind, None for any file of that name. A `*` stands
# for any name, a final `**` for everything below.
Contents = Mapping[str, FileKind | None]


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder.

    Attributes:
        title: As in "an artifact".
        marker: The file that identifies it: deleted first and written last.
        contents: The files that vitrim writes to a folder; None if it is of another kind.
    """

    title: str
    marker: str
    contents: Callable[[Path], Contents | None]


def json_kind(title: str, schema: str) -> FileKind:
    """The kind of JSON files with a schema such as `vitrim.measurement/1`, in any version."""
    return FileKind(title, lambda path: has_schema(json_object(path), schema))


def has_schema(data: Mapping[str, Any] | None, schema: str) -> bool:
    """Whether a JSON object has a schema such as `vitrim.measurement/1`, in any version."""
    found = None if data is None else data.get("schema")
    return isinstance(found, str) and found.partition("/")[0] == schema.partition("/")[0]


def json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or has other content."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return None
    try:
        data = strict_json.parse(path.read_bytes())
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def within(name: str, contents: Contents | None) -> dict[str, FileKind | None]:
    """The contents of a folder `name`, as a part of the contents of the folder around it."""
    return {f"{name}/{path}": kind for path, kind in (contents or {}).items()}


def own_entries(folder: Path) -> Iterator[Path]:
    """The entries of a folder, without those of the system and those of unfinished writes."""
    for path in sorted(folder.iterdir()):
        if path.name not in SYSTEM_ENTRIES and not is_staging(path.name):
            yield path


def unknown_file(folder: Path, contents: Contents) -> Path | None:
    """The first file in a folder that `contents` does not list; a link is never listed."""
    for path in own_entries(folder):
        if path.is_dir() and not path.is_symlink():
            found = unknown_file(path, below(path.name, contents))
            if found is not None:
                return found
        elif not _is_listed(path, contents):
            return path
    return None


def below(name: str, contents: Contents) -> Contents:
    """The part of `contents` that is in its folder `name`."""
    found: dict[str, FileKind | None] = {}
    for pattern, kind in contents.items():
        first, slash, rest = pattern.partition("/")
        if pattern == "**":
            found[pattern] = kind
        elif slash and fnmatchcase(name, first):
            found[rest] = kind
    return found


def _is_listed(file: Path, contents: Contents) -> bool:
    if not stat.S_ISREG(file.lstat().st_mode):
        return False
    return any(
        fnmatchcase(file.name, pattern) and (kind is None or kind.matches(file))
        for pattern, kind in contents.items()
    )
