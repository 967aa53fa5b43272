"""The tables of a recipe: every key with its type, its range, its default and its meaning."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..compress.network.patch_grid import parse_image_size
from ..core.errors import InputError
from ..targets.catalog import load_target

_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on"), "true"),
    **dict.fromkeys(("false", "no", "off"), "false"),
}
_LEAVE_OUT = "leave it out"
_WITHOUT_EFFECT = {
    "drop_path_rate": "set train.drop_path",
    "patch_drop_rate": "set train.patch_drop",
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate"), _LEAVE_OUT),
    "attn_drop_rate": _LEAVE_OUT,
}
Augmentation = Literal["none", "flip", "erasing", "light", "thesis", "imagenet"]
Precision = Literal["fp32", "fp16", "int8", "int8-static", "int8-weights", "int4-weights"]


class Section(BaseModel):
    """A table of a recipe: unknown keys are errors, types are strict, values are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True
    )


class DataSection(Section):
    """The images and their splits."""

    name: str = Field(
        "quickstart",
        min_length=1,
        description="quickstart (embedded), fashion-mnist, cifar10, another data set of the "
        "Hugging Face hub, imagefolder:PATH, parquet:PATH, arrow:PATH, disk:PATH (save_to_disk) or "
        "webdataset:PATH (tars)",
    )
    seed: int = Field(
        0,
        ge=0,
        description="seed of the validation split; separate from train.seed, so that training "
        "seeds are compared on the same data",
    )
    validation: float = Field(
        0.1,
        gt=0.0,
        lt=1.0,
        description="share of the training images that is held out for masks and early stopping",
    )
    limit: int | None = Field(
        None,
        gt=0,
        description="maximum number of training images, for a quick trial; with streaming: images "
        "of an epoch",
    )
    resize: Literal["squash", "center-crop"] = Field(
        "squash",
        description="how an image becomes the model's input in evaluation: squash scales it "
        "whatever its shape; center-crop scales the shorter side to size / crop_pct of timm's data "
        "config (248 or 256 for 224) and crops the centre, as ImageNet's figures are measured",
    )
    cache_gb: float = Field(
        16.0,
        ge=0.0,
        description="largest size of all decoded images in units of 2^30 bytes; larger data sets "
        "are decoded while they are read (`train.workers`); 0: never decode in advance",
    )
    streaming: bool = Field(
        False,
        description="read the training images in the order of the shards, without a copy on disk: "
        "hub names, parquet:PATH, webdataset:PATH",
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="an image that cannot be decoded ends the run, or is skipped and counted",
    )


class ModelSection(Section):
    """The dense Vision Transformer to compress."""

    name: str = Field("vit_tiny_patch16_224", min_length=1, description="a timm model name")
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments for timm.create_model, e.g. embed_dim = 128",
    )
    pretrained: bool = Field(
        False, description="start from timm's published weights (downloaded once)"
    )
    checkpoint: str | None = Field(
        None,
        min_length=1,
        description="a trained checkpoint: `embedded` for the one in the package, a .safetensors "
        "or .pth file, or a folder that vitrim saved",
    )
    new_head: bool = Field(
        False,
        description="start a new classifier on the checkpoint or the published weights, for "
        "another set of classes; `baseline.epochs` trains it",
    )

    @field_validator("overrides")
    @classmethod
    def _plain_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for key, value in overrides.items():
            word = value.strip().lower() if isinstance(value, str) else ""
            if word in _SWITCHES:
                # Python takes every text for true.
                raise ValueError(
                    f"{key} is the text {value!r}; write {key} = {_SWITCHES[word]}, without quotes"
                )
            if word in ("none", "null"):
                raise ValueError(f"{key} is the text {value!r}; leave {key} out for its default")
            if word[:1] in ("(", "[") and word[-1:] in (")", "]"):
                listed = word.strip("()[]")
                raise ValueError(
                    f"{key} is the text {value!r}; write {key} = [{listed}], without quotes"
                )
            if key in _WITHOUT_EFFECT and value:
                raise ValueError(
                    f"{key} has no effect, because the network is read before it is trained; "
                    f"{_WITHOUT_EFFECT[key]}"
                )
        classes = overrides.get("num_classes", 0)
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
            raise ValueError(
                f"num_classes is {classes!r}; write a whole number, 0 for a model without a "
                "classifier"
            )
        return overrides

    @field_validator("checkpoint")
    @classmethod
    def _expanded(cls, path: str | None) -> str | None:
        return None if path is None else os.path.expanduser(path)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("`pretrained` and `checkpoint` both name the weights; keep one")
        return self


