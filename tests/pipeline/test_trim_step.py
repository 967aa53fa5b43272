"""The chain with `masks.method = "closed-form"`: no mask is learned, and the cut is compensated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vitrim
from latency_tables import latency_table
from photo_folder import write_photos, write_recipe
from tiny_models import relative_error
from vitrim.bench.results.measurement import Measurement
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.network.count import count_params
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.budgets import file_bytes
from vitrim.core.errors import InputError
from vitrim.pipeline import latency_training
from vitrim.pipeline.latency_loop import Measure
from vitrim.pipeline.latency_training import LEAST, MOST
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import prepare, run

CLOSED_FORM = ['masks.method="closed-form"', "masks.round_to=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("closed-form")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", "")
    recipe = load_recipe(folder / "tiny.toml", CLOSED_FORM)
    run(recipe, folder / "run", until="finetune", quiet=True)
    return folder / "run"


def test_the_budget_is_met_without_an_epoch_of_mask_learning(finished: Path) -> None:
    dense, cut = vitrim.load(finished / "baseline"), vitrim.load(finished / "cut")
    share = load_recipe(finished / "recipe.toml").masks.params
    assert share is not None
    assert count_params(cut.architecture) <= share * count_params(dense.architecture)
    phases = {json.loads(line)["phase"] for line in (finished / "history.jsonl").open()}
    assert phases == {"baseline", "finetune"}


def test_the_rotated_network_equals_the_baseline_and_the_mask_fits_it(finished: Path) -> None:
    dense, rotated = vitrim.load(finished / "baseline"), vitrim.load(finished / "rotated")
    images = torch.randn(4, *dense.architecture.image)
    with torch.no_grad():
        assert relative_error(rotated.eval()(images), dense.eval()(images)) < 1e-4
    mask = vitrim.StructuredMask.load(finished / "mask.safetensors")
    cut, exact = vitrim.load(finished / "cut"), vitrim.compact(rotated, mask)
    assert [branch.core.kind for branch in cut.architecture.branches] == [
        branch.core.kind for branch in exact.architecture.branches
    ]
    parity = json.loads((finished / "cut-parity.json").read_text())
    assert parity["max_relative_error"] < 1e-5


def test_the_record_names_prediction_check_and_every_refit(finished: Path) -> None:
    record = json.loads((finished / "trim.json").read_text())
    assert record["schema"] == "vitrim.trim/1"
    assert record["predicted_error"] > 0
    assert record["check"]["images"] >= 1
    assert all(fit["after"] <= fit["before"] for fit in record["fits"])
    cut = vitrim.load(finished / "cut")
    assert {fit["branch"] for fit in record["fits"]} == {
        branch.name for branch in cut.architecture.branches if branch.core.kind != "constant"
    }


def test_a_budget_below_stem_and_head_is_refused_before_any_training(finished: Path) -> None:
    recipe = load_recipe(finished.parent / "tiny.toml", [*CLOSED_FORM, "masks.params=0.01"])
    with pytest.raises(InputError, match=r"masks.params = 0.01: the stem and the head"):
        run(recipe, finished.parent / "refused", quiet=True)
    assert not (finished.parent / "refused").exists()


def test_a_closed_form_needs_a_budget(finished: Path) -> None:
    with pytest.raises(InputError, match=r'"closed-form" needs a budget'):
        load_recipe(finished.parent / "tiny.toml", [*CLOSED_FORM, "masks.lambda=1e-7"])


ONE_SHOT = ['masks.start="one-shot"', "masks.round_to=2", "masks.params=0.6"]


@pytest.fixture(scope="module")
def started(finished: Path) -> Path:
    recipe = load_recipe(finished.parent / "tiny.toml", ONE_SHOT)
    run(recipe, finished.parent / "started", until="masks", quiet=True)
    return finished.parent / "started"


def test_masks_are_learned_from_the_cut_to_the_square_root_of_the_budget(started: Path) -> None:
    dense, start = vitrim.load(started / "baseline"), vitrim.load(started / "start")
    whole = count_params(dense.architecture)
    assert count_params(start.architecture) <= 0.6**0.5 * whole
    assert count_params(vitrim.load(started / "cut").architecture) <= 0.6 * whole
    mask = vitrim.StructuredMask.load(started / "mask.safetensors")
    mask.check(start.architecture)
    phases = [json.loads(line)["phase"] for line in (started / "history.jsonl").open()]
    assert "masks" in phases
    assert json.loads((started / "trim.json").read_text())["cost_share"] <= 0.6**0.5


def test_a_resumed_run_learns_from_the_start_that_was_saved(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, other = load_recipe(started.parent / "tiny.toml", ONE_SHOT), started.parent / "other"

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    run(recipe, other, until="baseline", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("vitrim.pipeline.training_steps.run_phase", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, other, until="masks", quiet=True, resume=True)
    with monkeypatch.context() as patch:
        # The statistics are not taken again.
        patch.setattr("vitrim.pipeline.training_steps.trim_baseline", interrupted)
        run(recipe, other, until="masks", quiet=True, resume=True)
    expected, found = vitrim.load(started / "cut"), vitrim.load(other / "cut")
    assert found.architecture == expected.architecture
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "settings",
    [['masks.method="closed-form"'], ["masks.params=1.0", "masks.lambda=1e-7"]],
)
def test_a_one_shot_start_needs_learned_masks_and_a_budget(
    finished: Path, settings: list[str]
) -> None:
    with pytest.raises(InputError, match=r"one-shot|both set the size"):
        load_recipe(finished.parent / "tiny.toml", ['masks.start="one-shot"', *settings])


def test_a_start_below_stem_and_head_is_refused_before_any_training(finished: Path) -> None:
    recipe = load_recipe(finished.parent / "tiny.toml", [*ONE_SHOT, "masks.params=0.02"])
    with pytest.raises(InputError, match=r"masks.params"):
        run(recipe, finished.parent / "refused", quiet=True)
    assert not (finished.parent / "refused").exists()


def test_a_file_size_is_a_budget(finished: Path) -> None:
    dense = vitrim.load(finished / "baseline").architecture
    wanted_mb = 0.8 * file_bytes(dense, "fp16") / 1e6
    sets = [*CLOSED_FORM, f"masks.file_mb={wanted_mb}", 'masks.file_precision="fp16"']
    recipe = load_recipe(finished.parent / "tiny.toml", sets)
    run(recipe, finished.parent / "file", until="masks", quiet=True)
    cut = vitrim.load(finished.parent / "file" / "cut").architecture
    assert file_bytes(cut, "fp16") <= wanted_mb * 1e6


def test_milliseconds_of_a_cost_table_are_a_budget(finished: Path) -> None:
    dense = vitrim.load(finished / "baseline").architecture
    table, path = latency_table(), finished.parent / "costs.json"
    table.save(path)
    whole = table.latency_ms(network_shape(dense))
    sets = [*CLOSED_FORM, "masks.latency=0.6", f'masks.cost_table="{path}"']
    sets += ["masks.latency_rounds=1", "masks.target_runtime=onnxruntime"]
    sets += ["bench.time_limit_s=1.0", "bench.top1_images=4"]
    folder = finished.parent / "latency"
    run(load_recipe(finished.parent / "tiny.toml", sets), folder, quiet=True)
    cut = vitrim.load(folder / "cut").architecture
    assert table.latency_ms(network_shape(cut)) <= 0.6 * whole
    record = json.loads((folder / "latency.json").read_text())
    assert record["latency_ms"] == pytest.approx(0.6 * whole)
    assert record["predicted_ms"] == pytest.approx(table.latency_ms(network_shape(cut)))
    assert record["measured_ms"] == record["rounds"][0]["measured_ms"] > 0
    # What is measured is the cut; the file that ships has other weights, and is measured again.
    shown = json.loads((folder / "report.json").read_text())["latency"]
    shipped = Measurement.load(folder / "measurements/compact-fp32.json")
    assert shown["shipped"] == "compact-fp32"
    assert shown["shipped_ms"] == pytest.approx(1e3 * shipped.summary().p50_s)
    assert shown["shipped_met"] == (shown["shipped_ms"] <= record["latency_ms"])


def test_masks_are_learned_for_a_latency_and_the_file_is_measured(finished: Path) -> None:
    """With a file size beside it; the budget that no table was measured for is an estimate."""
    dense = vitrim.load(finished / "baseline").architecture
    table, path = latency_table(power_w=2.0), finished.parent / "learned.json"
    table.save(path)
    whole = table.latency_ms(network_shape(dense))
    sets = ["masks.latency=0.9", f'masks.cost_table="{path}"', f"masks.energy_mj={1.4 * whole}"]
    sets += ["masks.round_to=2", "masks.file_mb=1.0", "masks.latency_rounds=1"]
    folder = finished.parent / "learned"
    run(load_recipe(finished.parent / "tiny.toml", sets), folder, until="masks", quiet=True)
    cut = vitrim.load(folder / "cut").architecture
    record = json.loads((folder / "latency.json").read_text())
    assert record["latency_ms"] == pytest.approx(0.7 * whole)
    assert record["predicted_ms"] == pytest.approx(table.latency_ms(network_shape(cut)), abs=1e-5)
    # A network of about the sizes was measured before, which corrects the budget by the table.
    trial, last = record["rounds"]
    assert trial["budget_ms"] == record["latency_ms"] >= trial["predicted_ms"]
    factor = 0.99 * trial["predicted_ms"] / trial["measured_ms"]
    assert last["budget_ms"] == pytest.approx(0.7 * whole * min(MOST, max(LEAST, factor)))
    assert last["predicted_ms"] <= last["budget_ms"]
    assert record["measured_ms"] == last["measured_ms"] > 0
    assert not record["estimated"]
    assert {json.loads(line)["phase"] for line in (folder / "history.jsonl").open()} == {
        "baseline",
        "masks",
    }
    sets = ["masks.latency=0.7", "export.target=rpi4", "masks.round_to=2"]
    folder = finished.parent / "estimated"
    run(load_recipe(finished.parent / "tiny.toml", sets), folder, until="masks", quiet=True)
    record = json.loads((folder / "latency.json").read_text())
    assert record["estimated"]
    assert record["measured_ms"] is None
    assert "estimated: operator costs within a factor of" in record["table"]
    assert record["predicted_ms"] <= record["latency_ms"]


BESIDE = ["masks.latency=0.9", 'masks.cost_table="costs.json"']


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["masks.file_mb=1.0"], 'file_mb alone needs method = "closed-form"'),
        ([*CLOSED_FORM, "masks.peak_memory_mb=1"], "peak_memory_mb needs a budget of millisecond"),
        ([*CLOSED_FORM, "masks.macs=0.5", 'masks.cost_table="costs.json"'], "cost_table needs a"),
        (["masks.latency=0.5", "masks.candidates=3"], "candidates and a latency of learned masks"),
        (
            ["masks.latency=0.5", "masks.energy_mj=1.0", 'masks.cost_table="costs.json"'],
            "masks.energy_mj = 1: no energy meter was read while the cost table of onnxruntime",
        ),
        (
            ["masks.latency=0.01", 'masks.cost_table="costs.json"', "masks.round_to=2"],
            "the smallest latency that learned masks can reach is 0.0",
        ),
        ([*CLOSED_FORM, "masks.target_runtime=tvm"], "target_runtime needs a budget of millisec"),
        (
            [*CLOSED_FORM, "masks.latency_ms=0.001", 'masks.cost_table="costs.json"'],
            "masks.latency_ms = 0.001: the smallest latency that can be reached is 0.01",
        ),
        (
            [*CLOSED_FORM, *BESIDE, "masks.file_mb=0.001"],
            "masks.file_mb = 0.001: the smallest weights that can be reached are 0.0",
        ),
        (
            [*CLOSED_FORM, *BESIDE, "masks.peak_memory_mb=0.001"],
            "masks.peak_memory_mb = 0.001: the smallest memory of weights and activations that",
        ),
        (
            [*BESIDE, "masks.file_mb=0.001"],
            "file_mb = 0.001: the smallest weights that can be reached are 0.0",
        ),
        (
            [*BESIDE, "masks.peak_memory_mb=0.001"],
            "peak_memory_mb = 0.001: the smallest memory of weights and activations that",
        ),
        (
            [
                *CLOSED_FORM,
                *("masks.latency_ms=1.0", "masks.target_runtime=tvm"),
                'masks.cost_table="costs.json"',
            ],
            "masks.target_runtime = 'tvm': costs.json is of onnxruntime fp32 on host, 1 thread",
        ),
        ([*CLOSED_FORM, "masks.file_mb=0.001"], "masks.file_mb = 0.001: the stem and the head"),
        (
            [*CLOSED_FORM, "masks.latency_ms=1.0", 'masks.cost_table="missing.json"'],
            "missing.json",
        ),
    ],
)
def test_impossible_file_and_latency_budgets_are_refused(
    finished: Path, sets: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    latency_table().save("costs.json")
    with pytest.raises(InputError) as caught:
        run(load_recipe(finished.parent / "tiny.toml", sets), finished.parent / "no", quiet=True)
    assert message in str(caught.value)


def test_a_corrected_budget_below_all_masks_ends_with_the_fastest_and_a_note(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not with an error after the baseline is trained. Disturbed readings are repeated."""
    dense = vitrim.load(finished / "baseline").architecture
    table, path = latency_table(), finished.parent / "slow.json"
    table.save(path)
    measured = list[float]()

    def file_measure(*arguments: object, **options: object) -> Measure:
        def measure(model: CompactModel) -> float:
            predicted_ms = table.latency_ms(network_shape(model.architecture))
            measured.append((9.0 if len(measured) % 2 == 0 else 3.0) * predicted_ms)
            return measured[-1]

        return measure

    monkeypatch.setattr(latency_training, "file_measure", file_measure)
    least_ms = 0.3 * table.latency_ms(network_shape(dense))
    sets = [f"masks.latency_ms={least_ms}", f'masks.cost_table="{path}"', "masks.round_to=2"]
    folder = finished.parent / "slow"
    run(load_recipe(finished.parent / "tiny.toml", sets), folder, until="masks")
    shown = " ".join(capsys.readouterr().err.split())
    assert "is below the smallest that learned masks can reach" in shown
    assert "NOT met" in shown
    record = json.loads((folder / "latency.json").read_text())
    assert record["met"] is False
    trial, last = record["rounds"]
    assert len(measured) == 4
    for each in (trial, last):
        assert each["measured_ms"] == pytest.approx(3 * each["predicted_ms"])
    assert LEAST * least_ms < last["budget_ms"]
    assert last["predicted_ms"] <= last["budget_ms"]


@pytest.mark.parametrize("method", ["learned", "closed-form"])
def test_a_latency_above_the_dense_model_is_named(
    finished: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    path = finished.parent / "slack.json"
    latency_table().save(path)
    sets = [f'masks.method="{method}"', "masks.latency_ms=50", f'masks.cost_table="{path}"']
    prepare(load_recipe(finished.parent / "tiny.toml", sets))
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("masks.latency_ms = 50 is above the latency of the dense model, 0.") == 1
    assert "nothing has to be cut" in shown
    sets[1] = "masks.latency=0.9"
    prepare(load_recipe(finished.parent / "tiny.toml", sets))
    assert "is above" not in capsys.readouterr().err
