"""Artifacts with buckets: one call measures all, with shares, top-1 of each, mean and bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bench_samples import measurement
from pydantic import ValidationError
from selecting_models import divided, noise_images, sharp_selection
from vitrim import BucketedModel, export, measure
from vitrim.bench.local.bucket_jobs import measured_names
from vitrim.bench.local.measure import measure_interleaved
from vitrim.bench.report.model import ArtifactEntry, ModelEntry
from vitrim.bench.report.run import from_measurements
from vitrim.bench.results.buckets import BucketTable, bucket_tables
from vitrim.bench.results.measurement import Bucket, Measurement
from vitrim.cli import call
from vitrim.export.artifact import Artifact
from vitrim.runtimes import EngineError, open_engine

COUNTS = (3, 6, 11)
QUICK: dict[str, Any] = {"least_rounds": 1, "most_rounds": 1, "quiet": True}
NAMES = tuple(f"small-{count}-patches" for count in COUNTS)


@pytest.fixture(scope="module")
def model() -> BucketedModel:
    return divided(sharp_selection(), COUNTS, noise_images(12))


@pytest.fixture(scope="module")
def artifact(model: BucketedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(model, tmp_path_factory.mktemp("artifact") / "small")


@pytest.fixture(scope="module")
def data(model: BucketedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, of which the model classifies all but every fourth as labeled."""
    images = noise_images(20, seed=5)
    with torch.no_grad():
        labels = model(images).argmax(1).numpy()
    labels[::4] = (labels[::4] + 1) % model.architecture.classes
    path = tmp_path_factory.mktemp("data") / "test.npz"
    np.savez(path, images=images.numpy(), labels=labels)
    return path


def test_every_bucket_is_measured_with_its_own_images(
    model: BucketedModel, artifact: Artifact, data: Path
) -> None:
    found = measure_interleaved({"small": artifact}, dataset=data, **QUICK)
    assert tuple(found) == NAMES
    kept = model.bucket_of(noise_images(20, seed=5)).numpy()
    right = np.arange(20) % 4 != 0
    for count, each in zip(COUNTS, found.values(), strict=True):
        own = kept == count
        assert each.bucket == Bucket(
            patches=count,
            counts=COUNTS,
            share=own.mean(),
            images=20,
            source="data set",
        )
        expected = (int(right[own].sum()), int(own.sum())) if own.any() else (None, None)
        assert (each.correct, each.total) == expected
    (table,) = bucket_tables(found.values())
    assert table.name == "small"
    assert table.counted == (15, 20)
    assert table.images == "20 images of the data set"


def test_without_data_shares_are_those_of_the_calibration(artifact: Artifact) -> None:
    found = measure_interleaved({"small": artifact}, **QUICK)
    buckets = artifact.manifest.buckets
    assert buckets is not None
    assert [each.bucket and each.bucket.share for each in found.values()] == list(
        buckets.shares or ()
    )
    (table,) = bucket_tables(found.values())
    assert table.images == "12 images of the calibration"
    assert table.counted is None
    one = measure(artifact, **QUICK)
    assert one.bucket == Bucket(patches=COUNTS[-1], counts=COUNTS)


def test_a_forced_bucket_counts_all_images(
    model: BucketedModel, artifact: Artifact, data: Path
) -> None:
    found = measure(artifact, bucket=3, dataset=data, **QUICK)
    labels = torch.from_numpy(np.load(data)["labels"])
    with torch.no_grad():
        expected = (model.fixed(3)(noise_images(20, seed=5)).argmax(1) == labels).sum()
    assert (found.correct, found.total) == (int(expected), 20)
    assert bucket_tables([found]) == ()


