"""Everything that bimask refuses, as one tree.

BimaskError                    the base: one sentence, with what was got, what was expected, what to do
├── DataError                  a dataset is missing, malformed or too small
├── SettingError               a setting is unknown or out of range
├── ModelError                 a model cannot be defended as it is: its forward, its answers, its layers
├── MaskMismatchError          masks and model do not belong together
├── NonFiniteError             a loss or a metric is NaN or infinite
├── ExportError                a cleaned model cannot be written, or would answer otherwise
├── InteropError               a file of another framework is refused
└── VictimError                a victim's files are damaged or incomplete
    └── VictimRefusedError     the victim was trained, but is no use: attack not learned, accuracy poor
"""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

if TYPE_CHECKING:
    from pydantic import ValidationError

MOST_CHARACTERS = 20_000  # of one error
MOST_PROBLEMS = 20  # of one file, that are told at once
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 200
_BRIEF.maxlist = _BRIEF.maxdict = _BRIEF.maxtuple = 20


def printable(text: str, most: int | None = None) -> str:
    """Text of a stranger without what steers a terminal or a page or no encoding has, on one line.

    Args:
        most: characters, of which the last three tell that there were more; None keeps all.
    """
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or category(c) == "Zs" else "?" for c in text)


class BimaskError(Exception):
    """Base of every error that a user can cause and mend.

    Its text is fit for a terminal, a page and a note, whatever names of strangers are in it.

    Args:
        lines: one sentence; several where there is one a problem. No name in a line makes a second one.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    @property
    def lines(self) -> list[str]:
        """What it says, one line a problem."""
        return [printable(str(line), MOST_CHARACTERS) for line in self.args]

    def __str__(self) -> str:
        return "\n".join(self.lines)[:MOST_CHARACTERS]


class DataError(BimaskError):
    """A dataset is missing, malformed or too small for what was asked."""


class SettingError(BimaskError, ValueError):
    """A setting is unknown or out of its range."""


class ModelError(BimaskError):
    """A model cannot be asked, answers with no logits, or mixes the images of a batch."""


class MaskMismatchError(BimaskError):
    """Masks name modules or channel counts that the model does not have."""


class NonFiniteError(BimaskError):
    """A loss or a metric is NaN or infinite."""


class ExportError(BimaskError):
    """A model cannot be written in a format, or what was written answers otherwise."""


class InteropError(BimaskError):
    """A file of another framework is hostile, broken, of no known format, or of no use."""


class VictimError(BimaskError):
    """A victim's files are damaged, incomplete or not the ones the manifest names."""


class VictimRefusedError(VictimError):
    """A victim was trained, but its attack was not learned or its accuracy is poor."""


def describe(error: ValidationError) -> str:
    """The first problems of a validation in one line: place, what is wrong, what was got."""
    return "; ".join(
        first_of(
            [
                f"{'.'.join(str(part) for part in problem['loc']) or 'top level'}: "
                f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {brief(problem['input'])}"
                for problem in error.errors(include_url=False)
            ]
        )
    )


def brief(value: object) -> str:
    """`repr` of a value that may be large or nested, cut."""
    return _BRIEF.repr(value)


def first_of(problems: Sequence[str]) -> list[str]:
    """At most `MOST_PROBLEMS` of them, each once, and how many more there are."""
    distinct = list(dict.fromkeys(problems))
    more = len(distinct) - MOST_PROBLEMS
    return [*distinct[:MOST_PROBLEMS], *([f"and {more} more problems"] if more > 0 else [])]


def warn(sentence: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside this package that led here, however deep the call is."""
    package, level, frame = str(Path(__file__).parent), 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(printable(sentence, MOST_CHARACTERS), category, stacklevel=level)
