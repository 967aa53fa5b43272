"""The page in a browser, on a phone and on a desktop: no requests, no overflow, exact bars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_sample
from chromium_browser import Browser, Page, chromium, find_chromium
from vitrim.bench.report import render, render_measurements, write_picture

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="needs Chromium (Debian: apt-get install chromium)"
)

PHONE, DESKTOP = 390, 1280
HOSTILE = (
    "<script>window.hit=1</script><img src=x onerror='window.hit=2'> "
    "averylongwordwithoutanyplacetobreakitatallintheworld"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample run, a hostile twelve-block run, and three devices side by side."""
    root = tmp_path_factory.mktemp("pages")
    made = report_sample.report()
    made["models"][HOSTILE] = made["models"].pop("compact")
    hostile = report_sample.write_run(
        root / "hostile", **{**made, "title": HOSTILE, "command": HOSTILE, "warnings": [HOSTILE]}
    )
    branches = report_sample.kept(12)
    for number, branch in enumerate(branches):
        branch["dims"]["embed"] = [128 - 4 * number, 128]
    branches[4] = {"branch": "blocks.2.attn", "kind": "removed", "dims": {}}
    (hostile / "kept.json").write_text(json.dumps(branches))
    files = []
    for number, (device, factor) in enumerate(
        (("Intel(R) Xeon(R)", 1), ("Raspberry Pi 5 Model B Rev 1.0", 9), ("Jetson Orin Nano", 4))
    ):
        environment = report_sample.environment(device_model=device)
        for name, p50_s in (("baseline-fp32", 0.001), ("compact-int8", 0.0004)):
            files.append(root / f"{number}-{name}.json")
            made_one = report_sample.measurement(
                name,
                name[-4:],
                p50_s * factor,
                1_000_000,
                0.91,
                environment=environment,
                session=device,
            )
            files[-1].write_text(json.dumps(made_one))
    return {
        "run": render(report_sample.write_run(root / "run"))[1],
        "hostile": render(hostile)[1],
        "devices": render_measurements(files, root / "devices")[2],
        "picture": write_picture(root / "run", root / "picture.svg"),
    }


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    tab = browser.new_page()
    yield tab
    # No page may log an error, whatever it contains.
    assert tab.errors == []


@pytest.mark.parametrize("name", ["run", "hostile", "devices"])
@pytest.mark.parametrize("width", [320, PHONE, 768, DESKTOP])
def test_the_page_makes_no_request_and_does_not_overflow(
    page: Page, pages: dict[str, Path], name: str, width: int
) -> None:
    page.open(pages[name], width=width)
    assert page.requests == [pages[name].resolve().as_uri()]
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("innerWidth") == width
    assert page.value("document.scripts.length + document.images.length") == 0
    assert page.value("window.hit === undefined")


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_card_is_inside_the_window_and_every_text_inside_its_card(
    page: Page, pages: dict[str, Path], width: int
) -> None:
    page.open(pages["run"], width=width)
    edges = page.value(
        "[...document.querySelectorAll('.card')].map(c => [c.getBoundingClientRect().left, "
        "c.getBoundingClientRect().right])"
    )
    assert edges
    assert all(left >= 0 and right <= width for left, right in edges)
    beyond = page.value(
        "[...document.querySelectorAll('svg text')].filter(t => "
        "t.getClientRects().length).filter(t => {"
        " const a = t.getBoundingClientRect(), b = t.closest('.card').getBoundingClientRect();"
        " return a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom "
        "}).map(t => t.textContent)"
    )
    assert beyond == []


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_column_of_every_table_is_visible(
    page: Page, pages: dict[str, Path], width: int
) -> None:
    page.open(pages["run"], width=width)
    hidden = page.value(
        "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > "
        "s.clientWidth).map(s => s.closest('section').querySelector('h2').textContent)"
    )
    assert hidden == []


