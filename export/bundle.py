"""`vitrim export --bundle`: a folder that an integrator adds to a build.

| path | content |
|---|---|
| `model/` | the artifact, unchanged, with its manifest |
| `vitrim_model.h` | C interface: sizes, labels, open, run, classify, close |
| `vitrim_model.cpp` | C++17 on ONNX Runtime's C API; the runtime's library is opened by path |
| `vitrim_tvm.cpp`, `tvm/` | instead for compiled networks: no runtime, the model can be linked in |
| `prepare.cpp` | from a picture of any size to the model's input |
| `cpu_features.h` | refuses processors that lack an instruction set of the model |
| `resize.h` | Pillow's resampling, bit for bit, as in training and calibration |
| `example.cpp` | a picture (PGM or PPM) in, labels out |
| `CMakeLists.txt` | builds the example, `vitrim_example` |
| `aarch64.cmake` | the same for 64-bit ARM, by a cross compiler |
| `README.md` | the commands |
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import InputError
from ..core.storage import replace_folder, require_output_folder
from ..core.written_kinds import Contents, FolderKind, within
from ..runtimes.compiled_program import ALIGNED_NUMBERS
from ..targets.instruction_sets import HEADER as CPU_HEADER
from .artifact import ARTIFACT, Artifact
from .manifest import Batch, CpuFeatures, PreprocessingSpec, TensorSpec

SOURCES = Path(__file__).parent / "bundle_sources"
HEADER = "vitrim_model.h"
SHARED = ("prepare.cpp", "failure.h", "resize.h", "example.cpp", "aarch64.cmake")
# Paths in the sources, and in the bundle.
RUNTIME_FILES: Mapping[str, Mapping[str, str]] = {
    "onnxruntime": {name: name for name in ("vitrim_model.cpp", "CMakeLists.txt", "README.md")},
    "tvm": {
        **{f"tvm/{name}": name for name in ("vitrim_tvm.cpp", "CMakeLists.txt", "README.md")},
        **{f"tvm/{name}": f"tvm/{name}" for name in ("compiled_network.h", "network_entries.h")},
    },
}


def _contents(folder: Path) -> Contents | None:
    model = ARTIFACT.contents(folder / "model")
    if model is None or not (folder / HEADER).is_file():
        return None
    names = [name for files in RUNTIME_FILES.values() for name in files.values()]
    return {
        **dict.fromkeys((HEADER, CPU_HEADER.name, *SHARED, *names)),
        **within("model", model),
    }


BUNDLE = FolderKind("a bundle", HEADER, _contents)


def bundle(artifact: Artifact | Path | str, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write the bundle of an artifact, and return its folder.

    Raises:
        InputError: The artifact is damaged, or the C++ code does not support it.
    """
    artifact = Artifact.load(artifact.folder if isinstance(artifact, Artifact) else artifact)
    manifest = artifact.manifest
    preprocessing = _supported_preprocessing(artifact)
    inputs = {"the artifact": artifact.folder}
    require_output_folder(folder, BUNDLE, overwrite=overwrite, inputs=inputs)
    with replace_folder(folder, BUNDLE, overwrite=overwrite) as aside:
        shutil.copytree(artifact.folder, aside / "model")
        files = {**{name: name for name in SHARED}, **RUNTIME_FILES[manifest.runtime]}
        for source, name in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(SOURCES / source, aside / name)
        shutil.copyfile(CPU_HEADER, aside / CPU_HEADER.name)
        (aside / HEADER).write_text(header(artifact, preprocessing), encoding="utf-8")
    return Path(folder)


def require_bundle(where: str, runtime: str, batch: Batch) -> None:
    """Validate that the artifacts of a runtime and a batch size have a bundle.

    Args:
        where: The artifact or option, for the message.
        runtime: Name of the runtime.
        batch: Images in a batch, or "dynamic".

    Raises:
        InputError: They have none.
    """
    if runtime not in RUNTIME_FILES:
        raise InputError(
            f"{where}: runtime {runtime!r} has no bundle; export for {' or '.join(RUNTIME_FILES)}"
        )
    if batch not in (1, "dynamic"):
        raise InputError(
            f"{where}: holds batches of {batch}, the bundle classifies one picture; "
            "export with batch 1 or 'dynamic'"
        )


