"""The chain with `masks.method = "magnitude"`: zeros among weights, and their exact removal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import vitrim
from photo_folder import write_photos, write_recipe
from tiny_models import relative_error
from vitrim import WeightMask
from vitrim.compress.network.count import count_params
from vitrim.core.errors import InputError
from vitrim.pipeline.dry_run import dry_run
from vitrim.pipeline.magnitude_step import read_dead
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import run
from vitrim.pipeline.studies.expansion import StudyRun
from vitrim.pipeline.studies.figures import read_figures
from vitrim.pipeline.studies.mask_pictures import PICTURE_FILE
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.table import StudyTable

QUICK = (
    '[export]\nprecisions = ["fp32"]\n[bench]\ntime_limit_s = 0.1\n[report]\nestimate_for = []\n'
)
MAGNITUDE = ('masks.method="magnitude"', "masks.weight_sparsity=0.9", "masks.epochs=1")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("magnitude")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", QUICK)
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def finished(recipe_file: Path) -> Path:
    """A run of three rounds at 98 % zeros, at which units die, with artifacts and report."""
    folder = recipe_file.parent / "finished"
    sets = (*MAGNITUDE, "masks.weight_sparsity=0.98", "masks.weight_rounds=3")
    run(load_recipe(recipe_file, sets), folder, quiet=True)
    return folder


def test_the_zeros_of_the_mask_stay_to_the_artifact(finished: Path) -> None:
    mask = WeightMask.load(finished / "weight-mask.safetensors")
    assert mask.zeros == round(0.98 * mask.total)
    for name in ("cut", "compact"):
        model = vitrim.load(finished / name)
        mask.check(model)
        for parameter, keep in mask.kept.items():
            weight = model.get_parameter(parameter).detach()
            assert bool((weight != 0).eq(keep).all())
    compact, baseline = (vitrim.load(finished / name) for name in ("compact", "baseline"))
    assert compact.architecture == baseline.architecture
    phases = [json.loads(line)["phase"] for line in (finished / "history.jsonl").open()]
    assert phases == ["baseline"] * 2 + ["masks"] * 2 + ["finetune"]


def test_the_exact_model_equals_the_masked_one_and_is_smaller(finished: Path) -> None:
    compact, exact = (vitrim.load(finished / name) for name in ("compact", "exact"))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert relative_error(exact(images), compact(images)) < 1e-5
    record = read_dead(finished)
    assert record is not None
    assert record["params"] == count_params(compact.architecture)
    assert record["params_exact"] == count_params(exact.architecture) < record["params"]
    assert record["units_dead"] > 0
    for row in record["rows"]:
        branches = {branch.name: branch for branch in exact.architecture.branches}
        core = branches[row["name"]].core if row["name"] in branches else None
        left = row["units"] - row["dead"]
        if row["kind"] == "units" and core is not None and left:
            assert getattr(core, "hidden", 0) == left


def test_the_report_has_both_models_and_the_zeros(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert list(report["models"]) == ["baseline", "compact", "exact"]
    assert report["zeros"]["sparsity"] == pytest.approx(0.98, abs=1e-3)
    for name in ("compact", "exact"):
        (artifact,) = report["models"][name]["artifacts"]
        assert artifact["measurement"]["latency_s"]
    assert report["models"]["compact"]["top1"] == report["models"]["exact"]["top1"]
    for name in ("report.md", "report.html"):
        text = (finished / name).read_text(encoding="utf-8")
        assert "Zero weights" in text
        assert "blocks.0.attn" in text
    assert (finished / "artifacts/exact-fp32/manifest.json").is_file()


@pytest.fixture(scope="module")
def study(finished: Path) -> Path:
    """A study folder with this run alone."""
    folder = finished.parent / "study"
    place = folder / "runs" / "0123456789"
    place.parent.mkdir(parents=True)
    place.symlink_to(finished)
    recipe = load_recipe(finished / "recipe.toml")
    values = {"masks.weight_sparsity": 0.98, "masks.weight_rounds": 3}
    table = StudyTable.create(folder, {"name": "zeros", "base": recipe.toml(), "toml": ""})
    table.add_runs([StudyRun(place.name, 1, 7, 1, values, recipe)])
    figures, columns = read_figures(place)
    table.change(place.name, "done", figures=figures, columns=columns)
    return folder


def test_a_study_has_the_figures_of_exact_removal(study: Path) -> None:
    table = StudyTable(study)
    (row,) = table.rows()
    record = read_dead(study / "runs/0123456789")
    assert record is not None
    assert row["sparsity"] == pytest.approx(0.98, abs=1e-3)
    assert row["params"] == row["params_dense"] == record["params"]
    assert row["params_nonzero"] == record["params"] - record["zeros"]
    assert row["params_exact"] == record["params_exact"]
    assert (row["heads"], row["heads_dead"]) == (6, record["heads_dead"])
    assert row["exact_fp32_ms"] > 0  # type: ignore[operator]
    assert row["top1_exact"] == row["top1"]
    meanings = {column.name: column.meaning for column in table.columns()}
    assert "share of zeros" in meanings["sparsity"]
    assert "exact model" in meanings["exact_fp32_ms"]


def test_the_report_of_a_study_shows_masks_and_sizes(study: Path) -> None:
    write_report(study)
    page = (study / "study.html").read_text(encoding="utf-8")
    assert "Kept weights of the attentions" in page
    assert "parameters after exact removal" in page
    assert (study / PICTURE_FILE).read_text(encoding="utf-8").startswith("<svg")
    text = (study / "study.md").read_text(encoding="utf-8")
    assert PICTURE_FILE in text
    assert "study-params-nonzero.svg" in text


def test_the_article_of_a_study_has_the_masks_as_vectors(study: Path) -> None:
    *_, main, compiled = write_report(study, latex=True)
    generated = study / "latex/generated"
    text = (generated / "figures.tex").read_text()
    assert "{generated/study-masks.pdf}" in text
    assert r"of run \href{../runs/0123456789/report.html}{0123456789}: 98.0 \% of" in text
    assert (
        r"Masks of the attentions are in Fig.~\ref{fig:study-masks}"
        in (generated / "numbers.tex").read_text()
    )
    assert b"/Subtype /Image" not in (generated / "study-masks.pdf").read_bytes()
    if shutil.which("pdflatex") is not None:
        assert compiled == str(Path(main).with_suffix(".pdf"))
        assert "undefined" not in (study / "latex/main.log").read_text(errors="replace")


def test_a_resumed_run_repeats_no_step(finished: Path, recipe_file: Path) -> None:
    before = json.loads((finished / "steps.json").read_text())["steps"]
    assert "weight-mask.safetensors" in before["masks"]["files"]
    assert {"dead.json", "exact/model.safetensors"} <= set(before["finetune"]["files"])
    run(load_recipe(finished / "recipe.toml"), finished, resume=True, quiet=True)
    assert json.loads((finished / "steps.json").read_text())["steps"] == before


def test_a_changed_mask_file_repeats_the_step(finished: Path, recipe_file: Path) -> None:
    folder = recipe_file.parent / "changed"
    recipe = load_recipe(recipe_file, MAGNITUDE)
    run(recipe, folder, until="finetune", quiet=True)
    path = folder / "weight-mask.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(b"\0" + whole[1:])
    run(recipe, folder, until="finetune", resume=True, quiet=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("granularity", "ranking", "scope"),
    [("row", "layerwise", "ffn"), ("column", "shuffled", "attention"), ("weight", "random", "all")],
)
def test_one_shot_masks_of_every_kind(
    recipe_file: Path, granularity: str, ranking: str, scope: str
) -> None:
    folder = recipe_file.parent / granularity
    names = {"granularity": granularity, "ranking": ranking, "scope": scope}
    sets = [f'masks.weight_{name}="{value}"' for name, value in names.items()]
    recipe = load_recipe(recipe_file, [*MAGNITUDE, *sets, "finetune.rewind=0.25"])
    run(recipe, folder, until="finetune", quiet=True)
    mask = WeightMask.load(folder / "weight-mask.safetensors")
    assert {name: mask.note[name] for name in names} == names
    compact = vitrim.load(folder / "compact")
    for parameter, keep in mask.kept.items():
        assert not bool(compact.get_parameter(parameter)[~keep].any())
    assert json.loads((folder / "cut-parity.json").read_text())["max_relative_error"] == 0.0
    rates = [json.loads(line)["lr"] for line in (folder / "history.jsonl").open()]
    assert rates[-1] < 0.15 * recipe.finetune.lr


def test_a_trial_estimates_the_rounds(recipe_file: Path) -> None:
    found = dry_run(load_recipe(recipe_file, [*MAGNITUDE, "masks.weight_rounds=4"]), quiet=True)
    assert [(phase.phase, phase.epochs) for phase in found.phases] == [
        ("baseline", 2),
        ("masks", 3),
        ("finetune", 1),
    ]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (['masks.method="magnitude"'], "keeps the shapes; write `weight_sparsity = 0.9`"),
        (["masks.weight_sparsity=0.9"], 'weight_sparsity needs method = "magnitude"; "learned"'),
        (["masks.weight_rounds=2"], 'weight_rounds needs method = "magnitude"'),
        ([*MAGNITUDE, 'masks.fixed=["head"]'], "fixed is of a method that removes units"),
        ([*MAGNITUDE, 'masks.tokens="learned"'], "tokens is of a method that removes units"),
        ([*MAGNITUDE, 'masks.start="one-shot"'], "start is of a method that removes units"),
        ([*MAGNITUDE, "masks.weight_sparsity=1.0"], "weight_sparsity"),
        ([*MAGNITUDE, 'masks.weight_ranking="best"'], "weight_ranking"),
        (["finetune.rewind=0.5", "finetune.warmup_epochs=1"], "leave `warmup_epochs` out"),
    ],
)
def test_impossible_keys_are_refused_before_any_work(
    recipe_file: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, sets)
    assert message in str(caught.value)


def test_a_sparsity_replaces_the_size_of_the_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, MAGNITUDE)
    assert recipe.masks.params is None
    assert "weight_rounds" not in recipe.toml()


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    assert read_dead(tmp_path) is None
    (tmp_path / "dead.json").write_text('{"schema": "vitrim.trim/1"}')
    with pytest.raises(InputError, match=r"dead\.json: not a record of dead weight"):
        read_dead(tmp_path)
