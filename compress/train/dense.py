"""Training of a whole model: the baseline, and fine-tuning with or without a teacher.

Distillation: loss = (1 - alpha) * CE(logits, targets)
+ alpha * T^2 * KL(softmax(teacher / T) || softmax(logits / T)).

References:
    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.errors import InputError
from ..masks.weight_mask import WeightMask
from ..network.modules.model import CompactModel
from .devices import Placement, tensors_to_cpu
from .held_zeros import HeldZeros
from .optimizers import OptimizerName, make_optimizer
from .regularization import DenseOptions, add_drop_path, add_patch_drop
from .task import EpochEnd

# Of the sine-cosine position table.
AMPLITUDE, TEMPERATURE = 0.7, 100.0


@dataclass(frozen=True)
class Distillation:
    """Learning from the outputs of a teacher.

    Attributes:
        teacher: The trained model.
        alpha: The share of the distillation loss, between 0 and 1.
        temperature: The temperature of both outputs, above 0.
        known: Logits of the teacher by `image_key`, for images that are not augmented; others are
            computed in every step, and all of them on a GPU. See `teacher_outputs`.
    """

    teacher: nn.Module
    alpha: float = 0.9
    temperature: float = 2.0
    known: Mapping[bytes, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0 or self.temperature <= 0.0:
            raise InputError(
                f"distillation: alpha = {self.alpha} must lie in [0, 1] and "
                f"temperature = {self.temperature} above 0"
            )


class DenseTask:
    """Train every parameter of a model.

    Args:
        model: The model to train, in place.
        phase: `baseline` or `finetune`, the name in history and progress.
        lr: The peak learning rate.
        weight_decay: For matrices and kernels.
        label_smoothing: For class numbers as targets.
        distillation: The teacher (default: none).
        metrics: Constant figures for the history of this phase, such as params and macs.
        optimizer: The name of the optimizer.
        options: Averaged weights, rates by depth, and stochastic depth (default: none of them).
        weights: Weights that it does not keep are set to zero, and stay zero (default: all kept).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        phase: str = "baseline",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        distillation: Distillation | None = None,
        metrics: dict[str, float] | None = None,
        optimizer: OptimizerName = "adamw",
        options: DenseOptions | None = None,
        weights: WeightMask | None = None,
    ) -> None:
        self.model, self.phase, self.optimizer_name = model, phase, optimizer
        self.lr, self.weight_decay = lr, weight_decay
        self.label_smoothing, self.distillation = label_smoothing, distillation
        self.metrics, self.options = dict(metrics or {}), options or DenseOptions()
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self.held = None if weights is None else HeldZeros(model, weights)
        self.average: ModelEmaV3 | None = None
        if self.options.ema is not None:
            self.average = ModelEmaV3(model, decay=self.options.ema, use_warmup=True)
        self._dropping = add_drop_path(model, self.options.drop_path)
        add_patch_drop(model, self.options.patch_drop)

    def place(self, placement: Placement) -> None:
        """Move the model, its average and the teacher to a device."""
        for module in (self.model, self.average):
            if module is not None:
                module.to(placement.device)
        if self.held is not None:
            self.held.place(placement.device)
        if self.distillation is not None:
            self.distillation.teacher.to(placement.device)
        self._compiled = torch.compile(self.model) if placement.compile else None

    def trained(self) -> nn.Module:
        """The model."""
        return self.model

    def observed(self) -> Sequence[nn.Parameter]:
        """None: every parameter is in the optimizer."""
        return ()

    def optimizer(self) -> Optimizer:
        """A new optimizer over all parameters."""
        decay = self.options.layer_decay
        return make_optimizer(self.optimizer_name, self.model, self.lr, self.weight_decay, decay)

    def train_mode(self) -> None:
        """Set the model to training mode."""
        self.model.train()

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and its logits (B, classes)."""
        forward = self.model if self._compiled is None else self._compiled
        logits: Tensor = forward(images)
        return task_loss(logits, targets, images, self.label_smoothing, self.distillation), logits

    def after_step(self, step: int) -> None:
        """Set weights to zero again that a mask removes, and update the average of the weights."""
        if self.held is not None:
            self.held.apply(self.model)
        if self.average is not None:
            self.average.update(self.model, step=step)

    def after_epoch(self, epoch: int, val_top1: float) -> EpochEnd:
        """The constant metrics; the best epoch is that of the highest top-1."""
        return EpochEnd(metrics=self.metrics)

    def model_for_eval(self) -> nn.Module:
        """The model itself, or the one with the averaged weights."""
        return self.model if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """The parameters and buffers of the model, and of the average of its weights."""
        state = {"model": tensors_to_cpu(dict(self.model.state_dict()))}
        if self.average is not None:
            state["average"] = tensors_to_cpu(dict(self.average.module.state_dict()))
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the parameters and buffers."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])

    def finish(self) -> None:
        """Give the model the averaged weights, and end stochastic depth and patch dropout."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        if self.held is not None:
            self.held.apply(self.model)
            self.held.release()
        for handle in self._dropping:
            handle.remove()
        if isinstance(self.model, CompactModel):
            self.model.patch_drop = None


