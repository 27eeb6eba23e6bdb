"""The page of a comparison: one file, pictures inside, nothing fetched and no script."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bimask.files.pages import render_page
from study.analysis.comparison import RANKED, Cell, Compared
from study.report.comparison_pictures import (
    draw_critical_difference,
    draw_fronts,
    draw_ranks_by_budget,
)
from study.spec.objectives import Spread

GROUPS = {"defences": "the defences", "ablations": "IMS and its ablations"}
PICTURES = "comparison"  # folder of the pictures, beside the page
PARTS = {
    "unseen_seed": "the tuning attacks, on victims of other seeds",
    "held_out": "attacks that no trial saw",
    "control": "twins that were never poisoned",
}
SHARES = {
    "clean_accuracy": "ACC",
    "attack_success": "ASR",
    "recovery": "RA",
    "arr": "ARR",
    "rdr": "RDR",
    "der": "DER",
    "accuracy_drop": "points lost",
}
COUNTS = {"seconds": "seconds", "forward": "forward passes", "backward": "backward passes"}


def draw(folder: Path, found: Compared) -> dict[str, Path]:
    """The pictures of a comparison, by title, as PNG in its folder."""
    target = folder / PICTURES
    target.mkdir(exist_ok=True)
    pictures = {}
    for ranking in found["rankings"]:
        if ranking["budget"] != found["main_budget"]:
            continue
        measure, of = ranking["measure"], ranking["of"]
        name = f"{measure.upper()} of {GROUPS[of]} at {ranking['budget']} images a class"
        pictures[name] = target / f"ranks-{of}-{measure}.png"
        draw_critical_difference(pictures[name], ranking["ranks"], name)
    for measure in RANKED:
        mine = [r for r in found["rankings"] if (r["of"], r["measure"]) == ("defences", measure)]
        if len(mine) > 1:
            name = f"Rank by {measure.upper()} and data budget"
            pictures[name] = target / f"budgets-{measure}.png"
            draw_ranks_by_budget(pictures[name], found, measure)
    if any(searched["front"] for searched in found["searched"].values()):
        pictures["Fronts of the searches"] = target / "fronts.png"
        draw_fronts(pictures["Fronts of the searches"], found)
    return pictures


def render(found: Compared, pictures: dict[str, Path]) -> str:
    """The page as HTML."""
    return render_page(
        "study.report",
        "comparison.html",
        found=found,
        verdict=verdict(found),
        pictures={
            title: Markup("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
            for title, path in pictures.items()
        },
        parts=PARTS,
        headings=[*SHARES.values(), *COUNTS.values()],
        tables=[
            (
                budget,
                part,
                [
                    _row(cell)
                    for cell in found["cells"]
                    if (cell["budget"], cell["part"]) == (budget, part) and cell["n"] + cell["n_failed"]
                ],
            )
            for budget in found["budgets"]
            for part in PARTS
        ],
        before=[
            (
                PARTS[part],
                [
                    percent(scores.get(name))
                    for name in ("clean_accuracy", "attack_success", "recovery")
                ],
            )
            for part, scores in found["before"].items()
            if scores
        ],
        attacks=_attacks(found),
        ranks=[(r["measure"].upper(), r["budget"], r["ranks"]) for r in found["rankings"]],
    )


def verdict(found: Compared) -> list[str]:
    """What may be concluded, a sentence for each measure: no more than the test says."""
    sentences = []
    for ranking in found["rankings"]:
        if ranking["budget"] != found["main_budget"]:
            continue
        ranks, measure = ranking["ranks"], ranking["measure"].upper()
        order = list(ranks["mean_rank"])
        among = "" if ranking["of"] == "defences" else " among IMS and its ablations"
        where = f"By {measure} at {ranking['budget']} images a class{among}"
        if ranks["p"] is None:
            sentences.append(f"{where} there is too little to test: {order[0]} has the best mean rank.")
        elif len(ranks["cliques"][0]) == len(order):
            sentences.append(
                f"{where} no defence is told apart from all others (Friedman p = {ranks['p']:.2g}); "
                f"{order[0]} has the best mean rank, {ranks['mean_rank'][order[0]]:.2f}."
            )
        else:
            best = ranks["cliques"][0]
            also = f" and is not told apart from {', '.join(best[1:])}" if len(best) > 1 else ""
            sentences.append(
                f"{where} {order[0]} has the best mean rank, {ranks['mean_rank'][order[0]]:.2f}{also} "
                f"(Friedman p = {ranks['p']:.2g}, Nemenyi's critical difference "
                f"{ranks['critical_difference']:.2f})."
            )
    return sentences


def percent(value: Spread | None) -> str:
    """A share with its spread, in percent."""
    if value is None:
        return "-"
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def number(value: Spread | None) -> str:
    """A count with its spread."""
    return "-" if value is None else f"{value['mean']:.3g} ± {value['std']:.2g}"


def _row(cell: Cell) -> dict[str, Any]:
    scores = cell["scores"]
    return {
        "entry": cell["entry"],
        "n": cell["n"],
        "n_failed": cell["n_failed"],
        "values": [percent(scores.get(name)) for name in SHARES]
        + [number(scores.get(name)) for name in COUNTS],
    }


def _attacks(found: Compared) -> list[tuple[str, list[tuple[str, str]]]]:
    """ACC / ASR / RA of every defence on each attack, which may be in two parts."""
    rows = found["by_attack"]
    columns = list(dict.fromkeys((str(row["part"]), str(row["attack"])) for row in rows))
    entries = list(dict.fromkeys(str(row["entry"]) for row in rows))
    cells: dict[tuple[str, tuple[str, str]], str] = {}
    for row in rows:
        values = [row[name] for name in ("clean_accuracy", "attack_success", "recovery")]
        means = " / ".join(f"{100 * value['mean']:.1f}" for value in values)  # type: ignore[index]
        cells[str(row["entry"]), (str(row["part"]), str(row["attack"]))] = means
    titles = [f"{attack} (held out)" if part == "held_out" else attack for part, attack in columns]
    return [
        (
            entry,
            [
                (title, cells.get((entry, column), "-"))
                for title, column in zip(titles, columns, strict=True)
            ],
        )
        for entry in entries
    ]
