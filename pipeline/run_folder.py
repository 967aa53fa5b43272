"""The folder of one run and its ledger, steps.json.

The ledger records which step made which files, and from what. A resumed run skips every step whose
files are complete and made from the same recipe.
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
    """A run folder with its ledger.

    `steps.json` contains, for each finished step, its fingerprint, its seconds and the SHA-256 of
    every file that it made. A step that was begun and not finished is listed too, so that only the
    same recipe continues from its training checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ledger = _read(path / LEDGER)

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> RunFolder:
        """Create the folder where it is missing, or empty it with `overwrite`.

        Raises:
            InputError: As for `check`.
        """
        cls.check(path, resume=resume, overwrite=overwrite)
        if overwrite and path.is_dir():
            shutil.rmtree(path)
        folder = cls(path)
        folder._write()
        return folder

    @staticmethod
    def check(path: Path, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may write to `path`.

        Raises:
            InputError: The folder contains an earlier run and neither `resume` nor `overwrite` is
                given, or it contains something else.
        """
        if path.is_file():
            require_empty(path)
        if not path.is_dir() or not any(path.iterdir()):
            return
        if not (path / LEDGER).is_file():
            raise InputError(
                f"{path}: the output folder is not empty and contains no vitrim run; "
                "name another one with --out"
            )
        if not resume and not overwrite:
            raise InputError(
                f"{path}: the output folder contains an earlier run; --resume continues it, "
                "--overwrite deletes it and starts again, --out names another one"
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
        """Load the value of a step where it is complete, or make it.

        Args:
            name: Name of the step in the ledger.
            fingerprint: Hash of everything that the value depends on.
            files: What `make` writes, as paths in the run folder. A folder includes all its files.
            make: Computes and saves the value. Its argument is True if an earlier attempt of the
                same fingerprint may be continued.
            load: Loads the value from `files`.

        Returns:
            The value, and whether it was made now.
        """
        if self.is_done(name, fingerprint):
            return load(), False
        continued = self._ledger["begun"].get(name) == fingerprint
        self._ledger["steps"].pop(name, None)
        self._ledger["begun"][name] = fingerprint
        self._write()
        started = time.perf_counter()
        value = make(continued)
        digests = {path: sha256_file(self.path / path) for path in sorted(self._expand(files))}
        self._ledger["steps"][name] = {
            "fingerprint": fingerprint,
            "seconds": round(time.perf_counter() - started, 3),
            "files": digests,
        }
        del self._ledger["begun"][name]
        self._write()
        return value, True

    def is_done(self, name: str, fingerprint: str) -> bool:
        """Whether all files of the step are present, unchanged and made from the same recipe."""
        entry = self._ledger["steps"].get(name)
        if entry is None or entry["fingerprint"] != fingerprint:
            return False
        return all(
            (self.path / path).is_file() and sha256_file(self.path / path) == digest
            for path, digest in entry["files"].items()
        )

    def seconds(self) -> dict[str, float]:
        """The duration of each finished step."""
        return {name: entry["seconds"] for name, entry in self._ledger["steps"].items()}

    def _expand(self, files: Sequence[str]) -> list[str]:
        found: list[Path] = []
        for name in files:
            path = self.path / name
            inside = [part for part in path.rglob("*") if part.is_file()]
            found += inside if path.is_dir() else [path]
        return [path.relative_to(self.path).as_posix() for path in found]

    def _write(self) -> None:
        replace_file(self.path / LEDGER, json.dumps(self._ledger, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"schema": SCHEMA, "steps": {}, "begun": {}}
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); start again with --overwrite") from error
    valid = (
        isinstance(ledger, dict)
        and ledger.get("schema") == SCHEMA
        and isinstance(ledger.get("steps"), dict)
        and isinstance(ledger.get("begun"), dict)
    )
    if not valid:
        raise InputError(
            f"{path}: not a ledger of this version (expected schema {SCHEMA!r}); "
            "start again with --overwrite"
        )
    return dict(ledger)
