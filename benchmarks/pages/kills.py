"""What kills and stops at moments that nobody chose cost a study."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, between, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "kills" / "runs.json"
COLUMNS = (
    "how",
    "times",
    "in which phase",
    "seconds to its end",
    "seconds until Ray is gone",
    "faults",
)
PHASES = ("start", "victims", "search", "confirmation", "summary")


def kills() -> str:
    """The page: a row a way of killing or stopping, of the newest run."""
    runs: list[dict[str, Any]] = read(KEPT) or []
    if not runs:
        return page("Kills and stops", NOTHING)
    run = runs[-1]
    hits, ends = run["hits"], run["ends"]
    total = {key: sum(end[key] for end in ends) for key in ("lost", "doubled", "running", "differ")}
    faulty = sum(bool(hit["faults"]) for hit in hits)
    return page(
        "Kills and stops",
        f"A study of {run['trials']} trials on digits, and its confirmation, is killed or stopped at a "
        "random moment after each launch in a random way, and gone on with by `--resume` until it is "
        "whole; then the next one begins (`python -m benchmarks.kills`). "
        f"Measured on {run['device']}, {run['cores']} cores, seed {run['seed']}, {run['date']}, commit "
        f"{run['commit']}.",
        table(COLUMNS, [_row(kind, hits) for kind in sorted({hit["kind"] for hit in hits})]),
        f"Of {len(hits)} kills and stops {faulty} ended as they should not: with another code, "
        "with a traceback, without a word of `--resume`, or with something of Ray left.",
        table(
            ("studies", "trials", "lost", "doubled", "left RUNNING", "other than left alone"),
            [[str(len(ends)), str(len(ends) * run["trials"]), *map(str, total.values())]],
        ),
        f"Records, Optuna and MLflow lost {total['lost']} trials, had {total['doubled']} twice "
        f"and left {total['running']} RUNNING. In {total['differ']} records and files studies differ "
        "from the one that was left alone, times apart.",
    )


def _row(kind: str, hits: list[dict[str, Any]]) -> list[str]:
    mine = [hit for hit in hits if hit["kind"] == kind]
    phases = {phase: sum(hit["phase"] == phase for hit in mine) for phase in PHASES}
    ended = [hit for hit in mine if hit["code"] is not None]
    return [
        kind,
        str(len(mine)),
        ", ".join(f"{phase} {count}" for phase, count in phases.items() if count),
        between([hit["end"] for hit in ended], 1) if ended else "goes on",
        between([hit["rays"] for hit in ended], 1) if ended else "",
        str(sum(bool(hit["faults"]) for hit in mine)),
    ]
