"""Output files and folders: validated before the work, written in full or not at all.

Three rules hold for every output:

1. It neither is, contains, nor lies in anything that is read.
2. Only files and folders that vitrim wrote itself are replaced (`written_kinds`), and folders only
   while they hold nothing else.
3. An error or a kill leaves the old content or the new one (`staging`), and no other files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import InputError
from .staging import delete, recover, staged_file, staged_folder
from .written_kinds import FileKind, FolderKind, own_entries, unknown_file

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Faults of the path that was given, not of the program.
_UNWRITABLE = (
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.EBUSY, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EXDEV),
)
Inputs = Mapping[str, Path | str | None]


def replace_file(path: Path | str, content: bytes | str, kind: FileKind | None = None) -> None:
    """Write a file so that readers see the old content or the new one, never half of either.

    Args:
        path: The file; missing parent folders are created.
        content: The whole content; text is encoded as UTF-8.
        kind: Replace an existing file only if it is of this kind. None: replace any regular file.

    Raises:
        InputError: The disk is full, the file cannot be written, or it is of another kind.
    """
    path = Path(path)
    # Names of files are surrogates where the file system's encoding is ASCII.
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    require_output_file(path, kind, overwrite=True)
    with disk_errors(path), staged_file(path.resolve()) as descriptor:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(data)
        os.fsync(descriptor)


@contextlib.contextmanager
def replace_folder(
    folder: Path | str, kind: FolderKind | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a staging folder whose content becomes that of `folder`, and vanishes on an error.

    Args:
        folder: The folder to write. If it exists, it stays, and its entries are replaced.
        kind: What is written.
        overwrite: Replace the entries of a folder of this kind.

    Raises:
        InputError: As for `require_output_folder`, or the disk is full.
    """
    folder = Path(folder)
    require_output_folder(folder, kind, overwrite=overwrite)
    with disk_errors(folder):
        place = folder.resolve()
        with staged_folder(place) as staging:
            yield staging.content
            # Hours may have passed, in which somebody else wrote to the folder.
            require_output_folder(folder, kind, overwrite=overwrite)
            old = [path.name for path in own_entries(place)] if place.is_dir() else []
            staging.commit(old, None if kind is None else kind.marker)


def clear_folder(folder: Path, marker: str) -> None:
    """Delete the entries of a folder, the marker last; the folder itself stays."""
    with disk_errors(folder):
        for path in sorted(own_entries(folder), key=lambda path: path.name == marker):
            delete(path)


def require_output_folder(
    folder: Path | str,
    kind: FolderKind | None = None,
    *,
    overwrite: bool = False,
    inputs: Inputs | None = None,
) -> None:
    """Validate that a folder can be written, and complete a write that a kill interrupted.

    Args:
        folder: The folder, which may be missing.
        kind: What will be written. None: nothing is replaced.
        overwrite: Whether the content of a folder of this kind may be replaced.
        inputs: The files and folders that are read, by what they are.

    Raises:
        InputError: The folder overlaps an input, is a file or below one, cannot be written, or is
            not empty. The message names the first file that vitrim did not write.
    """
    folder = Path(folder)
    with disk_errors(folder):
        require_separate(folder, inputs or {})
        place = _resolved(folder)
        recover(place)
        _require_directory(folder, place)
        first = next(own_entries(place), None) if place.is_dir() else None
        if first is not None:
            problem = _why_kept(folder, place, first, kind)
            if problem is None and not overwrite:
                problem = "the output folder is not empty; name another one, or pass --overwrite "
                problem += "to replace it"
            if problem is not None:
                raise InputError(f"{folder}: {problem}")
        _require_permission(folder, place)


