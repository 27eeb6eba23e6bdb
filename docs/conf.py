"""The site: pages in Markdown, the reference from the code. Nothing is fetched.

    make docs      # build/docs/docs/index.html; a warning or a dead link is an error

The source folder is the project's root, so that pages link to each other as they do on a code host.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference_pages  # noqa: E402

project = "bimask"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "docs/decisions/*.md", "docs/reference/*.md"]
include_patterns += ["docs/reference/defences/*.md"]
include_patterns += ["benchmarks/*.md", "SECURITY.md"]
html_theme = "furo"
html_title = "bimask"
myst_heading_anchors = 3
autodoc_member_order = "bysource"

reference_pages.write(HERE / "reference")
