"""The documentation site: strict build, and the pages in a real browser without a network."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium_browser import Page, chromium, find_chromium

ROOT = Path(__file__).resolve().parents[2]
MISSING = [
    name
    for name in ("sphinx", "furo", "myst_parser", "latex2mathml")
    if importlib.util.find_spec(name) is None
]
needs_sphinx = pytest.mark.skipif(
    bool(MISSING), reason=f"no {', '.join(MISSING)}: pip install 'vitrim[docs]'"
)


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    return subprocess.run(
        [*command, "-d", str(site) + ".doctrees", str(source), str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT / "docs", folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine (Debian: chromium)")
    with chromium() as browser:
        yield browser.new_page()


@needs_sphinx
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["index", "methods", "cli", "api", "recipes", "benchmarks"])
def test_pages_load_nothing_from_the_network_and_fit_the_window(
    site: Path, page: Page, name: str, width: int
) -> None:
    page.errors.clear()
    page.open(site / f"{name}.html", width=width)
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.errors == []
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.value("document.querySelector('h1').textContent.length > 3")


@needs_sphinx
def test_the_index_is_the_readme_with_its_picture(site: Path, page: Page) -> None:
    page.open(site / "index.html", width=1280)
    assert page.value("document.querySelector('article img').naturalWidth") > 0
    assert page.value("document.querySelectorAll('article pre').length") >= 3
    links = page.value("[...document.querySelectorAll('article a.reference')].map(a => a.href)")
    assert all(Path(link.partition("#")[0].removeprefix("file://")).is_file() for link in links)


@needs_sphinx
def test_formulas_are_mathml_with_lowered_indices(site: Path, page: Page) -> None:
    page.open(site / "methods.html", width=1280)
    assert page.value("document.querySelectorAll('math').length") > 10
    assert page.value("document.body.innerText.includes('$')") is False


@needs_sphinx
def test_search_finds_an_option_without_a_server(site: Path, page: Page) -> None:
    page.errors.clear()
    page.open(site / "search.html", width=1280)
    page.value("Search.performSearch('calibration')")
    # The results appear one after the other.
    script = """new Promise(resolve => {
        const found = () => [...document.querySelectorAll('#search-results li a')].map(a => a.href);
        const look = tries => found().some(link => link.endsWith('/cli.html')) || tries === 0
            ? resolve(found())
            : setTimeout(look, 100, tries - 1);
        look(100);
    })"""
    assert any(link.endswith("/cli.html") for link in page.value(script))
    assert page.errors == []


@needs_sphinx
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "conf.py").write_text(
        'extensions = ["myst_parser"]\nmyst_heading_anchors = 4\n', encoding="utf-8"
    )
    (source / "index.md").write_text("# Title\n\n[away](#nowhere)\n", encoding="utf-8")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere" in done.stderr
