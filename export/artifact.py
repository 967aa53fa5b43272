"""An artifact: one folder with the runnable files of a model and a `manifest.json` that says what
they are. Free of torch and of onnx.

The folder's format (schema `vitrim.manifest/1`; `manifest_schema()` gives it as JSON Schema):

- `manifest.json` is UTF-8 JSON, an object without repeated keys, NaN or Infinity, at most 16 MiB.
- `files` lists every other file of the folder: path (relative, `/` between parts, no `..`), role,
  size and SHA-256.
  Exactly one has the role `model`.
- `seal` is the SHA-256 of the manifest itself without `seal`, written as JSON with sorted keys and
  no spaces, so that a
  flipped byte in a label or a mean is found too.
- `inputs` and `outputs` state name, shape (a free dimension is its name), type and layout;
  `preprocessing` and `labels` how pictures become
  inputs and logits become words; `parity` how far each stage of the export moved the answers.
- A folder with a file that the manifest does not list, or with a symbolic link, is refused: what is
  shipped is what was proven.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..core import strict_json
from ..core.errors import InputError
from ..core.storage import replace_file, sha256_file

SCHEMA = "vitrim.manifest/1"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
MAX_ENTRIES = 10_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Array = NDArray[Any]
Batch = int | Literal["dynamic"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-static", "int8-weights", "int4-weights"]


class Plain(BaseModel):
    """Frozen plain data; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class TensorSpec(Plain):
    """One input or output: shape entries are sizes, or the name of a free dimension."""

    name: Name
    shape: tuple[Size | Name, ...]
    type: Literal["float32", "float16", "uint8", "int8", "int64"] = "float32"
    layout: Literal["NCHW", "NHWC", "NC"]


class PreprocessingSpec(Plain):
    """From a picture to the input, with the fields of `compress.data.preprocessing.Preprocessing`;
    mean and std in units of pixel / 255.
    """

    channels: Literal[1, 3]
    height: Size
    width: Size
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = (
        "bicubic"
    )
    resize: Literal["squash", "center-crop"] = "squash"
    crop_ratio: float = Field(1.0, gt=0.0, le=1.0)
    mean: tuple[Finite, ...]
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> PreprocessingSpec:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean and std need {self.channels} numbers, one a channel; got {len(self.mean)} and {len(self.std)}"
            )
        return self


class FileEntry(Plain):
    """A file of the folder: the model that the runtime opens, its external weights, the operators
    of a reduced runtime build, or another.
    """

    path: str
    role: Literal["model", "weights", "operators", "source", "other"]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @model_validator(mode="after")
    def _inside(self) -> FileEntry:
        reason = foreign(self.path)
        if reason:
            shown = repr(self.path if len(self.path) <= 80 else f"{self.path[:80]}...")
            raise ValueError(
                f"file {shown}: {reason}; an artifact holds only files of its own folder"
            )
        return self


class Parity(Plain):
    """How far one stage moved the logits, relative to the largest absolute value of the reference
    logits; agreement is a share of images.
    """

    stage: Name
    reference: Name
    max_relative_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    mean_relative_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top1_agreement: Annotated[float, Field(ge=0, le=1)]
    images: Size
    # Made-up inputs prove the arithmetic, not the accuracy; whoever reads the figures must see
    # which they were.
    input_kind: Literal["images", "seeded-noise"]
    seed: int | None = None
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Provenance(Plain):
    """Where the artifact came from: the source's kind, a SHA-256 of its weights, counts, and
    whatever the caller adds as text.
    """

    source: str = "torch module"
    weights_sha256: Sha256 | None = None
    parameters: Annotated[int, Field(ge=0)] | None = None
    macs: Annotated[int, Field(ge=0)] | None = None
    details: dict[str, str] = {}


