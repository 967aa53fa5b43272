"""Training on a GPU: equal masks, images per second and memory by precision, resuming elsewhere.

Every check that needs what this machine lacks is listed as skipped, with the reason.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import DataSplits, Split
from vitrim.compress.lift import lift
from vitrim.compress.masks.budget import Budget
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.train.dense import DenseTask, Distillation
from vitrim.compress.train.devices import Placement, choose_placement
from vitrim.compress.train.loop import fit
from vitrim.compress.train.mask_settings import MaskSettings
from vitrim.compress.train.mask_task import MaskTask
from vitrim.compress.train.processes import ALONE
from vitrim.compress.train.settings import TrainSettings
from vitrim.compress.train.steps import Stepper

Result = dict[str, Any]
SIZE, CLASSES = 32, 4
TINY: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "num_classes": CLASSES,
}
EPOCHS, IMAGES, BATCH = 6, 1024, 64
# Weights after some hundred steps differ in the last bits that a device rounds otherwise.
TOLERANCE = 2e-2


class Skipped(Exception):
    """A check that this machine cannot do; the text is the reason."""


def bands(images: int = IMAGES) -> DataSplits:
    """Images of four classes: a bright band in one of four places, with noise."""
    generator = np.random.default_rng(0)
    size = Preprocessing(channels=3, height=SIZE, width=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)

    def split(count: int) -> Split:
        targets = np.arange(count) % CLASSES
        pixels = generator.integers(0, 120, (count, 3, SIZE, SIZE), dtype=np.uint8)
        for pixel, target in zip(pixels, targets, strict=True):
            pixel[:, 8 * target : 8 * target + 8] += 60
        return Split(pixels, targets.astype(np.int64), size)

    labels = tuple("abcd")
    return DataSplits("bands", split(images), split(256), split(256), labels, size)


def tiny() -> CompactModel:
    """A network for the checks of equality."""
    torch.manual_seed(0)
    return lift(timm.create_model("vit_tiny_patch16_224", **TINY))


def gpu(precision: Any = "fp32", **options: bool) -> Placement:
    """The GPU of this machine."""
    if not torch.cuda.is_available():
        raise Skipped(f"torch {torch.__version__} finds no GPU (CUDA)")
    return choose_placement("cuda", precision, **options)[0]


def learned(placement: Placement, folder: Path, *, stop: int | None = None) -> MaskTask:
    """Masks learned with a budget and a teacher; `stop` ends after that epoch, to be resumed."""
    model = tiny()
    settings = MaskSettings(budget=Budget("params", 0.3), update_steps=4)
    teacher = Distillation(copy.deepcopy(model), alpha=0.5)
    task = MaskTask(model, settings, EPOCHS * (IMAGES // BATCH), distillation=teacher)
    training = TrainSettings(EPOCHS, BATCH, augmentation="none", quiet=True, placement=placement)
    if stop is not None:
        after_step = task.after_step

        def interrupted(step: int) -> None:
            if step == stop * (IMAGES // BATCH):
                raise KeyboardInterrupt
            after_step(step)

        task.after_step = interrupted  # type: ignore[method-assign]
        try:
            fit(task, bands(), training, folder)
        except KeyboardInterrupt:
            return task
    fit(task, bands(), training, folder, resume=True)
    return task


def compared(one: MaskTask, other: MaskTask) -> Result:
    """How far two trainings agree: units of the masks, and logits of the cut models."""
    masks = [(keep, other.mask().kept[dimension][site]) for dimension, site, keep in one.mask()]
    images = bands().test.floats()
    with torch.no_grad():
        logits = [task.result()(images) for task in (one, other)]
    error = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    unequal = sum(int((a != b).sum()) for a, b in masks)
    return {
        "units": sum(len(a) for a, _ in masks),
        "unequal_units": unequal,
        "relative_error": error,
        "shrunk": list(one.progress.shrunk),
        "passed": unequal == 0 and error < TOLERANCE,
    }


def equal_masks() -> Result:
    """Masks learned on the GPU are those of the CPU."""
    device = gpu()
    with tempfile.TemporaryDirectory() as name:
        here = learned(Placement(), Path(name) / "cpu")
        return compared(here, learned(device, Path(name) / "cuda"))


def resumed_on_the_cpu() -> Result:
    """A checkpoint of the GPU continues on the CPU."""
    return _resumed(gpu(), Placement())


def resumed_on_the_gpu() -> Result:
    """A checkpoint of the CPU continues on the GPU."""
    return _resumed(Placement(), gpu())


def _resumed(first: Placement, second: Placement) -> Result:
    with tempfile.TemporaryDirectory() as name:
        whole = learned(first, Path(name) / "whole")
        learned(first, Path(name) / "broken", stop=EPOCHS // 2)
        return compared(whole, learned(second, Path(name) / "broken"))


def two_gpus() -> Result:
    """Two processes, each on a GPU, learn the masks of one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        raise Skipped(f"{count} GPUs, and two are needed")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for processes in (1, 2):
            folder = Path(name) / f"{processes}"
            command = [sys.executable, "-m", "vitrim", "compress", "fashion_mnist", "--quiet"]
            command += ["--set", "data.name=quickstart", "--set", "train.device=cuda"]
            command += ["--out", str(folder), "--processes", str(processes)]
            started = time.perf_counter()
            subprocess.run(command, check=True, env=os.environ)
            found[processes] = (
                (folder / "mask.safetensors").read_bytes(),
                time.perf_counter() - started,
            )
    return {
        "seconds_1": found[1][1],
        "seconds_2": found[2][1],
        "passed": found[1][0] == found[2][0],
    }


