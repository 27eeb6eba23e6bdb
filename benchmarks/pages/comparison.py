"""Defences tuned for equal seconds, and what their choices are worth on victims that no trial saw."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "comparison"
TITLE = "Defences compared"
FEW = 10  # trials, of which TPE draws about as many at random
PARTS = {
    "unseen_seed": "the tuning attacks, on victims of other seeds",
    "held_out": "attacks that no trial saw",
    "control": "twins that were never poisoned",
}
SHOWN = {
    "clean_accuracy": "ACC",
    "attack_success": "ASR",
    "recovery": "RA",
    "arr": "ARR",
    "rdr": "RDR",
    "der": "DER",
    "accuracy_drop": "points lost",
}


def comparison() -> str:
    """The page: the tables of every comparison that is kept."""
    found = [run for path in sorted(KEPT.glob("*.json")) if (run := read(path))]
    if not found:
        return page(TITLE, NOTHING)
    parts: list[str] = []
    for run in found:
        parts += _parts(run["about"], run["tables"])
    return page(TITLE, *parts)


def _parts(about: dict[str, Any], found: dict[str, Any]) -> list[str]:
    budget = found["main_budget"]
    blocks = [
        f"## {found['name']}",
        f"`python -m study.compare {about['suite']}`: every defence was tuned for "
        f"{about['search_seconds']:g} seconds on {about['tuning']}, and its choice was run on `test` "
        f"with {budget} clean images a class. Numbers are means over n victims with their standard "
        f"deviation; shares are in %. {about['machine']}, {about['date']}, commit {about['commit']}.",
        *found["verdict"],
        *_caution(found),
    ]
    for part, title in PARTS.items():
        rows = [
            _row(cell, found["searched"][cell["entry"]])
            for cell in found["cells"]
            if (cell["budget"], cell["part"]) == (budget, part)
        ]
        if not rows:
            continue
        columns = ["defence", *SHOWN.values(), "seconds", "forward passes", "n", "failed"]
        blocks += [f"### {title[0].upper()}{title[1:]}", table(columns, rows), _conclusion(part, found)]
    blocks += [
        "### By attack",
        table(*_by_attack(found)),
        f"Each cell is ACC / ASR / RA of `test`, {budget} images a class, the mean over seeds.",
        *_by_budget(found),
        "### Does risk flatter a defence?",
        table(
            ["defence", "trials", "mean risk", "mean ASR", "Spearman of risk and ASR", "bias"],
            [
                [
                    *(entry, str(one["n"]), f"{one['mean_risk']:.3f}", f"{one['mean_success']:.3f}"),
                    "" if one["spearman"] is None else f"{one['spearman']:.2f}",
                    f"{one['bias']:+.3f}",
                ]
                for entry, one in found["risk_bias"].items()
            ],
        ),
        "The bias is the mean ASR of a defence's trials on `val` above what the same risk comes with "
        "over all defences, each weighing the same; above 0, a blind choice is misled in its favour.",
        "### Searches",
        table(["defence", "trials", "complete", "seconds", "hypervolume on val"], _searches(found)),
        "A row without scores above chose nothing: no trial of it kept the accuracy that was asked "
        "for, or none ended in its seconds.",
    ]
    return blocks


def _caution(found: dict[str, Any]) -> list[str]:
    """What takes the weight off a ranking: too few trials to have tuned anything."""
    few = [name for name, one in found["searched"].items() if 0 < one["trials"] < FEW]
    if not few:
        return []
    return [
        f"**This is a look, and no ranking of methods**: {len(few)} of {len(found['searched'])} "
        f"defences had fewer than {FEW} trials in their seconds, which tunes nothing, and slow ones "
        "have the fewest."
    ]


def _row(cell: dict[str, Any], searched: dict[str, Any]) -> list[str]:
    scores = cell["scores"]
    counted = [scores.get(name) for name in ("seconds", "forward")]
    counts = ["" if one is None else f"{one['mean']:.3g}" for one in counted]
    return [
        cell["entry"],
        *(_percent(scores.get(name)) for name in SHOWN),
        *counts,
        str(cell["n"]),
        str(cell["n_failed"]),
    ]


def _percent(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def _conclusion(part: str, found: dict[str, Any]) -> str:
    cells = [
        cell
        for cell in found["cells"]
        if (cell["budget"], cell["part"]) == (found["main_budget"], part) and cell["n"]
    ]
    name = "accuracy_drop" if part == "control" else "attack_success"
    known = [cell for cell in cells if name in cell["scores"]]
    if not known:
        return "No choice was run here."
    best = min(known, key=lambda cell: cell["scores"][name]["mean"])
    value = 100 * best["scores"][name]["mean"]
    if part == "control":
        return f"The points lost here are the tare; {best['entry']} has the least, {value:.1f}."
    lost = 100 * best["scores"]["accuracy_drop"]["mean"]
    return f"The least ASR is that of {best['entry']}, {value:.1f} %, at {lost:.1f} points lost."


def _by_attack(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = found["by_attack"]
    columns = list(dict.fromkeys((row["part"], row["attack"]) for row in rows))
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    shown = ("clean_accuracy", "attack_success", "recovery")
    cells = {
        (row["entry"], row["part"], row["attack"]): " / ".join(
            f"{100 * row[name]['mean']:.1f}" for name in shown
        )
        for row in rows
    }
    titles = [f"{attack} (held out)" if part == "held_out" else attack for part, attack in columns]
    return ["defence", *titles], [
        [entry, *(cells.get((entry, *column), "") for column in columns)] for entry in entries
    ]


def _by_budget(found: dict[str, Any]) -> list[str]:
    """What more and fewer images do, where choices were judged with several numbers of them."""
    if len(found["budgets"]) < 2:
        return []
    cells = {(cell["entry"], cell["part"], cell["budget"]): cell for cell in found["cells"]}
    columns = [(part, budget) for part in ("unseen_seed", "held_out") for budget in found["budgets"]]

    def shown(cell: dict[str, Any] | None) -> str:
        if cell is None or "der" not in cell["scores"]:
            return ""
        means = [
            100 * cell["scores"][name]["mean"] for name in ("attack_success", "accuracy_drop", "der")
        ]
        return f"{' / '.join(f'{mean:.1f}' for mean in means)} ({cell['n']})"

    entries = list(dict.fromkeys(cell["entry"] for cell in found["cells"]))
    return [
        "### By clean images",
        table(
            ["defence", *(f"{part.replace('_', ' ')}, {budget}" for part, budget in columns)],
            [[entry, *(shown(cells.get((entry, *column))) for column in columns)] for entry in entries],
        ),
        "Each cell is ASR / points lost / DER, the means over the n victims in brackets; the columns "
        "say how many clean images of every class there were.",
    ]


def _searches(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            entry,
            *(str(one["trials"]), str(one["complete"]), f"{one['seconds']:.0f}"),
            f"{one['hypervolume']:.3f}",
        ]
        for entry, one in found["searched"].items()
    ]
