"""The files and facts that a runner needs, of an artifact's folder or of a bare .onnx file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.storage import sha256_file
from ...export.artifact import Artifact
from ...export.manifest import MANIFEST, Manifest
from ...runtimes import engine_names


@dataclass(frozen=True)
class ArtifactFacts:
    """What a runner needs of an artifact; of a bare .onnx file only the files are known.

    Attributes:
        model: Path of the model file.
        files: Absolute paths, the model first.
        root: The folder that the files are in.
        sha256: Digest of all files.
        file_bytes: Size of all files.
        precision: As stated in the manifest.
        batch: The fixed batch size; None where it is free or unknown.
        output: Name of the output to read; None for the model's first one.
        outputs: Name and shape of every output, where there are others than the logits.
        logits: Whether the first output is the logits, which a data set is compared with.
        session: Settings of the runtime.
        preprocessing: Mean and std of each channel.
        runtime: Name of the engine.
        input: Name, shape, type and layout, which files of some runtimes do not contain.
        cpu: The instruction sets that it needs and assumes, and its target; see runtimes.
        warnings: What makes its outputs doubtful.
        buckets: The numbers of patches of which each image keeps one; empty without buckets.
        bucket_shares: Share of the calibration images in each, if known.
        bucket_images: Number of calibration images, if known.
    """

    model: Path
    files: tuple[Path, ...]
    root: Path
    sha256: str
    file_bytes: int
    precision: str | None = None
    batch: int | None = None
    output: str | None = None
    outputs: list[dict[str, Any]] | None = None
    logits: bool = True
    session: dict[str, str] = field(default_factory=dict)
    preprocessing: dict[str, Any] | None = None
    runtime: str = "onnxruntime"
    input: dict[str, Any] | None = None
    cpu: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    buckets: tuple[int, ...] = ()
    bucket_shares: tuple[float, ...] | None = None
    bucket_images: int | None = None


def artifact_facts(artifact: Artifact | Path | str) -> ArtifactFacts:
    """Collect the facts of an Artifact, of an artifact's folder or of an .onnx file.

    Raises InputError for anything else, and for a runtime without an engine.
    """
    if isinstance(artifact, Artifact):
        return _of_artifact(artifact)
    path = Path(artifact)
    if path.is_dir():
        if not (path / MANIFEST).exists():
            raise InputError(
                f"{path}: no artifact (there is no {MANIFEST}); "
                "give a folder that `vitrim export` wrote, or an .onnx file"
            )
        return _of_artifact(Artifact.load(path))
    if not path.is_file():
        raise InputError(f"{path}: no such file; give an artifact's folder or an .onnx file")
    if path.suffix.lower() != ".onnx":
        raise InputError(
            f"{path}: not an .onnx file; give an artifact's folder, or an ONNX model with that name"
        )
    files = (path, *_external_data(path))
    file_bytes = sum(file.stat().st_size for file in files)
    return ArtifactFacts(path, files, path.parent, _digest(files, path.parent), file_bytes)


def _of_artifact(artifact: Artifact) -> ArtifactFacts:
    manifest = artifact.manifest
    if manifest.runtime not in engine_names():
        raise InputError(
            f"{artifact.folder}: is made for the runtime {manifest.runtime!r}; "
            f"`vitrim bench` measures artifacts of {', '.join(engine_names())}"
        )
    weights = [artifact.folder / entry.path for entry in manifest.files if entry.role == "weights"]
    prepared, given = manifest.preprocessing, manifest.inputs[0]
    preprocessing: dict[str, Any] | None = None
    if prepared is not None:
        preprocessing = {"mean": list(prepared.mean), "std": list(prepared.std)}
    return ArtifactFacts(
        model=artifact.model_path,
        files=(artifact.model_path, *weights),
        root=artifact.folder,
        sha256=artifact.sha256,
        file_bytes=artifact.bytes,
        precision=manifest.precision,
        batch=None if manifest.batch == "dynamic" else manifest.batch,
        output=manifest.outputs[0].name,
        outputs=_outputs(manifest),
        logits=manifest.logits is not None,
        session=dict(manifest.session),
        preprocessing=preprocessing,
        runtime=manifest.runtime,
        input=given.model_dump(mode="json"),
        cpu=_cpu(manifest),
        warnings=manifest.warnings,
        **_buckets(manifest),
    )


def _buckets(manifest: Manifest) -> dict[str, Any]:
    found = manifest.buckets
    if found is None:
        return {}
    return {
        "buckets": found.counts,
        "bucket_shares": found.shares,
        "bucket_images": found.images,
    }


def _outputs(manifest: Manifest) -> list[dict[str, Any]] | None:
    """The outputs as engines read them; None for the logits alone."""
    if all(output.kind is None for output in manifest.outputs):
        return None
    # A free batch is sized by the input of the job.
    return [
        {
            "name": output.name,
            "shape": [size if isinstance(size, int) else -1 for size in output.shape],
        }
        for output in manifest.outputs
    ]


def _cpu(manifest: Manifest) -> dict[str, Any] | None:
    if manifest.cpu is None:
        return None
    return {"target": manifest.target, **manifest.cpu.model_dump(mode="json")}


def _external_data(model: Path) -> list[Path]:
    # Needed for bare files only, and not on devices.
    import onnx

    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception:  # not a model: the runtime refuses it with its own reason
        return []
    found = {
        model.parent / entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and ".." not in Path(entry.value).parts
    }
    return sorted(file for file in found if file.is_file() and file.is_relative_to(model.parent))


def _digest(files: tuple[Path, ...], root: Path) -> str:
    if len(files) == 1:
        return sha256_file(files[0])
    lines = "".join(
        f"{sha256_file(file)}  {file.relative_to(root).as_posix()}\n" for file in sorted(files)
    )
    return hashlib.sha256(lines.encode()).hexdigest()
