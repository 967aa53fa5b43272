"""The folder of one run, and its ledger: which step made which files, from what; a resumed run
skips what is whole and still true.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import InputError
from ..core.storage import replace_file, require_empty, sha256_file

LEDGER = "steps.json"
SCHEMA = "vitrim.steps/1"
Value = TypeVar("Value")


class RunFolder:
    """`steps.json` holds, for each finished step, its fingerprint, its seconds, and the SHA-256 of
    every file it made.

    A step that was begun and not finished is noted too, so that its training checkpoint is taken up
    only by the same recipe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ledger = _read(path / LEDGER)

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> RunFolder:
        """The folder, made if need be, emptied with `overwrite`. Errors: as `check`."""
        cls.check(path, resume=resume, overwrite=overwrite)
        if overwrite and path.is_dir():
            shutil.rmtree(path)
        folder = cls(path)
        folder._write()
        return folder

    @staticmethod
    def check(path: Path, *, resume: bool, overwrite: bool) -> None:
        """Errors: InputError if the folder holds something and neither resume nor overwrite is
        given, or is no run folder.
        """
        if path.is_file():
            require_empty(path)
        held = path.is_dir() and any(path.iterdir())
        if held and not (path / LEDGER).is_file():
            raise InputError(
                f"{path}: the output folder is not empty and is no run of vitrim; name another one with --out"
            )
        if held and not resume and not overwrite:
            raise InputError(
                f"{path}: the output folder is not empty, it holds an earlier run; --resume continues it, --overwrite starts anew, "
                "--out names another one"
            )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def step(
        self,
        name: str,
        fingerprint: str,
        files: Sequence[str],
        make: Callable[[bool], Value],
        load: Callable[[], Value],
    ) -> tuple[Value, bool]:
        """The step's value, and whether it was made now: `load()` if it is on disk, whole, and of
        this fingerprint; else `make(resume)`.

        `make` writes `files` (paths in the run folder; a folder counts with all that is in it). Its
        `resume` says that a part done before may be used.
        """
        if self.is_done(name, fingerprint):
            return load(), False
        continued = self._ledger["begun"].get(name) == fingerprint
        self._ledger["steps"].pop(name, None)
        self._ledger["begun"][name] = fingerprint
        self._write()
        started = time.perf_counter()
        value = make(continued)
        found = {path: sha256_file(self.path / path) for path in sorted(self._expand(files))}
        self._ledger["steps"][name] = {
            "fingerprint": fingerprint,
            "seconds": round(time.perf_counter() - started, 3),
            "files": found,
        }
        del self._ledger["begun"][name]
        self._write()
        return value, True

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether the step's files are all there, unchanged, and made from the same recipe."""
        entry = self._ledger["steps"].get(name)
        if entry is None or entry["fingerprint"] != fingerprint:
            return False
        return all(
            (self.path / path).is_file() and sha256_file(self.path / path) == digest
            for path, digest in entry["files"].items()
        )

    def seconds(self) -> dict[str, float]:
        """How long each finished step took."""
        return {name: entry["seconds"] for name, entry in self._ledger["steps"].items()}

    def _expand(self, files: Sequence[str]) -> list[str]:
        found: list[str] = []
        for name in files:
            path = self.path / name
            inside = (
                [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]
            )
            found += [part.relative_to(self.path).as_posix() for part in inside]
        return found

    def _write(self) -> None:
        replace_file(self.path / LEDGER, json.dumps(self._ledger, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"schema": SCHEMA, "steps": {}, "begun": {}}
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); start anew with --overwrite") from error
    whole = (
        isinstance(ledger, dict)
        and isinstance(ledger.get("steps"), dict)
        and isinstance(ledger.get("begun"), dict)
    )
    if not whole or ledger.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: not a ledger of this version (wanted schema {SCHEMA!r}); start anew with --overwrite"
        )
    return dict(ledger)
