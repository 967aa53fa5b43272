"""The article of a study: its tables, its Method text, the sources that it cites, and links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from study_sample import large_table
from vitrim.core.errors import InputError
from vitrim.pipeline.studies.article_text import MAIN
from vitrim.pipeline.studies.expansion import expand
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.study_file import load_study
from vitrim.pipeline.studies.table import Column, StudyTable

FIGURES = {
    **{"top1": 0.87, "top1_dense": 0.9, "params": 400_000, "params_dense": 800_000},
    **{"macs": 20_000_000, "macs_dense": 40_000_000},
}
HAS_TEX = shutil.which("pdflatex") is not None and shutil.which("bibtex") is not None


def shipped(folder: Path, name: str, seeds: tuple[int, ...] = (7,)) -> StudyTable:
    """The table of a study of the package with planted figures, without its trainings."""
    study = load_study(name)
    runs = [run for run in expand(study) if run.seed in seeds]
    section = study.section
    facts = {"name": study.name, "about": section.about, "source": section.source}
    facts |= {"bibtex": section.bibtex, "base": runs[0].recipe.toml(), "toml": study.text}
    table = StudyTable.create(folder, facts)
    table.add_runs(runs)
    for run in runs:
        table.change(run.id, "done", figures=FIGURES)
    return table


def article(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The texts of an article by the names of their files; nothing is compiled.

    Every citation has one entry.
    """
    monkeypatch.setattr(shutil, "which", lambda name: None)
    write_report(folder, latex=True)
    place = folder / "latex"
    files = [place / "main.tex", *(place / "generated").glob("*.tex")]
    files.append(place / "generated/references.bib")
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    keys = entries(texts)
    assert len(keys) == len(set(keys))
    assert cited(texts) <= set(keys)
    texts["numbers.tex"].encode("ascii")
    return texts


def method(texts: Mapping[str, str]) -> str:
    """The Method paragraph in one line."""
    found = re.search(
        r"newcommand\{\\studymethod\}\{(.*?)\}\n\\newcommand", texts["numbers.tex"], re.S
    )
    assert found is not None
    return " ".join(found[1].split())


def cited(texts: Mapping[str, str]) -> set[str]:
    """The keys that an article cites."""
    listed = re.findall(r"\\cite\{([^}]*)\}", "".join(texts.values()))
    return {key for keys in listed for key in keys.split(",")}


def entries(texts: Mapping[str, str]) -> list[str]:
    """The keys of the bibliography."""
    return re.findall(r"^@\w+\{([^,\s]+),", texts["references.bib"], re.MULTILINE)


def with_axes(table: StudyTable, cells: list[dict[str, Any]]) -> None:
    """Give the runs of a table values of further recipe keys."""
    columns = [Column(name, "axis", "", f"recipe key {name}") for name in cells[0]]
    for run, values in zip(table.states(), cells, strict=True):
        table.change(run, "done", figures=values, columns=columns)


def test_models_beside_and_failed_runs_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = large_table(tmp_path, 6)
    *_, failed, stopped = table.states()
    table.change(failed, "failed", "budget params_50 % is not feasible")
    table.change(stopped, "stopped", "others are better")
    table.set_beside("mobilevitv2_050", {"image": "256x256", "params": 1_370_000, "ms": 6.9})
    table.set_beside("broken", {"reason": "an operator is missing"})
    toml = "[published_top1]\nmobilevitv2_050 = 0.701\n"
    StudyTable.create(tmp_path, {"name": "x", "toml": toml})
    texts = article(tmp_path, monkeypatch)
    beside = texts["beside.tex"]
    assert r"\toprule" in beside
    assert r"mobilevitv2\_050 & 256x256 &" in beside
    assert r"published top-1, \%" in beside
    assert "70.10" in beside
    assert "accuracy is not measured" in beside
    assert "an operator is missing" in beside
    assert r"budget params\_50 \% is not feasible" in texts["failures.tex"]
    assert "others are better" in texts["stopped.tex"]
    for name in ("beside", "failures", "stopped"):
        assert rf"\input{{generated/{name}}}" in texts["main.tex"]
        assert rf"\label{{tab:{name}}}" in texts[f"{name}.tex"]
        assert rf"\ref{{tab:{name}}}" in texts["numbers.tex"]
        assert "|" not in re.findall(r"begin{tabular}{(.*)}", texts[f"{name}.tex"])[0]
    # A long reason is broken into lines.
    assert r"p{" in re.findall(r"begin{tabular}{(.*)}", texts["failures.tex"])[0]