class BaselineSection(Section):
    """Training of the dense model, before compression. `epochs = 0` keeps its weights unchanged."""

    epochs: int = Field(
        0, ge=0, description="epochs of dense training; 0 for weights that are trained already"
    )
    lr: float = Field(1e-3, gt=0.0, description="peak learning rate")
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay of the weights")
    warmup_epochs: int = Field(2, ge=0, description="epochs of learning rate warm-up")
    patience_epochs: int = Field(
        20, gt=0, description="stop after this many epochs without a better validation top-1"
    )
    augmentation: Augmentation = Field(
        "light",
        description="none, flip, erasing, light (shift, flip, erasing), thesis (RandAugment, "
        "MixUp, CutMix, erasing), or imagenet (the same with random resized crops, as DeiT was "
        "trained); with none and flip the outputs of a teacher are computed once",
    )


class FinetuneSection(Section):
    """Training of the compact model, after the cut."""

    epochs: int = Field(
        20, ge=0, description="maximum number of epochs; 0 keeps the weights after the cut"
    )
    lr: float = Field(5e-4, gt=0.0, description="peak learning rate, cosine without restarts")
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay of the weights")
    warmup_epochs: int = Field(0, ge=0, description="epochs of learning rate warm-up")
    patience_epochs: int = Field(
        10, gt=0, description="stop after this many epochs without a better validation top-1"
    )
    augmentation: Augmentation = Field("light", description="augmentation during fine-tuning")
    rewind: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="learning-rate rewinding: the rate takes the last part of the cosine of a "
        "longer training with the peak `lr`, this share of it, e.g. 0.25; absent: the whole cosine",
    )

    @model_validator(mode="after")
    def _no_warmup(self) -> Self:
        if self.rewind is not None and self.warmup_epochs:
            raise ValueError("`rewind` begins behind the warm-up; leave `warmup_epochs` out")
        return self


class DistillSection(Section):
    """Knowledge distillation from the dense model, during mask learning and fine-tuning."""

    enabled: bool = Field(True, description="`--no-distill` sets it to false")
    alpha: float = Field(
        0.5, ge=0.0, le=1.0, description="share of the distillation loss in the total loss"
    )
    temperature: float = Field(2.0, gt=0.0, description="softmax temperature of both outputs")


