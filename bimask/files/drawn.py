"""Pictures of charts, whose words may be a stranger's."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text

from bimask.errors import printable

MOST_IN_A_LINE = 160  # characters; longer ones cost minutes to lay out


def save_figure(figure: Figure, target: Any, **options: Any) -> None:
    """`figure.savefig` with words as they are: no mathematics, no controls, bounded."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(
            "\n".join(printable(line, MOST_IN_A_LINE) for line in text.get_text().split("\n"))
        )
    figure.savefig(target, **options)
