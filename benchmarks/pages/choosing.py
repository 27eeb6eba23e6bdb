"""The study over all defences beside those of one, at equal seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.pages.markdown import NOTHING, made, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "choosing" / "digits.json"
ALL = "all"
TITLE = "The defence as a setting"
LESS, REGRET = 0.01, 0.05  # hypervolume and attack success that may be lost
ABOUT = """Studies of `search_spaces/all_defences_digits.yaml` on one victim each, with the same seconds
of trials: one chooses the defence with its settings, the others have one defence
(`python -m benchmarks.choosing`). Hypervolumes are of `val`, with the file's reference point."""
Runs = dict[str, dict[int, dict[str, Any]]]  # entry -> seed -> what its study came to


def choosing() -> str:
    """The page: a part for each number of seconds."""
    kept = read(KEPT)
    if kept is None:
        return page(TITLE, NOTHING)
    parts = [ABOUT, made(kept["about"])]
    for seconds, victims in sorted(_by_victim(kept["runs"]).items()):
        parts += [f"## {seconds:g} seconds", *_hypervolumes(victims), *_choices(victims)]
    return page(TITLE, *parts)


def _by_victim(runs: Mapping[str, dict[str, Any]]) -> dict[float, dict[str, Runs]]:
    """Seconds -> victim -> its runs, of victims that have one over all defences and one of one."""
    found: dict[float, dict[str, Runs]] = {}
    for key, one in runs.items():
        seconds, victim, seed, entry = key.split("/")
        victims = found.setdefault(float(seconds), {})
        victims.setdefault(victim, {}).setdefault(entry, {})[int(seed)] = one
    return {
        seconds: known
        for seconds, victims in found.items()
        if (known := {name: runs for name, runs in victims.items() if ALL in runs and len(runs) > 1})
    }


def _hypervolumes(victims: Mapping[str, Runs]) -> list[str]:
    entries = list(dict.fromkeys(entry for runs in victims.values() for entry in runs))
    rows, lost = [], []
    for victim, runs in victims.items():
        medians = {
            entry: statistics.median(one["hypervolume"] for one in seeds.values())
            for entry, seeds in runs.items()
        }
        best = max((entry for entry in medians if entry != ALL), key=lambda entry: medians[entry])
        lost.append(medians[best] - medians[ALL])
        trials = statistics.median(one["complete"] for one in runs[ALL].values())
        shown = [f"{medians[entry]:.3f}" if entry in medians else "" for entry in entries]
        seeds = str(min(map(len, runs.values())))
        rows.append([victim, seeds, *shown, best, f"{-lost[-1]:+.3f}", f"{trials:g}"])
    near = sum(one <= LESS for one in lost)
    columns = ["victim", "seeds", *entries, "best alone", "all against it", "trials of all"]
    return [
        table(columns, rows),
        f"Medians over the seeds. The study over all defences is at most {LESS:g} below the best study "
        f"of one on {near} of {len(lost)} victims.",
    ]


def _choices(victims: Mapping[str, Runs]) -> list[str]:
    rows, regrets, none = [], [], 0
    for victim, runs in victims.items():
        for seed, one in sorted(runs[ALL].items()):
            oracle, blind = one["oracle"], one["blind"]
            if oracle is None or blind is None:
                none += 1
                rows.append([victim, str(seed), _choice(oracle), _choice(blind), "", ""])
                continue
            regrets.append(blind["attack_success_test"] - oracle["attack_success_test"])
            rho = "" if one["spearman"] is None else f"{one['spearman']:.2f}"
            rows.append(
                [victim, str(seed), _choice(oracle), _choice(blind), f"{regrets[-1]:+.3f}", rho]
            )
    near = sum(one <= REGRET for one in regrets)
    missing = f" In {none} one of the two chooses nothing." if none else ""
    return [
        table(["victim", "seed", "oracle", "blind", "blind above oracle", "risk and ASR"], rows),
        "Both choose from the trials of the study over all defences: the oracle by the true trigger on "
        "`val`, the blind one by `risk`. A choice is its defence with ACC / ASR on `test`; the last "
        f"column is Spearman's rank correlation on `val`. In {near} of {len(regrets)} studies the "
        f"blind choice leaves an ASR of at most {REGRET:g} above the oracle's.{missing}",
    ]


def _choice(one: dict[str, Any] | None) -> str:
    if one is None:
        return "none"
    return (
        f"{one['defence']} {100 * one['clean_accuracy_test']:.1f} / "
        f"{100 * one['attack_success_test']:.1f}"
    )
