"""The chain on a tiny model: its files, what a resumed run skips, and a run that was killed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import vitrim
from photo_folder import CLASSES, write_photos, write_recipe
from vitrim.bench.report.model import Report
from vitrim.bench.results.measurement import Measurement
from vitrim.cli import call
from vitrim.compress.masks.mask import StructuredMask
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.surgery.image_size import at_image_size
from vitrim.compress.train.dense import teacher_outputs
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.pipeline import phases
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import fingerprints, prepare, run
from warm_processes import start_vitrim

NAMES = ("baseline-fp32", "compact-fp32", "compact-int8")
QUICK = "[bench]\ntime_limit_s = 0.3\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", QUICK)
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The folder of a complete run."""
    run(load_recipe(place / "tiny.toml"), place / "run", quiet=True)
    return place / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_value_of_the_chain_is_saved(finished: Path) -> None:
    baseline, compact = vitrim.load(finished / "baseline"), vitrim.load(finished / "compact")
    assert baseline.architecture.classes == len(CLASSES)
    dense, left = count_params(baseline.architecture), count_params(compact.architecture)
    assert 0.59 * dense <= left <= 0.6 * dense
    StructuredMask.load(finished / "mask.safetensors").check(baseline.architecture)
    assert load_recipe(finished / "recipe.toml") == load_recipe(finished.parent / "tiny.toml")
    phases = [
        json.loads(line)["phase"] for line in (finished / "history.jsonl").read_text().splitlines()
    ]
    assert phases == ["baseline"] * 2 + ["masks"] * 3 + ["finetune"]
    assert not (finished / "training" / "masks").exists(), (
        "checkpoints are cleared once the step is saved"
    )


def test_the_mask_cuts_the_baseline_to_the_shape_of_the_compact_model(finished: Path) -> None:
    again = vitrim.compact(
        vitrim.load(finished / "baseline"), StructuredMask.load(finished / "mask.safetensors")
    )
    assert again.architecture == vitrim.load(finished / "compact").architecture


def test_the_report_matches_the_files(finished: Path) -> None:
    report = Report.model_validate(read(finished / "report.json"))
    assert list(report.models) == ["baseline", "compact"]
    for name, entry in report.models.items():
        architecture = vitrim.load(finished / name).architecture
        assert (entry.params, entry.macs) == (count_params(architecture), count_macs(architecture))
        first = entry.artifacts[0].measurement
        assert first is not None
        assert entry.top1 == first.top1
        assert first.total == 4 * len(CLASSES)
    assert report.seed == 7
    written = read(finished / "report.json")
    assert written["versions"]["vitrim"] == vitrim.__version__
    assert set(written["seconds"]) == {"baseline", "masks", "finetune", "export", "bench"}
    assert "<html" in (finished / "report.html").read_text()
    assert "compact" in (finished / "report.md").read_text()


def test_the_report_estimates_the_devices_of_the_recipe(finished: Path) -> None:
    report = Report.model_validate(read(finished / "report.json"))
    assert {entry.target for entry in report.estimates} == set(
        load_recipe(finished / "recipe.toml").report.estimate_for
    )
    assert {(entry.model, entry.precision) for entry in report.estimates} == {
        (m, p) for m in ("baseline", "compact") for p in ("fp32", "int8")
    }
    pi = {
        (entry.model, entry.precision): entry
        for entry in report.estimates
        if entry.target == "rpi4"
    }
    dense, compact = pi["baseline", "fp32"].latency, pi["compact", "fp32"].latency
    assert dense is not None
    assert compact is not None
    assert dense.low_s < dense.estimated_s < dense.high_s
    assert compact.estimated_s < dense.estimated_s
    assert len(compact.held_against) >= 5
    # The weights of an exported model are its file, those of another its parameters.
    assert pi["compact", "int8"].weight_bytes == report.models["compact"].artifacts[1].bytes
    assert pi["baseline", "int8"].weight_bytes == report.models["baseline"].params
    assert all(
        entry.latency is None and entry.no_latency
        for entry in report.estimates
        if entry.target == "stm32h7"
    )


def test_every_stage_equals_the_previous_one(finished: Path) -> None:
    parity = read(finished / "report.json")["parity"]
    assert parity["cut: masked against compact"] < 1e-5
    exact = {stage: error for stage, error in parity.items() if "int8" not in stage}
    # The cut, and one graph of each model.
    assert len(exact) == 3
    assert max(exact.values()) < 1e-4


def test_the_measured_file_is_the_exported_file(finished: Path) -> None:
    measured = {name: Measurement.load(finished / f"measurements/{name}.json") for name in NAMES}
    for name, measurement in measured.items():
        assert measurement.artifact_sha256 == Artifact.load(finished / f"artifacts/{name}").sha256
        assert measurement.top1 is not None
    assert len({measurement.session for measurement in measured.values()}) == 1, (
        "measured interleaved, in one session"
    )