def test_a_study_without_models_beside_has_no_column_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large_table(tmp_path, 3)
    texts = article(tmp_path, monkeypatch)
    assert "no such table" in texts["beside.tex"]
    assert "tab:beside" not in "".join(texts.values())
    assert "published top-1" not in "".join(texts.values())


def test_numbers_of_single_runs_link_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of three settings with equal sizes, two have one run.
    table = large_table(tmp_path, 3)
    first, second, third = table.states()
    table.change(third, "done", figures={"masks.sharing": "unshared", "top1": 0.95})
    texts = article(tmp_path, monkeypatch)
    lines = [line for line in texts["means.tex"].splitlines() if "runs/" in line]
    assert len(lines) == 3
    for line, run in zip(lines, (first, second, third), strict=True):
        cells = line.removesuffix(r" \\").split(" & ")[2:]
        assert len(cells) == 5
        assert all(rf"\href{{../runs/{run}/report.html}}" in each for each in cells)
    assert rf"\href{{../runs/{third}/report.html}}{{95.00 \%}}" in texts["numbers.tex"]


def test_numbers_of_means_do_not_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = large_table(tmp_path, 3)
    for run in table.states():
        table.change(run, "done", figures={"masks.sharing": "full", "masks.params": 0.5})
    (line,) = [
        line for line in article(tmp_path, monkeypatch)["means.tex"].splitlines() if "runs/" in line
    ]
    assert line.count(r"\href") == 3


def run_rows(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """The cells of the rows of the table of all runs, by id of the run."""
    rows = [
        line.strip().removesuffix(r" \\").split(" & ")
        for line in texts["runs.tex"].splitlines()
        if re.search(r"\b0{6}", line)
    ]
    return {re.findall(r"\b0{6}[0-9a-f]{4}\b", cells[0])[0]: cells for cells in rows}


def test_the_appendix_has_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = large_table(tmp_path, 6)
    *_, failed = table.states()
    missing = {"top1": None, "params": None, "macs": None, "compact_fp32_ms": None}
    table.change(failed, "failed", "not feasible", {**missing, "masks.sharing": "a_b & 5 %|λ"})
    texts = article(tmp_path, monkeypatch)
    rows = run_rows(texts)
    assert list(rows) == list(table.states())
    heads = r"run & masks.params & sharing & seed & state & top-1, \% & parameters & MACs & "
    assert texts["runs.tex"].count(heads) == 2
    for run, cells in rows.items():
        linked = [cell for cell in cells if rf"\href{{../runs/{run}/report.html}}" in cell]
        assert len(linked) == (0 if run == failed else 5)
    assert rows[failed][2:] == [r"a\_b \& 5 \%$|$$\lambda$", "42", "failed", "", "", "", ""]
    assert "|" not in re.findall(r"begin{longtable}{(.*)}", texts["runs.tex"])[0]
    order = [r"\usepackage{longtable}", "{hyperref}", r"\onecolumn", r"\input{generated/runs}"]
    assert sorted(order, key=texts["main.tex"].index) == order
    assert r"\ref{tab:runs}" in texts["main.tex"]
    # Those of earlier versions have no such table.
    assert "tab:runs" not in texts["numbers.tex"]


def test_the_appendix_has_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = large_table(tmp_path, 6)
    nonzero = Column("params_nonzero", "figure", "INTEGER", "parameters other than zero")
    for run in table.states():
        figures: dict[str, Any] = {"masks.sharing": "full", "params_nonzero": 9}
        table.change(run, "done", figures=figures, columns=[nonzero])
    # All have the shape of the dense model where single weights are zero.
    heads = r"run & masks.params & seed & top-1, \% & nonzero parameters & fp32, ms \\"
    assert heads in article(tmp_path, monkeypatch)["runs.tex"]


def test_many_settings_share_a_column_of_the_appendix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = large_table(tmp_path, 6)
    names = [f"masks.weight_setting_{place}" for place in range(9)]
    with_axes(table, [dict.fromkeys(names, number) for number in range(6)])
    texts = article(tmp_path, monkeypatch)
    assert r"run & settings & seed & top-1, \%" in texts["runs.tex"]
    # Behind each part of a name or a list a line may end.
    assert "masks.weight" not in texts["runs.tex"]
    (columns,) = re.findall(r"begin{longtable}{(.*)}", texts["runs.tex"])
    assert "p{" in columns
    for cells in run_rows(texts).values():
        assert re.search(r"setting\\_\\allowbreak{}8=\d", cells[1])


def test_a_study_without_a_finished_run_has_no_article(tmp_path: Path) -> None:
    table = large_table(tmp_path, 3)
    for run in table.states():
        table.change(run, "failed", "not feasible")
    with pytest.raises(InputError, match="no run is finished"):
        write_report(tmp_path, latex=True)
    assert not (tmp_path / "latex").exists()


def test_an_article_does_not_wait_for_timm(tmp_path: Path) -> None:
    large_table(tmp_path, 3)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('timm', 'torchvision')))\n"
        "from vitrim.pipeline.studies.report import write_report\n"
        "write_report(sys.argv[1], latex=True)"
    )
    # Without a path there is no TeX.
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" in (tmp_path / "latex/generated/numbers.tex").read_text()