def speed_rows(name: str, batch: int, seconds: float) -> list[Result]:
    """Images per second and memory of a training step.

    Args:
        name: A timm model.
        batch: The images of a step.
        seconds: How long each row is timed.

    Returns:
        A row for each of dense and mask-learning steps, precision, and compilation.
    """
    rows = []
    for task in ("dense", "masks"):
        for precision in ("fp32", "bf16", "fp16"):
            for compiled in (False, True):
                place = gpu(precision, compile=compiled, channels_last=True)
                where = {"task": task, "precision": precision, "compiled": compiled}
                try:
                    rows.append({**where, **_speed(name, task, place, batch, seconds)})
                except (RuntimeError, torch.OutOfMemoryError) as problem:
                    rows.append({**where, "error": " ".join(str(problem).split())[:200]})
    return rows


def _speed(name: str, kind: str, place: Placement, batch: int, seconds: float) -> Result:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = lift(timm.create_model(name))
    task: Any = DenseTask(model)
    if kind == "masks":
        task = MaskTask(model, MaskSettings(budget=Budget("macs", 0.5)), 10**6)
    channels, height, width = model.architecture.image
    images = place.images(torch.randn(batch, channels, height, width))
    targets = place.moved(torch.randint(0, model.architecture.classes, (batch,)))
    task.place(place)
    task.train_mode()
    stepper = Stepper(task, TrainSettings(1, batch, placement=place), ALONE)
    stepper.use(task.optimizer())
    for step in range(5):
        loss, _ = stepper.step(images, targets, step, "")
    float(loss)
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        loss, _ = stepper.step(images, targets, 5 + steps, "")
        torch.cuda.synchronize()
        steps += 1
    spent = time.perf_counter() - started
    return {
        "model": name,
        "batch": batch,
        "images_per_s": steps * batch / spent,
        "loss": float(loss),
        "device_memory_peak_bytes": torch.cuda.max_memory_allocated(),
    }


CHECKS: tuple[Callable[[], Result], ...] = (
    equal_masks,
    resumed_on_the_cpu,
    resumed_on_the_gpu,
    two_gpus,
)


def measure(name: str, batch: int, seconds: float) -> Result:
    """Do every check and every timing that this machine can do.

    Args:
        name: The timm model of the timings.
        batch: Its images in a step.
        seconds: How long each timing takes.

    Returns:
        `checks` by name, `rows`, and `skipped`: the reason by name.
    """
    checks: Result = {}
    rows: list[Result] = []
    skipped: dict[str, str] = {}
    for check in CHECKS:
        try:
            checks[check.__name__] = check()
        except Skipped as problem:
            skipped[check.__name__] = str(problem)
    try:
        rows = speed_rows(name, batch, seconds)
    except Skipped as problem:
        skipped["speed_rows"] = str(problem)
    return {"checks": checks, "rows": rows, "skipped": skipped}