@pytest.mark.parametrize(("width", "shown"), [(PHONE, "narrow"), (DESKTOP, "wide")])
def test_each_plot_is_shown_once_in_the_size_that_fits(
    page: Page, pages: dict[str, Path], width: int, shown: str
) -> None:
    page.open(pages["run"], width=width)
    visible = page.value(
        "[...document.querySelectorAll('svg')].filter(s => s.getClientRects().length).map(s => "
        "s.getAttribute('class'))"
    )
    assert visible == [f"plot {shown}"] * 7
    smallest = page.value(
        "Math.min(...[...document.querySelectorAll('svg text')].filter(t => "
        "t.getClientRects().length)"
        ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))"
    )
    assert smallest >= 10.5


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_length_of_a_bar_is_the_kept_share(
    page: Page, pages: dict[str, Path], width: int
) -> None:
    page.open(pages["run"], width=width)
    drawn = page.value(
        "[...document.querySelectorAll('.block:not(.all) .kept')].map(k => { const t = "
        "k.querySelector('.track');"
        " const on = [...t.querySelectorAll(t.classList.contains('cells') ? 'i.on' : 'i')];"
        " const filled = on.reduce((sum, i) => sum + i.getBoundingClientRect().width, 0);"
        " return [k.dataset.dimension, +k.dataset.kept, +k.dataset.total, "
        "filled / t.getBoundingClientRect().width, on.length] })"
    )
    expected = [
        (name, *branch["dims"][name])
        for branch in report_sample.kept()
        for name in branch["dims"]
        if name != "embed"
    ]
    assert [tuple(bar[:3]) for bar in drawn] == expected
    for dimension, kept, total, share, cells in drawn:
        if dimension == "head":
            assert cells == kept
        assert share == pytest.approx(kept / total, abs=0.06 if dimension == "head" else 0.01)


def test_the_markers_are_at_the_positions_of_their_figures(
    page: Page, pages: dict[str, Path]
) -> None:
    page.open(pages["run"], width=DESKTOP)
    marks = page.value(
        "[...document.querySelector('svg.wide').querySelectorAll('.mark')].map(m => { const b = "
        "m.getBBox();"
        " return [m.querySelector('title').textContent, b.x + b.width / 2 - 44, "
        "b.y + b.height / 2] })"
    )
    assert [mark[0] for mark in marks] == [
        "baseline fp32: 91.31 % top-1, 1.06 ms",
        "compact fp32: 91.03 % top-1, 0.377 ms",
        "compact int8: 90.96 % top-1, 0.307 ms",
    ]
    (_, x0, y0), (_, x1, y1), (_, x2, y2) = marks
    assert x1 / x0 == pytest.approx(0.377 / 1.063, rel=0.01)
    assert x2 / x0 == pytest.approx(0.307 / 1.063, rel=0.01)
    assert (y2 - y0) / (y1 - y0) == pytest.approx((91.31 - 90.96) / (91.31 - 91.03), rel=0.01)


def test_light_and_dark_theme_have_enough_contrast(page: Page, pages: dict[str, Path]) -> None:
    contrast = (
        "(() => { const c = v => { const [r, g, b] = v.match(/[0-9.]+/g).map(Number).map(x => { x "
        "/= 255;"
        " return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4 }); "
        "return .2126 * r + .7152 * g + .0722 * b };"
        " const card = c(getComputedStyle(document.querySelector('.card')).backgroundColor);"
        " const worst = sel => Math.min(...[...document.querySelectorAll(sel)].map(e => { const s "
        "= getComputedStyle(e);"
        " const ink = c(e.closest('svg') ? s.fill : s.color); return (Math.max(card, "
        "ink) + .05) / (Math.min(card, ink) + .05) }));"
        " return [worst('td, th, dd, dt, .remark, .kept b'), worst('svg text'), card] })()"
    )
    cards = []
    for dark in (False, True):
        page.open(pages["run"], width=DESKTOP, dark=dark)
        text, picture, card = page.value(contrast)
        # WCAG 2.1, level AA: 4.5 to 1 for text.
        assert text >= 4.5
        assert picture >= 4.5
        cards.append(card)
    assert cards[0] > 0.9
    assert cards[1] < 0.05


def test_a_screenshot_has_the_size_of_the_page(
    page: Page, pages: dict[str, Path], tmp_path: Path
) -> None:
    page.open(pages["run"], width=PHONE)
    page.screenshot(tmp_path / "phone.png")
    header = (tmp_path / "phone.png").read_bytes()[:24]
    assert int.from_bytes(header[16:20], "big") == 2 * PHONE


def test_the_readme_picture_makes_no_request_in_a_browser(
    page: Page, pages: dict[str, Path]
) -> None:
    page.open(pages["picture"], width=DESKTOP)
    assert page.requests == [pages["picture"].resolve().as_uri()]
    beyond = page.value(
        "[...document.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect(), "
        "s = document.documentElement.getBoundingClientRect();"
        " return b.right > s.right || b.bottom > s.bottom || b.left < s.left }).map(t => "
        "t.textContent)"
    )
    assert beyond == []
