"""Atomic files and folders: written under a temporary name, then renamed."""

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
    """Write a file so that readers see the old content or the new one, never half of either.

    Args:
        path: The file; missing parent folders are created.
        content: The whole content; text is encoded as UTF-8.

    Raises:
        InputError: The disk is full or the folder is not writable.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def replace_folder(final: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` on success and is removed on failure.

    Args:
        final: The folder to write.
        overwrite: Replace a folder that is not empty.

    Raises:
        InputError: `final` is not empty, the disk is full, or the folder is not writable.
    """
    final = Path(final)
    require_empty(final, overwrite=overwrite)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            if final.exists():
                # A non-empty folder cannot be renamed over, so the old one is moved away first
                # and moved back on failure.
                old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
                os.replace(final, old)
                try:
                    os.replace(temporary, final)
                except BaseException:
                    os.replace(old, final)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def require_empty(folder: Path | str, *, overwrite: bool = False) -> None:
    """Raise `InputError` if an output folder is a file, or is not empty unless `overwrite`."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(
            f"{folder}: a file is in the way of the output folder; name another folder"
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"{folder}: the output folder is not empty; "
            "name another one, or pass --overwrite to replace it"
        )


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise `InputError` in place of an `OSError` of a full or read-only disk.

    Args:
        path: The file or folder being written, for the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(
                f"{path}: no space left on the disk; nothing was written; "
                "free some space or name another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(
                f"{path}: the folder cannot be written to ({error.strerror}); name another one"
            ) from error
        raise
