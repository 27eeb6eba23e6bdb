"""Writes the pages of the benchmarks from the records in `results/`.

python -m benchmarks.report      # benchmarks/*.md; nothing is measured, and no record is changed
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.pages.audit import audit
from benchmarks.pages.blind import blind
from benchmarks.pages.driver import driver
from benchmarks.pages.samplers import samplers
from benchmarks.pages.speed import speed
from benchmarks.pages.training import training
from benchmarks.pages.victims import victims
from benchmarks.pages.zoo import zoo
from benchmarks.records import HERE

PAGES: dict[str, Callable[[], str]] = {
    "audit": audit,
    "blind": blind,
    "driver": driver,
    "samplers": samplers,
    "speed": speed,
    "training": training,
    "victims": victims,
    "zoo": zoo,
}


def write() -> None:
    """Write every page anew."""
    for name, made in PAGES.items():
        (HERE / f"{name}.md").write_text(made())


if __name__ == "__main__":
    write()