def test_kept_json_matches_the_compact_model(finished: Path) -> None:
    kept = read(finished / "kept.json")
    compact = vitrim.load(finished / "compact").architecture
    assert [entry["branch"] for entry in kept] == [
        "blocks.0.attn",
        "blocks.0.ffn",
        "blocks.1.attn",
        "blocks.1.ffn",
    ]
    assert all(
        entry["dims"]["embed"] == [compact.embed, 24]
        for entry in kept
        if entry["kind"] in ("attention", "ffn")
    )


def test_resuming_a_finished_run_repeats_no_step(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(finished / "steps.json")
    written = (finished / "compact/model.safetensors").stat().st_mtime_ns
    assert (
        call(["run", str(finished.parent / "tiny.toml"), "--out", str(finished), "--resume"]) == 0
    )
    assert read(finished / "steps.json") == before
    assert (finished / "compact/model.safetensors").stat().st_mtime_ns == written
    shown = capsys.readouterr()
    assert shown.err.count("loaded from the run folder") == 3
    row = next(
        line.split("│") for line in shown.out.splitlines() if line.startswith("compact int8")
    )
    # The terminal and the report show the same ratio; in the report the best one is bold.
    ratio = next(
        line.split("|")[4].split("×")[0].strip(" *")
        for line in (finished / "report.md").read_text().splitlines()
        if line.startswith("| Speed-up |")
    )
    assert row[5].strip() == f"{ratio}x"
    assert str(finished / "report.html") in shown.out


def test_a_run_is_not_overwritten_by_default(finished: Path) -> None:
    with pytest.raises(
        InputError, match="contains an earlier run; --resume continues it, --overwrite deletes it"
    ):
        run(load_recipe(finished.parent / "tiny.toml"), finished, quiet=True)


def test_a_model_of_the_run_is_exported_with_the_data_of_the_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        call(
            [
                "export",
                str(finished / "compact"),
                "--out",
                str(tmp_path / "any"),
                "--batch",
                "dynamic",
                "--images",
                "4",
            ]
        )
        == 0
    )
    assert "on 100.0 % of 4 images" in capsys.readouterr().out
    manifest = Artifact.load(tmp_path / "any").manifest
    assert manifest.labels == CLASSES
    assert manifest.batch == "dynamic"
    assert manifest.preprocessing is not None


def test_a_step_depends_on_its_sections_and_on_earlier_steps(place: Path) -> None:
    def marks(*sets: str) -> dict[str, str]:
        return fingerprints(prepare(load_recipe(place / "tiny.toml", sets), quiet=True))

    def changed(*sets: str) -> list[str]:
        now = marks(*sets)
        return [step for step, mark in base.items() if now[step] != mark]

    base = marks()
    assert changed() == []
    assert changed("bench.threads=2") == ["bench"]
    assert changed("finetune.lr=1e-4") == ["finetune", "export", "bench"]
    assert changed("train.seed=13") == list(base)
    assert changed("masks.round_to=2") == ["masks", "finetune", "export", "bench"]


def test_no_distill_trains_without_a_teacher(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        place / "tiny.toml", ["distill.enabled=false", "masks.epochs=1", "finetune.epochs=0"]
    )
    run(recipe, tmp_path / "run", until="finetune", quiet=True)
    cut, compact = vitrim.load(tmp_path / "run/cut"), vitrim.load(tmp_path / "run/compact")
    assert all(
        torch.equal(value, compact.state_dict()[key]) for key, value in cut.state_dict().items()
    )


@pytest.mark.parametrize("finetuning", ["flip", "none"])
def test_phases_with_equal_forms_of_the_images_share_the_outputs_of_the_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetuning: str
) -> None:
    computed: list[int] = []

    def counted(*arguments: Any) -> dict[bytes, torch.Tensor]:
        found = teacher_outputs(*arguments)
        computed.append(len(found))
        return found

    monkeypatch.setattr(phases, "teacher_outputs", counted)
    sets = ('masks.augmentation="flip"', f'finetune.augmentation="{finetuning}"')
    run(load_recipe(place / "tiny.toml", sets), tmp_path / "run", until="finetune", quiet=True)
    images = computed[0] // 2
    assert computed == [2 * images, *([images] if finetuning == "none" else [])]


def test_a_lambda_replaces_the_budget(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        place / "tiny.toml", ["masks.lambda=1e-3", "masks.epochs=2", "masks.score_lr=0.2"]
    )
    run(recipe, tmp_path / "run", until="masks", quiet=True)
    dense, cut = (
        count_params(vitrim.load(tmp_path / "run" / name).architecture)
        for name in ("baseline", "cut")
    )
    assert cut < dense


