"""A suspect described in words, as on a command line: sizes, and numbers with commas."""

from __future__ import annotations

import re

from bimask.data.pictures import Size
from bimask.errors import SettingError

MAX_SIDE = 1024  # pixels; a manifest of a cleaned model has no more


def size(text: str | None) -> Size | None:
    """`32` or `48x32`, (height, width); None for None.

    Raises:
        SettingError: it is none, or a side is not 1 to `MAX_SIDE`.
    """
    if text is None:
        return None
    parts = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text.strip(), re.ASCII)
    sides = [int(part) for part in parts.groups() if part] if parts else []
    if not sides or not all(1 <= side <= MAX_SIDE for side in sides):
        raise SettingError(
            f"--image-size must be pixels, such as 32, or 48x32 for height and width, 1 to {MAX_SIDE} "
            f"each, got {text!r}."
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def numbers(option: str, text: str | None) -> list[float] | None:
    """`0.485,0.456,0.406`; None for None.

    Args:
        option: its name, for the error.

    Raises:
        SettingError: they are no numbers.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingError(
            f"{option} must be numbers with commas, one a channel, got {text!r}."
        ) from error


def whole_numbers(option: str, text: str | None) -> list[int] | None:
    """`1,2,3`, each >= 0; None for None.

    Args:
        option: its name, for the error.

    Raises:
        SettingError: they are no such numbers.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", text, re.ASCII):
        raise SettingError(f"{option} must be whole numbers with commas, such as 1,2,3, got {text!r}.")
    return [int(part) for part in text.split(",")]