def test_zeros_by_magnitude_have_dense_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(tmp_path, "magnitude")
    texts = article(tmp_path, monkeypatch)
    text = method(texts)
    assert "those of the dense network" in text
    assert "removed one" not in text
    assert "structured masks" not in text
    assert "patches" not in text
    assert {"han2015", "li2017filters", "renda2020", "frankle2021"} <= cited(texts)
    assert not {"molchanov2019", "bengio2013", "hinton2015", "rao2021"} & set(entries(texts))


def test_the_method_of_the_tandem_names_patches_and_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(tmp_path, "tandem")
    texts = article(tmp_path, monkeypatch)
    text = method(texts)
    assert "for each image" in text
    assert r"DynamicViT~\cite{rao2021}" in text
    assert r"\label{eq:objective}" in text
    assert "multiply-adds" in text
    # The dense row has a method and cuts nothing.
    assert r"\ell_2" not in text
    assert "zero" not in text


def test_the_method_of_tokens_names_their_choosers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(tmp_path, "tokens")
    texts = article(tmp_path, monkeypatch)
    text = method(texts)
    assert {"tang2022patch", "goyal2020", "tang2020scop", "liang2022", "haurum2023"} <= cited(texts)
    assert "rao2021" not in entries(texts)
    assert "the same for all images" in text
    assert "for each image" in text
    # All widths stay.
    assert r"\label{eq:objective}" not in text
    assert "FFN units" not in text
    # The own entry of the study is the one of Patch Slimming and of DPS.
    assert entries(texts).count("tang2022patch") == 1


def test_penalty_and_budget_are_both_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(tmp_path, "structured")
    text = method(article(tmp_path, monkeypatch))
    assert text.count(r"\label{eq:objective}") == 1
    assert text.count(r"\label{eq:budget}") == 1
    assert r"VTP~\cite{zhu2021vtp}" in text
    assert r"\ell_1$ or $\ell_2" in text
    assert r"\cite{molchanov2019}" in text


def test_entries_of_a_study_replace_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = large_table(tmp_path, 3)
    with_axes(table, [{"masks.tokens": "dps", "masks.method": "learned"}] * 3)
    own = """@article{ps, author={Yehui Tang and others}, title={Patch Slimming for
      Efficient Vision Transformers}, year={2022}}
@inproceedings{dosovitskiy2021, title = {An Image}}"""
    StudyTable.create(tmp_path, {"bibtex": own})
    texts = article(tmp_path, monkeypatch)
    assert r"DPS~\cite{ps}" in method(texts)
    assert "tang2022patch" not in "".join(texts.values())
    assert texts["references.bib"].count("{dosovitskiy2021,") == 1


