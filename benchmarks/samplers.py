"""How soon a sampler, with early stopping or without, has the hypervolume that random search ends with.

    python -m benchmarks.samplers --pool 60 --trials 30     # default: seeds 0 to 4, digits, one thread

Trials run one after another in this process, by the study's own search and judge, without Ray.
Compute is the process's own seconds, suggestions included, so other work on the machine does not
count. Random search has no memory: its trials are drawn without replacement from one pool that is
measured once, a seed a permutation. Each seed's sampler is held against the same seed's random search
of `--trials` trials: the seconds until it has that hypervolume, as a share of all seconds of the
random search, which it does not outlast. `--shipped-start` also begins with the points that the digits
study ships (`start` in its file) and random search is not given: what a user's search begins with, not
what a sampler finds. Results are kept as they come in; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import report
from benchmarks.pages import samplers as page
from benchmarks.pages.samplers import KEPT, ROUNDING, SPACE, curve, random_search
from benchmarks.purify import hardware
from bimask.errors import NonFiniteError
from bimask.victims import obtain_victim
from study.search.pareto_search import ParetoSearch
from study.search.samplers import SAMPLERS
from study.spec.config import StudyConfig
from study.spec.reading import load_config
from study.spec.stopping import EarlyStopping, Halving
from study.store.schema import TrialRecord
from study.trial.cases import Case
from study.trial.history import StoppingBounds
from study.trial.rules import TrialRules
from study.trial.run import run_trials
from study.trial.suite import cases_of

FOLDER = Path("outputs/benchmarks")
STOPPING = EarlyStopping(dominated=True, halving=Halving(shares=[0.5, 0.75], reduction=3, grace=6))
ATTACKS = {"badnets": {"name": "badnets", "size": 3}, "blended": {"name": "blended"}}


def study_of(attacks: list[str], width: int, *, start: bool = False, **changes: Any) -> StudyConfig:
    """The digits study on these attacks, without its points to begin with, or with them (`start`)."""
    shipped = load_config(SPACE)
    victims = [
        shipped.victims[0].model_copy(update={"attack": ATTACKS[a], "width": width}) for a in attacks
    ]
    usual = {"victims": victims, "paper_defaults": False} | ({} if start else {"start": []})
    return shipped.model_copy(update=usual | changes)


def search(
    config: StudyConfig,
    cases: list[Case],
    trials: int,
    *,
    seconds: float = math.inf,
    volume: float = math.inf,
) -> list[dict[str, Any]]:
    """One row a trial: its parameters, status, seconds and objectives.

    Ends after so many trials or seconds, or once the hypervolume is reached.
    """
    config = config.model_copy(update={"trials": trials})
    searcher = ParetoSearch(config, None)
    rows: list[dict[str, Any]] = []
    for number in range(trials):
        begun = time.process_time()
        asked = searcher.suggest(str(number))
        assert isinstance(asked, dict), "a storage in memory always answers"
        (member,) = asked["members"]
        (result,) = run_trials(
            [config.defence_config(member["parameters"])],
            cases,
            seed=0,
            rules=TrialRules.of(config, StoppingBounds.of(asked.get("rivals"))),
        )
        found: dict[str, Any] = {}
        status = "FAILED"
        if not isinstance(result, NonFiniteError):
            found |= result.outcome()
            status = "PRUNED" if result.stopped else "COMPLETE"
        searcher.tell(cast(TrialRecord, member | found | {"status": status}))
        rows.append({"status": status, "seconds": time.process_time() - begun})
        rows[-1]["parameters"] = member["parameters"]
        if status == "COMPLETE":
            rows[-1] |= {name: found[name] for name in config.directions}
        spent, reached = curve(config, rows)[-1]
        if spent > seconds or reached >= volume - ROUNDING:
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--attacks", nargs="+", choices=sorted(ATTACKS), default=["badnets"])
    parser.add_argument("--width", type=int, default=8, help="of the victims")
    parser.add_argument("--pool", type=int, default=60, help="random trials measured")
    parser.add_argument("--trials", type=int, default=30, help="of each random search")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--samplers", nargs="+", choices=sorted(SAMPLERS), default=["gp", "tpe"])
    parser.add_argument("--plain", action="store_true", help="also without early stopping")
    parser.add_argument(
        "--shipped-start", action="store_true", help="also from the study's first points"
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs of a trial")
    parser.add_argument("--out", type=Path, help="default: a file by the attacks' names")
    options = parser.parse_args()
    options.out = options.out or KEPT / f"digits-{'-'.join(options.attacks)}.json"
    torch.set_num_threads(1)

    def study(**changes: Any) -> StudyConfig:
        return study_of(options.attacks, options.width, repeats=options.repeats, **changes)

    config = study(sampler="random", seed=1000, early_stopping=None)
    victims = {
        name: obtain_victim(spec, FOLDER / "victims")
        for name, spec in zip(config.victim_names(), config.victims, strict=True)
    }
    kept: dict[str, Any] = {"pool": [], "ways": {}}
    if options.out.is_file():
        kept = json.loads(options.out.read_text())

    def keep() -> None:
        about = hardware(torch.device("cpu")) | {"attacks": options.attacks, "width": options.width}
        about["trials"] = options.trials
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept | {"about": about}, indent=1) + "\n")

    # the defender's images and the defence's seed are those of seed 0 everywhere
    cases = cases_of(config.model_copy(update={"seed": 0}), victims)
    if len(kept["pool"]) < options.pool:
        kept["pool"] = search(config, cases, options.pool)
        keep()
    ways: dict[str, dict[str, Any]] = {}
    for sampler in options.samplers:
        early = f"{sampler}, early stopping"
        ways[early] = {"sampler": sampler, "early_stopping": STOPPING}
        if options.plain:
            ways[sampler] = {"sampler": sampler, "early_stopping": None}
        if options.shipped_start:
            ways[f"{early}, shipped start"] = ways[early] | {"start": True}
    for seed, (way, changes) in itertools.product(options.seeds, ways.items()):
        seeds = kept["ways"].setdefault(way, {})
        if str(seed) not in seeds:
            spent, volume = random_search(config, kept["pool"], seed, options.trials)[-1]
            mine, most = study(seed=seed, **changes), 4 * options.trials
            seeds[str(seed)] = search(mine, cases, most, seconds=spent, volume=volume)
            keep()
    print(page.report(kept, config, options.trials))
    report.write()


if __name__ == "__main__":
    main()
