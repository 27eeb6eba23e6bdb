"""Keeps what a comparison of defences came to; writes benchmarks/comparison.md from it.

python -m study.compare search_spaces/comparison_digits.yaml
python -m benchmarks.comparison outputs/comparison-digits search_spaces/comparison_digits.yaml
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.pages.comparison import KEPT
from benchmarks.purify import hardware
from bimask.devices import resolve_device
from study.report.comparison import verdict
from study.spec.comparison import load_comparison
from study.store.comparison import COMPARISON, TABLES
from study.store.provenance import commit


def main(folder: Path, suite: str) -> None:
    tables = json.loads((folder / TABLES).read_text())
    config = load_comparison(folder / COMPARISON)
    machine = hardware(resolve_device("cpu"))
    attacks = [spec.attack_name for spec in config.specs(config.tuning, config.seeds.tuning[:1])]
    about = {
        "suite": suite,
        "search_seconds": config.search_seconds,
        "tuning": ", ".join(attacks),
        "machine": f"Measured on {machine['device']}, one thread a run",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = {"about": about, "tables": {**tables, "verdict": verdict(tables)}}
    (KEPT / f"{tables['name']}.json").write_text(json.dumps(kept, indent=1) + "\n")
    report.write()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
