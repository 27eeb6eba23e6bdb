"""Whether a study that chooses the defence, too, finds what the best study of one defence finds.

    python -m benchmarks.choosing --seconds 300 --seeds 1     # 15 minutes a victim on two cores

Studies of search_spaces/all_defences_digits.yaml on one victim each: one over all defences, and one of
each of the three that had the largest hypervolumes in the comparison, all with the same seconds of
trials. A run that is kept is not run again, and one that was cut short is gone on with. Choices are
made on `val` and reported on `test`; the blind one is made without the trigger, from the same trials.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from benchmarks import report
from benchmarks.pages.choosing import ALL, KEPT
from benchmarks.purify import hardware
from bimask.devices import resolve_device
from study.pipeline.run import run_study
from study.store.provenance import commit
from study.store.records import STUDY, read_summary, read_trials
from study.store.schema import Measured

OUTPUTS = Path("outputs/benchmarks/choosing")
SPACE = Path("search_spaces/all_defences_digits.yaml")
SINGLE = ("ims", "fst", "fine_pruning")  # the three largest hypervolumes of benchmarks/comparison.md
# settings with which each is learned on digits: benchmarks/victims.md
VICTIMS: dict[str, dict[str, Any]] = {
    "badnets": {"attack": {"name": "badnets", "size": 3}},
    "blended": {"attack": {"name": "blended", "alpha": 0.2}},
    "low_frequency": {"attack": {"name": "low_frequency"}},
    "wanet": {"attack": {"name": "wanet", "strength": 1.5}, "epochs": 60},
    "adaptive_blend": {"attack": {"name": "adaptive_blend"}, "poisoning_rate": 0.02},
}


def content(victim: str, entry: str, seed: int, seconds: float) -> dict[str, Any]:
    """One study: the file's, of one victim, over all defences or over `entry` alone."""
    base: dict[str, Any] = yaml.safe_load(SPACE.read_text())
    for key in ("held_out", "controls", "confirm", "gates"):
        base.pop(key)
    spec = base["victims"][0] | {"min_clean_accuracy": 0.9, "min_attack_success": 0.8}
    if entry != ALL:
        base |= {"defences": [entry]}
        base["fixed"] = {name: held for name, held in base["fixed"].items() if name == entry}
        base["start"] = [point for point in base["start"] if point["defence"] == entry]
    return base | {
        "name": f"{victim}-{entry}-{seed}-{seconds:g}",
        "seed": seed,
        "victims": [spec | VICTIMS[victim] | {"seed": seed}],
        "search_seconds": seconds,
        "trials": 2000,  # seconds end it
        "trial_timeout": base["trial_timeout"] * seconds / base["search_seconds"],
    }


def run(victim: str, entry: str, seed: int, seconds: float) -> dict[str, Any]:
    """What such a study comes to."""
    study = content(victim, entry, seed, seconds)
    folder = OUTPUTS / study["name"]
    if (folder / STUDY).is_file():
        run_study(None, {}, outputs=OUTPUTS, address=None, resume=study["name"])
    else:
        OUTPUTS.mkdir(parents=True, exist_ok=True)
        path = OUTPUTS / f"{study['name']}.yaml"
        path.write_text(yaml.safe_dump(study))
        run_study(path, {}, outputs=OUTPUTS, address=None)
    summary, trials = read_summary(folder), read_trials(folder)
    selection = summary["selection"]
    return {
        "hypervolume": summary["hypervolume"],
        "reference_point": summary["reference_point"],
        "trials": summary["n_trials"],
        "complete": summary["n_complete"],
        "seconds": sum(trial.get("seconds", 0.0) for trial in trials),
        "of": dict(Counter(str(trial["parameters"].get("defence", entry)) for trial in trials)),
        "front": sorted({str(p["parameters"].get("defence", entry)) for p in summary["front"]}),
        "oracle": _choice(selection["oracle"], entry),
        "blind": _choice(selection["blind"], entry),
        "spearman": selection["spearman"] and selection["spearman"]["rho"],
    }


def _choice(point: Measured | None, entry: str) -> dict[str, Any] | None:
    """The defence of a choice, and what it leaves."""
    if point is None:
        return None
    scores = {
        f"{name}_{split}": point[split][name]
        for split in ("val", "test")
        for name in ("clean_accuracy", "attack_success")
    }
    return {"defence": str(point["parameters"].get("defence", entry)), **scores}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=300, help="in trials, of every study")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--victims", nargs="+", choices=list(VICTIMS), default=list(VICTIMS))
    parser.add_argument("--entries", nargs="+", default=[ALL, *SINGLE], help="all, or a defence")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {"runs": {}}
    for seed, victim, entry in itertools.product(
        range(options.seeds), options.victims, options.entries
    ):
        key = f"{options.seconds:g}/{victim}/{seed}/{entry}"
        if key in kept["runs"]:
            continue
        kept["runs"][key] = {**run(victim, entry, seed, options.seconds), "commit": commit()}
        kept["about"] = hardware(resolve_device("cpu"))
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        report.write()


if __name__ == "__main__":
    main()
