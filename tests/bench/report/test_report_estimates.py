"""The estimates of a report: labelled as such, with error bars, their devices, and the excess of
what does not fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_sample
from vitrim.bench.report import load_run
from vitrim.bench.report.html import render_html
from vitrim.bench.report.markdown import render_markdown
from vitrim.core.errors import InputError


def rendered(folder: Path, **changes: Any) -> tuple[str, str]:
    run = load_run(report_sample.write_run(folder, **changes))
    return render_markdown(run), render_html(run)


def test_every_time_is_labelled_an_estimate_with_its_error_bar(tmp_path: Path) -> None:
    markdown, page = rendered(tmp_path / "run")
    section = markdown[markdown.index("## Estimates") : markdown.index("## Kept units")]
    assert "Estimates, not measurements: nothing was measured on these devices." in section
    assert (
        "| Raspberry Pi 4 Model B (4 GB) (onnxruntime, 4 threads) | 9.1 ms (estimate, "
        "3.9 to 21 ms) | 8.2 ms (estimate, 3.5 to 19 ms) | "
        "3.6 ms (estimate, 1.5 to 8.6 ms) | 3.5 ms (estimate, 1.5 to 8.4 ms) |"
    ) in section
    assert "estimate, 3.9 to 21\u00a0ms" in page
    assert page.count("<small>estimate, ") == 8


def test_each_error_bar_names_the_devices_behind_it(tmp_path: Path) -> None:
    for text in rendered(tmp_path / "run"):
        assert (
            "An error bar of 2.4× either way "
            "(estimates from measurements of other runtimes on aarch64)" in text.replace("\\_", "_")
        )
        assert (
            "covers 80 % of 3 measured devices, each predicted without its own measurements" in text
        )
        assert (
            "An error bar of 1.6× either way (estimates from measurements of onnxruntime on "
            "x86_64) "
            "covers 80 % of 2 measured devices" in text.replace("\\_", "_")
        )
        assert "Jetson Nano, its four Cortex-A57" in text


def test_a_model_that_does_not_fit_has_its_excess_and_no_time(tmp_path: Path) -> None:
    markdown, _ = rendered(tmp_path / "run")
    line = next(line for line in markdown.splitlines() if "STM32H743" in line)
    assert "(no latency estimate: no microcontroller was measured to calibrate one with)" in line
    assert "| does not fit (weights 1.12 MB too large) | fits (no latency estimate) |" in line


def test_a_run_without_estimates_has_no_such_section(tmp_path: Path) -> None:
    for text in rendered(tmp_path / "run", estimates=[]):
        assert "Estimates" not in text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("estimated_s", 0, "estimates.0.latency.estimated_s: input should be greater than 0"),
        ("factor", 0.5, "estimates.0.latency.factor: input should be greater than or equal to 1"),
        ("held_against", [], "estimates.0.latency.held_against: tuple should have at least 1 item"),
    ],
)
def test_a_malformed_estimate_is_refused_by_key(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    made = report_sample.estimates()
    made[0]["latency"][key] = value
    with pytest.raises(InputError) as error:
        load_run(report_sample.write_run(tmp_path / "run", estimates=made))
    assert words in str(error.value)
