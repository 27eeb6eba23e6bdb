"""BackdoorBench's own log beside a checkpoint: `attack_df.csv`, a row an epoch."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from bimask.metrics import Scores

LOG = "attack_df.csv"
COLUMNS = ("test_acc", "test_asr", "test_ra")
MAX_LOG_BYTES = 16 * 2**20
AGREEMENT = 1e-4


def logged_scores(folder: Path) -> tuple[float, float, float] | None:
    """ACC, ASR and RA of the last row that has them; None where there is no such log."""
    path = folder / LOG
    try:
        if not path.is_file() or path.stat().st_size > MAX_LOG_BYTES:
            return None
        with open(path, newline="") as lines:
            rows = [[float(row[column]) for column in COLUMNS] for row in csv.DictReader(lines)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None  # the log is not what is imported: without it nothing can be compared, that is all
    whole = [(a, b, c) for a, b, c in rows if math.isfinite(a + b + c)]
    return whole[-1] if whole else None


def compare_with_log(folder: Path, scores: Scores) -> tuple[str, ...]:
    """A note if BackdoorBench logged other scores than were found anew."""
    logged = logged_scores(folder)
    found = (scores.clean_accuracy, scores.attack_success, scores.recovery)
    if logged is None or all(abs(a - b) <= AGREEMENT for a, b in zip(logged, found, strict=True)):
        return ()
    theirs, ours = (", ".join(f"{value:.4f}" for value in values) for values in (logged, found))
    return (
        f"The last row of {LOG} has other ACC, ASR and RA ({theirs}) than were found here "
        f"({ours}); it may be of another epoch, or the clean data or the net may be others.",
    )
