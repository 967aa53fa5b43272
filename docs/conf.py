"""Settings of the documentation site: `make docs`.

Formulas become MathML while the site is built, so that a page needs no script and no network.
"""

from __future__ import annotations

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
exclude_patterns = ["**.ipynb_checkpoints"]
# Two hyphens are the beginning of an option, not a dash.
smartquotes = False
highlight_language = "text"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = f"vitrim {release}"
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"


def _formula(translator: HTML5Translator, node: nodes.Element) -> None:
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
