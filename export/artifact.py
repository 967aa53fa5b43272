"""An artifact: one folder with the runnable files of a model and a `manifest.json`.

`manifest.py` documents the format. Free of torch and of onnx.
"""

from __future__ import annotations

import glob
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core import strict_json
from ..core.errors import InputError
from ..core.staging import recover
from ..core.storage import replace_file, sha256_file
from ..core.written_kinds import (
    Contents,
    FileKind,
    FolderKind,
    has_schema,
    json_kind,
    json_object,
    within,
)
from ..runtimes import Engine, open_engine
from ..targets.catalog import EARLIER_NAMES, load_target, present_name
from ..targets.instruction_sets import EXACT_PRODUCTS
from .manifest import MANIFEST, SCHEMA, CpuFeatures, FileEntry, Manifest, Role, seal_of

MAX_MANIFEST_BYTES = 16 * 1024 * 1024
MAX_ENTRIES = 10_000
# Beside the artifacts of several runtimes.
MEASUREMENTS = "measurements"


@dataclass(frozen=True)
class Artifact:
    """A folder and its manifest.

    Attributes:
        folder: The folder.
        manifest: Its manifest.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path | str, verify: bool = True) -> Artifact:
        """Open an artifact.

        Args:
            folder: A folder that `export` wrote.
            verify: Whether to read every byte, or only the manifest.

        Returns:
            The artifact.

        Raises:
            InputError: The folder is not an intact artifact; the message names the entry.
        """
        folder = Path(folder)
        manifest = verify_folder(folder) if verify else read_manifest(folder)
        return cls(folder, manifest)

    @classmethod
    def write(cls, folder: Path, manifest: Manifest) -> Artifact:
        """Write the manifest into a folder that already holds the files, with a new seal."""
        data = manifest.to_dict()
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        replace_file(folder / MANIFEST, text + "\n")
        return cls(folder, manifest.model_copy(update={"seal": data["seal"]}))

    def engine(self, threads: int = 1) -> Engine:
        """Open the model in its runtime.

        Args:
            threads: Threads of the runtime.

        Returns:
            The loaded engine: `infer_outputs(images)` returns a dict with every output by its name,
            `infer(images)` the first one alone; images are an array of `input_shape` and
            `input_type`.

        Raises:
            EngineError: The runtime is missing here, or cannot open the model.
        """
        manifest, given = self.manifest, self.manifest.inputs[0]
        batch = 1 if manifest.batch == "dynamic" else manifest.batch
        sizes = [[batch, *output.shape[1:]] for output in manifest.outputs]
        outputs = [
            {"name": output.name, "shape": shape}
            for output, shape in zip(manifest.outputs, sizes, strict=True)
        ]
        cpu = None if manifest.cpu is None else manifest.cpu.model_dump(mode="json")
        engine = open_engine(
            {
                "runtime": manifest.runtime,
                "model": str(self.model_path.resolve()),
                "threads": threads,
                "batch": batch,
                "session": dict(manifest.session),
                "input": {
                    "name": given.name,
                    "shape": [batch, *given.shape[1:]],
                    "type": given.type,
                },
                "output": manifest.outputs[0].name,
                "cpu": cpu and {"target": manifest.target, **cpu},
                **({} if manifest.outputs[0].kind is None else {"outputs": outputs}),
            }
        )
        engine.load()
        return engine

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.manifest.name

    @property
    def model_path(self) -> Path:
        """The file that the runtime opens."""
        model = next(entry for entry in self.manifest.files if entry.role == "model")
        return self.folder / model.path

    @property
    def bytes(self) -> int:
        """Size of what the device must store: the model and its external weights."""
        return sum(
            entry.bytes for entry in self.manifest.files if entry.role in ("model", "weights")
        )

    @property
    def sha256(self) -> str:
        """The manifest's seal, which covers the SHA-256 of every file."""
        return self.manifest.seal


