"""Staging: content is written aside and then takes its place in full, or not at all.

A staging folder `.NAME.vitrim-new-XXXXXXXX` lies beside the folder NAME, or inside it where it
cannot be moved out (a mount point, a parent folder without permission). It contains `content/`,
which the caller writes, and, where NAME exists already, `replaced.json`, the names of the old
entries to delete.

A folder that exists is neither renamed nor removed, so that shells, links and mounts keep it: its
entries are replaced one by one. Before that, the staging folder becomes `.NAME.vitrim-ready-...`.
After a kill, `recover` completes ready staging folders and deletes all others. A process holds a
lock on those that it works on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is deleted after a kill.
    fcntl = None  # type: ignore[assignment]

NEW, READY, FILE = "new", "ready", "file"
CONTENT, JOURNAL = "content", "replaced.json"
# File systems allow 255 bytes for a name; the name within a longer one is replaced by its digest.
MAX_NAME_BYTES = 200
_STAGING = re.compile(r"\.(?P<name>.*)\.vitrim-(new|ready|file)-[a-z0-9_]{8}", re.DOTALL)


def is_staging(name: str) -> bool:
    """Whether a file or folder of this name belongs to an unfinished write."""
    return _STAGING.fullmatch(name) is not None


class Staging:
    """A staging folder of this process.

    Attributes:
        folder: The staging folder.
        place: Where its content goes.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place

    @property
    def content(self) -> Path:
        """The folder to write to."""
        return self.folder / CONTENT

    def commit(self, old: Sequence[str], marker: str | None) -> None:
        """Put the content in its place.

        Args:
            old: The entries of `place` to replace, where it exists.
            marker: The entry that identifies the folder: deleted first and written last.
        """
        if not self.place.is_dir():
            os.rename(self.content, self.place)
            return
        new = set(os.listdir(self.content))
        journal = json.dumps({"delete": [name for name in old if name not in new]})
        (self.folder / JOURNAL).write_text(journal, encoding="ascii")
        ready = self.folder.with_name(self.folder.name.replace(f"-{NEW}-", f"-{READY}-"))
        os.rename(self.folder, ready)
        self.folder = ready
        if marker is not None and marker in old:
            (self.place / marker).unlink(missing_ok=True)
        _complete(ready, self.place, marker)


@contextlib.contextmanager
def staged_folder(place: Path) -> Iterator[Staging]:
    """Yield a staging folder, and remove it at the end unless its commit began.

    Args:
        place: The resolved path of a folder that exists, or that the commit creates.
    """
    with _parents(place):
        folder, lock = _new_folder(place)
        staging = Staging(folder, place)
        try:
            staging.content.mkdir()
            yield staging
        finally:
            if staging.folder == folder or not (staging.folder / CONTENT).is_dir():
                shutil.rmtree(staging.folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


@contextlib.contextmanager
def staged_file(place: Path) -> Iterator[int]:
    """Yield the descriptor of a file that replaces `place` at the end; nothing on an error.

    Args:
        place: The resolved path of a file.
    """
    with _parents(place):
        _recover(place.parent, place)
        descriptor, name = tempfile.mkstemp(prefix=_prefix(place, FILE), dir=place.parent)
        try:
            _lock(descriptor)
            yield descriptor
            os.chmod(name, 0o644)
            os.replace(name, place)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        finally:
            os.close(descriptor)


def recover(place: Path) -> None:
    """Complete or undo the writes of a folder that a kill interrupted.

    Args:
        place: The folder, which may be missing.
    """
    with contextlib.suppress(OSError, RuntimeError):
        place = place.resolve()
        for parent in (place.parent, place):
            _recover(parent, place)


def recover_all(parent: Path) -> None:
    """Complete or undo the interrupted writes of all files and folders in `parent`."""
    for name in os.listdir(parent):
        found = _STAGING.fullmatch(name)
        if found:
            _finish(parent / name, parent / found["name"])


def delete(path: Path) -> None:
    """Delete a file or a folder, not what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Create the folders above `place`, and remove them again on an error."""
    missing = [path for path in place.parents if not path.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _new_folder(place: Path) -> tuple[Path, int | None]:
    """A new staging folder, and the descriptor of its lock."""
    exists = place.is_dir()
    while True:
        base = place if exists else place.parent
        folder = Path(tempfile.mkdtemp(prefix=_prefix(place, NEW), dir=base))
        lock = _locked(folder)
        if lock is None or folder.is_dir():
            break
        os.close(lock)  # Another process took it for abandoned before the lock.
    if exists:
        # Outside, the old content stays unchanged until the commit. Only a rename shows that
        # entries can be moved from there, which bind mounts prevent.
        with contextlib.suppress(OSError):
            folder = folder.rename(place.parent / folder.name)
    return folder, lock


def _prefix(place: Path, state: str) -> str:
    name = os.fsencode(place.name)
    short = len(name) <= MAX_NAME_BYTES
    return f".{place.name if short else hashlib.sha256(name).hexdigest()}.vitrim-{state}-"


def _complete(staging: Path, place: Path, marker: str | None) -> None:
    """Delete the replaced entries and move the new ones in; repeating it continues it."""
    journal = json.loads((staging / JOURNAL).read_text(encoding="ascii"))
    for name in journal["delete"]:
        delete(place / name)
    for name in sorted(os.listdir(staging / CONTENT), key=lambda name: (name == marker, name)):
        if (place / name).is_dir():
            delete(place / name)
        os.replace(staging / CONTENT / name, place / name)
    (staging / CONTENT).rmdir()


def _recover(parent: Path, place: Path) -> None:
    prefixes = tuple(_prefix(place, state) for state in (NEW, READY, FILE))
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(prefixes) and is_staging(name):
                _finish(parent / name, place)


def _finish(staging: Path, place: Path) -> None:
    """Complete or delete a staging file or folder, if no process works on it."""
    with contextlib.suppress(OSError):
        if not hasattr(os, "getuid") or staging.lstat().st_uid != os.getuid():
            return
        lock = _locked(staging)
        if lock is None:
            return
        try:
            ready = f".vitrim-{READY}-" in staging.name and (staging / CONTENT).is_dir()
            if ready and place.is_dir():
                _complete(staging, place, None)
            delete(staging)
        finally:
            os.close(lock)


def _locked(path: Path) -> int | None:
    """The descriptor of a new lock; None where another process has one, or there are none."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other vitrim processes from writing to a folder as long as the context is open.

    The lock is one of the operating system, so that it ends with the process, however that ends.
    Without such locks (Windows) nothing is checked.

    Raises:
        InputError: Another process has the lock.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _HELD.add(descriptor)
    try:
        if not _lock(descriptor):
            raise InputError(
                f"{folder}: another vitrim process writes to this folder; wait until it has ended, "
                "or name another folder with --out"
            )
        yield
    finally:
        _HELD.discard(descriptor)
        os.close(descriptor)


# Descriptors of `only_writer`. A forked child, such as one that reads images, has copies of them,
# with which the lock would outlive a killed parent.
_HELD: set[int] = set()


def _close_held() -> None:
    while _HELD:
        os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)
