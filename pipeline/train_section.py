"""The table `[train]` of a recipe, and which of its keys do not change the result of a run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from .recipe_sections import Section

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
# They determine where and how fast training runs, so that a run continues with other ones.
FREE_KEYS = (
    *("device", "precision", "compile", "channels_last", "threads", "workers"),
    *("checkpoint_minutes", "trackers"),
)


class TrainSection(Section):
    """Settings of every training in this recipe."""

    batch_size: int = Field(128, gt=0, description="images per step")
    threads: int | None = Field(
        None, gt=0, description="threads of torch; absent: the number of cores"
    )
    seed: int = Field(7, ge=0, description="seed of weights, batch order and augmentation")
    label_smoothing: float = Field(
        0.1, ge=0.0, lt=1.0, description="label smoothing of the task loss"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, the usual choice, or muon for short trainings of small models",
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest", description="argument of torch.set_float32_matmul_precision"
    )
    device: DeviceName = Field(
        "auto",
        description="where training runs: auto is cuda, else mps, else cpu; another one must be "
        "there. A run resumes on another device",
    )
    precision: PrecisionName = Field(
        "fp32",
        description="type of the matrix products, by autocast; weights stay fp32. bf16 needs its "
        "instructions, fp16 a GPU",
    )
    compile: bool = Field(
        False, description="compile the forward pass with torch.compile; pays in long trainings"
    )
    channels_last: bool = Field(
        False, description="memory format of the batches; for patch embeddings on GPUs"
    )
    accumulate: int = Field(
        1,
        gt=0,
        description="divide each batch in this many parts, one after the other, to need less "
        "memory; the step stays that of the whole batch",
    )
    grad_clip: float = Field(
        1.0, ge=0.0, description="largest norm of the gradient of a step; 0: no limit"
    )
    ema: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="in [baseline] and [finetune]: decay of a moving average of the weights, e.g. "
        "0.9999, which is kept in place of them; absent: none",
    )
    layer_decay: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="in [baseline] and [finetune]: learning rate of each block relative to the "
        "next one, e.g. 0.75",
    )
    drop_path: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="in [baseline] and [finetune]: probability with which the last block is "
        "skipped, rising from 0 at the first one",
    )
    patch_drop: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="in [baseline] and [finetune]: share of the patches of an image, drawn anew "
        "each time, that training leaves out",
    )
    workers: int = Field(
        0,
        ge=0,
        description="processes that read and decode images, for data that is not decoded in "
        "advance; 0: the training process",
    )
    checkpoint_minutes: float = Field(
        30.0,
        gt=0.0,
        description="minutes between checkpoints within an epoch; one is written after each epoch",
    )
    trackers: tuple[TrackerName, ...] = Field(
        (),
        strict=False,
        description="where to log each epoch, through accelerate: tensorboard, wandb, mlflow",
    )

    @field_validator("trackers")
    @classmethod
    def _no_duplicates(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a tracker is listed twice")
        return names

    @model_validator(mode="after")
    def _whole_parts(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size} cannot be divided in {self.accumulate} equal "
                "parts (accumulate)"
            )
        if (self.device, self.precision) == ("cpu", "fp16"):
            raise ValueError(
                'precision = "fp16" needs a GPU; with device = "cpu" write "bf16" or "fp32"'
            )
        return self
