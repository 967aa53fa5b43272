"""Markdown and HTML: all sections, harmless labels, lines for missing parts, complete files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_sample
from vitrim.bench.report import load_run, render, render_measurements, write_picture
from vitrim.bench.report.cut import shipped_text
from vitrim.bench.report.html import render_html
from vitrim.bench.report.markdown import render_markdown
from vitrim.bench.results.measurement import Measurement
from vitrim.core.errors import InputError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`|*_&amp;\u202e\x00"
VOID = {"meta", "br"}


class Tree(HTMLParser):
    """Every tag with its attributes; fails if tags are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_render_writes_both_files_into_the_folder(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    before = {path.name for path in folder.iterdir()}
    assert render(folder) == [folder / "report.md", folder / "report.html"]
    assert {path.name for path in folder.iterdir()} - before == {"report.md", "report.html"}


def test_a_damaged_run_keeps_the_old_report(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    (folder / "report.html").write_text("old")
    (folder / "kept.json").write_text("{")
    with pytest.raises(InputError, match=r"kept\.json"):
        render(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not (folder / "report.md").exists()


def test_the_page_has_every_section_and_no_link_to_load(tmp_path: Path) -> None:
    page = render_html(load_run(report_sample.write_run(tmp_path / "run")))
    tree = Tree(page)
    ids = [attributes["id"] for _, attributes in tree.tags if attributes.get("id")]
    assert ids == [
        "figures",
        "fronts",
        "latency",
        "estimates",
        "kept",
        "training",
        "parity",
        "environment",
        "warnings",
        "reproduce",
    ]
    assert not {tag for tag, _ in tree.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    loading = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"}
    assert not [attributes for _, attributes in tree.tags if loading & set(attributes)]
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"(?:https?:)?//\w", page)


def test_every_plot_has_a_description_for_screen_readers(tmp_path: Path) -> None:
    tree = Tree(render_html(load_run(report_sample.write_run(tmp_path / "run"))))
    labels = [attributes.get("aria-label") for tag, attributes in tree.tags if tag == "svg"]
    # Two fronts, the distributions and four training curves, each for desktops and for phones.
    assert len(labels) == 14
    assert all(labels)
    assert any(label and "compact int8 90.96 % top-1, 0.307 ms" in label for label in labels)


def test_hostile_labels_remain_text(tmp_path: Path) -> None:
    made = report_sample.report()
    made["models"][HOSTILE] = made["models"].pop("compact")
    made["parity"] = {HOSTILE: 1e-6}
    made["estimates"][0] |= {"model": HOSTILE, "device": HOSTILE}
    made["estimates"][0]["latency"] |= {
        "runtime": HOSTILE,
        "rests_on": HOSTILE,
        "held_against": [HOSTILE],
    }
    made["models"]["baseline"]["artifacts"][0]["measurement"]["environment"]["cpu_model"] = HOSTILE
    folder = report_sample.write_run(
        tmp_path / "run",
        **{**made, "title": HOSTILE, "command": HOSTILE, "warnings": [HOSTILE], "data": HOSTILE},
    )
    (folder / "kept.json").write_text(
        json.dumps([{"branch": HOSTILE, "kind": "ffn", "dims": {HOSTILE: [1, 2]}}])
    )
    (folder / "history.jsonl").write_text(
        json.dumps({"phase": HOSTILE, "epoch": 1, "loss": 1.0}) + "\n"
    )
    (folder / "recipe.toml").write_text(HOSTILE.replace("\x00", ""))
    run = load_run(folder)
    tree = Tree(render_html(run))
    assert not {tag for tag, _ in tree.tags} & {"script", "img"}
    assert not [
        attributes
        for _, attributes in tree.tags
        if any(name.startswith("on") for name in attributes)
    ]
    assert any("<script>alert(1)</script>" in words for words in tree.words)
    markdown = render_markdown(run)
    assert "<script" not in markdown[: markdown.index("Command")]
    heads = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in heads} <= {4, 5, 8}


def test_missing_parts_are_replaced_by_a_line(tmp_path: Path) -> None:
    folder = report_sample.write_run(
        tmp_path / "run", without=("kept.json", "history.jsonl", "recipe.toml"), parity={}
    )
    run = load_run(folder)
    tree = Tree(render_html(run))
    assert not [
        attributes
        for _, attributes in tree.tags
        if attributes.get("id") in ("kept", "training", "parity")
    ]
    for line in (
        "the folder contains no kept.json",
        "the folder contains no history.jsonl",
        "contains no parity figures",
    ):
        assert any(line in words for words in tree.words)
        assert line in render_markdown(run)


def test_a_single_artifact_has_a_report(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(
        json.dumps(
            {
                **report_sample.measurements()["compact-int8"],
                "top1": None,
                "correct": None,
                "total": None,
            }
        )
    )
    written = render_measurements([path], tmp_path / "out")
    assert [file.name for file in written] == ["report.json", "report.md", "report.html"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "compact int8: p50 0.307" in page
    assert "no artifact has both a top-1 and a cost" in page
    assert load_run(tmp_path / "out").report.models["compact"].params is None


def test_a_run_without_measurements_has_a_report(tmp_path: Path) -> None:
    models = {
        name: {"params": 10_000_000, "macs": 1, "top1": None} for name in ("baseline", "compact")
    }
    folder = report_sample.write_run(tmp_path / "run", models=models)
    run = load_run(folder)
    tree = Tree(render_html(run))
    assert any("no artifact of this run was measured" in words for words in tree.words)
    assert "10.0 M → 10.0 M parameters" in render_markdown(run)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path, file = write_measurement(tmp_path / "measured"), tmp_path / "file"
    file.write_text("precious")
    for out in (file, file / "report"):
        with pytest.raises(InputError, match=r"a file is in the way of the output folder"):
            render_measurements([path], out)


def write_measurement(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "one.json"
    path.write_text(json.dumps(report_sample.measurements()["compact-int8"]))
    return path


def test_a_report_is_replaced_only_by_a_report(tmp_path: Path) -> None:
    path, out = write_measurement(tmp_path / "measured"), tmp_path / "out"
    for _ in range(2):
        render_measurements([path], out)
    for name in ("report.json", "report.md", "report.html"):
        mine = tmp_path / f"mine-{name}"
        mine.mkdir()
        (mine / name).write_text('{"text": "precious"}')
        (mine / "thesis.txt").write_text("precious")
        with pytest.raises(InputError, match=rf"{name}: vitrim did not write this file"):
            render_measurements([path], mine)
        assert (mine / name).read_text() == '{"text": "precious"}'
        assert len(list(mine.iterdir())) == 2


def test_a_report_of_a_run_is_not_replaced_by_one_of_other_measurements(tmp_path: Path) -> None:
    path, run = write_measurement(tmp_path / "measured"), report_sample.write_run(tmp_path / "run")
    with pytest.raises(InputError, match="contains a run, and its report would be lost"):
        render_measurements([path], run)
    for out in (run, run / "report", tmp_path):
        with pytest.raises(
            InputError, match=r"the output (is|lies in|contains) the source that is"
        ):
            render_measurements([run], out)


def test_only_measurements_and_pictures_of_vitrim_are_replaced(tmp_path: Path) -> None:
    path, run = write_measurement(tmp_path / "measured"), report_sample.write_run(tmp_path / "run")
    measurement = Measurement.load(path)
    measurement.save(path)
    for _ in range(2):
        write_picture(run, tmp_path / "picture.svg")
    (tmp_path / "drawing.svg").write_text("<svg></svg>")
    with pytest.raises(InputError, match=r"drawing\.svg: vitrim did not write this file"):
        write_picture(run, tmp_path / "drawing.svg")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.txt: .* is not a measurement"):
        measurement.save(tmp_path / "thesis.txt")


def test_markdown_tables_contain_the_figures(tmp_path: Path) -> None:
    markdown = render_markdown(load_run(report_sample.write_run(tmp_path / "run")))
    assert "| Parameters | 0.80 M | **0.23 M** (29 %) | **0.23 M** (29 %) |" in markdown
    assert "| block 3 | 1 of 4 | 14 of 32 | 18 of 32 | 60 of 512 |" in markdown
    assert "| masked → compact | 3.1 × 10⁻⁷ |" in markdown


def test_a_history_with_gaps_or_a_single_epoch_is_drawn(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    lines = [
        '{"phase": "masks", "epoch": 1, "loss": NaN, "val_top1": 50.0}',
        '{"phase": "masks", "epoch": 2, "val_top1": null}',
    ]
    for content in ("\n".join(lines), lines[0]):
        (folder / "history.jsonl").write_text(content)
        page = render_html(load_run(folder))
        assert "nan" not in page.lower().replace("nano", "")
        assert "<h3>Top-1, %</h3>" in page
        assert "<h3>Loss</h3>" not in page


def test_the_report_imports_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    program = (
        "import sys; from vitrim.bench.report import render, write_picture; render(sys.argv[1]); "
        "write_picture(sys.argv[1], sys.argv[1] + '/p.svg');"
        "sys.exit(' '.join({'torch', 'matplotlib', 'onnxruntime'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_page_shows_where_patches_leave(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    path = folder / "report.json"
    report = json.loads(path.read_text())
    pixel = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9aw"
        "AAAABJRU5ErkJggg=="
    )
    report["tokens"] = {
        "grid": [2, 2],
        "sites": ["stem", "blocks.0.attn", "blocks.0.ffn"],
        "counts": [4, 2, 2],
        "exits": [0, 1, 3, 3],
        "images": [pixel],
    }
    path.write_text(json.dumps(report))
    page = render_html(load_run(folder))
    tree = Tree(page)
    assert "tokens" in [attributes.get("id") for _, attributes in tree.tags]
    words = " ".join(tree.words)
    assert "Of 4 patches, 1 are never embedded and 2 are carried to the end." in words
    pictures = [attributes for tag, attributes in tree.tags if tag == "image"]
    assert [one["href"] for one in pictures] == [f"data:image/png;base64,{pixel}"]


def test_a_page_shows_which_patches_each_image_keeps(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    path = folder / "report.json"
    report = json.loads(path.read_text())
    tokens = {"grid": [2, 2], "sites": ["stem", "a"], "counts": [4, 2], "exits": [2, 2, 1, 1]}
    own = {"images": ["QUJD", "REVG"], "chosen": [[2, 2, 1, 1], [1, 2, 1, 2]], "averaged": 16}
    report["tokens"] = tokens | own
    path.write_text(json.dumps(report))
    tree = Tree(render_html(load_run(folder)))
    words = " ".join(tree.words)
    assert "Of 4 patches, a constant number is chosen for each image." in words
    assert "mean over 16 test images" in words
    styles = [each.get("style") or "" for tag, each in tree.tags if tag == "rect"]
    opacities = [each.split("fill-opacity:")[1] for each in styles if "fill-opacity:" in each]
    dark = [float(each.split(";")[0]) > 0 for each in opacities]
    # The mean of all images, then each image.
    assert [dark[start : start + 4] for start in (0, 4, 8)] in (
        [[False, False, True, True], [False, False, True, True], [True, False, True, False]],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["QUJD"], "chosen": [[0, 1]]}, "2 exits for 2 x 2 patches"),
        ({"chosen": [[0, 1, 2, 2]]}, "1 choices for 0 images"),
        ({"exits": [0, 1]}, "2 exits for 2 x 2 patches"),
        ({"counts": [4]}, "1 counts for 2 sites"),
        ({"exits": [0, 1, 2, 3]}, "a patch is carried at 3 of 2 sites"),
        ({"images": ["<svg onload=x>"]}, "images"),
    ],
)
def test_a_malformed_map_of_tokens_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    path = folder / "report.json"
    report = json.loads(path.read_text())
    tokens = {"grid": [2, 2], "sites": ["stem", "a"], "counts": [4, 2], "exits": [0, 1, 2, 2]}
    report["tokens"] = tokens | change
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match=message):
        load_run(folder)


def test_predicted_and_measured_errors_of_a_cut_are_listed(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    path = folder / "report.json"
    report = json.loads(path.read_text())
    report["cut"] = {
        "predicted": 0.05,
        "measured": 0.08,
        "images": 64,
        "rows": [
            {"name": "blocks.0.attn", "predicted": 0.01, "measured": 0.02, "cost_share": 0.4},
            {"name": "blocks.1.attn", "predicted": 0.0002, "measured": None, "cost_share": 0.0},
        ],
    }
    path.write_text(json.dumps(report))
    run = load_run(folder)
    words = " ".join(Tree(render_html(run)).words)
    assert "Errors of the cut" in words
    assert "64 held-out images" in words
    text = render_markdown(run)
    assert "| blocks.0.attn | 1.00 % | 2.00 % | 40 % |" in text
    assert "| blocks.1.attn | 0.02 % | absorbed | 0 % |" in text
    assert "| features (64 held-out images) | 5.00 % | 8.00 % | – |" in text


def test_the_latency_budget_has_table_prediction_and_measurement(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    path = folder / "report.json"
    report = json.loads(path.read_text())
    rounds = [
        {"budget_ms": 2.0, "predicted_ms": 1.99, "measured_ms": 2.2},
        {"budget_ms": 1.79, "predicted_ms": 1.78, "measured_ms": 1.96},
    ]
    report["latency"] = {
        "latency_ms": 2.0,
        "table": "onnxruntime fp32 on host, 1 thread",
        "table_error": 0.012,
        "predicted_ms": 1.78,
        "measured_ms": 1.96,
        "met": True,
        "rounds": rounds,
    }
    path.write_text(json.dumps(report))
    run = load_run(folder)
    words = " ".join(Tree(render_html(run)).words)
    assert "The budget is 2 ms. The cut met it before fine-tuning." in words
    text = render_markdown(run)
    assert "1 thread, median error 1.2 % on whole networks" in text
    assert "| cut 1 | 2 ms | 1.99 ms | 2.2 ms |" in text
    assert "| cut 2 | 1.79 ms | 1.78 ms | 1.96 ms |" in text
    shipped = {"shipped": "compact-fp32", "shipped_ms": 2.1, "shipped_met": False}
    path.write_text(json.dumps({**report, "latency": {**report["latency"], **shipped}}))
    run = load_run(folder)
    outcome = "The shipped file compact-fp32 takes 2.1 ms and does NOT meet it."
    assert f"The budget is 2 ms. {outcome}" in " ".join(Tree(render_html(run)).words)
    assert "| compact-fp32, fine-tuned | – | – | 2.1 ms |" in render_markdown(run)
    assert run.report.latency is not None
    assert shipped_text(run.report.latency) == (
        "latency: budget 2 ms, compact-fp32 measured 2.1 ms: NOT met"
    )
    unmeasured = {**report["latency"], "rounds": [], "measured_ms": None, "met": None}
    path.write_text(json.dumps({**report, "latency": unmeasured}))
    text = render_markdown(load_run(folder))
    assert "It was not measured." in text
    assert "| cut | 2 ms | 1.78 ms | – |" in text
