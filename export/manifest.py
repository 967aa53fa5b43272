"""The manifest of an artifact: what the runnable files are and how they were verified.

The folder's format (schema `vitrim.manifest/1`; `manifest_schema()` returns it as JSON Schema):

- `manifest.json` is UTF-8 JSON, an object without repeated keys, NaN or Infinity, at most 16 MiB.
- `files` lists every other file of the folder: path (relative, `/` between parts, no `..`), role,
  size and SHA-256. Exactly one has the role `model`.
- `seal` is the SHA-256 of the manifest itself without `seal`, written as JSON with sorted keys and
  no spaces, so that a flipped byte in a label or a mean is detected too.
- `cpu` lists the instruction sets that the code needs and that the numbers assume. Manifests of
  earlier versions lack the key; the names of their targets have their former meaning.
- `inputs` and `outputs` state name, shape (a free dimension is its name), type and layout. Outputs
  other than the logits alone also have a `kind`, a `meaning` in words, and the `grid` of their
  patches; an output without these keys, the only one of its artifact, returns logits.
- `preprocessing` and `labels` how pictures become inputs and logits become class names; `parity`
  how far each stage of the export changed the outputs.
- `buckets` states, where images keep different numbers of patches, which ones, and who gets which.
- A folder with a file that the manifest does not list, or with a symbolic link, is refused: only
  files that were verified are shipped.

Free of torch and of onnx.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Annotated, Any, Literal

from numpy.typing import NDArray
from pydantic import Field, model_validator

from .manifest_parts import BucketsSpec, Name, Plain, PlainWithExtras, Size

SCHEMA = "vitrim.manifest/1"
MANIFEST = "manifest.json"
# The smallest share of equal top-1 classes, and the fewest images, that need no warning.
LEAST_AGREEMENT, FEWEST_IMAGES = 0.9, 8
# The smallest share of images with equal choices of tokens in fp32, and of equal tokens in other
# precisions, that need no warning.
LEAST_EQUAL_CHOICES, LEAST_OVERLAP = 0.99, 0.9
PARITY = "parity: "

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Array = NDArray[Any]
Batch = int | Literal["dynamic"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-static", "int8-weights", "int4-weights"]
Layout = Literal["NCHW", "NHWC"]
OutputKind = Literal["logits", "features", "tokens", "patches", "block"]
Role = Literal["model", "weights", "operators", "source", "other"]


class TensorSpec(PlainWithExtras):
    """One input or output: shape entries are sizes, or the name of a free dimension.

    Attributes:
        name: Its name in the model.
        shape: Its sizes.
        type: The type of its numbers.
        layout: What its dimensions are: batch, channels or classes, height, width, tokens (L).
        kind: What an output is, where it is not the artifact's only one; None: logits.
        meaning: The same in words.
        grid: Rows and columns of the patches, which are in rows from the top left.
    """

    name: Name
    shape: tuple[Size | Name, ...]
    type: Literal["float32", "float16", "uint8", "int8", "int64"] = "float32"
    layout: Literal["NCHW", "NHWC", "NC", "NLC"]
    kind: OutputKind | None = None
    meaning: Name | None = None
    grid: tuple[Size, Size] | None = None

    @property
    def extras(self) -> frozenset[str]:
        """The fields that only outputs other than the logits alone have."""
        return frozenset({"kind", "meaning", "grid"})


class PreprocessingSpec(Plain):
    """From a picture to the input, with the fields of `Preprocessing`.

    Mean and std are in units of pixel / 255, one number for each channel.
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
                f"mean and std need {self.channels} numbers, one a channel; "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        return self


class FileEntry(Plain):
    """A file of the folder.

    It is the model that the runtime opens, its external weights, the operators of a reduced runtime
    build, sources, or another file.
    """

    path: str
    role: Role
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @model_validator(mode="after")
    def _inside(self) -> FileEntry:
        problem = path_problem(self.path)
        if problem:
            shown = repr(self.path if len(self.path) <= 80 else f"{self.path[:80]}...")
            raise ValueError(
                f"file {shown}: {problem}; an artifact holds only files of its own folder"
            )
        return self


