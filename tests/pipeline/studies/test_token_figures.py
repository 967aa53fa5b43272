"""Figures 3, 4, 6 and 7 of Tang et al. 2022 in a study: measured once, and drawn everywhere."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import vitrim
from study_sample import large_table, write_study
from vitrim.compress.tokens import block_studies
from vitrim.core.errors import InputError
from vitrim.pipeline.studies import token_figures
from vitrim.pipeline.studies.engine import StudyOptions, run_study, validated_runs
from vitrim.pipeline.studies.line_charts import Panel
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.study_file import load_study
from vitrim.pipeline.studies.summary import summarise
from vitrim.pipeline.studies.table import Column, StudyTable
from vitrim.pipeline.studies.token_pictures import tolerance_chart

TABLE = """
[token_figures]
methods = ["patch-slimming", "random"]
share = 0.5
block = 0
shares = [0.75, 0.25]
images = 6
scoring_images = 4
"""
TEXT = f"""
until = "finetune"
[set]
"masks.method" = "closed-form"
"masks.params" = 1.0
"masks.tokens" = "patch-slimming"
[axes]
"masks.token_tolerance" = [0.01, 0.3]
{TABLE}"""
QUIET = StudyOptions(quiet=True)
PICTURES = {
    "study-similarity.svg": "Mean cosine similarity of two patches of an image, by depth.",
    "study-tolerance.svg": "Validation top-1 and multiply-adds by the tolerance of Patch Slimming.",
    "study-tokens.svg": "Tokens by depth, chosen by patch-slimming.",
    "study-blocks.svg": (
        "Validation top-1 where one block alone computes 50 % of its patches, by block."
    ),
    "study-scores.svg": "Validation top-1 by the share of its patches that blocks.0 computes.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two tolerances whose dense network is measured."""
    place = tmp_path_factory.mktemp("figures")
    run_study(load_study(write_study(place, TEXT)), place / "out", QUIET)
    return place / "out"


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "token-figures.json").read_text())
    return found


