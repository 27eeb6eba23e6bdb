"""HTML pages, whose words may be a stranger's: the one place that puts words into them.

A string is shown as it is: escaped, without what no reader sees or what turns the writing direction
round, and bounded. What this program made itself, such as a picture as a data URI, is `Markup`, and
stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bimask.errors import printable

MOST_WORDS = 2_000  # characters of one string


def render_page(package: str, name: str, /, **content: Any) -> str:
    """The page of a template in a package; it extends `base.html` here, which holds the common look."""
    templates = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("bimask.files", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(name).render(**content)


def plain(value: object) -> object:
    """The same for a page that draws itself from JSON: strings as `render_page` shows them, and NaN and
    infinities, for which JSON has no word, as null."""
    if isinstance(value, Mapping):
        return {_shown(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else _shown(value)


def _shown(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, MOST_WORDS)
    if isinstance(value, list | tuple | dict):  # in a template, which prints it as Python does
        return printable(str(value), MOST_WORDS)
    return value
