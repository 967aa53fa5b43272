"""The waterfall of a stack: its figures, its picture, and its place in the report."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report_sample
from vitrim.bench.report.waterfall import Waterfall, WaterfallStep, cells, waterfall_picture
from vitrim.bench.report.writing import PICTURE, render
from vitrim.core.errors import InputError

LATENCIES = {"dense": 8.0, "+ ONNX Runtime": 4.0, "+ widths": 2.0, "+ int8": 2.5}


def waterfall() -> Waterfall:
    steps = tuple(
        WaterfallStep(
            name=name,
            how="onnxruntime, fp32",
            latency_ms=latency,
            quartiles_ms=(0.9 * latency, 1.1 * latency),
            samples=20,
            top1=None if name == "+ widths" else 0.9125,
        )
        for name, latency in LATENCIES.items()
    )
    return Waterfall(title="demo & <more>", machine="a processor", images=100, steps=steps)


def test_each_row_has_what_the_step_and_all_steps_brought() -> None:
    rows = cells(waterfall())
    assert [row[0] for row in rows] == list(LATENCIES)
    assert [row[3] for row in rows] == ["–", "2.0×", "2.0×", "0.80×"]
    assert [row[4] for row in rows] == ["1.00×", "2.0×", "4.0×", "3.2×"]
    assert [row[5] for row in rows] == ["91.25 %", "91.25 %", "–", "91.25 %"]
    assert rows[0][2] == "8.000 ms [7.200, 8.800]"


def test_the_bars_are_as_long_as_the_latencies(tmp_path: Path) -> None:
    text = waterfall_picture(waterfall())
    root = ElementTree.fromstring(text)
    rects = [each for each in root.iter() if each.tag.endswith("rect")]
    left = [float(each.get("width", 0)) for each in rects if each.get("class") == "left"]
    saved = [float(each.get("width", 0)) for each in rects if each.get("class") == "saved"]
    assert [width / left[0] for width in left] == pytest.approx([1.0, 0.5, 0.25, 0.3125], abs=1e-3)
    # The last step is slower than the one before, so it saves nothing.
    assert [width / left[0] for width in saved] == pytest.approx([0.5, 0.25], abs=1e-3)
    shown = "".join(root.itertext())
    assert "demo & <more>: 3.2× faster" in shown
    assert "8.000 ms" in shown
    (tmp_path / "w.svg").write_text(text)
    assert PICTURE.matches(tmp_path / "w.svg")


def test_the_report_of_a_run_shows_its_waterfall(tmp_path: Path) -> None:
    folder = report_sample.write_run(tmp_path / "run")
    waterfall().save(folder / "waterfall.json")
    render(folder)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "What each step brought" in page
    assert "+ ONNX Runtime 4.000 ms" in page
    assert "What each step brought" in text
    assert "| 4.000 ms" in text
    (folder / "waterfall.json").unlink()
    render(folder)
    assert "What each step brought" not in (folder / "report.html").read_text()


def test_a_damaged_file_is_refused_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "waterfall.json"
    waterfall().save(path)
    assert Waterfall.load(path) == waterfall()
    data = json.loads(path.read_text())
    data["steps"][0]["latency_ms"] = -1
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"waterfall\.json: steps\.0\.latency_ms: Input should be"):
        Waterfall.load(path)
