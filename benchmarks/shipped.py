"""Keeps what the shipped study came to, from the folder that `make study` leaves.

python -m benchmarks.shipped outputs/ims-digits
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import report
from benchmarks.records import RESULTS, keep
from study.store.records import read_summary, read_trials

KEPT = RESULTS / "shipped" / "ims-digits.json"


def shipped(folder: Path) -> dict[str, object]:
    """What the page says of a study, from its folder."""
    summary, trials = read_summary(folder), read_trials(folder)
    return {
        "victims": {name: one["test"] for name, one in summary["victims"].items()},
        "suite": summary.get("suite", {}),
        "chosen": summary["chosen"],
        "paper_defaults": summary["paper_defaults"],
        "front": [point["number"] for point in summary["front"]],
        "trials": {
            "are complete": summary["n_complete"],
            "were stopped early": summary["n_pruned"],
            "failed": summary["n_failed"],
        },
        "images": summary["victims"][next(iter(summary["victims"]))]["test"]["n_clean"],
        "minutes": summary["seconds"]["total"] / 60,
        "commit": trials[0]["provenance"]["commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shipped", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="of the study, such as outputs/ims-digits")
    keep(KEPT, "study", "summary", shipped(parser.parse_args().folder))
    report.write()


if __name__ == "__main__":
    main()
