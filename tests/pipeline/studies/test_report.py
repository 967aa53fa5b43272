"""The report of a study: page, Markdown, pictures, sorting in a browser, and the article."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chromium_browser import chromium, find_chromium
from study_sample import large_table
from vitrim.core.errors import InputError
from vitrim.pipeline.studies.article_text import escaped
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.table import Column, StudyTable

REASON = "budget <b>params</b> = 0.0001: not feasible"
SOURCE = {
    "name": "Shared & fixed masks",
    "about": "Which masks to share, at 5 % steps.",
    "source": "Tredese 2023",
    "bibtex": "@mastersthesis{tredese2023,\n  author = {Tredese, Leonardo},\n  title = {A},\n"
    "  school = {B},\n  year = {2023},\n}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 29 finished runs and one that failed, with its report."""
    place = tmp_path_factory.mktemp("report")
    table = large_table(place, 30)
    missing = {"top1": None, "params": None, "macs": None, "compact_fp32_ms": None}
    table.change(list(table.states())[4], "failed", REASON, missing)
    StudyTable.create(place, SOURCE)
    write_report(place)
    return place


def test_the_page_is_self_contained(folder: Path) -> None:
    page = (folder / "study.html").read_text(encoding="utf-8")
    assert "29 of 30 runs done, 1 failed" in page
    assert "Shared &amp; fixed masks" in page
    assert "Which masks to share" in page
    assert "&lt;b&gt;params&lt;/b&gt; = 0.0001" in page
    assert page.count("<svg") == 3
    assert "src=" not in page
    assert not re.search(r'href="(?!runs/[0-9a-f]{10}/report.html")', page)


def test_every_figure_links_to_its_run(folder: Path) -> None:
    page = (folder / "study.html").read_text(encoding="utf-8")
    for row in StudyTable(folder).rows():
        links = page.count(f'href="runs/{row["id"]}/report.html"')
        # Of three runs in a row the second one is the only one of its setting.
        alone = int(row["number"] or 0) % 3 == 2
        # A point in each picture, a seed among the means, the cells of its own row, and the means
        # of which it is the only run.
        assert links == (0 if row["state"] == "failed" else 3 + 1 + 5 + 4 * alone)


def test_the_markdown_has_the_same_tables(folder: Path) -> None:
    text = (folder / "study.md").read_text(encoding="utf-8")
    assert "# Shared & fixed masks" in text.replace("&amp;", "&")
    titles = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert titles == ["Means over seeds", "On the Pareto fronts", "All runs", "Failed runs"]
    caption = "A point is a run; a line is the Pareto front of a seed."
    alts = dict(re.findall(r"!\[(.*?)\]\((.*?)\)", text))
    assert alts == {
        "Top-1 by parameters (thousands), coloured by masks.sharing.": "study-params.svg",
        "Top-1 by multiply-adds (millions), coloured by masks.sharing.": "study-macs.svg",
        "Top-1 by median latency of fp32 (ms), coloured by masks.sharing.": (
            "study-compact-fp32-ms.svg"
        ),
    }
    page = (folder / "study.html").read_text(encoding="utf-8")
    for alt in alts:
        assert f"*{alt} {caption}*" in text
        assert f"<title>{alt}</title>" in page
        assert f">{alt} {caption}</figcaption>" in page
    assert (folder / "study-params.svg").read_text().startswith("<svg")
    first = StudyTable(folder).rows()[0]["id"]
    assert f"[{first}](runs/{first}/report.html)" in text


def test_the_first_cost_is_drawn_for_each_axis_with_few_values(tmp_path: Path) -> None:
    table = large_table(tmp_path, 6)
    # Values that go together divide the runs equally.
    names = ("masks.fixed", "finetune.lr")
    axes = [Column(name, "axis", "", f"recipe key {name}") for name in names]
    for place, run in enumerate(table.states()):
        values = (("none", 0.1), ("head", 0.2), ("embed", 0.3))[place % 3]
        table.change(run, "done", figures=dict(zip(names, values, strict=True)), columns=axes)
    write_report(tmp_path)
    pictures = {path.name: path.read_text() for path in tmp_path.glob("study-*.svg")}
    assert sorted(pictures) == [
        *("study-compact-fp32-ms.svg", "study-macs.svg", "study-params-masks-fixed.svg"),
        *("study-params-masks-params.svg", "study-params.svg"),
    ]
    assert "masks.sharing:" in pictures["study-params.svg"]
    assert "masks.fixed:" in pictures["study-params-masks-fixed.svg"]
    for name in ("none", "head", "embed"):
        assert f">{name}<" in pictures["study-params-masks-fixed.svg"]
    assert all(picture.count("<a href=") == 6 for picture in pictures.values())


