"""The claims of publications: planted effects are found, and too few rows decide nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_sample import large_table
from tiny_models import tiny_vit
from vitrim import StructuredMask, compact, lift
from vitrim.compress.network.count import count_params
from vitrim.pipeline.studies.claims import findings, verdict
from vitrim.pipeline.studies.figures import kept_shares
from vitrim.pipeline.studies.findings import Finding
from vitrim.pipeline.studies.report import write_report
from vitrim.pipeline.studies.summary import Summary
from vitrim.pipeline.studies.table import FIGURE_COLUMNS, RUN_COLUMNS, Column, Row

SEEDS, LAMBDAS = (7, 13, 42), (4e-6, 2e-6, 1e-6, 5e-7)
FRONT = "a shared residual with heads or embed fixed is most often on the front"
UNSHARED = "unshared masks are within 2 points of a shared residual"
FFN, DEPTH = "FFN is more prunable than attention", "deeper layers are more redundant"
MAGNITUDE = "structured magnitude barely beats random"


def summary(rows: list[Row], *axes: str) -> Summary:
    """A study of finished runs with these axes."""
    columns = (*RUN_COLUMNS, *(Column(axis, "axis", "", "") for axis in axes), *FIGURE_COLUMNS)
    whole = {column.name: None for column in columns}
    found = [
        {**whole, "state": "done", "id": f"{place:010x}", **row} for place, row in enumerate(rows)
    ]
    return Summary({}, columns, tuple(found), ())


def masks(top1: Callable[[str, str], float], kept: dict[str, float] | None = None) -> list[Row]:
    """The grid of the study `structured`, with accuracies by sharing and fixed dimensions."""
    shared = itertools.product(("residual", "full"), ("none", "head", "embed", "ffn", "qk+v"))
    return [
        {
            "seed": seed,
            "masks.lambda": lam,
            "masks.sharing": sharing,
            "masks.fixed": fixed,
            # Larger lambdas make smaller networks.
            "params": round(1e5 / (1e6 * lam)) + 10 * SEEDS.index(seed),
            "top1": top1(sharing, fixed) - 2e3 * lam + 1e-4 * seed,
            **(kept or {}),
        }
        for seed, lam, (sharing, fixed) in itertools.product(
            SEEDS, LAMBDAS, [*shared, ("unshared", "none")]
        )
    ]


def of(found: Summary) -> dict[str, Finding]:
    return {finding.claim: finding for finding in findings(found)}


STRUCTURED = ("masks.lambda", "masks.sharing", "masks.fixed")


def test_planted_effects_of_masks_are_found() -> None:
    def top1(sharing: str, fixed: str) -> float:
        best = sharing == "residual" and fixed in ("head", "embed")
        return 0.8 + 0.02 * best + 0.01 * (sharing == "unshared")

    kept = {"kept_attention": 0.6, "kept_ffn": 0.4}
    kept |= {"kept_first_half": 0.5, "kept_second_half": 0.45}
    found = of(summary(masks(top1, kept), *STRUCTURED))
    assert found[FRONT].number == 100.0
    interval = found[FRONT].interval
    assert interval is not None
    assert interval[0] > 20.0
    assert "most often: masks.sharing=residual, masks.fixed=" in found[FRONT].note
    assert found[UNSHARED].number == pytest.approx(1.0)
    assert found[UNSHARED].interval == pytest.approx((1.0, 1.0))
    assert "12 pairs" in found[UNSHARED].note
    assert found[FFN].number == pytest.approx(20.0)
    # A setting each: 4 values of lambda, 5 of the residual stream and the unshared one.
    assert found[DEPTH].number == pytest.approx(5.0)
    assert "24 pairs" in found[DEPTH].note
    assert {verdict(finding) for finding in found.values()} == {"holds"}
    assert MAGNITUDE not in found


def test_the_opposite_does_not_hold_here() -> None:
    def top1(sharing: str, fixed: str) -> float:
        return 0.8 + 0.03 * (sharing == "unshared") + 0.02 * (sharing == "full")

    kept = {"kept_attention": 0.4, "kept_ffn": 0.6}
    kept |= {"kept_first_half": 0.45, "kept_second_half": 0.5}
    found = of(summary(masks(top1, kept), *STRUCTURED))
    front = found.pop(FRONT)
    assert front.number == 0.0
    # 20 % of the runs could by chance have none of 12 places.
    assert "0 of 12 places" in front.note
    assert verdict(front) == "not decided"
    assert {verdict(finding) for finding in found.values()} == {"does not hold here"}


@pytest.mark.parametrize("gain", [-0.1, -0.03, -0.01, 0.01, 0.03])
def test_two_points_are_a_distance_on_both_sides(gain: float) -> None:
    found = of(summary(masks(lambda sharing, _: 0.8 + gain * (sharing == "unshared")), *STRUCTURED))
    assert found[UNSHARED].number == pytest.approx(100 * gain)
    assert verdict(found[UNSHARED]) == ("holds" if abs(gain) < 0.02 else "does not hold here")


def test_few_rows_decide_nothing() -> None:
    rows = masks(lambda sharing, fixed: 0.8)[:11]
    found = of(summary(rows, *STRUCTURED))
    assert found[UNSHARED].number == pytest.approx(0.0)
    assert {verdict(found[claim]) for claim in (UNSHARED, FFN, DEPTH)} == {"not enough rows"}
    # No run is finished.
    waiting = [{**row, "state": "waiting"} for row in rows]
    found = of(summary(waiting, *STRUCTURED))
    assert [finding.number for finding in found.values()] == [None] * 4
    assert findings(summary(rows, "masks.lambda")) == []


@pytest.mark.parametrize(
    ("lead", "found"),
    [(0.01, "holds"), (0.03, "does not hold here"), (-0.01, "does not hold here")],
)
def test_magnitude_is_compared_with_chance(lead: float, found: str) -> None:
    rows: list[Row] = [
        {
            "seed": seed,
            "masks.method": method,
            "masks.params": params,
            "top1": params + 0.001 * seed + lead * (method != "random"),
        }
        for seed, method, params in itertools.product(
            SEEDS, ("l1", "l2", "random", "learned"), (0.75, 0.5, 0.25)
        )
    ]
    (finding,) = findings(summary(rows, "masks.method", "masks.params"))
    assert finding.number == pytest.approx(100 * lead)
    # The two norms of a size and a seed are one observation.
    assert "9 pairs" in finding.note
    assert verdict(finding) == found


def test_impact_is_compared_with_attention_and_chance() -> None:
    gains = {"patch-slimming": 0.02, "class-attention": 0.01, "column-attention": 0.03, "random": 0}
    rows: list[Row] = [
        {"seed": seed, "masks.tokens": name, "masks.token_macs": share, "top1": share + gain}
        for seed, share, (name, gain) in itertools.product(SEEDS, (0.8, 0.6), gains.items())
    ]
    found = findings(summary(rows, "masks.tokens", "masks.token_macs"))
    assert [(finding.claim, verdict(finding)) for finding in found] == [
        ("impact beats attention of the class token", "holds"),
        ("impact beats attention of all tokens", "does not hold here"),
        ("impact beats random patches", "holds"),
    ]


def test_kept_shares_are_those_of_the_sub_layers() -> None:
    dense = lift(tiny_vit())
    cut = compact(dense, StructuredMask.random(dense, {"ffn": 0.25}, seed=0))
    found = kept_shares(cut.architecture, dense.architecture)
    assert found["kept_attention"] == 1.0
    lost = count_params(dense.architecture) - count_params(cut.architecture)
    whole = 2 * (24 * 96 + 96 + 96 * 24 + 24 + 2 * 24)
    assert found["kept_ffn"] == pytest.approx(1 - lost / whole, abs=1e-5)
    assert found["kept_first_half"] == found["kept_second_half"]


def test_the_report_has_the_claims_in_all_formats(tmp_path: Path) -> None:
    table = large_table(tmp_path, 6)
    axes = [Column(name, "axis", "", "") for name in ("masks.tokens", "masks.token_macs")]
    names = ("patch-slimming", "random") * 3
    for place, (run, name) in enumerate(zip(table.states(), names, strict=True)):
        cells: dict[str, Any] = {"masks.tokens": name, "masks.token_macs": 0.5, "seed": place // 2}
        cells |= {
            "masks.params": 1.0,
            "masks.sharing": "full",
            "top1": 0.5 + 0.1 * (place % 2 == 0),
        }
        table.change(run, "done", figures=cells, columns=axes)
    write_report(tmp_path, latex=True)
    text = (tmp_path / "study.md").read_text()
    assert "## Claims of the sources" in text
    assert "| impact beats random patches | Tang et al. 2022" in text
    assert "| not enough rows | patch-slimming minus random" in text
    assert "| 10.00 points |" in text
    assert "impact beats random patches" in (tmp_path / "study.html").read_text()
    latex = (tmp_path / "latex/generated/findings.tex").read_text()
    assert r"begin{tabular}{p{0.2\linewidth}p{0.2\linewidth}lp{0.24\linewidth}rr}" in latex
    assert "generated/findings" in (tmp_path / "latex/main.tex").read_text()