def task_loss(
    logits: Tensor,
    targets: Tensor,
    images: Tensor,
    label_smoothing: float,
    distillation: Distillation | None,
) -> Tensor:
    """Cross-entropy, combined with the distillation loss if there is a teacher.

    Args:
        logits: (B, classes), the outputs of the student.
        targets: Class numbers (B,), or soft targets (B, classes) with smoothing applied.
        images: (B, C, H, W), the inputs of the teacher.
        label_smoothing: For class numbers.
        distillation: The teacher, or None.

    Returns:
        A scalar, in nats.
    """
    own = F.cross_entropy(
        logits, targets, label_smoothing=label_smoothing if targets.ndim == 1 else 0.0
    )
    if distillation is None or distillation.alpha == 0.0:
        return own
    return (1.0 - distillation.alpha) * own + distillation.alpha * distillation_loss(
        logits, images, distillation
    )


def image_key(image: Tensor) -> bytes:
    """A hash of the pixels of one image."""
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()


def teacher_outputs(
    teacher: nn.Module, batches: Iterable[Tensor], report: Callable[[int], None]
) -> dict[bytes, Tensor]:
    """Compute the logits of a teacher once for a whole training.

    The batches are the same in every run, so that a resumed training learns from equal numbers.

    Args:
        teacher: The trained model.
        batches: The images, (B, C, H, W) each, as the training loop passes them to the task.
        report: Called with the number of images that are done.

    Returns:
        Logits (classes,) by `image_key`.
    """
    found: dict[bytes, Tensor] = {}
    teacher.eval()
    done = 0
    with torch.no_grad():
        for images in batches:
            for image, logits in zip(images, teacher(images), strict=True):
                found[image_key(image)] = logits
            done += len(images)
            report(done)
    return found


def _teacher_logits(images: Tensor, distillation: Distillation) -> Tensor:
    if distillation.known and images.device.type == "cpu":
        found = [distillation.known.get(image_key(image)) for image in images]
        if all(logits is not None for logits in found):
            return torch.stack([logits for logits in found if logits is not None])
    distillation.teacher.eval()
    with torch.inference_mode():
        outputs: Tensor = distillation.teacher(images)
    # Copied out of inference mode, so that the backward pass may keep it.
    return outputs.clone()


def distillation_loss(logits: Tensor, images: Tensor, distillation: Distillation) -> Tensor:
    """T^2 * KL(teacher || student), averaged over the batch; a scalar, in nats."""
    temperature = distillation.temperature
    wanted = F.log_softmax(_teacher_logits(images, distillation) / temperature, dim=1)
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, dim=1), wanted, reduction="batchmean", log_target=True
    )


def init_position_embedding(model: nn.Module) -> bool:
    """Initialise the learned `pos_embed` of a timm ViT with a sine-cosine table.

    timm draws it with a standard deviation of 0.02, but patch tokens of small images have about
    0.5, so that positions are invisible in the first thousand steps. The table has a comparable
    amplitude and stays trainable. On Fashion-MNIST after 300 steps of 128 images the training loss
    is 1.20 instead of 1.34.

    Returns:
        Whether there is such a table; if not, the model is unchanged.

    References:
        Beyer, Zhai, Kolesnikov 2022, "Better plain ViT baselines for ImageNet-1k".
    """
    table = getattr(model, "pos_embed", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(table, nn.Parameter) or grid is None or table.ndim != 3 or table.shape[2] % 4:
        return False
    patches = grid[0] * grid[1]
    if table.shape[1] < patches:
        return False
    with torch.no_grad():
        # Class and other prefix tokens come first and are not changed.
        sine_cosine = build_sincos2d_pos_embed(list(grid), table.shape[2], temperature=TEMPERATURE)
        table[0, -patches:] = AMPLITUDE * sine_cosine
    return True
