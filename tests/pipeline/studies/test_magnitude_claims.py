"""The five claims about zeros by magnitude, on rows with known answers; the picture of masks."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import vitrim
from tiny_models import tiny_vit
from vitrim import WeightMask
from vitrim.pipeline.studies.expansion import expand
from vitrim.pipeline.studies.findings import Finding
from vitrim.pipeline.studies.magnitude_claims import magnitude_findings
from vitrim.pipeline.studies.mask_pictures import Masks, mask_pdf, mask_picture, shown_run
from vitrim.pipeline.studies.study_file import load_study
from vitrim.pipeline.studies.summary import Summary
from vitrim.pipeline.studies.table import Column

AXES: dict[str, tuple[str | int | float, ...]] = {
    "masks.weight_granularity": ("weight", "row"),
    "masks.weight_ranking": ("global", "shuffled"),
    "masks.weight_scope": ("all", "ffn", "attention"),
    "masks.weight_rounds": (1, 4),
    "masks.weight_sparsity": (0.5, 0.95),
    "seed": (7, 13, 42),
}
Row = dict[str, Any]


def summary(top1: Callable[[Row], float], dead: int = 1, without: tuple[str, ...] = ()) -> Summary:
    """A finished study in which one-shot runs have four epochs, and iterative ones one."""
    axes = [key for key in AXES if key != "seed" and key not in without]
    rows = []
    for number, values in enumerate(itertools.product(*AXES.values())):
        row: Row = dict(zip(AXES, values, strict=True))
        if any(row[key] != AXES[key][0] for key in without):
            continue
        row |= {"id": f"{number:010x}", "number": number + 1, "state": "done"}
        row["finetune.epochs"] = 4 if row["masks.weight_rounds"] == 1 else 1
        row |= {"top1_dense": 0.9, "top1": top1(row), "heads": 16, "heads_dead": dead}
        rows.append({key: value for key, value in row.items() if key not in without})
    columns = tuple(Column(key, "axis", "", "") for key in (*axes, "finetune.epochs"))
    return Summary({}, columns, tuple(rows), ())


def by_claim(found: list[Finding]) -> Mapping[str, Finding]:
    words = ("loss", "FFN", "iterative", "structured", "heads")
    return {word: finding for word in words for finding in found if word in finding.claim}


def as_the_source(row: Row) -> float:
    """Every claim is true: small losses, FFN before attention, rounds before one-shot."""
    points = 0.0
    if row["masks.weight_granularity"] == "row":
        points -= 10.0 + (0.5 if row["masks.weight_ranking"] == "shuffled" else 0.0)
    elif row["masks.weight_ranking"] == "shuffled":
        points -= 30.0
    losses = {"ffn": 0.1, "attention": 0.8, "all": 1.0}
    points -= losses[str(row["masks.weight_scope"])]
    points -= 0.0 if row["masks.weight_rounds"] == 4 else 0.5
    return 0.9 + points / 100 - 1e-4 * float(row["seed"]) / 42


def test_claims_that_are_true_hold() -> None:
    found = magnitude_findings(summary(as_the_source))
    assert len(found) == 5
    claims = by_claim(found)
    assert {name: finding.holds for name, finding in claims.items()} == dict.fromkeys(claims, True)
    assert claims["FFN"].number == pytest.approx(0.7)
    assert claims["FFN"].interval == pytest.approx((0.7, 0.7))
    assert claims["iterative"].number == pytest.approx(0.5)
    assert claims["structured"].number == pytest.approx(0.5)
    assert "single weights: 30.00 points" in claims["structured"].note
    assert claims["loss"].number == pytest.approx(1.25, abs=0.01)
    assert "at 95 % of all matrices" in claims["loss"].note
    low, high = claims["heads"].interval or (0.0, 0.0)
    assert (claims["heads"].number, high) == (100.0, 100.0)
    assert 50.0 < low < 100.0
    assert "1.00 of 16 heads a run" in claims["heads"].note


def test_claims_that_are_false_do_not_hold() -> None:
    found = by_claim(magnitude_findings(summary(lambda row: 1.5 - as_the_source(row), dead=0)))
    expected = {"FFN": False, "iterative": False, "structured": False, "heads": False}
    assert {name: found[name].holds for name in expected} == expected
    worse = by_claim(magnitude_findings(summary(lambda row: as_the_source(row) - 0.05)))
    assert worse["loss"].holds is False
    beaten = by_claim(
        magnitude_findings(
            summary(
                lambda row: as_the_source(row) - 0.1 * (row["masks.weight_ranking"] == "shuffled")
            )
        )
    )
    assert beaten["structured"].holds is False


def test_noise_decides_nothing() -> None:
    noise: dict[tuple[object, ...], float] = {}

    def top1(row: Row) -> float:
        key = tuple(row[name] for name in AXES)
        return 0.9 + noise.setdefault(key, 0.05 * float(torch.rand(())))

    torch.manual_seed(0)
    found = by_claim(magnitude_findings(summary(top1)))
    for name in ("FFN", "iterative"):
        low, high = found[name].interval or (1.0, 1.0)
        assert low < 0.0 < high
        assert found[name].holds is None


def test_a_study_that_varies_less_has_fewer_claims() -> None:
    keys = ("masks.weight_rounds", "masks.weight_scope", "masks.weight_granularity")
    claims = by_claim(magnitude_findings(summary(lambda row: 0.9, without=keys)))
    assert set(claims) == {"loss", "heads"}
    assert magnitude_findings(summary(lambda row: 0.9, without=("masks.weight_sparsity",))) == []


def test_rows_without_a_partner_are_no_pairs() -> None:
    whole = summary(as_the_source)
    first = next(row for row in whole.rows if row["masks.weight_scope"] == "ffn")
    fewer = Summary({}, whole.columns, tuple(row for row in whole.rows if row is not first), ())
    counts = [
        re.search(r"(\d+) pairs", by_claim(magnitude_findings(each))["FFN"].note)
        for each in (whole, fewer)
    ]
    assert [found and int(found[1]) for found in counts] == [48, 47]


def test_the_shown_run_is_the_nearest_to_95_percent_of_all_matrices_in_rounds() -> None:
    row = shown_run(summary(as_the_source))
    assert row is not None
    assert (row["masks.weight_sparsity"], row["masks.weight_rounds"], row["seed"]) == (0.95, 4, 7)
    assert (row["masks.weight_scope"], row["masks.weight_granularity"]) == ("all", "weight")


def test_the_picture_shows_every_kept_weight_and_the_dead_heads() -> None:
    network = vitrim.lift(tiny_vit())
    mask = WeightMask.from_magnitude(network, 0.9)
    masks = Masks(mask, network.architecture, {"blocks.1.attn": [0, 2]}, "<1>")
    text = mask_picture(masks)
    assert text.startswith("<svg")
    assert "<1>" not in text
    assert "2 of 6 heads are dead" in text
    assert text.count('class="dead"') == 2 * 4
    assert text.count('class="matrix"') == 2 * 4
    # A matrix of 24 x 24 is drawn weight by weight: the areas of its runs are its kept weights.
    paths = re.findall(r'<path d="([^"]*)"', text)
    cell = 128.0 / 24
    drawn = sum(
        float(width) * float(height) / cell**2
        for path in paths
        for width, height in re.findall(r"h([\d.]+)v([\d.]+)", path)
    )
    attention = [keep for name, keep in mask.kept.items() if "fc" not in name]
    assert drawn == pytest.approx(sum(int(keep.sum()) for keep in attention), rel=0.01)


def test_an_empty_matrix_is_drawn_empty() -> None:
    network = vitrim.lift(tiny_vit())
    whole = WeightMask.from_magnitude(network, 0.5)
    empty = {name: torch.zeros_like(keep) for name, keep in whole.kept.items()}
    masks = Masks(WeightMask(empty, whole.model), network.architecture, {}, "none")
    assert "<path" not in mask_picture(masks)
    assert mask_pdf(masks).startswith(b"%PDF")


def test_the_figure_of_an_article_is_the_picture_as_vectors() -> None:
    network = vitrim.lift(tiny_vit())
    mask = WeightMask.from_magnitude(network, 0.9)
    masks = Masks(mask, network.architecture, {"blocks.1.attn": [0, 2]}, "1")
    file = mask_pdf(masks)
    assert mask_pdf(masks) == file
    assert b"/Subtype /Image" not in file
    streams = [
        zlib.decompress(part)
        for part in re.findall(rb"/FlateDecode.*?stream\n(.*?)\nendstream", file, re.DOTALL)
    ]
    page = max(streams, key=len).decode("latin-1")
    paths = re.findall(r'<path d="([^"]*)"', mask_picture(masks))
    # The closed outlines: the sheet, the kept weights, the dead heads and the matrices.
    boxes = 1 + sum(path.count("M") for path in paths) + 2 * 4 + 2 * 4
    assert len(re.findall(r"\bh\b", page)) == boxes


def test_the_study_of_the_package_varies_what_the_claims_need() -> None:
    study = load_study("magnitude")
    runs = expand(study)
    assert len(runs) == 252
    assert "@" in study.section.bibtex
    rows = [
        {**run.cells, "id": run.id, "number": run.number, "seed": run.seed, "state": "done"}
        | {"top1": 0.9, "top1_dense": 0.9, "heads": 16, "heads_dead": 0}
        for run in runs
    ]
    columns = tuple(Column(key, "axis", "", "") for key in runs[0].cells)
    found = magnitude_findings(Summary({}, columns, tuple(rows), ()))
    assert len(found) == 5
    assert all(finding.interval is not None for finding in found)