class ChoiceParity(Plain):
    """How often a selection of tokens chose as in the reference.

    Attributes:
        selection: Name of the selection.
        kept: How many patches it keeps of each image.
        equal: Share of the images for which it kept exactly the same patches.
        overlap: Share of the kept patches that are the same, the mean over all images.
    """

    selection: Name
    kept: Size
    equal: Annotated[float, Field(ge=0, le=1)]
    overlap: Annotated[float, Field(ge=0, le=1)]


class Parity(PlainWithExtras):
    """How far one stage changed an output: the only one, or the one that `output` names.

    Errors are relative to the largest absolute value of the reference's output; agreement is a
    share of images, and absent for outputs that are not logits. Where a network selects tokens by
    content, errors are those for the same choices, `choices` states how often these are the
    reference's own, and agreement is that with the reference's own choices.
    """

    stage: Name
    reference: Name
    max_relative_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    mean_relative_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None
    images: Size
    # Noise verifies the arithmetic, not the accuracy, so the kind of input is recorded.
    input_kind: Literal["images", "seeded-noise"]
    seed: int | None = None
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    output: Name | None = None
    choices: tuple[ChoiceParity, ...] | None = None

    @property
    def extras(self) -> frozenset[str]:
        """The fields of artifacts with other outputs than the logits, or that select tokens."""
        return frozenset({"output", "choices"})

    @property
    def choices_text(self) -> str:
        """How often tokens were chosen as in the reference, in words; empty without selections."""
        if not self.choices:
            return ""
        shares = ", ".join(
            f"{100 * choice.equal:.1f} % ({choice.selection})" for choice in self.choices
        )
        return f"same tokens on {shares}"

    @property
    def title(self) -> str:
        """The stage, and the output if there are several."""
        return self.stage if self.output is None else f"{self.stage}, {self.output}"


class Provenance(Plain):
    """The source: its kind, a SHA-256 of its weights, counts, and the caller's own entries."""

    source: str = "torch module"
    weights_sha256: Sha256 | None = None
    parameters: Annotated[int, Field(ge=0)] | None = None
    macs: Annotated[int, Field(ge=0)] | None = None
    details: dict[str, str] = Field(default_factory=dict)


class CpuFeatures(Plain):
    """Instruction sets, as Linux names them; of `a|b` one suffices.

    Attributes:
        needs: Those that the files' code uses: without them it would end in an illegal instruction.
        assumes: Those without which the numbers would be others, such as products that saturate.
    """

    needs: tuple[Name, ...] = ()
    assumes: tuple[Name, ...] = ()


