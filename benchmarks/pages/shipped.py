"""What the study that `make study` runs came to: a page, and the table in the README."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "shipped" / "ims-digits.json"
SCORES = ("clean_accuracy", "attack_success", "recovery")


def shipped() -> str:
    """The page."""
    found = _found()
    if found is None:
        return page("What `make study` comes to", NOTHING)
    trials, number = found["trials"], found["chosen"]["number"]
    ends = ", ".join(f"{count} {how}" for how, count in trials.items())
    return page(
        "What `make study` comes to",
        f"Of its trials {ends}. It took {found['minutes']:.0f} minutes (commit {found['commit']}).",
        "Every configuration is purified anew with seeds that no trial had, and scored on "
        f"{found['images']} test images.",
        shipped_table(),
        f"Trial {number} is chosen on `val`, among {len(found['front'])} points of the front.",
    )


def shipped_table() -> str:
    """Scores on `test`: the victim, the paper's defaults, the choice; mean (least to most)."""
    found = _found()
    if found is None:
        return NOTHING
    (name, victim), *_ = found["victims"].items()
    paper, chosen = found["paper_defaults"], found["suite"]["chosen"]["victims"][name]
    runs = chosen["attack_success"]["n"]
    rows = [[f"the victim ({name})", *(f"{victim[score]:.3f}" for score in SCORES)]]
    if paper is not None:
        mine = paper["victims"][name]
        who = f"the paper's defaults (trial {paper['number']}), 1 run"
        rows.append([who, *(f"{mine[score]:.3f}" for score in SCORES)])
    rows.append([f"the chosen configuration, {runs} new runs", *(_spread(chosen[s]) for s in SCORES)])
    return table(["on the test images", *(score.replace("_", " ") for score in SCORES)], rows)


def _found() -> dict[str, Any] | None:
    records = read(KEPT)
    return None if records is None else records["study"]["summary"]


def _spread(of: dict[str, float]) -> str:
    return f"{of['mean']:.3f} ({of['min']:.3f}-{of['max']:.3f})"
