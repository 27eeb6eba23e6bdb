"""What the records of a comparison come to: tables by defence, data budget and part, and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
from typing_extensions import NotRequired, TypedDict

from study.analysis.ranks import Ranks, rank
from study.analysis.risk_bias import RiskBias, risk_bias
from study.spec.comparison import ComparisonConfig, Part
from study.spec.defences import IMS
from study.spec.objectives import Spread, spread
from study.store.comparison import JudgedRecord
from study.store.schema import Parameters, StudySummary, TrialRecord

PARTS: tuple[Part, ...] = ("unseen_seed", "held_out", "control")
# name -> whether more of it is better
COLUMNS = {
    "clean_accuracy": True,
    "attack_success": False,
    "recovery": True,
    "arr": False,
    "rdr": False,
    "der": True,
    "accuracy_drop": False,
    "seconds": False,
    "forward": False,
    "backward": False,
}
Group = Literal["defences", "ablations"]
RANKED = {"der": "attacked", "rdr": "attacked", "tare": "control"}


class Cell(TypedDict):
    """One defence at one data budget on one part of the victims.

    Attributes:
        n, n_failed: runs with scores, and without.
    """

    entry: str
    budget: int
    part: Part
    n: int
    n_failed: int
    scores: dict[str, Spread]


class Searched(TypedDict):
    """What the study of a defence came to."""

    study: str
    trials: int
    complete: int
    seconds: float
    chosen: Parameters | None
    hypervolume: float
    front: list[tuple[float, float]]
    reason: NotRequired[str]


class Ranking(TypedDict):
    """Ranks by one measure at one data budget, over the victims of one part."""

    measure: str
    budget: int
    of: Group
    ranks: Ranks


class Compared(TypedDict):
    """comparison.json.

    Attributes:
        before: part -> the victims' own scores.
        tare: entry -> data budget -> accuracy lost on twins that were never poisoned.
    """

    name: str
    digest: str
    main_budget: int
    budgets: list[int]
    searched: dict[str, Searched]
    before: dict[str, dict[str, Spread]]
    cells: list[Cell]
    by_attack: list[dict[str, object]]
    tare: dict[str, dict[str, Spread | None]]
    rankings: list[Ranking]
    risk_bias: dict[str, RiskBias]


def searched_of(summary: StudySummary, trials: Sequence[TrialRecord]) -> Searched:
    """One study in the table."""
    chosen = summary["chosen"]
    found: Searched = {
        "study": summary["name"],
        "trials": summary["n_trials"],
        "complete": summary["n_complete"],
        "seconds": sum(trial.get("seconds", 0.0) for trial in trials),
        "chosen": chosen and chosen["parameters"],
        "hypervolume": summary["hypervolume"],
        "front": [
            (point["val"]["attack_success"], point["val"]["clean_accuracy"])
            for point in summary["front"]
        ],
    }
    if chosen is None:
        found["reason"] = (
            "no complete trial kept the accuracy that was asked for"
            if summary["n_complete"]
            else "no trial was complete"
        )
    return found


def compare(
    config: ComparisonConfig,
    searched: Mapping[str, Searched],
    records: Sequence[JudgedRecord],
    trials: Mapping[str, Sequence[TrialRecord]] | None = None,
) -> Compared:
    """All tables of a comparison.

    Args:
        searched: entry -> what its study came to, in the order of the comparison.
        trials: entry -> the records of its study.
    """
    budgets = config.budgets
    cells = [
        _cell(entry, budget, part, records)
        for entry in searched
        for budget in budgets
        for part in PARTS
    ]
    tare = {
        cell["entry"]: {
            str(one["budget"]): one["scores"].get("accuracy_drop")
            for one in cells
            if one["entry"] == cell["entry"] and one["part"] == "control"
        }
        for cell in cells
    }
    tried = [entry for entry in config.entries() if searched[entry.name]["trials"]]
    ablated = [entry.name for entry in tried if entry.held or entry.name == IMS]
    groups: dict[Group, list[str]] = {
        "defences": [entry.name for entry in tried if not entry.held],
        "ablations": ablated if len(ablated) > 1 else [],
    }
    return {
        "name": config.name,
        "digest": config.digest,
        "main_budget": config.main_budget,
        "budgets": budgets,
        "searched": dict(searched),
        "before": {part: _before(part, records) for part in PARTS},
        "cells": cells,
        "by_attack": _by_attack(records, config.main_budget),
        "tare": tare,
        "rankings": [
            ranking
            for of, group in groups.items()
            for measure in RANKED
            for budget in budgets
            if (ranking := _ranking(of, measure, budget, group, records)) is not None
        ],
        "risk_bias": risk_bias(trials or {}),
    }


def table(found: Compared) -> pd.DataFrame:
    """One row a defence, budget and part; of each score mean, std, least, most and n."""
    rows = []
    for cell in found["cells"]:
        row: dict[str, object] = {
            key: cell[key] for key in ("entry", "budget", "part", "n", "n_failed")
        }
        for name, value in cell["scores"].items():
            row |= {f"{name}.{kind}": value[kind] for kind in ("mean", "std", "min", "max")}
        rows.append(row)
    return pd.DataFrame(rows)


def _cell(entry: str, budget: int, part: Part, records: Sequence[JudgedRecord]) -> Cell:
    mine = [r for r in records if (r["entry"], r["budget"], r["part"]) == (entry, budget, part)]
    done = [r for r in mine if "test" in r]
    scores: dict[str, Spread] = {}
    for name in COLUMNS:
        known = [value for r in done if not math.isnan(value := score_of(r, name))]
        unasked = part == "control" and name in ("der", "rdr", "recovery")  # of no backdoor
        if known and not unasked:
            scores[name] = spread(known)
    return {
        "entry": entry,
        "budget": budget,
        "part": part,
        "n": len(done),
        "n_failed": len(mine) - len(done),
        "scores": scores,
    }


def score_of(record: JudgedRecord, name: str) -> float:
    """A score of a run by its name in `COLUMNS`; NaN where it has none."""
    if "test" not in record:
        return math.nan
    if name == "accuracy_drop":
        return record["before"]["clean_accuracy"] - record["test"]["clean_accuracy"]
    value = record["test"].get(name, record.get(name))
    return float(value) if isinstance(value, int | float) else math.nan


def _before(part: Part, records: Sequence[JudgedRecord]) -> dict[str, Spread]:
    victims = {r["victim"]: r["before"] for r in records if r["part"] == part}
    return {
        name: spread([float(scores[name]) for scores in victims.values()])
        for name in ("clean_accuracy", "attack_success", "recovery")
        if victims
    }


def _by_attack(records: Sequence[JudgedRecord], budget: int) -> list[dict[str, object]]:
    """Means over the seeds of each attack, at one data budget."""
    rows: dict[tuple[str, str, str], list[JudgedRecord]] = {}
    for record in records:
        if record["budget"] == budget and "test" in record:
            rows.setdefault((record["entry"], record["part"], record["attack"]), []).append(record)
    return [
        {
            "entry": entry,
            "part": part,
            "attack": attack,
            **{
                name: spread([score_of(r, name) for r in mine])
                for name in ("clean_accuracy", "attack_success", "recovery")
            },
        }
        for (entry, part, attack), mine in rows.items()
    ]


def _ranking(
    of: Literal["defences", "ablations"],
    measure: str,
    budget: int,
    entries: list[str],
    records: Sequence[JudgedRecord],
) -> Ranking | None:
    """Ranks over the victims, a failure, and a search that chose nothing, behind all others."""
    wanted = RANKED[measure]
    mine = [
        r
        for r in records
        if r["budget"] == budget and ((r["part"] == "control") == (wanted == "control"))
    ]
    blocks = sorted({(r["victim"], r["seed"]) for r in mine})
    if len(entries) < 2 or not blocks:
        return None
    name = "accuracy_drop" if measure == "tare" else measure
    sign = 1.0 if COLUMNS[name] else -1.0
    known = {(r["entry"], r["victim"], r["seed"]): sign * score_of(r, name) for r in mine}
    scores = {
        entry: [known.get((entry, victim, seed), math.nan) for victim, seed in blocks]
        for entry in entries
    }
    return {"measure": measure, "budget": budget, "of": of, "ranks": rank(scores)}