def test_equal_titles_of_others_are_other_publications(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zhu et al. and Bui et al. have the same title."""
    table = shipped(tmp_path, "tandem")
    with_axes(table, [{"masks.method": "vtp", "masks.params": 0.5}] * len(table.states()))
    texts = article(tmp_path, monkeypatch)
    assert r"VTP~\cite{zhu2021vtp}" in method(texts)
    assert {"bui", "zhu2021vtp"} <= set(entries(texts))


def test_published_accuracies_are_of_models_beside(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    text = 'recipe = "quickstart"\nbeside = ["test_vit"]\n[published_top1]\n'
    path.write_text(f"{text}test_vit = 0.7\n")
    assert load_study(path).section.published_top1 == {"test_vit": 0.7}
    path.write_text(f"{text}vit_huge = 0.7\n")
    with pytest.raises(InputError, match=r"'vit_huge' is not a model of `beside`; add it there"):
        load_study(path)
    path.write_text(f"{text}test_vit = 70.1\n")
    with pytest.raises(InputError, match=r"published_top1"):
        load_study(path)


def test_early_stopping_is_cited_where_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = large_table(tmp_path, 4)
    assert "li2020asha" not in cited(article(tmp_path, monkeypatch))
    *_, last = table.states()
    table.change(last, "stopped", "others are better")
    texts = article(tmp_path, monkeypatch)
    assert "li2020asha" in cited(texts)
    assert "li2020asha" in entries(texts)


@pytest.mark.skipif(not HAS_TEX, reason="pdflatex and bibtex are not installed")
@pytest.mark.parametrize("name", ["magnitude", "tandem"])
def test_the_articles_of_shipped_studies_compile(name: str, tmp_path: Path) -> None:
    table = shipped(tmp_path, name)
    table.set_beside("mobilevitv2_050", {"image": "256x256", "params": 1_370_000, "ms": 6.9})
    table.change(list(table.states())[3], "failed", "budget params = 0.0001: not feasible")
    *_, line = write_report(tmp_path, latex=True)
    assert line == str(tmp_path / "latex/main.pdf")
    log = (tmp_path / "latex/main.log").read_text(errors="replace")
    assert "undefined" not in log
    # No table leaves the page.
    assert not re.findall(r"Overfull .hbox \(\d\d[\d.]*pt", log)
    assert "warning$ -- 0" in (tmp_path / "latex/main.blg").read_text()


def require_compiled(folder: Path, pages: int) -> None:
    """The PDF of a report has at least so many pages, all references, and nothing beside them."""
    *_, line = write_report(folder, latex=True)
    assert line == str(folder / "latex/main.pdf")
    log = (folder / "latex/main.log").read_text(errors="replace")
    assert "undefined" not in log
    assert "Table widths have changed" not in log
    assert not re.findall(r"Overfull .hbox \(\d\d[\d.]*pt", log)
    assert int(re.findall(r"Output written on main.pdf \((\d+) page", log)[0]) >= pages


@pytest.mark.skipif(not HAS_TEX, reason="pdflatex and bibtex are not installed")
def test_the_article_of_hundreds_of_runs_compiles(tmp_path: Path) -> None:
    table = large_table(tmp_path, 250)
    table.change(list(table.states())[3], "failed", "x", {"masks.sharing": "a_b & 5 %~^\\{#é|"})
    require_compiled(tmp_path, pages=6)
    # Settings beyond the width of a page, one of them without a space.
    names = [f"masks.weight_setting_{place}" for place in range(9)]
    blocks = "+".join(map(str, range(40)))
    with_axes(table, [dict.fromkeys(names[1:], n) | {names[0]: blocks} for n in range(250)])
    require_compiled(tmp_path, pages=6)


@pytest.mark.skipif(not HAS_TEX, reason="pdflatex and bibtex are not installed")
def test_the_text_of_an_earlier_version_compiles(tmp_path: Path) -> None:
    large_table(tmp_path, 9)
    new = ("longtable", "onecolumn", "appendix", "All runs", "generated/runs", "tab:runs")
    lines = [line for line in MAIN.splitlines() if not any(word in line for word in new)]
    (tmp_path / "latex").mkdir()
    main = tmp_path / "latex/main.tex"
    earlier = "\n".join(lines)
    main.write_text(earlier)
    require_compiled(tmp_path, pages=2)
    assert main.read_text() == earlier
    # What docs/studies.md says.
    earlier = earlier.replace(
        r"\usepackage[hidelinks]", "\\usepackage{longtable}\n\\usepackage[hidelinks]"
    )
    appendix = r"\onecolumn\appendix\section{All runs}\input{generated/runs}"
    main.write_text(earlier.replace(r"\end{document}", appendix + "\n\\end{document}"))
    require_compiled(tmp_path, pages=3)
