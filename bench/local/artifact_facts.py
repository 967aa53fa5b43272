"""What is measured: an artifact's folder, or a bare .onnx file of which nothing else is known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.storage import sha256_file
from ...export.artifact import MANIFEST, Artifact
from ...runtimes import engine_names


@dataclass(frozen=True)
class Subject:
    """The files and facts that a runner needs; `files` are absolute, the model first; `session`
    holds the runtime's own settings.

    input: name, shape and type as the manifest tells them, for runtimes whose files do not.
    """

    model: Path
    files: tuple[Path, ...]
    root: Path
    sha256: str
    file_bytes: int
    precision: str | None = None
    batch: int | None = None
    output: str | None = None
    session: dict[str, str] = field(default_factory=dict)
    preprocessing: dict[str, Any] | None = None
    runtime: str = "onnxruntime"
    input: dict[str, Any] | None = None


def open_subject(artifact: Artifact | Path | str) -> Subject:
    """The subject of an Artifact, an artifact's folder or an .onnx path. Errors: InputError for
    anything else, or a runtime without an engine.
    """
    if isinstance(artifact, Artifact):
        return _of_artifact(artifact)
    path = Path(artifact)
    if path.is_dir():
        if not (path / MANIFEST).exists():
            raise InputError(
                f"{path}: no artifact (there is no {MANIFEST}); give a folder that `vitrim export` wrote, or an .onnx file"
            )
        return _of_artifact(Artifact.load(path))
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an artifact's folder or an .onnx file")
    if path.suffix != ".onnx":
        raise InputError(
            f"{path}: not an .onnx file; give an artifact's folder, or an ONNX model named so"
        )
    files = (path, *_external_data(path))
    return Subject(
        path,
        files,
        path.parent,
        _digest(files, path.parent),
        sum(file.stat().st_size for file in files),
    )


def _of_artifact(artifact: Artifact) -> Subject:
    manifest = artifact.manifest
    if manifest.runtime not in engine_names():
        known = ", ".join(engine_names())
        raise InputError(
            f"{artifact.folder}: is made for the runtime {manifest.runtime!r}; `vitrim bench` measures artifacts of {known}"
        )
    weights = [artifact.folder / entry.path for entry in manifest.files if entry.role == "weights"]
    prepared, taken = manifest.preprocessing, manifest.inputs[0]
    return Subject(
        model=artifact.model_path,
        files=(artifact.model_path, *weights),
        root=artifact.folder,
        sha256=artifact.sha256,
        file_bytes=artifact.bytes,
        precision=manifest.precision,
        batch=None if manifest.batch == "dynamic" else manifest.batch,
        output=manifest.outputs[0].name,
        session=dict(manifest.session),
        preprocessing=None
        if prepared is None
        else {"mean": list(prepared.mean), "std": list(prepared.std)},
        runtime=manifest.runtime,
        input={"name": taken.name, "shape": list(taken.shape), "type": taken.type},
    )


def _external_data(model: Path) -> list[Path]:
    # The names that torch.onnx and onnx give to weights beside the model.
    names = (
        f"{model.name}.data",
        f"{model.name}_data",
        f"{model.stem}.data",
        f"{model.stem}.onnx_data",
    )
    return [model.parent / name for name in dict.fromkeys(names) if (model.parent / name).is_file()]


def _digest(files: tuple[Path, ...], root: Path) -> str:
    if len(files) == 1:
        return sha256_file(files[0])
    lines = "".join(
        f"{sha256_file(file)}  {file.relative_to(root).as_posix()}\n" for file in sorted(files)
    )
    return hashlib.sha256(lines.encode()).hexdigest()
