"""The last links of the chain: artifacts from models, measurements from artifacts, and the report
of them all.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..bench.report.model import Report
from ..bench.results.measurement import Measurement
from ..compress.data.splits import DataSplits, Split, stratified_indices
from ..compress.network.architecture import Architecture
from ..compress.network.count import count_macs, count_params
from ..compress.network.modules.model import CompactModel
from ..compress.network.patch_fit import shown
from ..compress.surgery.image_size import at_image_size
from ..core.console import status
from ..core.storage import replace_file
from ..export.artifact import Artifact
from .artifacts import ONNX_RUNTIME, planned_artifacts
from .estimates import run_estimates
from .kept_units import kept_branches
from .recipe import Recipe
from .run_folder import RunFolder
from .training_steps import Cut

ARTIFACTS, MEASUREMENTS = "artifacts", "measurements"
SAMPLE_SEED = 0
VERSIONED = ("torch", "timm", "numpy", "onnx", "onnxruntime", "onnxsim")


def export_all(
    baseline: CompactModel,
    compact: CompactModel,
    data: DataSplits,
    recipe: Recipe,
    folder: RunFolder,
    *,
    quiet: bool,
) -> dict[str, Artifact]:
    """Artifacts of both models; parity and int8 calibration on validation images."""
    from ..export.exporter import export
    from ..export.stage_line import stages_shown

    images, _ = sample(data.val, recipe.export.calibration_images).arrays()
    made: dict[str, Artifact] = {}
    for name, plan in planned_artifacts(recipe.export).items():
        status(f"exporting {name}", quiet=quiet)
        with stages_shown(quiet=quiet):
            made[name] = export(
                {"baseline": baseline, "compact": compact}[plan.model],
                folder / f"{ARTIFACTS}/{name}",
                target=recipe.export.target,
                runtime=plan.runtime,
                precision=plan.precision,
                threads=recipe.bench.threads,
                preprocessing=data.preprocessing,
                labels=list(data.labels),
                images=images,
                batch=recipe.export.batch,
                image_size=recipe.export.image_size,
                overwrite=True,
                name=name,
                provenance={
                    "recipe": recipe.name,
                    "seed": str(recipe.train.seed),
                    "data": data.name,
                },
            )
    return made


def load_artifacts(recipe: Recipe, folder: RunFolder) -> dict[str, Artifact]:
    """The artifacts that `export_all` left in the run folder."""
    return {
        name: Artifact.load(folder / f"{ARTIFACTS}/{name}")
        for name in planned_artifacts(recipe.export)
    }


def measure_all(
    artifacts: Mapping[str, Artifact],
    data: DataSplits,
    recipe: Recipe,
    folder: RunFolder,
    *,
    quiet: bool,
) -> dict[str, Measurement]:
    """All artifacts measured in turns on this machine, each with its top-1 on the test images."""
    from ..bench.local.measure import measure_interleaved

    status(f"measuring {', '.join(artifacts)} in turns", quiet=quiet)
    with tempfile.TemporaryDirectory() as aside:
        dataset = write_dataset(data, Path(aside) / "test.npz", recipe.bench.top1_images)
        measured = measure_interleaved(
            artifacts,
            recipe.bench.threads,
            dataset=dataset,
            time_limit_s=recipe.bench.time_limit_s,
            quiet=quiet,
        )
    for name, measurement in measured.items():
        measurement.save(folder / f"{MEASUREMENTS}/{name}.json")
    return measured


def write_dataset(data: DataSplits, path: Path, limit: int | None) -> Path:
    """The test images as the runner reads them: uint8 `images` (N, C, H, W) and int64 `labels`
    (N,).
    """
    images, labels = sample(data.test, limit).batch(slice(None))
    np.savez(path, images=images.numpy(), labels=labels.numpy())
    return path


def sample(split: Split, count: int | None) -> Split:
    """At most `count` images, every class in its own share: the first ones of a folder may all be
    of one class.
    """
    if count is None or count >= len(split):
        return split
    return split.take(stratified_indices(split.targets, count, SAMPLE_SEED)[0])


def load_measurements(recipe: Recipe, folder: RunFolder) -> dict[str, Measurement]:
    """The measurements that `measure_all` left in the run folder."""
    return {
        name: Measurement.load(folder / f"{MEASUREMENTS}/{name}.json")
        for name in planned_artifacts(recipe.export)
    }


def write_report(
    baseline: CompactModel,
    compact: CompactModel,
    cut: Cut,
    artifacts: Mapping[str, Artifact],
    measurements: Mapping[str, Measurement],
    data: DataSplits,
    recipe: Recipe,
    folder: RunFolder,
) -> Report:
    """kept.json, report.json, report.md and report.html in the run folder."""
    from ..bench.report import render

    replace_file(
        folder / "kept.json",
        json.dumps(kept_branches(baseline.architecture, compact.architecture), indent=1) + "\n",
    )
    # As they were exported, so that their multiply-adds go with their latencies.
    architectures = {
        name: _exported(model.architecture, recipe)
        for name, model in (("baseline", baseline), ("compact", compact))
    }
    plans = planned_artifacts(recipe.export)
    models = {
        name: _model_entry(
            architecture,
            [key for key, plan in plans.items() if plan.model == name],
            artifacts,
            measurements,
        )
        for name, architecture in architectures.items()
    }
    parity = {"cut: masked against compact": cut.max_relative_error}
    for name, artifact in artifacts.items():
        parity |= {
            f"{name}: {stage.stage} against {stage.reference}": stage.max_relative_error
            for stage in artifact.manifest.parity
        }
    # Estimates are of ONNX Runtime.
    sizes: dict[tuple[str, str], int] = {
        (plans[name].model, plans[name].precision): measured.file_bytes
        for name, measured in measurements.items()
        if plans[name].runtime == ONNX_RUNTIME
    }
    size = recipe.export.image_size
    resized = (
        f"; artifacts at {shown(size)}, without training there"
        if size and size != baseline.architecture.image[1:]
        else ""
    )
    report = Report.model_validate(
        {
            "schema": "vitrim.report/1",
            "models": models,
            "parity": parity,
            "estimates": run_estimates(
                architectures,
                ("fp32", *recipe.export.precisions),
                recipe.report.estimate_for,
                sizes,
            ),
            "title": recipe.name,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "recipe": recipe.name,
            "data": f"{data.name}: {len(data.train):,} training, {len(data.val):,} validation, {len(data.test):,} test images{resized}",
            "seed": recipe.train.seed,
            "data_seed": recipe.data.seed,
            "versions": versions(),
            "seconds": folder.seconds(),
        }
    )
    replace_file(folder / "report.json", json.dumps(report.to_dict(), indent=1) + "\n")
    render(folder.path)
    return report


def _exported(architecture: Architecture, recipe: Recipe) -> Architecture:
    return (
        architecture
        if recipe.export.image_size is None
        else at_image_size(architecture, recipe.export.image_size)
    )


def versions() -> dict[str, str]:
    """vitrim, Python, and the libraries whose version a figure may depend on."""
    found = {"vitrim": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _model_entry(
    architecture: Architecture,
    names: list[str],
    artifacts: Mapping[str, Artifact],
    measurements: Mapping[str, Measurement],
) -> dict[str, Any]:
    entries = [
        {
            "runtime": artifacts[name].manifest.runtime,
            "precision": artifacts[name].manifest.precision,
            "target": artifacts[name].manifest.target,
            "bytes": measurements[name].file_bytes,
            "measurement": measurements[name].to_dict(),
        }
        for name in names
    ]
    # The model's own accuracy is that of its first artifact: a file that ran, not the network it
    # was written from.
    return {
        "params": count_params(architecture),
        "macs": count_macs(architecture),
        "top1": measurements[names[0]].top1,
        "artifacts": entries,
    }
