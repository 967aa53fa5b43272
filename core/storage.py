"""Files that are either whole or absent: written aside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError


def replace_file(path: Path | str, content: bytes | str) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never half of
    either.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
            raise


@contextlib.contextmanager
def replace_folder(final: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `final`, renamed to it on success and removed on failure.

    Errors: InputError if `final` exists and is not empty (unless `overwrite`), or if the disk is
    full.
    """
    final = Path(final)
    require_empty(final, overwrite=overwrite)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            os.chmod(aside, 0o755)
            yield aside
            if final.exists():
                # Renaming over a non-empty folder is refused by the system, so the old one steps
                # aside first and comes back if we fail.
                old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
                os.replace(final, old)
                try:
                    os.replace(aside, final)
                except BaseException:
                    os.replace(old, final)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(aside, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def require_empty(folder: Path | str, *, overwrite: bool = False) -> None:
    """Refuse an output folder that holds something, or a file where a folder is wanted."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(
            f"{folder}: a file is in the way of the output folder; name another folder"
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"{folder}: the output folder is not empty; name another one, or pass --overwrite to replace it"
        )


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line for the user; `path` is what was being
    written.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(
                f"{path}: no space left on the disk; nothing was written; free some space or name another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(
                f"{path}: the folder cannot be written to ({error.strerror}); name another one"
            ) from error
        raise
