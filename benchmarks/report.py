"""Writes the pages of the benchmarks from the records in `results/`.

python -m benchmarks.report

That is benchmarks/*.md and the README's table. Nothing is measured, and no record is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.pages.audit import audit
from benchmarks.pages.blind import blind
from benchmarks.pages.choosing import choosing
from benchmarks.pages.comparison import comparison
from benchmarks.pages.conditional import conditional
from benchmarks.pages.driver import driver
from benchmarks.pages.gpu_check import gpu_check
from benchmarks.pages.kills import kills
from benchmarks.pages.samplers import samplers
from benchmarks.pages.serving import serving
from benchmarks.pages.shipped import shipped, shipped_table
from benchmarks.pages.speed import speed
from benchmarks.pages.training import training
from benchmarks.pages.victims import victims
from benchmarks.pages.zoo import zoo
from benchmarks.records import HERE

PAGES: dict[str, Callable[[], str]] = {
    "audit": audit,
    "blind": blind,
    "choosing": choosing,
    "comparison": comparison,
    "conditional": conditional,
    "driver": driver,
    "gpu_check": gpu_check,
    "kills": kills,
    "samplers": samplers,
    "serving": serving,
    "shipped": shipped,
    "speed": speed,
    "training": training,
    "victims": victims,
    "zoo": zoo,
}


README = HERE.parent / "README.md"
PLACE = re.compile(r"(<!-- table of benchmarks/shipped.md -->\n).*?(\n<!-- end of the table -->)", re.S)


def with_table(readme: str) -> str:
    """The README with its table from the records."""
    return PLACE.sub(lambda found: found[1] + shipped_table() + found[2], readme)


def write() -> None:
    """Write every page anew."""
    for name, made in PAGES.items():
        (HERE / f"{name}.md").write_text(made())
    README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    write()
