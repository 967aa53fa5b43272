"""A recipe: everything that `vitrim run` needs to know, as one TOML file checked before any work
starts.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..compress.network.patch_fit import checked_size
from ..core.errors import InputError
from ..targets.catalog import load_target
from .recipe_errors import first_line

RECIPES = Path(__file__).parents[1] / "recipes"
QUICKSTART = RECIPES / "quickstart.toml"

Augmentation = Literal["none", "erasing", "light", "thesis"]
Precision = Literal["fp32", "fp16", "int8", "int8-static", "int8-weights", "int4-weights"]


class Section(BaseModel):
    """What every table of a recipe shares: no unknown keys, no silent conversions, no change after
    reading.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True
    )


class DataSection(Section):
    """Which images, and how they are split."""

    name: str = Field(
        "quickstart",
        min_length=1,
        description="quickstart (embedded), fashion-mnist, cifar10, another hub set, or imagefolder:PATH",
    )
    seed: int = Field(
        0,
        ge=0,
        description="seed of the validation split; kept apart from train.seed so that seeds compare on equal data",
    )
    validation: float = Field(
        0.1,
        gt=0.0,
        lt=1.0,
        description="share of the training images that masks and early stopping look at",
    )
    limit: int | None = Field(
        None, gt=0, description="at most this many training images, for a quick look"
    )


class ModelSection(Section):
    """The dense Vision Transformer that is trimmed."""

    name: str = Field("vit_tiny_patch16_224", min_length=1, description="a timm model name")
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments for timm.create_model, e.g. embed_dim = 128",
    )
    pretrained: bool = Field(
        False, description="start from timm's published weights (needs the network once)"
    )
    checkpoint: str | None = Field(
        None,
        min_length=1,
        description="a trained checkpoint: `embedded` for the one in the package, or a .safetensors or .pth file",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("`pretrained` and `checkpoint` both name the weights; keep one")
        return self


class BaselineSection(Section):
    """How the dense model is trained first; used when no checkpoint is named. `epochs = 0` takes
    the weights as they are.
    """

    epochs: int = Field(
        0, ge=0, description="epochs of dense training; 0 when the weights are trained already"
    )
    lr: float = Field(1e-3, gt=0.0, description="peak learning rate")
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay of the weights")
    warmup_epochs: int = Field(2, ge=0, description="epochs in which the learning rate rises")
    patience_epochs: int = Field(
        20, gt=0, description="stop after so many epochs without a better validation top-1"
    )
    augmentation: Augmentation = Field(
        "light",
        description="none, erasing, light (shift, flip, erasing), or thesis (RandAugment, MixUp, CutMix, erasing)",
    )


class MasksSection(Section):
    """How much goes, and how the masks are learned. Exactly one of `params`, `macs` and `lambda`
    says how much.
    """

    params: float | None = Field(
        None, gt=0.0, le=1.0, description="budget: share of the parameters that stays, e.g. 0.3"
    )
    macs: float | None = Field(
        None, gt=0.0, le=1.0, description="budget: share of the multiply-adds that stays, e.g. 0.5"
    )
    lambda_: float | None = Field(
        None,
        alias="lambda",
        ge=0.0,
        description="no budget: the fixed strength of the size penalty, e.g. 1e-7",
    )
    sharing: Literal["residual", "unshared", "full"] = Field(
        "residual",
        description="residual: one mask for the residual stream; full: one a dimension for all blocks; unshared: each its own",
    )
    fixed: tuple[Literal["head", "embed", "ffn", "qk", "v"], ...] = Field(
        (), strict=False, description="dimensions that are kept whole"
    )
    epochs: int = Field(20, gt=0, description="at most so many epochs of mask learning")
    lr: float = Field(
        1e-4, gt=0.0, description="learning rate of the weights while the masks are learned"
    )
    score_lr: float = Field(
        1e-2, gt=0.0, description="learning rate of the mask scores (their weight decay is 0)"
    )
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay of the weights")
    restart_epochs: int = Field(
        4, gt=0, description="cosine annealing restarts every so many epochs"
    )
    patience_epochs: int = Field(
        20,
        gt=0,
        description="stop when accuracy has not risen and size has not fallen for so many epochs",
    )
    augmentation: Augmentation = Field(
        "light", description="augmentation while the masks are learned"
    )
    attention_overhead_macs: float = Field(
        1.3e6,
        ge=0.0,
        description="with a budget: multiply-adds that take as long as an attention's fixed cost; one not worth it goes; 0: none goes as a whole",
    )
    ffn_overhead_macs: float = Field(
        4e5,
        ge=0.0,
        description="the same for an FFN (both as `python -m benchmarks.sublayer_cost` measures them)",
    )
    round_to: int | None = Field(
        None,
        gt=0,
        description="snap kept widths to multiples of this; absent: the target's good multiple",
    )

    @field_validator("fixed")
    @classmethod
    def _no_dimension_twice(cls, fixed: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(fixed)) != len(fixed):
            raise ValueError("a dimension is named twice")
        return fixed

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        named = [
            key
            for key, value in (
                ("params", self.params),
                ("macs", self.macs),
                ("lambda", self.lambda_),
            )
            if value is not None
        ]
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(f'`{key}`' for key in named)} both say how much goes; keep one"
            )
        if not named:
            raise ValueError(
                "nothing says how much goes; add one of `params = 0.3`, `macs = 0.5` or `lambda = 1e-7`"
            )
        return self


