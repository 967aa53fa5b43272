"""Fronts of sizes: the table shows what exists, the CSV everything, and the picture is valid."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from vitrim.bench.report.front import Front, Size, front_csv, front_markdown, front_picture

DENSE = Size("", 1.0, 800_000, 33_000_000, 3_200_000, 0.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.85)
HALF = Size(
    "macs-0.50", 0.5, 500_000, 16_000_000, 2_000_000, 0.1, 0.98, 0.97, 0.95, 0.89, 0.79, 0.84
)
LABELLED = Front("macs", "small <vit>", (DENSE, HALF))


def _without_labels(size: Size) -> Size:
    return replace(size, agreement=None, top1=None, knn=None, linear=None)


UNLABELLED = Front("params", "backbone", tuple(map(_without_labels, LABELLED.sizes)))


def test_the_table_has_a_row_a_network_and_no_empty_column() -> None:
    lines = front_markdown(UNLABELLED).splitlines()
    header, *rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2
    assert "top-1" not in header
    assert "| macs-0.50 | 0.50 M |" in rows[1]
    assert "top-1" in front_markdown(LABELLED)
    assert "90.00 %" in front_markdown(LABELLED)


def test_the_csv_has_full_precision_and_empty_cells_where_nothing_was_measured() -> None:
    rows = list(csv.DictReader(io.StringIO(front_csv(UNLABELLED))))
    assert [row["folder"] for row in rows] == ["", "macs-0.50"]
    assert float(rows[1]["cosine"]) == 0.98
    assert rows[1]["top1"] == ""


@pytest.mark.parametrize(
    ("front", "shown"),
    [(LABELLED, ["top-1", "nearest neighbours"]), (UNLABELLED, ["cosine of features"])],
)
def test_the_picture_shows_accuracies_or_else_cosines(front: Front, shown: list[str]) -> None:
    text = front_picture(front)
    tree = ET.fromstring(text)
    words = [element.text for element in tree.iter() if element.text]
    for word in shown:
        assert word in words
    assert text.startswith("<svg")
    assert 'class="plot"' in text


def test_the_cost_axis_is_that_of_the_budget() -> None:
    assert "multiply-adds, millions" in front_picture(LABELLED)
    assert "parameters, millions" in front_picture(UNLABELLED)
    assert "weights, MB" in front_picture(replace(LABELLED, kind="file"))
    timed = tuple(replace(size, latency_ms=1.0) for size in LABELLED.sizes)
    assert "predicted latency, ms" in front_picture(Front("cost", "small", timed))
    assert "latency (ms)" in front_markdown(Front("cost", "small", timed))