def test_the_dense_network_is_measured_behind_the_runs(folder: Path) -> None:
    found = record(folder)
    assert found["run"] == StudyTable(folder).rows()[0]["id"]
    assert list(found["similarity"]) == ["stem", "blocks.0", "blocks.1"]
    assert all(-1.0 <= value <= 1.0 for value in found["similarity"].values())
    assert [row["block"] for row in found["blocks"]] == ["blocks.0", "blocks.1"]
    assert {row["tokens"] for row in found["blocks"]} == {3}
    assert [(row["method"], row["share"]) for row in found["scores"]] == [
        *(("patch-slimming", 0.75), ("patch-slimming", 0.25)),
        *(("random", 0.75), ("random", 0.25)),
    ]
    # The class token, which the head reads, is computed by the last block in any case.
    assert found["blocks"][-1]["accuracy"] == found["accuracy"]
    model = vitrim.load(folder / "runs" / found["run"] / "baseline")
    assert model.architecture.last_queries
    with (folder / "token-figures.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["figure"] for line in lines] == ["3"] * 3 + ["6"] * 2 + ["7"] * 4
    assert [float(line["value"]) for line in lines[3:5]] == [
        row["accuracy"] for row in found["blocks"]
    ]


def test_what_is_measured_is_not_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(token_figures._Measuring, "__init__", again)
    before = (folder / "token-figures.json").read_bytes()
    study = load_study(folder.parent / "trial.toml")
    run_study(study, folder, StudyOptions(resume=True, quiet=True))
    assert (folder / "token-figures.json").read_bytes() == before


def test_an_interrupted_measurement_continues_behind_the_last_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, place = record(folder), tmp_path / "out"
    shutil.copytree(folder, place)
    (place / "token-figures.json").unlink()
    study, calls = load_study(folder.parent / "trial.toml"), list[int]()
    measure = block_studies.single_block_accuracy

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(len(options["blocks"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(block_studies, "single_block_accuracy", killed)
    resumed = StudyOptions(resume=True, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, place, resumed)
    assert record(place)["scores"] is None
    write_report(place)
    assert (place / "study-blocks.svg").is_file()
    run_study(study, place, resumed)
    # Two blocks, the one of the scores, and that again.
    assert calls == [2, 1, 1]
    assert record(place) == whole
    # Other settings are measured anew.
    path = folder.parent / "other.toml"
    path.write_text((folder.parent / "trial.toml").read_text().replace("images = 6", "images = 5"))
    run_study(load_study(path), place, resumed)
    assert record(place)["images"] == 5


def test_reports_have_every_figure_with_a_caption(folder: Path) -> None:
    lines = write_report(folder, latex=True)
    text = (folder / "study.md").read_text(encoding="utf-8")
    page = (folder / "study.html").read_text(encoding="utf-8")
    alts = {file: alt for alt, file in re.findall(r"!\[(.*?)\]\((.*?)\)", text)}
    assert {name: alts.get(name) for name in PICTURES} == PICTURES
    assert len(set(alts.values())) == len(alts)
    generated = folder / "latex/generated"
    figures = (generated / "figures.tex").read_text()
    for name, alt in PICTURES.items():
        assert (folder / name).read_text().startswith("<svg")
        assert f"<title>{alt}</title>" in page
        stem = name.removesuffix(".svg")
        assert b"/Subtype /Image" not in (generated / f"{stem}.pdf").read_bytes()
        assert f"{{generated/{stem}.pdf}}" in figures
    assert page.count("</figcaption>") == page.count("<svg") == len(alts)
    assert ">Tokens</h2>" in page
    assert "\n## Tokens\n" in text
    assert "random (chance)" in (folder / "study-scores.svg").read_text()
    assert "Dashed: the dense network." in text
    if shutil.which("pdflatex") is not None:
        assert lines[-1] == str(folder / "latex/main.pdf")


def test_a_study_without_the_table_measures_nothing(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    shutil.copytree(folder, place)
    for path in [*place.glob("token-figures.*"), *place.glob("study*.svg")]:
        path.unlink()
    path = folder.parent / "without.toml"
    path.write_text((folder.parent / "trial.toml").read_text().replace(TABLE, ""))
    run_study(load_study(path), place, StudyOptions(resume=True, quiet=True))
    write_report(place)
    assert not list(place.glob("token-figures.*"))
    assert not (place / "study-blocks.svg").exists()
    # The figure of the runs stays.
    assert (place / "study-tolerance.svg").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'methods = ["impact"]',
            r"no score is called impact; choose of patch-slimming, class-attention",
        ),
        ('methods = ["random", "random"]', r"a score is listed twice"),
        ("shares = [0.5, 1.5]", r"`token_figures.shares` = .*: shares are different numbers"),
        ("share = 1.5", r"`token_figures.share` = 1.5 is out of range"),
        ("picture = 3", r"unknown key `token_figures.picture`; the nearest valid key is `token_"),
        ("block = 2", r"vit_tiny_patch16_224 has 2 blocks with attention; give a number from 0 to"),
    ],
)
def test_wrong_settings_are_refused_before_any_run(tmp_path: Path, line: str, message: str) -> None:
    path = write_study(tmp_path, f'until = "finetune"\n[token_figures]\n{line}\n')
    with pytest.raises(InputError, match=message) as caught:
        validated_runs(load_study(path), quiet=True)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_network_that_cannot_be_measured_leaves_the_report_of_the_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    shutil.copytree(folder, place)
    (place / "token-figures.json").unlink()
    run = place / "runs" / record(folder)["run"]
    (run / "baseline/architecture.json").write_text("{}")
    study = load_study(folder.parent / "trial.toml")
    run_study(study, place, StudyOptions(resume=True))
    assert "no figures of single blocks: " in capsys.readouterr().err
    write_report(place)


def test_the_tolerance_has_means_over_seeds_and_the_dense_accuracy(tmp_path: Path) -> None:
    table = large_table(tmp_path, 6)
    column = Column("masks.token_tolerance", "axis", "", "a key")
    for place, run in enumerate(table.states()):
        figures: dict[str, Any] = {"top1": 0.8 + 0.01 * place, "macs": 20_000_000 + place}
        figures |= {"masks.token_tolerance": (0.01, 0.02)[place // 3], "masks.params": 1.0}
        figures |= {"masks.sharing": "residual"}
        table.change(run, "done", figures=figures, columns=[column])
    chart = tolerance_chart(summarise(table))
    assert chart is not None
    accuracy, macs = chart.panels
    assert isinstance(accuracy, Panel)
    (line,) = accuracy.lines
    assert list(line.points[0]) == pytest.approx([0.01, 81.0])
    assert list(line.points[1]) == pytest.approx([0.02, 84.0])
    assert len(line.points) == 2
    assert line.spreads == pytest.approx((1.0, 1.0))
    assert line.name == ""
    assert accuracy.level == pytest.approx(95.0)
    assert macs.lines[0].points[0] == pytest.approx((0.01, 50.0), rel=1e-5)
    # One value is no figure.
    for run in list(table.states())[3:]:
        table.change(run, "done", figures={"masks.token_tolerance": None})
    assert tolerance_chart(summarise(table)) is None
