"""What the pages are made of: tables, and numbers with their spread."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence

MARK = "<!-- Written by `python -m benchmarks.report`; what is changed by hand is lost. -->"
WIDTH = 118
NOTHING = "Nothing was measured yet."


def page(title: str, *parts: str) -> str:
    """A page: its title, the mark, and its parts with an empty line between them."""
    blocks = "\n\n".join([f"# {title}", MARK, *parts]).split("\n\n")
    return "\n\n".join(map(_wrapped, blocks)) + "\n"


def _wrapped(block: str) -> str:
    """A paragraph in lines of a page's width; tables and headings as they are."""
    if block.startswith(("|", "#", "<")):
        return block
    return textwrap.fill(block, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, with the least and the most where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def between(values: Sequence[float], digits: int = 2) -> str:
    """ "0.81 to 0.95", or the one value where the ends are shown alike."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def made(about: dict[str, object]) -> str:
    """One sentence on the machine of a record."""
    threads = "one thread" if about["threads"] == 1 else f"{about['threads']} threads"
    return f"Measured on {about['device']}, {threads}, torch {about['torch']}, {about['date']}."
