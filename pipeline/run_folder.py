"""The folder of one run and its ledger, steps.json.

The ledger records which step made which files, and from what. A resumed run skips every step whose
files are complete and made from the same recipe.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..bench.report.writing import PICTURE
from ..bench.results.measurement import MEASUREMENT
from ..compress.network.files import MODEL
from ..compress.train.processes import ALONE, Processes
from ..core.errors import InputError
from ..core.storage import (
    Inputs,
    clear_folder,
    disk_errors,
    replace_file,
    require_output_folder,
    require_separate,
    sha256_file,
)
from ..core.written_kinds import (
    Contents,
    FileKind,
    FolderKind,
    below,
    has_schema,
    json_object,
    unknown_file,
    within,
)
from ..export.artifact import ARTIFACT

LEDGER = "steps.json"
SCHEMA = "vitrim.steps/1"
# The files of a run that the ledger does not list.
UNLISTED = (
    *(LEDGER, "recipe.toml", "data.json", "kept.json", "cut-parity.json"),
    *("trim.json", "tokens.json", "latency.json", "weight-mask.safetensors", "dead.json"),
    *("waterfall.json", "waterfall.svg", "waterfall.md"),
    *("report.json", "report.md", "report.html", "history.jsonl", "mask.safetensors"),
    *("training/*/checkpoint.pt", "training/*/best.pt", "trackers/**"),
    # A choice of tokens that refits blocks.
    *("training/tokens/state.json", "training/tokens/slim-*.safetensors"),
)
# Steps write files to this folder and replace none of the others in it.
ADDED_TO = "measurements"
Value = TypeVar("Value")


def _contents(folder: Path) -> Contents | None:
    ledger = json_object(folder / LEDGER) or {}
    if not has_schema(ledger, SCHEMA):
        # A damaged ledger: the data card identifies the run too.
        ledger = {}
        if not has_schema(json_object(folder / "data.json"), "vitrim.data/1"):
            return None
    found: dict[str, FileKind | None] = dict.fromkeys(UNLISTED)
    found |= {"*.svg": PICTURE, "measurements/*.svg": PICTURE, "measurements/*.json": MEASUREMENT}
    steps = ledger.get("steps")
    for step in steps.values() if isinstance(steps, dict) else ():
        files = step.get("files") if isinstance(step, dict) else None
        found |= dict.fromkeys(map(glob.escape, files if isinstance(files, dict) else {}))
    for path in [*folder.iterdir(), *folder.glob("artifacts/*")]:
        name = glob.escape(path.relative_to(folder).as_posix())
        for kind in (MODEL, ARTIFACT):
            found |= within(name, kind.contents(path))
    return found


RUN = FolderKind("a run", LEDGER, _contents)


class RunFolder:
    """A run folder with its ledger.

    `steps.json` contains, for each finished step, its fingerprint, its seconds and the SHA-256 of
    every file that it made. A step that was begun and not finished is listed too, so that only the
    same recipe continues from its training checkpoint. Of several processes that share the folder,
    the main one writes to it, and the others follow.
    """

    def __init__(self, path: Path, processes: Processes = ALONE) -> None:
        self.path, self.processes = path, processes
        self._ledger = _read(path / LEDGER)

    @classmethod
    def open(
        cls, path: Path, *, resume: bool, overwrite: bool, processes: Processes = ALONE
    ) -> RunFolder:
        """Create the folder where it is missing, or empty it with `overwrite`.

        Args:
            path: The run folder.
            resume: Continue the run in it.
            overwrite: Delete the run in it.
            processes: The processes that share it. Others than the main one change nothing.

        Returns:
            The folder.

        Raises:
            InputError: As for `check`.
        """
        if not processes.is_main:
            return cls(path, processes)
        cls.check(path, resume=resume, overwrite=overwrite)
        if overwrite and path.is_dir():
            clear_folder(path, LEDGER)
        folder = cls(path, processes)
        folder._write()
        return folder

    @staticmethod
    def check(path: Path, *, resume: bool, overwrite: bool, inputs: Inputs | None = None) -> None:
        """Check that a run may write to `path`.

        Args:
            path: The run folder.
            resume: Continue the run in it.
            overwrite: Delete the run in it.
            inputs: The files and folders that the run reads, by what they are.

        Raises:
            InputError: The folder overlaps an input, cannot be written, contains an earlier run
                and neither `resume` nor `overwrite` is given, or contains something else.
        """
        with disk_errors(path):
            has_run = (path / LEDGER).is_file()
        if not has_run:
            require_output_folder(path, RUN, overwrite=overwrite, inputs=inputs)
        elif overwrite:
            require_output_folder(path, RUN, overwrite=True, inputs=inputs)
        elif resume:
            require_separate(path, inputs or {})
        else:
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
        *,
        by_all: bool = False,
    ) -> tuple[Value, bool]:
        """Load the value of a step where it is complete, or make it.

        Args:
            name: Name of the step in the ledger.
            fingerprint: Hash of everything that the value depends on.
            files: What `make` writes, as paths in the run folder. A folder includes all its files.
            make: Computes and saves the value. Its argument is True if an earlier attempt of the
                same fingerprint may be continued.
            load: Loads the value from `files`.
            by_all: All processes call `make`, and the main one writes the files; otherwise it
                alone calls `make`. The others load the value.

        Returns:
            The value, and whether it was made now.
        """
        is_main = self.processes.is_main
        done, continued = self.processes.from_main(
            (self.is_done(name, fingerprint), self._ledger["begun"].get(name) == fingerprint)
            if is_main
            else (False, False)
        )
        if done:
            return load(), False
        if not is_main:
            if by_all:
                make(continued)
            self.processes.wait()
            return load(), True
        self._require_known(files)
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
        self.processes.wait()
        return value, True

    def adopt(
        self, other: RunFolder, name: str, fingerprint: str, beside: Sequence[str] = ()
    ) -> bool:
        """Take a finished step over from another run folder, so that it is not computed again.

        Files are linked where the file system allows it; nothing changes a file in place.

        Args:
            other: The folder that has the step.
            name: Name of the step in the ledger.
            fingerprint: Hash of everything that its value depends on.
            beside: Files and folders that the step also writes and the ledger does not list.

        Returns:
            Whether this folder has the step now; False if `other` does not.
        """
        if self.is_done(name, fingerprint):
            return True
        if not other.is_done(name, fingerprint):
            return False
        entry = other._ledger["steps"][name]
        for path in [*sorted(entry["files"]), *other._expand(beside)]:
            if (other.path / path).is_file():
                _link(other.path / path, self.path / path)
        self._ledger["begun"].pop(name, None)
        self._ledger["steps"][name] = entry
        self._write()
        return True

    def forget(self, name: str, files: Sequence[str]) -> None:
        """Delete what an optional step made, where the recipe no longer has it.

        Args:
            name: Name of the step in the ledger.
            files: What it writes, as paths in the run folder.
        """
        known = [steps.pop(name, None) for steps in (self._ledger["steps"], self._ledger["begun"])]
        if not self.processes.is_main or known == [None, None]:
            return
        for path in files:
            (self.path / path).unlink(missing_ok=True)
        self._write()

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

    def _require_known(self, files: Sequence[str]) -> None:
        """Check, before the work of a step, that nothing else is in the folders that it replaces.

        Raises:
            InputError: There is such a file.
        """
        contents = _contents(self.path) or {}
        for name in files:
            folder = self.path / name
            replaced = folder.is_dir() and name != ADDED_TO
            unknown = unknown_file(folder, below(name, contents)) if replaced else None
            if unknown is not None:
                raise InputError(
                    f"{unknown}: vitrim did not write this file, and {folder} is replaced; "
                    "move the file elsewhere"
                )

    def _expand(self, files: Sequence[str]) -> list[str]:
        found: list[Path] = []
        for name in files:
            path = self.path / name
            inside = [part for part in path.rglob("*") if part.is_file()]
            found += inside if path.is_dir() else [path]
        return [path.relative_to(self.path).as_posix() for path in found]

    def _write(self) -> None:
        replace_file(self.path / LEDGER, json.dumps(self._ledger, indent=1) + "\n")


def _link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(source, place)
    except OSError:  # Another disk, or one without links.
        shutil.copyfile(source, place)


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