def require_output_file(
    path: Path | str,
    kind: FileKind | None = None,
    *,
    overwrite: bool = False,
    inputs: Inputs | None = None,
) -> None:
    """Validate that a file can be written.

    Args:
        path: The file, which may be missing.
        kind: What will be written; an existing file of another kind is refused. None: any file.
        overwrite: Whether an existing file may be replaced.
        inputs: The files and folders that are read, by what they are.

    Raises:
        InputError: The file is an input or lies in one, is not a regular file, cannot be written,
            exists already, or is of another kind.
    """
    path = Path(path)
    with disk_errors(path):
        require_separate(path, inputs or {})
        place = _resolved(path)
        _require_directory(path.parent, place.parent)
        if place.is_dir():
            raise InputError(f"{path}: a folder; name a file")
        if place.exists():
            if not place.is_file():
                raise InputError(f"{path}: not a regular file; name another one")
            if kind is not None and not kind.matches(place):
                raise InputError(
                    f"{path}: vitrim did not write this file (it is not {kind.title}), so it is "
                    "not replaced; name another one, or move it elsewhere"
                )
            if not overwrite:
                raise InputError(f"{path}: exists already; --overwrite replaces it")
        _require_permission(path, place.parent)


def require_separate(output: Path | str, inputs: Inputs) -> None:
    """Validate that an output neither is, contains, nor lies in anything that is read.

    Args:
        output: The output file or folder.
        inputs: The files and folders that are read, by what they are; None is ignored.

    Raises:
        InputError: The two overlap, also through links, mounts or the case of letters.
    """
    with disk_errors(Path(output)):
        written = _ancestors(_resolved(Path(output)))
        for title, given in inputs.items():
            relation = None if given is None else _relation(written, Path(given))
            if relation is not None:
                raise InputError(
                    f"{output}: the output {relation} {title} that is read ({given}); "
                    "name another place for the output"
                )


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise `InputError` in place of an `OSError` of a full disk, or of a path that is unwritable.

    Args:
        path: The file or folder being written, for the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise InputError(
                f"{path}: no space left on the disk; nothing was written; "
                "free some space or name another folder"
            ) from error
        if error.errno in _UNWRITABLE and _concerns(path, error):
            raise InputError(
                f"{_short(path)}: the folder cannot be written to ({error.strerror}); "
                "name another one"
            ) from error
        raise


def _concerns(path: Path, error: OSError) -> bool:
    """Whether an error is one of the output, and not of another file that was opened meanwhile."""
    if error.filename is None:
        return True
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        failed, parent = Path(os.fsdecode(error.filename)).absolute(), path.resolve().parent
        return failed.is_relative_to(parent) or parent.is_relative_to(failed)
    return True


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError:  # Python before 3.13 raises this in place of an OSError.
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
    except ValueError:
        raise InputError(f"{path!r}: not the name of a file or folder; name another") from None


def _ancestors(path: Path) -> list[tuple[int, int] | Path]:
    """The path and its parents, identified by what the file system has there."""
    found: list[tuple[int, int] | Path] = []
    for part in (path, *path.parents):
        try:
            status = part.stat()
        except OSError:
            found.append(part)
        else:
            found.append((status.st_dev, status.st_ino))
    return found


def _relation(written: list[tuple[int, int] | Path], read: Path) -> str | None:
    """How an output, given by its ancestors, overlaps a path that is read."""
    ancestors = _ancestors(_resolved(read))
    if written[0] == ancestors[0]:
        return "is"
    if written[0] in ancestors:
        return "contains"
    return "lies in" if ancestors[0] in written else None


def _require_directory(folder: Path, place: Path) -> None:
    """Raise InputError where a file is in the way of a folder."""
    for part in (place, *place.parents):
        if part.is_dir():
            return
        if os.path.lexists(part):
            given = folder if part == place else part
            raise InputError(
                f"{given}: a file is in the way of the output folder; name another folder"
            )


def _why_kept(folder: Path, place: Path, first: Path, kind: FolderKind | None) -> str | None:
    """Why the content of a folder is not replaced; None if vitrim wrote all of it."""
    contents = None if kind is None else kind.contents(place)
    if kind is None or contents is None:
        what = "" if kind is None else f" and is not {kind.title} that vitrim wrote"
        return (
            f"the output folder is not empty{what} (it holds {first.name}), so it is not replaced; "
            "name another folder"
        )
    unknown = unknown_file(place, contents)
    if unknown is None:
        return None
    return (
        f"vitrim did not write {unknown.relative_to(place)} in this folder, so it is not "
        "replaced; move that file elsewhere, or name another folder"
    )


def _require_permission(output: Path, folder: Path) -> None:
    existing = next((part for part in (folder, *folder.parents) if part.is_dir()), folder)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{output}: the folder cannot be written to ({existing} is read-only, or you have no "
            "permission); name another one"
        )