class FinetuneSection(Section):
    """How the compact model is trained after the cut."""

    epochs: int = Field(
        20, ge=0, description="at most so many epochs; 0 leaves the cut model as it is"
    )
    lr: float = Field(5e-4, gt=0.0, description="peak learning rate, cosine without restarts")
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay of the weights")
    warmup_epochs: int = Field(0, ge=0, description="epochs in which the learning rate rises")
    patience_epochs: int = Field(
        10, gt=0, description="stop after so many epochs without a better validation top-1"
    )
    augmentation: Augmentation = Field("light", description="augmentation while fine-tuning")


class DistillSection(Section):
    """Learning from the dense model's outputs, during mask learning and fine-tuning."""

    enabled: bool = Field(True, description="off with `--no-distill`")
    alpha: float = Field(
        0.5, ge=0.0, le=1.0, description="share of the loss that comes from the dense model"
    )
    temperature: float = Field(2.0, gt=0.0, description="softening of both outputs")


class TrainSection(Section):
    """What all training in this recipe shares."""

    batch_size: int = Field(128, gt=0, description="images a step")
    threads: int | None = Field(
        None, gt=0, description="torch threads; absent: as many as the machine has cores"
    )
    seed: int = Field(7, ge=0, description="seed of weights, order and augmentation")
    label_smoothing: float = Field(
        0.1, ge=0.0, lt=1.0, description="label smoothing of the task loss"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw as in the sources, or muon for short trainings of small models"
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", description="torch.set_float32_matmul_precision"
    )


