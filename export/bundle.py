"""`vitrim export --bundle`: a folder that an integrator drops into a build.

model/            the artifact, untouched, with its manifest vitrim_model.h    C interface: sizes,
labels, open, run, classify, close vitrim_model.cpp  C++17 on ONNX Runtime's C API; the runtime's
library is opened by path, so nothing of it is linked vitrim_tvm.cpp    in its place for compiled
networks, with the folder tvm; there is no runtime, and the model can be a part of the program
prepare.cpp       a picture of any size to the model's input resize.h          Pillow's resampling,
number for number, since training and calibration resized with Pillow example.cpp       a picture
(PGM or PPM) in, labels out CMakeLists.txt    builds the two into `vitrim_example` aarch64.cmake
the same for 64-bit ARM, by a cross compiler README.md         three commands
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import InputError
from ..core.storage import replace_folder
from .artifact import Artifact
from .manifest import PreprocessingSpec

SOURCES = Path(__file__).parent / "bundle_sources"
SHARED = ("prepare.cpp", "failure.h", "resize.h", "example.cpp", "aarch64.cmake")
# From where in the sources, to where in the bundle.
OWN: Mapping[str, Mapping[str, str]] = {
    "onnxruntime": {name: name for name in ("vitrim_model.cpp", "CMakeLists.txt", "README.md")},
    "tvm": {
        **{f"tvm/{name}": name for name in ("vitrim_tvm.cpp", "CMakeLists.txt", "README.md")},
        **{f"tvm/{name}": f"tvm/{name}" for name in ("compiled_network.h", "network_entries.h")},
    },
}


def bundle(artifact: Artifact | Path | str, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write the bundle of an artifact. Errors: InputError if the artifact is damaged, or is one
    that the C++ code cannot feed.
    """
    artifact = Artifact.load(artifact.folder if isinstance(artifact, Artifact) else artifact)
    manifest = artifact.manifest
    if manifest.runtime not in OWN:
        raise InputError(
            f"{artifact.folder}: runtime {manifest.runtime!r} has no bundle; export for {' or '.join(OWN)}"
        )
    if manifest.runtime == "tvm" and manifest.session.get("entry") != "program":
        raise InputError(
            f"{artifact.folder}: this model runs in TVM's virtual machine, which no bundle holds; export for a CPU, or for onnxruntime"
        )
    if manifest.batch not in (1, "dynamic"):
        raise InputError(
            f"{artifact.folder}: holds batches of {manifest.batch}, the bundle classifies one picture; export with batch 1 or 'dynamic'"
        )
    if manifest.preprocessing is None:
        raise InputError(
            f"{artifact.folder}: the manifest has no preprocessing, so the bundle cannot read pictures; export with preprocessing"
        )
    if (
        len(manifest.inputs) != 1
        or manifest.inputs[0].type != "float32"
        or manifest.inputs[0].layout != "NCHW"
    ):
        raise InputError(
            f"{artifact.folder}: the bundle feeds one float32 NCHW input; export again without changing the input"
        )
    with replace_folder(folder, overwrite=overwrite) as aside:
        shutil.copytree(artifact.folder, aside / "model")
        for source, name in {**{name: name for name in SHARED}, **OWN[manifest.runtime]}.items():
            (aside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(SOURCES / source, aside / name)
        (aside / "vitrim_model.h").write_text(
            header(artifact, manifest.preprocessing), encoding="utf-8"
        )
    return Path(folder)


def header(artifact: Artifact, preprocessing: PreprocessingSpec) -> str:
    """`vitrim_model.h`: what the manifest says, as C constants."""
    manifest = artifact.manifest
    classes = manifest.outputs[0].shape[-1]
    labels = manifest.labels or tuple(f"class {number}" for number in range(int(classes)))
    scale = [1.0 / (255.0 * std) for std in preprocessing.std]
    shift = [-mean / std for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]
    values = {
        "NAME": _text(manifest.name),
        "SEAL": _text(artifact.sha256),
        "MODEL_FILE": _text(artifact.model_path.name),
        "INPUT": _text(manifest.inputs[0].name),
        "OUTPUT": _text(manifest.outputs[0].name),
        "CHANNELS": str(preprocessing.channels),
        "HEIGHT": str(preprocessing.height),
        "WIDTH": str(preprocessing.width),
        "CLASSES": str(classes),
        "CENTER_CROP": "1" if preprocessing.resize == "center-crop" else "0",
        "CROP_RATIO": repr(float(preprocessing.crop_ratio)),
        "INTERPOLATION": _text(preprocessing.interpolation),
        "PILLOW": str(pillow_major(manifest.versions)),
    }
    template = (SOURCES / "vitrim_model.h.in").read_text(encoding="utf-8")
    for key, value in values.items():
        template = template.replace(f"@{key}@", value)
    template = template.replace("@SCALE@", ", ".join(_float(value) for value in scale))
    template = template.replace("@SHIFT@", ", ".join(_float(value) for value in shift))
    template = template.replace("@LABELS@", ", ".join(_text(label) for label in labels))
    entries = ", ".join(
        f"{{{_text(key)}, {_text(value)}}}" for key, value in sorted(manifest.session.items())
    )
    count = len(manifest.session)
    return template.replace("@SESSION@", entries or "{0, 0}").replace("@SESSION_COUNT@", str(count))


def pillow_major(versions: Mapping[str, str]) -> int:
    """The major version of the Pillow that training resized with, for its order of passes: the
    manifest's, or else the one that is installed.
    """
    import PIL

    return int(versions.get("pillow", PIL.__version__).split(".")[0])


def _text(value: str) -> str:
    """A C string literal; what is not plain ASCII goes in as the octal codes of its UTF-8 bytes."""
    pieces = []
    for byte in value.encode("utf-8"):
        letter = chr(byte)
        if letter in '"\\?' or byte < 32 or byte > 126:
            pieces.append(f"\\{byte:03o}")
        else:
            pieces.append(letter)
    return '"' + "".join(pieces) + '"'


def _float(value: float) -> str:
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"