def _contents(folder: Path) -> Contents | None:
    data = json_object(folder / MANIFEST)
    if data is None or not has_schema(data, SCHEMA):
        return None
    try:
        if data.get("seal") != seal_of(data):
            return None
        listed = [str(entry["path"]) for entry in data["files"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return {MANIFEST: None, **dict.fromkeys(map(glob.escape, listed))}


def _contents_of_several(folder: Path) -> Contents | None:
    artifacts: dict[str, FileKind | None] = {}
    for path in folder.iterdir():
        artifacts |= within(path.name, ARTIFACT.contents(path))
    measurement = json_kind("a measurement", "vitrim.measurement/1")
    return {**artifacts, f"{MEASUREMENTS}/*.json": measurement} if artifacts else None


ARTIFACT = FolderKind("an artifact", MANIFEST, _contents)
# One artifact for each runtime, and their measurements.
ARTIFACTS = FolderKind("a folder of artifacts", MANIFEST, _contents_of_several)


def entry_for(folder: Path, path: str, role: Role) -> FileEntry:
    """Return the manifest's entry for a file in `folder`."""
    file = folder / path
    return FileEntry(path=path, role=role, bytes=file.stat().st_size, sha256=sha256_file(file))


def read_manifest(folder: Path | str) -> Manifest:
    """Parse and validate `manifest.json` alone, including its seal.

    Args:
        folder: A folder that `export` wrote.

    Returns:
        The manifest.

    Raises:
        InputError: There is no valid manifest; the message names the file and the key.
    """
    folder = Path(folder)
    recover(folder)
    path = folder / MANIFEST
    data = _manifest_data(folder, path)
    try:
        # Strict, and as JSON: "12" is no number, and JSON writes a tuple as a list.
        manifest = Manifest.model_validate_json(json.dumps(data), strict=True)
        true_seal = seal_of(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        problem = _short(first["msg"].removeprefix("Value error, "))
        raise InputError(f"{path}: {where}: {problem}; export the model again") from None
    except (RecursionError, OverflowError, ValueError) as error:
        raise InputError(f"{path}: {_short(error)}; export the model again") from None
    if manifest.seal != true_seal:
        raise InputError(
            f"{path}: the seal does not fit; {MANIFEST} was changed after the export; "
            "use the unchanged folder"
        )
    return manifest if "cpu" in data else _of_earlier_version(manifest)


def _of_earlier_version(manifest: Manifest) -> Manifest:
    """Return a manifest without `cpu` with the present name of its target, and what it needs."""
    target = present_name(manifest.target)
    if manifest.target not in EARLIER_NAMES:
        return manifest
    eight_bits = manifest.precision in ("int8", "int8-static")
    whole = eight_bits and target == EARLIER_NAMES["x86-64"] and manifest.runtime != "tvm"
    cpu = CpuFeatures(
        needs=load_target(target).features if manifest.runtime == "tvm" else (),
        assumes=(EXACT_PRODUCTS,) if whole else (),
    )
    return manifest.model_copy(update={"target": target, "cpu": cpu})


def _manifest_data(folder: Path, path: Path) -> dict[str, Any]:
    """Read the JSON object of a manifest of the known schema."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; give the folder of an artifact that `vitrim export` wrote"
        )
    if path.is_symlink() or not path.is_file():
        state = "is a symbolic link" if path.is_symlink() else "missing"
        raise InputError(f"{path}: {state}; an artifact is a folder with a {MANIFEST} of its own")
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise InputError(
            f"{path}: {size} bytes are more than a manifest may have ({MAX_MANIFEST_BYTES}); "
            "export the model again"
        )
    try:
        data = strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON ({_short(error)}); export the model again"
        ) from None
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: holds a {type(data).__name__}, a manifest is a JSON object; "
            "export the model again"
        )
    schema = data.get("schema")
    if schema != SCHEMA:
        raise InputError(
            f"{path}: schema is {_short(repr(schema))}, this vitrim reads {SCHEMA!r}; "
            "export the model again with it"
        )
    return data


def verify_folder(folder: Path | str) -> Manifest:
    """Verify an artifact byte for byte.

    Args:
        folder: A folder that `export` wrote.

    Returns:
        Its manifest.

    Raises:
        InputError: An entry is missing, changed, not listed, or not a plain file of this folder;
            the message names it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    listed = {entry.path: entry for entry in manifest.files}
    present = _listed_files(folder, listed)
    for relative, entry in listed.items():
        path = folder / relative
        if relative not in present:
            raise InputError(
                f"{path}: missing; the manifest lists {relative!r} with {entry.bytes} bytes; "
                "copy the whole folder again"
            )
        size = path.stat().st_size
        if size != entry.bytes:
            raise InputError(
                f"{path}: has {size} bytes, the manifest says {entry.bytes}; "
                "copy the whole folder again"
            )
        if sha256_file(path) != entry.sha256:
            raise InputError(
                f"{path}: its SHA-256 is not the manifest's; {relative!r} was changed; "
                "copy the whole folder again"
            )
    return manifest


def _listed_files(folder: Path, listed: dict[str, FileEntry]) -> set[str]:
    """Return the files of a folder, all of which must be plain and listed."""
    present: set[str] = set()
    for count, path in enumerate(sorted(folder.rglob("*"))):
        relative = path.relative_to(folder).as_posix()
        if count > MAX_ENTRIES:
            raise InputError(
                f"{folder}: more than {MAX_ENTRIES} entries; this is no artifact folder"
            )
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise InputError(
                f"{path}: a symbolic link ({relative}) leads out of what was proven; "
                "put the file itself in its place"
            )
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: not a plain file; remove it from the artifact")
        present.add(relative)
        if relative != MANIFEST and relative not in listed:
            raise InputError(
                f"{path}: the manifest does not list {relative!r}; "
                "remove the file from the artifact, or export again"
            )
    return present


def verify(folder: Path | str) -> str:
    """Verify an artifact and describe it in one line, as `vitrim export --verify` prints it.

    Args:
        folder: A folder that `export` wrote.

    Returns:
        Name, precision, target, runtime, size and largest parity error.

    Raises:
        InputError: The folder is not an intact artifact; the message names the entry.
    """
    artifact = Artifact.load(folder)
    manifest = artifact.manifest
    worst = max((stage.max_relative_error for stage in manifest.parity), default=None)
    parity = (
        "no parity recorded"
        if worst is None
        else f"parity {worst:.1e} over {len(manifest.parity)} stages"
    )
    if manifest.parity and manifest.parity[-1].choices:
        last = manifest.parity[-1]
        parity += f", {last.choices_text} of {last.images} {last.input_kind}"
    count = len(manifest.files)
    return (
        f"{manifest.name}: {manifest.precision} for {manifest.target} on {manifest.runtime}, "
        f"{artifact.bytes} bytes, {count} file{'s' if count > 1 else ''} unchanged, {parity}"
    )


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