class Manifest(PlainWithExtras):
    """What an artifact is; the module's docstring states the format.

    Attributes:
        name: Name of the model.
        inputs: The model's inputs; the first one takes images.
        outputs: The model's outputs; logits are the first one, see `logits`.
        batch: Images in a batch, or "dynamic".
        preprocessing: From a picture to the input, if known.
        labels: One for each class, if known.
        opset: Version of the standard's operators, where the model is an ONNX graph.
        target: Name of the device profile that it was exported for.
        cpu: The instruction sets that it was exported for; None where they are unknown.
        runtime: Name of the runtime that opens it.
        precision: What it computes in.
        form: How its graph is written.
        session: Settings that the runtime opens it with.
        versions: Versions of the tools that made it, by package.
        files: Every file of the folder except the manifest.
        parity: How far each stage of the export changed the outputs.
        provenance: Where the model came from.
        notes: Lines for the user.
        buckets: The numbers of patches that images may keep, where they differ between images.
        seal: SHA-256 of the manifest without this field.
    """

    schema_: Literal["vitrim.manifest/1"] = Field("vitrim.manifest/1", alias="schema")
    name: Name
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    batch: Size | Literal["dynamic"] = 1
    preprocessing: PreprocessingSpec | None = None
    labels: tuple[str, ...] | None = None
    opset: Size | None = None
    target: Name
    cpu: CpuFeatures | None = None
    runtime: Name
    precision: Precision
    form: Name
    # Config entries of the runtime's session that the form was measured with.
    session: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: tuple[FileEntry, ...] = Field(min_length=1)
    parity: tuple[Parity, ...] = ()
    provenance: Provenance = Provenance()
    notes: tuple[str, ...] = ()
    buckets: BucketsSpec | None = None
    seal: Sha256 = "0" * 64

    @property
    def extras(self) -> frozenset[str]:
        """The fields of artifacts with buckets."""
        return frozenset({"buckets"})

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
        names = [output.name for output in self.outputs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"output {name!r} is listed twice")
        if self.labels is not None and self.logits is not None:
            classes = self.logits.shape[-1]
            if isinstance(classes, int) and classes != len(self.labels):
                raise ValueError(f"{len(self.labels)} labels for {classes} classes")
        spec, only = self.preprocessing, self.inputs[0]
        if spec is not None and len(only.shape) == 4 and only.layout != "NC":
            image = {
                "NCHW": (spec.channels, spec.height, spec.width),
                "NHWC": (spec.height, spec.width, spec.channels),
            }[only.layout]
            if only.shape[1:] != image:
                raise ValueError(f"preprocessing makes {image}, the input takes {only.shape[1:]}")
        return self

    @property
    def logits(self) -> TensorSpec | None:
        """The output with the logits; None where the artifact returns features or tokens only."""
        first = self.outputs[0]
        return first if first.kind in (None, "logits") else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, with the key `schema` and a new seal."""
        data = self.model_dump(mode="json", by_alias=True)
        data["seal"] = seal_of(data)
        return data

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the outputs doubtful, and what to do about it, one line each."""
        if not self.parity:
            return ()
        found = []
        agreements = {
            stage: stage.top1_agreement
            for stage in self.parity
            if stage.top1_agreement is not None and stage.top1_agreement < LEAST_AGREEMENT
        }
        if agreements:
            worst, share = min(agreements.items(), key=lambda entry: entry[1])
            found.append(
                f"{PARITY}{worst.stage} has the top-1 class of {worst.reference} on only "
                f"{100 * share:.0f} % of {worst.images} {worst.input_kind}; "
                "measure its accuracy (vitrim bench --dataset), or export in another precision"
            )
        found += self._choice_warnings()
        count = self.parity[-1].images
        if self.precision not in ("fp32", "fp16", "bf16") and count < FEWEST_IMAGES:
            static = self.precision == "int8-static"
            rest = "ranges and parity rest" if static else "parity rests"
            found.append(
                f"{PARITY}{self.precision}: {rest} on only {count} "
                f"{self.parity[-1].input_kind}; export with {FEWEST_IMAGES} or more images"
            )
        return tuple(found)

    def _choice_warnings(self) -> list[str]:
        stage = self.parity[-1]
        exact = self.precision == "fp32"
        doubtful = [
            choice
            for choice in stage.choices or ()
            if (choice.equal < LEAST_EQUAL_CHOICES if exact else choice.overlap < LEAST_OVERLAP)
        ]
        if not doubtful:
            return []
        worst = min(doubtful, key=lambda choice: choice.overlap)
        return [
            f"{PARITY}{stage.title} keeps other tokens than {stage.reference} at "
            f"{worst.selection} on {100 * (1 - worst.equal):.0f} % of {stage.images} "
            f"{stage.input_kind}, {100 * worst.overlap:.1f} % of the tokens are the same; "
            "measure its accuracy (vitrim bench --dataset), or export in another precision"
        ]

    @property
    def macs(self) -> int | None:
        """Multiply-adds of one image, if known."""
        return self.provenance.macs


def path_problem(path: str) -> str | None:
    """Return why a listed path could lead out of its folder, or None if it cannot."""
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
    """Return the SHA-256 of a manifest's data without its `seal`."""
    rest = {key: value for key, value in data.items() if key != "seal"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_schema() -> dict[str, Any]:
    """Return the manifest's format as JSON Schema (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(by_alias=True),
    }


def tool_versions(*names: str) -> dict[str, str]:
    """Return the versions of installed packages by name, without those that are absent."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
