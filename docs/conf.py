"""Sphinx: Markdown pages, and pages generated from the code (see generate.py)."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

import core

sys.path.insert(0, str(Path(__file__).parent))

project = "core"
author = "The core developers"
project_copyright = f"2026, {author}"
release = version = core.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
]
exclude_patterns = ["_build", "generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"core {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

# References into core must resolve, but for its type variables. The inventories of other projects
# would need a network.
nitpick_ignore_regex = [("py:.*", r"(?!core\.).*"), ("py:class", r"core\.\w+\.[A-Z]")]


def setup(app: Sphinx) -> None:
    """Write the generated pages before Sphinx reads the others."""
    from generate import write_pages

    app.connect("config-inited", lambda app, config: write_pages(Path(app.srcdir) / "generated"))
