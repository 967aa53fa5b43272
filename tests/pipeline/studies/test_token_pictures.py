"""The picture of the tokens by depth, from the records of real choices."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import vitrim
from study_sample import large_table
from tiny_models import tiny_vit
from vitrim.compress.tokens.choose import Method, TokenRequest, token_choice
from vitrim.pipeline.studies.expansion import Cell
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.summary import summarise
from vitrim.pipeline.studies.table import Column, StudyTable
from vitrim.pipeline.studies.token_pictures import Course, courses

METHODS: tuple[Method, ...] = ("random", "radial")
SHARES = (0.8, 0.7)


@pytest.fixture
def table(tmp_path: Path) -> StudyTable:
    """Twelve runs: two shares by two methods for each of three seeds, with their records."""
    table = large_table(tmp_path, 12)
    model = vitrim.lift(tiny_vit())
    axes = [Column(f"masks.{name}", "axis", "", "a key") for name in ("tokens", "token_macs")]
    for place, (run, row) in enumerate(zip(table.states(), table.rows(), strict=True)):
        method, share = METHODS[place // 3 % 2], SHARES[place // 6]
        choice = token_choice(model, TokenRequest(method, macs=share, seed=int(str(row["seed"]))))
        file = tmp_path / "runs" / run / "tokens.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(choice.record()))
        values: dict[str, Cell] = {"masks.tokens": method, "masks.token_macs": share}
        values |= {"masks.params": 1.0, "masks.sharing": "residual"}
        table.change(run, "done", figures=values, columns=axes)
    return table


def test_one_method_and_seed_has_a_course_for_each_size(table: StudyTable, tmp_path: Path) -> None:
    found = courses(summarise(table), tmp_path)
    assert [course.method for course in found] == ["random"] * 2
    assert ["token_macs=0.8" in course.name for course in found] == [True, False]
    for course in found:
        record = json.loads((tmp_path / "runs" / course.run / "tokens.json").read_text())
        assert course.counts == tuple(record["counts"].values())
        assert list(course.counts) == sorted(course.counts, reverse=True)
    assert sum(found[0].counts) > sum(found[1].counts)


def test_patch_slimming_is_shown_where_it_was_tried(table: StudyTable, tmp_path: Path) -> None:
    last = list(table.states())[-1]
    table.change(last, "done", figures={"masks.tokens": "patch-slimming"})
    (course,) = courses(summarise(table), tmp_path)
    assert isinstance(course, Course)
    assert (course.method, course.run) == ("patch-slimming", last)
    (tmp_path / "runs" / last / "tokens.json").write_text("{")
    assert {course.method for course in courses(summarise(table), tmp_path)} == {"random"}


def test_reports_show_the_tokens_by_depth(table: StudyTable, tmp_path: Path) -> None:
    *_, main, line = write_report(tmp_path, latex=True)
    text = (tmp_path / "study-tokens.svg").read_text()
    found = courses(summarise(table), tmp_path)
    links = re.findall(r'<a href="runs/(\w+)/report.html"><path', text)
    assert links == [course.run for course in found]
    assert "Tokens by depth, chosen by random" in (tmp_path / "study.html").read_text()
    generated = tmp_path / "latex/generated"
    assert b"/Subtype /Image" not in (generated / "study-tokens.pdf").read_bytes()
    assert rf"\href{{../runs/{links[0]}/report.html}}" in (generated / "figures.tex").read_text()
    if shutil.which("pdflatex") is not None:
        assert line == str(Path(main).with_suffix(".pdf"))


def test_a_study_without_records_has_no_such_picture(table: StudyTable, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "runs")
    assert courses(summarise(table), tmp_path) == []
    write_report(tmp_path)
    assert not (tmp_path / "study-tokens.svg").exists()
