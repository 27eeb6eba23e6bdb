"""What one GPU does with a purification."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "gpu_check" / "cuda.json"
MEMBERS = (1, 8, 32)
ABOUT = """`bash benchmarks/gpu_check.sh` trains a victim of the published width and times rounds of the
last stage with 100 clean images. *Busy* is the share of the time in which kernels run. The arithmetic
limit is what a large product of matrices reaches on the same device, in TF32 for `paper` and bfloat16
for the other profiles."""
FEWER = 20  # times as few kernels a member in the largest population as alone


def gpu_check() -> str:
    """The page: what was measured, or that nothing was run."""
    kept = read(KEPT)
    found = [_table(None), "The program has not been run on a GPU yet."] if kept is None else _of(kept)
    return page("One GPU", ABOUT, *found)


def _of(kept: dict[str, Any]) -> list[str]:
    about, parts = kept["about"], kept["parts"]
    made = (
        f"Measured on {about['device']}, torch {about['torch']}, {about['date']}, commit "
        f"{about['commit']}, PreActResNet18 of width {about['width']}."
    )
    return [made, _table(parts), _conclusion(parts)]


def _table(parts: dict[str, Any] | None) -> str:
    rows = [
        [name, "; ".join(f"{key} {_shown(value)}" for key, value in found.items())]
        for name, found in (parts or {"all": {"not run": ""}}).items()
    ]
    return table(["part", "measured"], rows)


def _conclusion(parts: dict[str, Any]) -> str:
    key = "kernels a round and member"
    alone, many = (parts.get(f"population of {n}", {}).get(key) for n in (MEMBERS[0], MEMBERS[-1]))
    if not alone or not many:
        return f"No population of {MEMBERS[-1]} was run beside one alone."
    return (
        f"A member of a population of {MEMBERS[-1]} launches {alone / many:.0f} times fewer kernels a "
        f"round than one alone; {FEWER} are wanted."
    )


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
