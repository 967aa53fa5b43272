"""Plots match their numbers: positions, fronts, densities, and the picture for a README."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import report_sample
from hypothesis import given
from hypothesis import strategies as st
from vitrim.bench.report import load_run, write_picture
from vitrim.bench.report.curves import panels, phases
from vitrim.bench.report.distribution import Strip, distributions, shape
from vitrim.bench.report.picture import main
from vitrim.bench.report.plot import SERIES, Scale, marker, text_width
from vitrim.bench.report.scatter import Point, pareto, scatter
from vitrim.core.errors import InputError

SVG = "{http://www.w3.org/2000/svg}"


def point(label: str, cost: float, accuracy: float, series: int = 0) -> Point:
    return Point(label, series, cost, accuracy, None, None, "")


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 100)), min_size=1, max_size=12))
def test_the_front_has_the_points_that_no_other_point_beats(
    pairs: list[tuple[float, float]],
) -> None:
    points = [point(str(number), *pair) for number, pair in enumerate(pairs)]
    front = pareto(points)
    for p in points:
        beaten = any(
            q.cost <= p.cost
            and q.accuracy >= p.accuracy
            and (q.cost, q.accuracy) != (p.cost, p.accuracy)
            for q in points
        )
        on_front = any((f.cost, f.accuracy) == (p.cost, p.accuracy) for f in front)
        assert on_front != beaten


@given(
    st.lists(st.tuples(st.floats(0.001, 1e4), st.floats(0, 100)), min_size=1, max_size=8),
    st.sampled_from([330.0, 480.0]),
)
def test_a_scatter_plot_is_well_formed_with_its_markers_inside(
    pairs: list[tuple[float, float]], width: float
) -> None:
    drawn = scatter(
        [point(f"artifact {n}", *pair, series=n) for n, pair in enumerate(pairs)],
        cost_title="ms",
        label="x",
        width=width,
        height=300,
    )
    assert "nan" not in drawn
    tree = ElementTree.fromstring(drawn)
    for circle in tree.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= 300


def test_labels_of_crowded_points_do_not_overlap() -> None:
    points = [
        point(f"compact int8-static {n}", 1.0 + 0.02 * n, 89.7 + 0.01 * (n % 3), series=n)
        for n in range(12)
    ]
    drawn = scatter(points, cost_title="ms", label="x", width=480, height=300)
    boxes = []
    for text in ElementTree.fromstring(drawn).iter("text"):
        if "name" in text.attrib["class"].split():
            wide, at = text_width(text.text or ""), float(text.attrib["x"])
            start = at - wide if text.attrib.get("text-anchor") == "end" else at
            boxes.append((start, start + wide, float(text.attrib["y"])))
    # Points of the front are labelled first; some of the others have no free position.
    assert 3 <= len(boxes) < len(points)
    for number, (left, right, base) in enumerate(boxes):
        assert not any(
            left < end and start < right and abs(base - at) < 11
            for start, end, at in boxes[number + 1 :]
        )
    named = {text.text for text in ElementTree.fromstring(drawn).iter("text")}
    assert {p.label for p in pareto(points)} <= named


def test_the_cost_axis_starts_at_zero() -> None:
    drawn = scatter(
        [point("a", 1.0, 90.0), point("b", 2.0, 91.0)],
        cost_title="ms",
        label="x",
        width=480,
        height=300,
    )
    xs = sorted(
        float(circle.attrib["cx"]) for circle in ElementTree.fromstring(drawn).iter("circle")
    )
    # Twice the cost is twice as far from the left edge of the frame.
    assert xs[1] - 44 == pytest.approx(2 * (xs[0] - 44), abs=0.05)


def test_bars_of_the_distributions_end_at_the_medians() -> None:
    strips = [
        Strip("slow", 0, tuple(np.linspace(0.9, 1.1, 101))),
        Strip("fast", 1, tuple(np.linspace(0.2, 0.3, 101))),
    ]
    tree = ElementTree.fromstring(distributions(strips, label="x", width=1000))
    slow, fast = (float(bar.attrib["width"]) for bar in tree.iter("rect"))
    assert slow / fast == pytest.approx(4.0, rel=1e-3)


def test_the_density_is_where_the_samples_are() -> None:
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.normal(1.0, 0.02, 3000), rng.normal(2.0, 0.02, 1000)])
    grid, heights = shape(samples, Scale(0, 3, 0, 900))
    first = max(height for at, height in zip(grid, heights, strict=True) if at < 450)
    second = max(height for at, height in zip(grid, heights, strict=True) if at >= 450)
    assert grid[int(np.argmax(heights))] == pytest.approx(300, abs=6)
    assert second / first == pytest.approx(1 / 3, rel=0.2)


def test_equal_samples_and_a_single_sample_are_drawn() -> None:
    for samples in ((0.001,), (0.001,) * 50):
        assert "nan" not in distributions([Strip("a", 0, samples)], label="x", width=330)


def test_samples_beyond_the_axis_are_counted_in_the_label() -> None:
    samples = (0.001,) * 999 + (5.0,)
    assert "1 of 1,000 beyond" in distributions([Strip("a", 0, samples)], label="x", width=1000)


def test_phases_are_consecutive_and_remaining_sizes_are_shares(tmp_path: Path) -> None:
    run = load_run(report_sample.write_run(tmp_path / "run"))
    assert [(p.name, p.first, p.last) for p in phases(run.history)] == [
        ("baseline", 1, 30),
        ("masks", 31, 50),
        ("finetune", 51, 70),
    ]
    made = {panel.title: panel for panel in panels(run.history, 803_466, 40_141_312)}
    assert list(made) == ["Loss", "Top-1", "Remaining size", "Training speed"]
    assert made["Remaining size"].curves[0].values[-1] == pytest.approx(28.86, abs=0.01)


def test_the_readme_picture_is_one_self_contained_svg(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    out = write_picture(folder, tmp_path / "picture.svg")
    tree = ElementTree.parse(out).getroot()
    assert tree.tag == f"{SVG}svg"
    words = "".join(tree.itertext())
    assert "0.80 M → 0.23 M parameters, 91.3 → 91.0 % top-1, 3.5× faster" in words
    assert "prefers-color-scheme:dark" in words
    titles = [title.text or "" for title in tree.iter(f"{SVG}title")]
    assert "FFN units: 148 of 512 kept" in titles
    assert not re.search(r"href|url\(|<image", out.read_text())


def test_the_bars_of_the_picture_are_the_kept_shares(tmp_path: Path) -> None:
    tree = ElementTree.parse(
        write_picture(report_sample.write_run(tmp_path / "run"), tmp_path / "p.svg")
    ).getroot()
    bar = next(
        g
        for g in tree.iter(f"{SVG}g")
        if any(t.text == "FFN units: 148 of 512 kept" for t in g.findall(f"{SVG}title"))
    )
    track, fill = (float(rect.attrib["width"]) for rect in bar.findall(f"{SVG}rect"))
    assert fill / track == pytest.approx(148 / 512, rel=1e-3)
    heads = next(
        g
        for g in tree.iter(f"{SVG}g")
        if any(t.text == "heads: 1 of 4 kept" for t in g.findall(f"{SVG}title"))
    )
    assert [rect.attrib["class"] for rect in heads.findall(f"{SVG}rect")] == [
        "fill",
        "track",
        "track",
        "track",
    ]


def test_the_command_writes_the_picture_or_one_error_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    assert main([str(folder), str(tmp_path / "p.svg")]) == 0
    assert main([str(folder), str(tmp_path / "p.png")]) == 2
    assert main([str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("p.png: the picture is an SVG; name a file that ends in .svg")
    assert lines[1].startswith("usage: ")
    assert not (tmp_path / "p.png").exists()


def test_a_run_with_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    models = {"baseline": {"params": 1, "macs": 1, "top1": None}}
    folder = report_sample.write_run(tmp_path / "run", without=("kept.json",), models=models)
    with pytest.raises(InputError, match="nothing to draw"):
        write_picture(folder, tmp_path / "p.svg")


@pytest.mark.parametrize("missing", ["kept.json", "measurement"])
def test_a_run_without_a_part_has_a_picture_of_the_other(tmp_path: Path, missing: str) -> None:
    made = report_sample.report()
    if missing == "measurement":
        for model in made["models"].values():
            model["artifacts"] = []
    folder = report_sample.write_run(tmp_path / "run", without=(missing,), **made)
    words = "".join(
        ElementTree.parse(write_picture(folder, tmp_path / "p.svg")).getroot().itertext()
    )
    assert ("Kept units" in words) == (missing == "measurement")
    assert ("Accuracy against latency" in words) == (missing == "kept.json")


def test_hostile_labels_keep_the_picture_well_formed(tmp_path: Path) -> None:
    folder = report_sample.write_run(
        tmp_path / "run", title="</title><script>alert(1)</script>\x00"
    )
    (folder / "kept.json").write_text(
        json.dumps([{"branch": "<b>\x01", "kind": "ffn", "dims": {"<i>&": [1, 2]}}])
    )
    tree = ElementTree.parse(write_picture(folder, tmp_path / "p.svg")).getroot()
    assert not list(tree.iter(f"{SVG}script"))


def test_every_colour_has_a_marker_of_its_own_shape() -> None:
    """A legend is read without colours, too."""
    outlines = {
        re.sub(r' class="[^"]*"', "", str(marker(0.0, 0.0, series))) for series in range(SERIES)
    }
    assert len(outlines) == SERIES
