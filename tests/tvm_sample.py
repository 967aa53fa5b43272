"""Compiled artifacts of a tiny network, made without torch's exporter, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vitrim
from numpy.typing import NDArray
from tiny_models import tiny_vit
from vitrim.export.artifact import Artifact, entry_for
from vitrim.export.forms import Form, write_network
from vitrim.export.manifest import CpuFeatures, Manifest, PreprocessingSpec, TensorSpec
from vitrim.export.parity import Probe
from vitrim.export.runtimes import RuntimeFiles, Source, runtime_named

LABELS = ("ankle boot", "coat", "dress", "shirt", "bag")
PREPROCESSING = {
    "channels": 3,
    "height": 16,
    "width": 16,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 1.0],
    "interpolation": "bilinear",
}


def images(count: int = 3, seed: int = 0) -> NDArray[Any]:
    """Noise (count, 3, 16, 16), the size of the tiny network's input."""
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16), dtype=np.float32)


def expected(given: NDArray[Any]) -> NDArray[Any]:
    """Torch's logits."""
    with torch.no_grad():
        found: NDArray[Any] = tiny_vit()(torch.from_numpy(given)).numpy()
    return found


def source(
    target: str,
    *,
    batch: int = 1,
    threads: int = 1,
    options: Mapping[str, str] | None = None,
    lifted: bool = True,
) -> Source:
    """The source that the exporter passes to a runtime."""
    pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")
    compact = vitrim.lift(tiny_vit())
    graph = write_network(compact, Form(rows="batch", norm="layer", stem="matrix"), batch=batch)
    probe = Probe.of(expected, (3, 16, 16), images())
    return Source(
        model=tiny_vit(),
        compact=compact if lifted else None,
        make_graph=lambda: graph,
        shape=(3, 16, 16),
        batch=batch,
        target=target,
        threads=threads,
        precision="fp32",
        images=None,
        probe=probe,
        options=options or {},
    )


def compiled(folder: Path, target: str = "host", **settings: Any) -> RuntimeFiles:
    """A tiny network compiled for a target."""
    folder.mkdir(parents=True)
    return runtime_named("tvm").write(source(target, **settings), folder)


def job_of(folder: Path, written: RuntimeFiles, batch: int = 1, threads: int = 1) -> dict[str, Any]:
    """The job that opens the files."""
    shape = [batch, 3, 16, 16]
    session = dict(written.session)
    return {
        "runtime": "tvm",
        "model": str(folder / written.main),
        "threads": threads,
        "session": session,
        "input": {"name": "images", "shape": shape},
    }


def artifact_in(folder: Path, target: str = "host") -> Artifact:
    """An artifact with a manifest, and with the objects that a bundle links."""
    written = compiled(folder, target, options={"static": "yes"})
    files = [
        entry_for(folder, written.main, "model"),
        *(entry_for(folder, path, role) for path, role in written.files),
    ]
    manifest = Manifest(
        name="tiny",
        inputs=(TensorSpec(name="images", shape=(1, 3, 16, 16), layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(1, 5), layout="NC"),),
        preprocessing=PreprocessingSpec.model_validate(PREPROCESSING),
        labels=LABELS,
        target=target,
        cpu=CpuFeatures(needs=written.needs),
        runtime="tvm",
        precision="fp32",
        form="torch",
        session=dict(written.session),
        files=tuple(files),
    )
    return Artifact.write(folder, manifest)