def test_artifacts_are_exported_at_another_image_size(
    finished: Path, place: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = load_recipe(
        place / "tiny.toml", ["export.image_size=24x16", 'export.precisions=["fp32"]']
    )
    run(recipe, folder, resume=True, quiet=True)
    assert load_recipe(folder / "recipe.toml").export.image_size == (24, 16)
    # The model keeps its image size; only the artifacts have the other one, and are counted and
    # measured at it.
    trained = vitrim.load(folder / "compact").architecture
    assert trained.image == (3, 16, 16)
    report = Report.model_validate(read(folder / "report.json"))
    assert (
        report.models["compact"].macs
        == count_macs(at_image_size(trained, "24x16"))
        > count_macs(trained)
    )
    assert str(report.data).endswith("; artifacts at 24x16, without training at that size")
    assert report.models["compact"].top1 is not None
    manifest = Artifact.load(folder / "artifacts/compact-fp32").manifest
    assert manifest.inputs[0].shape == (1, 3, 24, 16)
    assert manifest.preprocessing is not None
    assert (manifest.preprocessing.height, manifest.preprocessing.width) == (24, 16)
    assert manifest.parity[0].input_kind == "images"


def test_an_invalid_size_is_refused_before_training(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="image size 20x20: height 20 does not make whole patches, "
        "which start every 8 pixels; 16 and 24 are the nearest",
    ):
        run(
            load_recipe(place / "tiny.toml", ["export.image_size=20"]), tmp_path / "run", quiet=True
        )
    assert not (tmp_path / "run").exists()


def test_artifacts_are_exported_for_several_runtimes(
    finished: Path, place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    changes = [
        'export.runtimes=["onnxruntime","tvm"]',
        'export.precisions=["fp32","int8","int8-weights"]',
    ]
    run(load_recipe(place / "tiny.toml", changes), folder, resume=True, quiet=True)
    # TVM does not support int8-weights; it has a baseline of its own.
    names = [
        *NAMES,
        "compact-int8-weights",
        "baseline-tvm-fp32",
        "compact-tvm-fp32",
        "compact-tvm-int8",
    ]
    assert sorted(path.name for path in (folder / "artifacts").iterdir()) == sorted(names)
    report = Report.model_validate(read(folder / "report.json"))
    rows = [(entry.runtime, entry.precision) for entry in report.models["compact"].artifacts]
    assert rows == [
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("onnxruntime", "int8-weights"),
        ("tvm", "fp32"),
        ("tvm", "int8"),
    ]
    assert all(
        entry.measurement is not None and entry.measurement.top1 is not None
        for entry in report.models["compact"].artifacts
    )
    assert "tvm" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            ['export.runtimes=["tvn"]'],
            "export.runtimes: 'tvn' is unknown; choose from onnxruntime, executorch, litert, ncnn, "
            "openvino, torch, tvm",
        ),
        (['export.runtimes=["torch","torch"]'], "a runtime is listed twice"),
        (
            ['export.runtimes=["torch"]', 'export.precisions=["int8-weights"]'],
            "torch supports fp32.*, but export.precisions is int8-weights",
        ),
    ],
)
def test_unusable_runtimes_are_refused_before_training(
    changes: list[str], reason: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        run(load_recipe(place / "tiny.toml", changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "long.toml", place / "photos", masks_epochs=12)
    run(load_recipe(recipe), tmp_path / "whole", until="masks", quiet=True)

    command = ["compress", str(recipe), "--out", str(tmp_path / "killed"), "--quiet"]
    process = start_vitrim(*command, log=tmp_path / "log")
    history = tmp_path / "killed" / "history.jsonl"
    process.wait_until(lambda: history.is_file() and '"masks"' in history.read_text())
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was killed during mask learning"
    assert call([*command, "--resume"]) == 0

    for name in ("mask.safetensors", "cut/model.safetensors", "cut/architecture.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), name


def test_ctrl_c_exits_with_130_and_the_command_that_resumes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitrim.compress.train.mask_task import MaskTask

    real = MaskTask.after_epoch

    def interrupted(self: MaskTask, epoch: int, val_top1: float) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, epoch, val_top1)

    monkeypatch.setattr(MaskTask, "after_epoch", interrupted)
    arguments = ["compress", str(place / "tiny.toml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert call(arguments) == 130
    assert capsys.readouterr().err.endswith(f"resume with: vitrim {' '.join(arguments)} --resume\n")
    monkeypatch.undo()
    assert call([*arguments, "--resume"]) == 0