def _supported_preprocessing(artifact: Artifact) -> PreprocessingSpec:
    """Return the preprocessing of an artifact that the C++ code supports."""
    manifest = artifact.manifest
    require_bundle(str(artifact.folder), manifest.runtime, manifest.batch)
    if manifest.runtime == "tvm" and manifest.session.get("entry") != "program":
        raise InputError(
            f"{artifact.folder}: this model runs in TVM's virtual machine, which no bundle "
            "contains; export for a CPU, or for onnxruntime"
        )
    if manifest.preprocessing is None:
        raise InputError(
            f"{artifact.folder}: the manifest has no preprocessing, so the bundle cannot read "
            "pictures; export with preprocessing"
        )
    if (
        len(manifest.inputs) != 1
        or manifest.inputs[0].type != "float32"
        or manifest.inputs[0].layout == "NC"
    ):
        raise InputError(
            f"{artifact.folder}: the bundle feeds one float32 input of images; "
            "export again without changing the input"
        )
    for output in manifest.outputs:
        sizes = output.shape[1:]
        if not 1 <= len(sizes) <= 2 or not all(isinstance(size, int) for size in sizes):
            raise InputError(
                f"{artifact.folder}: the sizes of output {output.name!r} are not fixed; export the "
                "model again"
            )
    return manifest.preprocessing


def header(artifact: Artifact, preprocessing: PreprocessingSpec) -> str:
    """Return `vitrim_model.h`: the manifest's values as C constants."""
    manifest = artifact.manifest
    classes = 0 if manifest.logits is None else int(manifest.logits.shape[-1])
    labels = manifest.labels or tuple(f"class {number}" for number in range(classes))
    starts, numbers = _starts(manifest.outputs)
    scale = [1.0 / (255.0 * std) for std in preprocessing.std]
    shift = [-mean / std for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]
    cpu = manifest.cpu or CpuFeatures()
    buckets = () if manifest.buckets is None else manifest.buckets.counts
    values = {
        "TARGET": _text(manifest.target),
        "CPU_NEEDS": _text(" ".join(cpu.needs)),
        "CPU_ASSUMES": _text(" ".join(cpu.assumes)),
        "NAME": _text(manifest.name),
        "SEAL": _text(artifact.sha256),
        "MODEL_FILE": _text(artifact.model_path.name),
        "INPUT": _text(manifest.inputs[0].name),
        "OUTPUT": _text(manifest.outputs[0].name),
        "OUTPUT_COUNT": str(len(manifest.outputs)),
        "OUTPUT_NUMBERS": str(numbers),
        "OUTPUT_STARTS": "\n".join(
            f"#define {_macro(output.name)}_START {start}"
            for output, start in zip(manifest.outputs, starts, strict=True)
        ),
        "BUCKET_COUNT": str(len(buckets)),
        "BUCKETS": ", ".join(map(str, (*buckets, 0))),
        "CHANNELS": str(preprocessing.channels),
        "HEIGHT": str(preprocessing.height),
        "WIDTH": str(preprocessing.width),
        "CLASSES": str(classes),
        "CHANNELS_LAST": "1" if manifest.inputs[0].layout == "NHWC" else "0",
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
    # The last entry ends the list, which is empty without logits.
    template = template.replace("@LABELS@", ", ".join([*map(_text, labels), "0"]))
    rows = (_output(*entry) for entry in zip(manifest.outputs, starts, strict=True))
    template = template.replace("@OUTPUTS@", ", ".join(rows))
    entries = ", ".join(
        f"{{{_text(key)}, {_text(value)}}}" for key, value in sorted(manifest.session.items())
    )
    count = len(manifest.session)
    return template.replace("@SESSION@", entries or "{0, 0}").replace("@SESSION_COUNT@", str(count))


def _starts(outputs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """The first number of each output of one picture, and how many numbers there are.

    Compiled networks write each output from a multiple of 16 on.
    """
    starts, end = [], 0
    for output in outputs:
        starts.append(-(-end // ALIGNED_NUMBERS) * ALIGNED_NUMBERS)
        end = starts[-1] + math.prod(int(size) for size in output.shape[1:])
    return starts, end


def _macro(name: str) -> str:
    return "VITRIM_" + re.sub(r"\W", "_", name, flags=re.ASCII).upper()


def _output(output: TensorSpec, start: int) -> str:
    """The row of an output in `VITRIM_OUTPUTS`."""
    sizes = [int(size) for size in output.shape[1:]]
    rows, columns = output.grid or (0, 0)
    meaning = _text(output.meaning or "one number a class")
    second = sizes[1] if len(sizes) > 1 else 1
    return (
        f"{{{_text(output.name)}, {meaning}, {start}, {len(sizes)}, {{{sizes[0]}, {second}}}, "
        f"{{{rows}, {columns}}}}}"
    )


def pillow_major(versions: Mapping[str, str]) -> int:
    """Return the major version of the Pillow that training resized with, for its order of passes.

    It is the manifest's, or else that of the installed one.
    """
    import PIL

    return int(versions.get("pillow", PIL.__version__).split(".")[0])


def _text(value: str) -> str:
    """Return a C string literal, with octal codes for UTF-8 bytes outside of plain ASCII."""
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
