"""How well the audit tells backdoored models from clean models, and how often it cannot know."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, page, table
from benchmarks.records import RESULTS, read
from bimask.inspection.audit import calibration

KEPT = RESULTS / "audit" / "measurement.json"
AIM = 0.95  # of the ROC-AUC where a verdict is given
NAMES = {
    "held": "strangers, part `held`",
    "measurement": "digits zoo, part `measurement`",
    "together": "together",
}
ABOUT = """A verdict is "backdoored", "no sign" or "unknown"; [a
decision](../docs/decisions/0015-audit.md) says where the audit says nothing, and what its figures
do not cover."""


def audit() -> str:
    """The page: the calibration, the measurement, and every held model."""
    content: dict[str, Any] | None = read(KEPT)
    if content is None:
        return page("Audit", NOTHING)
    parts = [
        ABOUT,
        fitted(calibration()),
        f"The models below are of no other use. They were measured at the commit {content['commit']}.",
        measurement(content),
        conclusion(content),
    ]
    if "held" in content:
        parts += ["## Held strangers", *models(content["held"]["models"])]
    parts += ["## Kinds that were left out of the fit", *models(calibration()["left_out_unsearched"])]
    return page("Audit", *parts)


def fitted(found: dict[str, Any]) -> str:
    """Sentences on the calibration, from its file."""
    on, band = found["fitted_on"], found["band"]
    return (
        f"The calibration is of {on['models']}: {on['clean']} clean and {on['backdoored']} backdoored "
        f"models, {on['clean_images']} clean images each, with the attacks {', '.join(on['attacks'])}. "
        f'"No sign" is said below a probability of {band["no_sign_below"]:.2f} and "backdoored" from '
        f"{band['backdoored_from']:.2f} on."
    )


def measurement(content: dict[str, Any]) -> str:
    """The figures of every part."""
    columns = [
        "models",
        "clean + backdoored",
        "with a verdict (coverage)",
        "ROC-AUC of those",
        "ROC-AUC of all",
    ]
    columns += [
        "called backdoored: clean, backdoored",
        'called "no sign": clean, backdoored',
        "right target",
    ]
    rows = [_line("calibration, each model left out", calibration()["left_out"])]
    for source, name in NAMES.items():
        if source in content:
            rows.append(_line(f"**{name}**", content[source]["all"]))
            rows.append(_line("of those, all-to-one and not SIG", content[source]["searched"]))
    return table(columns, rows)


def _line(name: str, row: dict[str, Any]) -> list[str]:
    def two(counts: dict[str, int]) -> str:
        return f"{counts['clean']}, {counts['backdoored']}"

    def auc(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    n, spoken = row["n"], row["with verdict"]
    return [
        name,
        f"{n['clean']} + {n['backdoored']}",
        f"{spoken['clean']} + {spoken['backdoored']} ({row['coverage']:.2f})",
        auc(row["roc_auc"]),
        auc(row["roc_auc of all"]),
        two(row["called backdoored"]),
        two(row["called no sign"]),
        f"{row['right target'][0]} of {row['right target'][1]}",
    ]


def conclusion(content: dict[str, Any]) -> str:
    """One sentence: is the aim met, and what was got wrong?"""
    row = content["together"]["all"]
    alone = content["together"]["searched"]["roc_auc"]
    auc, spoken = row["roc_auc"], row["with verdict"]
    said = (
        "not defined, since the models with a verdict are of one kind"
        if auc is None
        else f"{auc:.3f}, {'which meets' if auc >= AIM else 'which misses'} the aim of {AIM}"
    )
    return (
        f"Of {sum(row['n'].values())} models {sum(spoken.values())} get a verdict (coverage "
        f"{row['coverage']:.2f}); of those the ROC-AUC is {said} "
        f"({'-' if alone is None else f'{alone:.3f}'} without SIG and rules other than all to one); "
        f'{row["called no sign"]["backdoored"]} backdoored models were called "no sign" and '
        f"{row['called backdoored']['clean']} clean models backdoored."
    )


def models(found: list[dict[str, Any]]) -> tuple[str, str]:
    """The verdict on every model, and how many were wrong."""
    rows, wrong, silent = [], 0, 0
    for row in found:
        attack = (
            "none" if row["attack"] is None else f"{row['attack']}, {row['rule'].replace('_', ' ')}"
        )
        right = row["verdict"] == ("no sign" if row["attack"] is None else "backdoored")
        unknown = row["verdict"] == "unknown"
        wrong, silent = wrong + (not unknown and not right), silent + unknown
        verdict = row["verdict"] if unknown or right else f"**{row['verdict']}: wrong**"
        rows.append([row["name"], attack, verdict, " ".join(row["reasons"]) if unknown else ""])
    said = (
        f"{silent} of {len(found)} models get no verdict, and {wrong} of the other verdicts are wrong."
    )
    return table(["model", "attack", "verdict", "why unknown"], rows), said