def test_the_command_prints_saves_and_reports_one_table(
    artifact: Artifact, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "measured"
    where = [str(artifact.folder), "--dataset", str(data), "--time-limit", "0.2"]
    assert call(["bench", *where, "--out", str(out), "-q"]) == 0
    shown = capsys.readouterr().out
    assert "small: buckets. Each image keeps one of 3 numbers of patches." in shown
    assert "patches, bounds the latency of every image: p50" in " ".join(shown.split())
    for line in ("3 patches", "11 patches", "mean: ", "guarantee: slowest bucket"):
        assert line in shown
    assert sorted(file.stem for file in out.iterdir()) == sorted(NAMES)
    assert call(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    text = (tmp_path / "page" / "report.md").read_text()
    assert 'id="buckets"' in page
    assert "guarantee: slowest bucket" in page
    assert "## Buckets: small" in text
    assert "| guarantee: slowest bucket |" in text
    assert "15 of 20" in text
    # Top-1 of a bucket's images is no figure of the artifact.
    assert "different numbers of images" not in text
    assert "| Top-1 |" not in text


def bucket(patches: int, p50_s: float, **fields: Any) -> Measurement:
    own = Bucket(patches=patches, counts=COUNTS, **fields)
    made = measurement(latency_s=(p50_s,) * 3)
    return made.model_copy(update={"name": f"small-{patches}-patches", "bucket": own})


def test_the_bound_is_the_slowest_bucket_and_the_mean_is_weighted() -> None:
    shares = {"source": "calibration", "images": 10}
    rows = [
        bucket(6, 0.005, share=0.5, **shares),
        bucket(3, 0.001, share=0.4, **shares),
        # Not the largest number, if the machine says so.
        bucket(11, 0.004, share=0.1, **shares),
    ]
    (table,) = bucket_tables(rows)
    assert [each.bucket and each.bucket.patches for each in table.measurements] == [3, 6, 11]
    assert table.guarantee_s == 0.005
    assert table.slowest.bucket is not None
    assert table.slowest.bucket.patches == 6
    assert table.mean_s == pytest.approx(0.4 * 0.001 + 0.5 * 0.005 + 0.1 * 0.004)
    assert table.mean_patches == pytest.approx(0.4 * 3 + 0.5 * 6 + 0.1 * 11)
    # Beside other artifacts stands the slowest one, with no share.
    assert (table.bound.name, table.bound.latency_s[0]) == ("small", 0.005)
    assert table.bound.bucket == Bucket(patches=6, counts=COUNTS)
    assert table.bound.of_all_images
    unknown = BucketTable("small", tuple(bucket(count, 0.001) for count in COUNTS))
    assert unknown.mean_s is None
    assert unknown.images == ""
    # A table has all buckets.
    assert bucket_tables(rows[:2]) == ()


def test_the_artifact_of_a_model_is_one_entry_with_all_images() -> None:
    counted = [(3, 4), (4, 5), (1, 1)]
    made = [
        bucket(count, time, share=total / 10, images=10, source="data set").model_copy(
            update={"correct": correct, "total": total, "top1": correct / total}
        )
        for count, time, (correct, total) in zip(COUNTS, (0.1, 0.2, 0.3), counted, strict=True)
    ]
    dense = measurement(latency_s=(0.4,) * 3)
    entries = [
        ArtifactEntry(
            runtime="onnxruntime", precision="fp32", target="host", bytes=1, measurement=m
        )
        for m in (dense, *made)
    ]
    model = ModelEntry(params=1, macs=1, top1=None, artifacts=tuple(entries))
    first, second = model.one_each
    assert first.measurement is dense
    assert second.measurement is not None
    assert (second.measurement.correct, second.measurement.total) == (8, 10)
    assert second.measurement.summary().p50_s == 0.3
    # One of them alone is what was measured.
    alone = model.model_copy(update={"artifacts": tuple(entries[:2])})
    assert alone.one_each == tuple(entries[:2])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"patches": 4}, "patches 4 must be one of increasing counts"),
        ({"patches": 3, "counts": (6, 3)}, "must be one of increasing counts"),
        ({"patches": 3, "share": 0.5}, "share and source need each other"),
        ({"patches": 3, "share": 1.5, "source": "data set"}, "less than or equal to 1"),
    ],
)
def test_a_malformed_bucket_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Bucket(**{"counts": COUNTS, **fields})


def test_buckets_have_names_of_their_own(artifact: Artifact) -> None:
    assert measured_names({"small": artifact}, None) == {"small": NAMES}
    assert measured_names({"small": artifact}, 6) == {"small": ("small",)}
    models = from_measurements([bucket(count, 0.001) for count in COUNTS]).models
    assert tuple(models) == NAMES


def test_a_file_that_does_not_return_the_bucket_is_refused(
    artifact: Artifact, tmp_path: Path
) -> None:
    graph = onnx.load(str(artifact.model_path))
    (kept,) = [output for output in graph.graph.output if output.name == "kept"]
    graph.graph.output.remove(kept)
    onnx.save(graph, str(tmp_path / "model.onnx"))
    engine = open_engine({"model": str(tmp_path / "model.onnx"), "runtime": "onnxruntime"})
    engine.load()
    with pytest.raises(EngineError, match=r"no output 'kept' with the number .* export it again"):
        engine.infer_chosen(noise_images(1).numpy())