class Manifest(Plain):
    """What an artifact is; see the module's docstring for the format."""

    schema_: Literal["vitrim.manifest/1"] = Field("vitrim.manifest/1", alias="schema")
    name: Name
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    batch: Size | Literal["dynamic"] = 1
    preprocessing: PreprocessingSpec | None = None
    labels: tuple[str, ...] | None = None
    opset: Size | None = None
    target: Name
    runtime: Name
    precision: Precision
    form: Name
    # Config entries of the runtime's session that the form was measured with.
    session: dict[str, str] = {}
    versions: dict[str, str] = {}
    files: tuple[FileEntry, ...] = Field(min_length=1)
    parity: tuple[Parity, ...] = ()
    provenance: Provenance = Provenance()
    notes: tuple[str, ...] = ()
    seal: Sha256 = "0" * 64

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        paths = [entry.path for entry in self.files]
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"file {path!r} is listed twice")
            if path == MANIFEST:
                raise ValueError(f"{MANIFEST} cannot list itself")
        if sum(entry.role == "model" for entry in self.files) != 1:
            raise ValueError("exactly one file has the role 'model'")
        if self.labels is not None and self.outputs:
            classes = self.outputs[0].shape[-1]
            if isinstance(classes, int) and classes != len(self.labels):
                raise ValueError(f"{len(self.labels)} labels for {classes} classes")
        shape = self.inputs[0].shape
        if self.preprocessing is not None and len(shape) == 4 and self.inputs[0].layout == "NCHW":
            image = (
                self.preprocessing.channels,
                self.preprocessing.height,
                self.preprocessing.width,
            )
            if tuple(shape[1:]) != image:
                raise ValueError(f"preprocessing makes {image}, the input takes {tuple(shape[1:])}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with the key `schema` and a fresh seal."""
        data = self.model_dump(mode="json", by_alias=True)
        data["seal"] = seal_of(data)
        return data

    @property
    def macs(self) -> int | None:
        """Multiply-adds of one image, if known."""
        return self.provenance.macs


@dataclass(frozen=True)
class Artifact:
    """A folder and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: Path | str, verify: bool = True) -> Artifact:
        """Open an artifact; `verify` reads every byte. Errors: InputError naming the entry that is
        wrong.
        """
        folder = Path(folder)
        manifest = verify_folder(folder) if verify else read_manifest(folder)
        return cls(folder, manifest)

    @classmethod
    def write(cls, folder: Path, manifest: Manifest) -> Artifact:
        """Write the manifest into a folder that already holds the files."""
        data = manifest.to_dict()
        replace_file(
            folder / MANIFEST,
            json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        )
        return cls(folder, manifest.model_copy(update={"seal": data["seal"]}))

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.manifest.name

    @property
    def model_path(self) -> Path:
        """The file that the runtime opens."""
        return self.folder / next(
            entry.path for entry in self.manifest.files if entry.role == "model"
        )

    @property
    def bytes(self) -> int:
        """Size of what the device must store: the model and its external weights."""
        return sum(
            entry.bytes for entry in self.manifest.files if entry.role in ("model", "weights")
        )

    @property
    def sha256(self) -> str:
        """One SHA-256 for the whole artifact: the manifest's seal, which covers the SHA-256 of
        every file.
        """
        return self.manifest.seal


def entry_for(
    folder: Path, path: str, role: Literal["model", "weights", "operators", "source", "other"]
) -> FileEntry:
    """The manifest's line for a file that lies in `folder`."""
    file = folder / path
    return FileEntry(path=path, role=role, bytes=file.stat().st_size, sha256=sha256_file(file))


def foreign(path: str) -> str | None:
    """Why a listed path may lead out of its folder, or None if it cannot."""
    if not path or len(path) > 1024:
        return "the path is empty or longer than 1024 characters"
    if "\x00" in path or "\\" in path or any(ord(letter) < 32 for letter in path):
        return "the path holds a backslash or a control character"
    if path.startswith("/") or re.match(r"^[A-Za-z]:", path):
        return "the path is absolute"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "the path has an empty part, '.' or '..'"
    return None


def seal_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's data without its `seal`."""
    rest = {key: value for key, value in data.items() if key != "seal"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path | str) -> Manifest:
    """Parse and check `manifest.json` alone, its seal included. Errors: InputError naming the file
    and the key.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; give the folder of an artifact that `vitrim export` wrote"
        )
    if path.is_symlink() or not path.is_file():
        state = "is a symbolic link" if path.is_symlink() else "missing"
        raise InputError(f"{path}: {state}; an artifact is a folder with a {MANIFEST} of its own")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        size = path.stat().st_size
        raise InputError(
            f"{path}: {size} bytes are more than a manifest may have ({MAX_MANIFEST_BYTES}); export the model again"
        )
    try:
        data = strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON ({_short(error)}); export the model again"
        ) from None
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: holds a {type(data).__name__}, a manifest is a JSON object; export the model again"
        )
    schema = data.get("schema")
    if schema != SCHEMA:
        raise InputError(
            f"{path}: schema is {_short(repr(schema))}, this vitrim reads {SCHEMA!r}; export the model again with it"
        )
    try:
        # Strict, and as JSON: "12" is no number, and a list is how JSON writes a tuple.
        manifest = Manifest.model_validate_json(json.dumps(data), strict=True)
    except (RecursionError, OverflowError) as error:
        raise InputError(f"{path}: {_short(error)}; export the model again") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise InputError(
            f"{path}: {where}: {_short(first['msg'].removeprefix('Value error, '))}; export the model again"
        ) from None
    try:
        true_seal = seal_of(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {_short(error)}; export the model again") from None
    if manifest.seal != true_seal:
        raise InputError(
            f"{path}: the seal does not fit; {MANIFEST} was changed after the export; take the untouched folder"
        )
    return manifest


def verify_folder(folder: Path | str) -> Manifest:
    """Check an artifact byte for byte and return its manifest.

    Errors: InputError naming the entry that is missing, changed, not listed, or not a plain file of
    this folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    listed = {entry.path: entry for entry in manifest.files}
    seen: set[str] = set()
    for count, path in enumerate(sorted(folder.rglob("*"))):
        relative = path.relative_to(folder).as_posix()
        if count > MAX_ENTRIES:
            raise InputError(
                f"{folder}: more than {MAX_ENTRIES} entries; this is no artifact folder"
            )
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise InputError(
                f"{path}: a symbolic link ({relative}) leads out of what was proven; put the file itself in its place"
            )
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: not a plain file; take it out of the artifact")
        seen.add(relative)
        if relative != MANIFEST and relative not in listed:
            raise InputError(
                f"{path}: the manifest does not list {relative!r}; take the file out of the artifact, or export again"
            )
    for relative, entry in listed.items():
        path = folder / relative
        if relative not in seen:
            raise InputError(
                f"{path}: missing; the manifest lists {relative!r} with {entry.bytes} bytes; take the whole folder again"
            )
        size = path.stat().st_size
        if size != entry.bytes:
            raise InputError(
                f"{path}: has {size} bytes, the manifest says {entry.bytes}; take the whole folder again"
            )
        if sha256_file(path) != entry.sha256:
            raise InputError(
                f"{path}: its SHA-256 is not the manifest's; {relative!r} was changed; take the whole folder again"
            )
    return manifest


def verify(folder: Path | str) -> str:
    """Check an artifact and say in one line what it is: what `vitrim export --verify FOLDER`
    prints. Errors: InputError.
    """
    artifact = Artifact.load(folder)
    manifest = artifact.manifest
    worst = max((stage.max_relative_error for stage in manifest.parity), default=None)
    proven = (
        "no parity recorded"
        if worst is None
        else f"parity {worst:.1e} over {len(manifest.parity)} stages"
    )
    count = len(manifest.files)
    return (
        f"{manifest.name}: {manifest.precision} for {manifest.target} on {manifest.runtime}, {artifact.bytes} bytes, "
        f"{count} file{'s' if count > 1 else ''} unchanged, {proven}"
    )


def manifest_schema() -> dict[str, Any]:
    """The manifest's format as JSON Schema (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(by_alias=True),
    }


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
