"""Settings of the documentation site: `make docs`.

Formulas become MathML while the site is built, so that a page needs no script and no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import vitrim
from docutils import nodes
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

project = "vitrim"
release = vitrim.__version__
author = "the authors of vitrim"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# Two hyphens are the beginning of an option, not a dash.
smartquotes = False
highlight_language = "text"
html_theme = "furo"
html_title = f"vitrim {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
# Excerpts in search results are fetched, which browsers refuse for files.
html_show_search_summary = False
html_math_renderer = "mathml"

ROOT = Path(__file__).resolve().parent.parent
# Pages whose text is a file at the root of the repository.
ROOT_FILES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def _insert_root_file(app: Sphinx, page: str, source: list[str]) -> None:
    if page not in ROOT_FILES:
        return
    path = ROOT / ROOT_FILES[page]
    app.env.note_dependency(str(path))
    text = path.read_text(encoding="utf-8").replace("](docs/", "](")
    for target, name in ROOT_FILES.items():
        text = text.replace(f"]({name}", f"]({target}.md")
    source[0] = f"{text}\n{source[0]}"


def _write_formula(translator: HTML5Translator, node: nodes.Element) -> None:
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the pages from root files and the renderer of formulas."""
    app.connect("source-read", _insert_root_file)
    app.add_html_math_renderer("mathml", (_write_formula, None), (_write_formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
