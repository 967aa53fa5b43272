"""Recipes with buckets: how many patches the last selection keeps depends on the image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import vitrim
from photo_folder import write_photos, write_recipe
from vitrim.bench.report.model import Report
from vitrim.bench.results.buckets import bucket_tables
from vitrim.bench.results.measurement import Measurement
from vitrim.cli import call
from vitrim.core.errors import InputError
from vitrim.export.artifact import Artifact
from vitrim.pipeline.dry_run import dry_run
from vitrim.pipeline.recipe import Recipe, load_recipe
from vitrim.pipeline.run import recipe_fingerprints, run
from vitrim.pipeline.studies.figures import read_figures

QUICK = """\
[export]
precisions = ["fp32"]
calibration_images = 4
[bench]
time_limit_s = 0.3
[report]
estimate_for = []
"""
# 16 patches, of which 9 stay behind block 1.
TOKENS = (
    "model.overrides={img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3}",
    *("masks.params=1.0", "masks.token_ratio=0.6", "masks.token_stages=[1]"),
    *("masks.images=12", "baseline.epochs=1", "finetune.epochs=1"),
)
CLASS_ATTENTION = 'masks.tokens="class-attention"'
BUCKETS = ("masks.token_buckets=[4, 6, 9]",)
COVERAGE = "masks.token_coverage=0.6"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", QUICK)
    return folder / "tiny.toml"


def recipe_of(recipe_file: Path, *sets: str) -> Recipe:
    return load_recipe(recipe_file, (*TOKENS, *sets))


@pytest.fixture(scope="module")
def finished(recipe_file: Path) -> Path:
    folder = recipe_file.parent / "finished"
    sets = (CLASS_ATTENTION, *BUCKETS, "masks.token_mean_patches=6.5")
    run(recipe_of(recipe_file, *sets), folder, quiet=True)
    return folder


def test_a_run_calibrates_and_exports_buckets(finished: Path) -> None:
    model = vitrim.load_bucketed(finished / "compact")
    assert model.buckets.counts == (4, 6, 9)
    assert model.buckets.images == 12
    assert model.buckets.shares is not None
    pairs = zip(model.buckets.shares, model.buckets.counts, strict=True)
    assert sum(share * count for share, count in pairs) <= 6.5
    assert vitrim.load(finished / "compact").architecture.selects[-1].patches == 9
    artifact = Artifact.load(finished / "artifacts/compact-fp32")
    assert artifact.manifest.buckets is not None
    assert artifact.manifest.buckets.counts == (4, 6, 9)
    assert model.buckets.divergence is not None
    assert artifact.manifest.buckets.divergence == model.buckets.divergence.threshold
    assert artifact.manifest.buckets.coverage is None
    assert Artifact.load(finished / "artifacts/baseline-fp32").manifest.buckets is None


def test_every_bucket_is_measured(finished: Path) -> None:
    names = [f"compact-fp32-{count}-patches" for count in (4, 6, 9)]
    files = {path.stem: path for path in (finished / "measurements").glob("*.json")}
    assert sorted(files) == sorted(["baseline-fp32", *names])
    (table,) = bucket_tables(Measurement.load(files[name]) for name in names)
    assert table.name == "compact-fp32"
    assert table.images == "12 images of the data set"
    assert table.counted is not None
    report = Report.model_validate(json.loads((finished / "report.json").read_text()))
    compact = report.models["compact"]
    assert compact.top1 == table.counted[0] / table.counted[1]
    assert len(compact.artifacts) == 3
    assert compact.macs == vitrim.load_bucketed(finished / "compact").macs[-1]


def test_a_study_has_the_bound_and_the_mean_of_the_latency(finished: Path) -> None:
    names = [f"compact-fp32-{count}-patches" for count in (4, 6, 9)]
    (table,) = bucket_tables(
        Measurement.load(finished / f"measurements/{name}.json") for name in names
    )
    found, columns = read_figures(finished)
    assert found["compact_fp32_ms"] == round(1e3 * table.guarantee_s, 6)
    assert table.mean_s is not None
    assert found["compact_fp32_mean_ms"] == round(1e3 * table.mean_s, 6)
    names = [column.name for column in columns]
    assert "compact_fp32_mean_ms" in names
    assert "baseline_fp32_mean_ms" not in names
    assert len(set(names)) == len(names)


def test_the_reports_have_the_table_of_buckets(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, text = ((finished / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert 'id="buckets"' in page
    for line in ("4 patches", "9 patches", "mean: ", "guarantee: slowest bucket"):
        assert line in page
        assert f"| {line}" in text
    # Beside other artifacts is one row: the bound, with the top-1 of all images.
    assert "| baseline fp32 | compact fp32 |" in text
    assert "of 12" in text
    figures, columns = read_figures(finished)
    assert len({column.name for column in columns}) == len(columns)
    assert figures["compact_fp32_top1"] == figures["top1"]
    recipe = load_recipe(finished / "recipe.toml")
    assert recipe.masks.token_buckets == (4, 6, 9)
    capsys.readouterr()
    run(recipe, finished, resume=True, quiet=True)
    shown = capsys.readouterr().out
    assert "compact-fp32: buckets. Each image keeps one of 3 numbers of patches." in shown
    assert "guarantee: slowest bucket" in shown


def test_other_buckets_of_the_same_weights_need_no_training(recipe_file: Path) -> None:
    folder = recipe_file.parent / "again"

    def trained(*sets: str, resume: bool = True) -> None:
        recipe = recipe_of(recipe_file, CLASS_ATTENTION, *sets)
        run(recipe, folder, until="finetune", resume=resume, quiet=True)

    trained(*BUCKETS, COVERAGE, resume=False)
    history = (folder / "history.jsonl").read_bytes()
    assert vitrim.load_bucketed(folder / "compact").buckets.coverage == 0.6
    trained("masks.token_buckets=[3, 9]", "masks.token_coverage=0.7")
    found = vitrim.load_bucketed(folder / "compact").buckets
    assert (found.counts, found.coverage) == ((3, 9), 0.7)
    trained()
    assert not (folder / "compact/buckets.json").exists()
    assert "buckets" not in json.loads((folder / "steps.json").read_text())["steps"]
    trained(*BUCKETS, COVERAGE)
    assert vitrim.load_bucketed(folder / "compact").buckets.counts == (4, 6, 9)
    assert (folder / "history.jsonl").read_bytes() == history


def test_buckets_are_part_of_the_identity_of_artifacts_alone(recipe_file: Path) -> None:
    def marks(*sets: str) -> dict[str, str]:
        return recipe_fingerprints(recipe_of(recipe_file, CLASS_ATTENTION, *sets))

    without, some = marks(), marks(*BUCKETS, COVERAGE)
    others = marks(*BUCKETS, "masks.token_coverage=0.7")
    for step in ("baseline", "masks", "finetune"):
        assert without[step] == some[step] == others[step]
    assert len({each["export"] for each in (without, some, others)}) == 3


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("masks.token_buckets=[6, 9]",), "`token_buckets` needs one of `token_mean_patches"),
        ((*BUCKETS, COVERAGE, "masks.token_mean_patches=6"), "`token_buckets` needs one of"),
        ((COVERAGE,), "token_coverage = 0.6 belongs to token_buckets"),
        (("masks.token_mean_patches=6",), "token_mean_patches = 6.0 belongs to token_buckets"),
        (("masks.token_buckets=[9, 6]", COVERAGE), "[9, 6]: the numbers must increase"),
        (("masks.token_buckets=[9]", COVERAGE), "`masks.token_buckets` = [9]"),
        (("masks.token_buckets=[0, 9]", COVERAGE), "`masks.token_buckets` = 0 is out of range"),
        ((*BUCKETS, "masks.token_coverage=1.5"), "`masks.token_coverage` = 1.5 is out of range"),
        (
            (*BUCKETS, "masks.token_mean_patches=12"),
            "token_mean_patches = 12.0: give a number from 4 to 9",
        ),
        (
            ('masks.tokens="evit"', *BUCKETS, COVERAGE),
            'token_buckets needs tokens = "dynamicvit", "dps" or "class-attention"; "evit" fuses',
        ),
        (
            ("masks.token_buckets=[4, 8]", COVERAGE),
            "masks.token_buckets = [4, 8]: the largest is 8, and the last selection (select.1) "
            "keeps 9 patches in training; write 9 as the last number",
        ),
        ((*BUCKETS, COVERAGE, "export.batch=4"), "export.batch = 4: masks.token_buckets gives"),
        ((*BUCKETS, COVERAGE, 'export.batch="dynamic"'), "export.batch = dynamic: masks.token_bu"),
        (
            (*BUCKETS, COVERAGE, 'export.precisions=["fp32", "fp16"]'),
            "export.precisions: fp16 is not for masks.token_buckets; use fp32, int8",
        ),
        (
            (*BUCKETS, COVERAGE, 'export.runtimes=["torch"]'),
            "export.runtimes: torch runs no masks.token_buckets; use onnxruntime, tvm",
        ),
        (
            (*BUCKETS, COVERAGE, "export.image_size=32"),
            "export.image_size: masks.token_buckets",
        ),
        (
            (*BUCKETS, COVERAGE, 'export.outputs=["logits", "features"]'),
            "export.outputs: masks.token_buckets",
        ),
    ],
)
def test_impossible_buckets_are_refused_before_any_work(
    recipe_file: Path, sets: tuple[str, ...], message: str
) -> None:
    folder = recipe_file.parent / "no"
    with pytest.raises(InputError) as caught:
        run(recipe_of(recipe_file, CLASS_ATTENTION, *sets), folder, quiet=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_a_cut_without_selections_is_named_before_fine_tuning(recipe_file: Path) -> None:
    folder = recipe_file.parent / "gone"
    # Of so small a network the start of an attention costs more than its products, so all leave
    # that no selection reads.
    sets = (CLASS_ATTENTION, 'masks.token_order="tokens-first"', "masks.macs=0.4")
    with pytest.raises(InputError) as caught:
        run(recipe_of(recipe_file, *sets, *BUCKETS, COVERAGE), folder, quiet=True)
    assert "masks.token_buckets = [4, 6, 9]: the cut network has no selection" in str(caught.value)
    assert not (folder / "compact").exists()
    run(recipe_of(recipe_file, *sets), folder, until="finetune", resume=True, quiet=True)
    assert (folder / "compact").is_dir()


@pytest.mark.parametrize(
    "sets",
    [
        (*BUCKETS, COVERAGE),
        ('masks.tokens="patch-slimming"', "masks.token_macs=0.6", *BUCKETS, COVERAGE),
        ("masks.token_mean_patches=5",),
    ],
)
def test_buckets_need_a_choice_for_each_image(recipe_file: Path, sets: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="needs a method that chooses for each image"):
        load_recipe(recipe_file, sets)


def test_the_command_and_a_trial_refuse_them_too(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = (*TOKENS, CLASS_ATTENTION, "masks.token_buckets=[4, 8]", COVERAGE)
    options = [word for each in sets for word in ("--set", each)]
    assert call(["run", str(recipe_file), *options, "--out", str(recipe_file.parent / "no")]) == 2
    assert "masks.token_buckets = [4, 8]" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="keeps 9 patches in training"):
        dry_run(load_recipe(recipe_file, sets), quiet=True)


def test_measurements_of_other_buckets_leave_the_folder(recipe_file: Path, finished: Path) -> None:
    def measured(*sets: str) -> set[str]:
        recipe = recipe_of(recipe_file, CLASS_ATTENTION, *sets)
        run(recipe, finished, resume=True, quiet=True)
        return {path.stem for path in (finished / "measurements").glob("*.json")}

    two = ("masks.token_buckets=[5, 9]", COVERAGE)
    names = {"compact-fp32-5-patches", "compact-fp32-9-patches"}
    assert measured(*two) == {"baseline-fp32", *names}
    assert measured() == {"baseline-fp32", "compact-fp32"}
    assert "Buckets" not in (finished / "report.md").read_text()
