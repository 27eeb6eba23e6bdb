"""The tables of a protocol: every case with its spread over seeds, and what the cases come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from typing_extensions import TypedDict

from study.analysis.comparison import score_of
from study.spec.objectives import Spread, number, spread
from study.spec.protocol import Case, ProtocolConfig
from study.store.comparison import JudgedRecord

SCORES = (
    "clean_accuracy",
    "attack_success",
    "recovery",
    "arr",
    "rdr",
    "der",
    "accuracy_drop",
    "seconds",
)
AXES = ("dataset", "net", "attack", "rate")
LEARNED = 0.5  # attack success of a victim that has a backdoor at all


class Row(TypedDict):
    """One case under one entry, over the seeds of its victims.

    Attributes:
        rate: null of twins without a backdoor.
        learned: of its victims, how many obey the trigger at all.
        before: the victims' own scores.
        scores: of the defended models, over the runs on victims that obey it.
        n, n_failed: runs with scores, and without.
    """

    dataset: str
    net: str
    attack: str
    rate: float | None
    entry: str
    learned: int
    victims: int
    before: dict[str, Spread]
    scores: dict[str, Spread]
    n: int
    n_failed: int


class Over(TypedDict):
    """The mean over cases, each weighing the same, with its spread over them.

    Attributes:
        axis, value: which cases; axis "all" are all that were learned, "clean" the twins.
    """

    entry: str
    axis: str
    value: str
    cases: int
    scores: dict[str, Spread]


class Protocolled(TypedDict):
    """protocol.json.

    Attributes:
        cases: of the protocol, twins not counted; `judged` of them have a record.
        unlearned: cases none of whose victims obeys its trigger; no mean counts them.
    """

    name: str
    digest: str
    cases: int
    judged: int
    unlearned: list[str]
    rows: list[Row]
    over: list[Over]


def protocolled(
    config: ProtocolConfig, records: Mapping[tuple[str, str], Sequence[JudgedRecord]]
) -> Protocolled:
    """All tables of a protocol.

    Args:
        records: (data set, net) -> what its comparison judged, at the main budget and others.
    """
    cases, comparisons = config.case_of(), config.comparisons()
    found: dict[tuple[Case, str], list[JudgedRecord]] = {}
    for key, mine in records.items():
        for record in mine:
            if record["budget"] == comparisons[key].main_budget and record["victim"] in cases:
                found.setdefault((cases[record["victim"]], record["entry"]), []).append(record)
    rows = [_row(case, entry, mine) for (case, entry), mine in found.items()]
    wanted = config.cases()
    judged = [case for case in wanted if any(case == known for known, _ in found)]
    unlearned = {_name(row) for row in rows if row["rate"] is not None and not row["learned"]}
    return {
        "name": config.name,
        "digest": config.digest,
        "cases": len(wanted),
        "judged": len(judged),
        "unlearned": sorted(unlearned),
        "rows": rows,
        "over": [
            one for entry in dict.fromkeys(r["entry"] for r in rows) for one in _over(entry, rows)
        ],
    }


def table(found: Protocolled) -> pd.DataFrame:
    """One row a case and entry; of each score mean, std, least and most."""
    lines = []
    for row in found["rows"]:
        line: dict[str, object] = {
            key: _at(row, key) for key in (*AXES, "entry", "learned", "n", "n_failed")
        }
        for prefix, scores in (("before.", row["before"]), ("", row["scores"])):
            for name, value in scores.items():
                line |= {
                    f"{prefix}{name}.{kind}": _at(value, kind) for kind in ("mean", "std", "min", "max")
                }
        lines.append(line)
    return pd.DataFrame(lines)


def _row(case: Case, entry: str, records: Sequence[JudgedRecord]) -> Row:
    before = {record["victim"]: record["before"] for record in records}
    obeys = {
        victim
        for victim, scores in before.items()
        if case.rate is None or scores["attack_success"] >= LEARNED
    }
    counted = [record for record in records if record["victim"] in obeys]
    done = [record for record in counted if "test" in record]
    names = ("clean_accuracy", "attack_success", "recovery")
    return {
        "dataset": case.dataset,
        "net": case.net,
        "attack": case.attack,
        "rate": case.rate,
        "entry": entry,
        "learned": len(obeys),
        "victims": len(before),
        "before": {name: spread([number(one, name) for one in before.values()]) for name in names},
        "scores": _scores(done, case),
        "n": len(done),
        "n_failed": len(counted) - len(done),
    }


def _scores(records: Sequence[JudgedRecord], case: Case) -> dict[str, Spread]:
    found = {}
    for name in SCORES:
        unasked = case.rate is None and name in ("der", "rdr", "recovery", "attack_success")
        known = [value for r in records if not math.isnan(value := score_of(r, name))]
        if known and not unasked:
            found[name] = spread(known)
    return found


def _over(entry: str, rows: Sequence[Row]) -> list[Over]:
    """The means of an entry over all cases, then along every axis, then over the twins."""
    mine = [row for row in rows if row["entry"] == entry and row["scores"]]
    attacked = [row for row in mine if row["rate"] is not None]
    found = [_mean(entry, "all", "", attacked)] if attacked else []
    for axis in AXES:
        for value in dict.fromkeys(_at(row, axis) for row in attacked):
            some = [row for row in attacked if _at(row, axis) == value]
            found.append(_mean(entry, axis, str(value), some))
    if twins := [row for row in mine if row["rate"] is None]:
        found.append(_mean(entry, "clean", "", twins))
    return found


def _mean(entry: str, axis: str, value: str, rows: Sequence[Row]) -> Over:
    every = [row["scores"] for row in rows]
    shared = [name for name in SCORES if all(name in scores for scores in every)]
    scores = {name: spread([found[name]["mean"] for found in every]) for name in shared}
    return {"entry": entry, "axis": axis, "value": value, "cases": len(rows), "scores": scores}


def _at(row: Mapping[str, object], key: str) -> object:
    return row[key]


def _name(row: Row) -> str:
    return f"{row['dataset']} {row['net']} {row['attack']} {100 * (row['rate'] or 0):g} %"