class ExportSection(Section):
    """Which files leave the chain."""

    target: str = Field(
        "x86-64", min_length=1, description="a target name (`vitrim targets list`) or a target TOML"
    )
    precisions: tuple[Precision, ...] = Field(
        ("fp32", "int8"), strict=False, min_length=1, description="precisions of the compact model"
    )
    runtimes: tuple[str, ...] = Field(
        ("onnxruntime",),
        strict=False,
        min_length=1,
        description="runtimes to export for, the first one's baseline being what all are held against",
    )
    batch: int | Literal["dynamic"] = Field(1, description="images a run, or dynamic")
    image_size: tuple[int, int] | None = Field(
        None,
        strict=False,
        description='resize the artifacts to another height and width, 160 or "160x192", without training; absent: as trained',
    )
    calibration_images: int = Field(
        64, gt=0, description="real images for parity figures and int8 calibration"
    )

    @field_validator("precisions", "runtimes")
    @classmethod
    def _nothing_twice(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError(f"a {(info.field_name or '').removesuffix('s')} is named twice")
        return names

    @field_validator("image_size", mode="before")
    @classmethod
    def _sides(cls, size: Any) -> tuple[int, int] | None:
        try:
            return None if size is None else checked_size(size)
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("batch")
    @classmethod
    def _batch_of_one_or_more(cls, batch: int | str) -> int | str:
        if isinstance(batch, int) and batch < 1:
            raise ValueError("a batch holds at least one image")
        return batch


class BenchSection(Section):
    """How the artifacts are measured."""

    threads: int = Field(1, gt=0, description="threads of the runtime")
    time_limit_s: float = Field(
        30.0, gt=0.0, description="timing stops after so many seconds, all artifacts together"
    )
    top1_images: int | None = Field(
        None, gt=0, description="test images for the top-1 of the timed artifact; absent: all"
    )


class ReportSection(Section):
    """What the report tells besides what was measured."""

    estimate_for: tuple[str, ...] = Field(
        ("rpi-zero-2w", "rpi4", "rpi5", "snapdragon-8-gen-2", "stm32h7"),
        strict=False,
        description="devices that are not at hand, for which fit and time are estimated: names (`vitrim targets list`) or target TOMLs; [] for none",
    )

    @field_validator("estimate_for")
    @classmethod
    def _targets_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a target is named twice")
        for name in names:
            try:
                load_target(name)
            except InputError as error:
                raise ValueError(str(error)) from None
        return names


class Recipe(Section):
    """One run of the chain, from data to report."""

    name: str = Field("", description="name of the run folder; absent: the recipe file's name")
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    baseline: BaselineSection = Field(default_factory=BaselineSection)
    masks: MasksSection
    finetune: FinetuneSection = Field(default_factory=FinetuneSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    train: TrainSection = Field(default_factory=TrainSection)
    export: ExportSection = Field(default_factory=ExportSection)
    bench: BenchSection = Field(default_factory=BenchSection)
    report: ReportSection = Field(default_factory=ReportSection)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if name in (".", "..") or any(sign in name for sign in "/\\\0\n"):
            raise ValueError("it names a folder, so it holds no slash and is not a dot")
        return name

    def plain(self) -> dict[str, Any]:
        """The recipe as TOML-ready tables: keys as the user writes them, absent values left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def fingerprint(self, *sections: str, previous: str = "") -> str:
        """SHA-256 of the named sections and of the step before, so that a step is redone only when
        what it depends on changed.
        """
        plain = self.plain()
        text = json.dumps(
            {"previous": previous, **{section: plain[section] for section in sections}},
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def toml(self) -> str:
        """The whole recipe as TOML, every default written out; reading it back gives an equal
        recipe.
        """
        return _toml(self.plain())


def load_recipe(source: str | Path | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or by name from the recipes in the package; None is the
    quickstart.

    `sets` holds `section.key=value` strings that replace single values (the value is TOML; a bare
    word is a string). Errors: InputError naming the file, the key and what to write instead.
    """
    path = _find(source)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a text file ({error.reason} at byte {error.start}); a recipe is TOML in UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    # The file is checked before anything is laid over it, so that an error names its true place.
    recipe = parse_recipe(tables, where=str(path))
    for item in sets:
        recipe = _with_set(recipe, item)
    return recipe if recipe.name else recipe.model_copy(update={"name": path.stem})


def parse_recipe(tables: Mapping[str, Any], where: str) -> Recipe:
    """Validate the tables of a recipe; `where` names their file in the error line."""
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise InputError(f"{where}: {first_line(error, Recipe)}") from None


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _find(source: str | Path | None) -> Path:
    if source is None:
        return QUICKSTART
    path = Path(source)
    if path.is_file():
        return path
    packaged = RECIPES / f"{source}.toml"
    if path.name == str(source) and packaged.is_file():
        return packaged
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; a recipe is a TOML file")
    raise InputError(
        f"{path}: no such recipe; name a TOML file, or one of {', '.join(recipe_names())}"
    )


def parse_value(item: str, option: str, form: str = "KEY=VALUE") -> tuple[str, Any]:
    """`key=value` of a command-line option, split; the value is TOML, a bare word a string. Errors:
    InputError naming the option.
    """
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise InputError(f"{option} {item}: write {option} {form}")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text.strip()


def _with_set(recipe: Recipe, item: str) -> Recipe:
    key, value = parse_value(item, "--set", "section.key=value, e.g. --set masks.params=0.3")
    tables = recipe.plain()
    *sections, last = key.split(".")
    if sections == ["masks"] and last in ("params", "macs", "lambda"):
        # One of the three says how much goes; naming another on the command line means that one
        # instead.
        for other in ("params", "macs", "lambda"):
            tables["masks"].pop(other, None)
    table = tables
    for section in sections:
        inner = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(
                f"--set {item}: `{section}` is a value, not a table; write section.key=value"
            )
        table = inner
    table[last] = value
    return parse_recipe(tables, where=f"--set {item}")


def _toml(tables: Mapping[str, Any], prefix: str = "") -> str:
    lines = [
        f"{_key(key)} = {_value(value)}"
        for key, value in tables.items()
        if not isinstance(value, dict)
    ]
    text = "".join(f"{line}\n" for line in lines)
    for key, value in tables.items():
        if isinstance(value, dict):
            path = f"{prefix}{_key(key)}"
            text += f"\n[{path}]\n" + _toml(value, prefix=f"{path}.")
    return text


def _key(key: str) -> str:
    bare = key and all(sign.isascii() and (sign.isalnum() or sign in "-_") for sign in key)
    return key if bare else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves bare and TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
        )
    raise InputError(f"a value of type {type(value).__name__} cannot be written as TOML: {value!r}")
