"""A sample artifact to bundle, and the build and the output of a bundle's example."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vitrim
from tiny_models import tiny_vit
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.artifact import Artifact
from vitrim.export.forms import FORMS, write_network
from vitrim.export.graphs.model_proto import save_model
from vitrim.export.manifest import Manifest, PreprocessingSpec, TensorSpec

LABELS = ("ankle boot", 'a "quoted" label', "naïve", "back\\slash", "??=")


def artifact_in(
    folder: Path, model: CompactModel | None = None, **preprocessing: object
) -> Artifact:
    """Write an artifact without torch's exporter, which takes seconds."""
    settings = PreprocessingSpec.model_validate(
        {"channels": 1, "height": 16, "width": 16, "mean": [0.3], "std": [0.4], **preprocessing}
    )
    if model is None:
        model = vitrim.lift(tiny_vit(in_chans=settings.channels))
    folder.mkdir()
    manifest = Manifest(
        name="tiny",
        inputs=(TensorSpec(name="images", shape=(1, settings.channels, 16, 16), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(1, 5), layout="NC"),),
        preprocessing=settings,
        labels=LABELS,
        target="x86-64",
        runtime="onnxruntime",
        precision="fp32",
        form=FORMS[0].name,
        files=tuple(save_model(write_network(model, FORMS[0]), folder)),
    )
    return Artifact.write(folder, manifest)


def runtime_library() -> Path | None:
    import onnxruntime

    found = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"))
    return found[0] if found else None


def needs_compiler() -> None:
    """Skip where the example cannot be built, and name what is missing."""
    if sys.platform != "linux":
        pytest.skip("the bundle's test needs Linux")
    missing = [tool for tool in ("g++", "cmake") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: apt-get install g++ cmake")
    if runtime_library() is None:
        pytest.skip("this onnxruntime wheel has no libonnxruntime.so")


def build(folder: Path, header: Path, *settings: str, place: str = "build") -> Path:
    """Build the example of a bundle with warnings as errors, and return the program."""
    options = [f"-DONNXRUNTIME_INCLUDE={header}", "-DCMAKE_CXX_FLAGS=-Werror", *settings]
    for command in (["cmake", "-S", ".", "-B", place, *options], ["cmake", "--build", place]):
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=folder, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / place / "vitrim_example"


def logits_in(lines: list[str]) -> np.ndarray:
    """The logits that a program printed."""
    numbers = next(line for line in lines if line.startswith("logits")).split()[1:]
    return np.array([float(number) for number in numbers])