class ExportSection(Section):
    """The artifacts of the run."""

    target: str = Field(
        "host",
        min_length=1,
        description="a target name (`vitrim targets list`), the path of a target TOML, or host, "
        "this machine",
    )
    precisions: tuple[Precision, ...] = Field(
        ("fp32", "int8"), strict=False, min_length=1, description="precisions of the compact model"
    )
    runtimes: tuple[str, ...] = Field(
        ("onnxruntime",),
        strict=False,
        min_length=1,
        description="runtimes to export for; every artifact is compared with the baseline of the "
        "first one",
    )
    batch: int | Literal["dynamic"] = Field(1, description="images per inference, or dynamic")
    image_size: tuple[int, int] | None = Field(
        None,
        strict=False,
        description='resize the artifacts to another height and width, 160 or "160x192", without '
        "training; absent: the size of training",
    )
    calibration_images: int = Field(
        64, gt=0, description="validation images for parity figures and int8 calibration"
    )
    outputs: tuple[str, ...] = Field(
        ("logits",),
        strict=False,
        description="what the artifacts return: logits, which a run measures the accuracy of, "
        "features, patches, tokens, blocks.8 (the stream after block 8, counted from 0)",
    )

    @field_validator("outputs")
    @classmethod
    def _known_outputs(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from ..compress.network.named_outputs import require_output_names

        try:
            names = require_output_names(names)
        except InputError as error:
            raise ValueError(str(error).removeprefix("outputs: ")) from None
        if "logits" not in names:
            raise ValueError(
                "a run measures the accuracy of its artifacts; add 'logits', or export the saved "
                "model with vitrim export --output"
            )
        return names

    @field_validator("target")
    @classmethod
    def _existing_target(cls, name: str) -> str:
        return _existing(name)

    @field_validator("precisions", "runtimes")
    @classmethod
    def _no_duplicates(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError(f"a {(info.field_name or '').removesuffix('s')} is listed twice")
        return names

    @field_validator("image_size", mode="before")
    @classmethod
    def _height_and_width(cls, size: Any) -> tuple[int, int] | None:
        try:
            return None if size is None else parse_image_size(size)
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("batch")
    @classmethod
    def _positive_batch(cls, batch: int | str) -> int | str:
        if isinstance(batch, int) and batch < 1:
            raise ValueError("a batch holds at least one image")
        return batch


class BenchSection(Section):
    """The measurement of the artifacts."""

    threads: int = Field(1, gt=0, description="threads of the runtime")
    time_limit_s: float = Field(
        30.0, gt=0.0, description="time limit in seconds of the timing of all artifacts together"
    )
    top1_images: int | None = Field(
        None, gt=0, description="test images for the top-1 of the timed artifact; absent: all"
    )
    on: str | None = Field(
        None,
        min_length=1,
        description="the device that measures the artifacts, and the cuts to a latency: "
        "ssh://user@host[:port], adb://SERIAL or tvm-rpc://tracker:port/key; absent: this machine",
    )
    python: str | None = Field(
        None,
        min_length=1,
        description="Python interpreter on the device, with numpy and the runtime; absent: python3",
    )
    runtime_library: str | None = Field(
        None, min_length=1, description="libonnxruntime.so for a device without Python"
    )
    ssh_options: tuple[str, ...] | None = Field(
        None, strict=False, description='options for ssh, such as ["-i key"] or ["-F config"]'
    )

    @field_validator("on")
    @classmethod
    def _elsewhere(cls, address: str | None) -> str | None:
        return None if address == "host" else address

    @field_validator("runtime_library")
    @classmethod
    def _expanded(cls, path: str | None) -> str | None:
        return None if path is None else os.path.expanduser(path)

    @model_validator(mode="after")
    def _valid_device(self) -> Self:
        # A check of the whole table, whose error does not repeat an address with a password.
        if self.on is None:
            for key in ("python", "runtime_library", "ssh_options"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to a device; add on, or leave {key} out")
            return self
        from ..bench.remote.reach import EMULATED, require_address

        if self.on == EMULATED:
            raise ValueError(
                f"on = {self.on!r} is emulated, and has no latency; measure the artifacts of the "
                f"run there with vitrim bench --on {EMULATED}"
            )
        try:
            require_address(self.on)
        except InputError as error:
            raise ValueError(str(error).replace("--on ", "on = ", 1)) from None
        return self


class ReportSection(Section):
    """Contents of the report beyond the measurements."""

    estimate_for: tuple[str, ...] = Field(
        ("rpi-zero-2w", "rpi4", "rpi5", "snapdragon-8-gen-2", "stm32h7"),
        strict=False,
        description="devices to estimate fit and latency for, without measuring on them: target "
        "names (`vitrim targets list`) or paths of target TOMLs; [] for none",
    )

    @field_validator("estimate_for")
    @classmethod
    def _existing_targets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a target is listed twice")
        return tuple(map(_existing, names))


def _existing(target: str) -> str:
    """The name or the path of a target, with `~` expanded."""
    target = os.path.expanduser(target)
    try:
        load_target(target)
    except InputError as error:
        raise ValueError(str(error)) from None
    return target