def test_axes_are_coloured_by_the_first_cost_in_which_runs_differ(tmp_path: Path) -> None:
    table = large_table(tmp_path, 6)
    axes = [Column("masks.fixed", "axis", "", "recipe key masks.fixed")]
    for place, run in enumerate(table.states()):
        values = {"masks.fixed": ("none", "head", "embed")[place % 3], "params": 1_000_000 + place}
        table.change(run, "done", figures=values, columns=axes)
    write_report(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("study-*.svg")) == [
        *("study-compact-fp32-ms.svg", "study-macs-masks-fixed.svg"),
        *("study-macs-masks-params.svg", "study-macs.svg", "study-params.svg"),
    ]


@pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
def test_tables_sort_in_the_browser(folder: Path) -> None:
    column = "[...document.querySelectorAll('#runs ~ * tbody tr')].map(r => r.children[%d].%s)"
    click = "document.querySelectorAll('#runs ~ * th')[%d].querySelector('button').click()"
    with chromium() as browser:
        page = browser.new_page()
        page.open(folder / "study.html", width=1100)
        heads = page.value("[...document.querySelectorAll('#runs ~ * th')].map(h => h.innerText)")
        place = heads.index("parameters")
        page.value(click % place)
        rising = [float(value or "inf") for value in page.value(column % (place, "dataset.v"))]
        assert rising == sorted(rising)
        assert len(rising) == 30
        page.value(click % place)
        falling = [float(value or "-inf") for value in page.value(column % (place, "dataset.v"))]
        assert falling == sorted(falling, reverse=True)
        texts = heads.index("sharing")
        page.value(click % texts)
        values = page.value(column % (texts, "innerText"))
        assert values == sorted(values)
        assert page.errors == []
        assert all(url.startswith("file:") for url in page.requests)


def test_a_report_starts_without_torch() -> None:
    code = "import sys, vitrim.pipeline.studies.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page_of_others_is_not_replaced(tmp_path: Path) -> None:
    large_table(tmp_path, 3)
    (tmp_path / "study.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match=r"study.html: vitrim did not write this file"):
        write_report(tmp_path)
    assert (tmp_path / "study.html").read_text() == "<p>mine</p>"


def test_a_study_without_a_finished_run_has_a_report(tmp_path: Path) -> None:
    table = large_table(tmp_path, 3)
    for run in table.states():
        table.change(run, "waiting")
    write_report(tmp_path)
    assert "0 of 3 runs done" in (tmp_path / "study.html").read_text()
    with pytest.raises(InputError, match="no run is finished"):
        write_report(tmp_path, latex=True)


def test_a_cost_without_an_accuracy_has_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With until = "finetune" and finetune.epochs = 0 runs have sizes alone."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    table = large_table(tmp_path, 4)
    for run in table.states():
        table.change(run, "done", figures={"top1": None, "val_top1": None})
    write_report(tmp_path, latex=True)
    assert "4 of 4 runs done" in (tmp_path / "study.html").read_text()
    assert list(tmp_path.glob("study-*.svg")) == []
    # One run has an accuracy and no latency.
    run = next(iter(table.states()))
    table.change(run, "done", figures={"top1": 0.9, "compact_fp32_ms": None})
    write_report(tmp_path, latex=True)
    names = sorted(path.name for path in tmp_path.glob("study-*.svg"))
    assert names == ["study-macs.svg", "study-params-masks-params.svg", "study-params.svg"]


def test_the_article_keeps_the_text_of_its_author(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    *_, main, line = write_report(folder, latex=True)
    assert main == str(folder / "latex/main.tex")
    assert "no PDF, since pdflatex and bibtex are not installed" in line
    generated = folder / "latex/generated"
    numbers = (generated / "numbers.tex").read_text()
    assert r"\newcommand{\studyname}{Shared \& fixed masks}" in numbers
    assert r"\cite{tredese2023}" in numbers
    assert "@mastersthesis{tredese2023," in (generated / "references.bib").read_text()
    assert r"\toprule" in (generated / "means.tex").read_text()
    assert "|" not in re.findall(r"begin{tabular}{(.*?)}", (generated / "means.tex").read_text())[0]
    assert (generated / "study-params.pdf").read_bytes().startswith(b"%PDF")
    before = (generated / "study-params.pdf").read_bytes()
    Path(main).write_text("edited by the author")
    write_report(folder, latex=True)
    assert Path(main).read_text() == "edited by the author"
    assert (generated / "study-params.pdf").read_bytes() == before
    Path(main).unlink()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_article_compiles(folder: Path) -> None:
    *_, line = write_report(folder, latex=True)
    assert line == str(folder / "latex/main.pdf")
    log = (folder / "latex/main.log").read_text(errors="replace")
    assert "undefined" not in log
    assert "Citation" not in (folder / "latex/main.blg").read_text()


def test_texts_are_escaped_for_latex() -> None:
    assert escaped("5 % of a_b & {c} ± 1\n\\input") == (
        r"5 \% of a\_b \& \{c\} $\pm$ 1 \textbackslash{}input"
    )
    assert escaped("naïve 漢") == "na?ve ?"
