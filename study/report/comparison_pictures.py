"""Pictures of a comparison: critical differences, fronts over one another, ranks by data budget."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bimask.files.drawn import save_figure
from study.analysis.comparison import Compared
from study.analysis.ranks import ALPHA, Ranks

MARKERS = "osD^vP*X<>ph"
INK, FAINT = "#222222", "#bbbbbb"
# Okabe-Ito without yellow, which is faint on white; a marker tells apart what shares a colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def draw_critical_difference(path: Path, ranks: Ranks, title: str) -> None:
    """Mean ranks on a line, the best on the left; a bar joins those that are not told apart."""
    names = list(ranks["mean_rank"])
    bars = [clique for clique in ranks["cliques"] if len(clique) > 1]
    half = -(-len(names) // 2)
    figure = Figure(figsize=(9, 1.6 + 0.28 * half + 0.12 * len(bars)), dpi=130, layout="constrained")
    axes = figure.subplots()
    low, high = 1.0, float(len(names))
    axes.plot([low, high], [0, 0], color=INK, linewidth=1.2)
    for tick in range(int(low), int(high) + 1):
        axes.plot([tick, tick], [0, 0.12], color=INK, linewidth=1)
        axes.text(tick, 0.2, str(tick), ha="center", va="bottom", fontsize=8)
    depth = 0.35 + 0.22 * len(bars)
    for place, name in enumerate(names):
        value = ranks["mean_rank"][name]
        left = place < half
        row = place if left else len(names) - 1 - place
        y, end = -depth - 0.4 * row, low - 0.3 if left else high + 0.3
        axes.plot([value, value, end], [0, y, y], color=INK, linewidth=0.8)
        axes.text(
            end + (-0.08 if left else 0.08),
            y,
            f"{name} ({value:.2f})",
            ha="right" if left else "left",
            va="center",
            fontsize=9,
        )
    for row, clique in enumerate(bars):
        values = [ranks["mean_rank"][name] for name in clique]
        y = -0.2 - 0.22 * row
        axes.plot(
            [min(values) - 0.04, max(values) + 0.04], [y, y], color=COLOURS[0], linewidth=4, alpha=0.7
        )
    difference = ranks["critical_difference"]
    if difference is not None:
        width = min(difference, high - low)
        axes.plot([low, low + width], [0.75, 0.75], color=INK, linewidth=1.6)
        axes.text(low, 0.85, f"critical difference {difference:.2f}", fontsize=8, va="bottom")
    p = ranks["p"]
    test = "too few to test" if p is None else f"Friedman p = {p:.2g}, Nemenyi at {ALPHA:g}"
    axes.set_title(f"{title}: mean rank over {ranks['blocks']} victims ({test})", fontsize=10)
    axes.set_xlim(low - 0.28 * (high - low) - 0.6, high + 0.28 * (high - low) + 0.6)
    axes.set_ylim(-depth - 0.4 * half, 1.5)
    axes.axis("off")
    save_figure(figure, path)


def draw_fronts(path: Path, found: Compared) -> None:
    """The Pareto front of every defence's study over the others, on `val`."""
    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for place, (entry, searched) in enumerate(found["searched"].items()):
        points = sorted((100 * asr, 100 * acc) for asr, acc in searched["front"])
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axes.step(x, y, where="post", color=_colour(place), linewidth=1)
        axes.plot(x, y, _marker(place), color=_colour(place), markersize=5, label=entry)
    axes.set_xlabel("attack success rate on val, % (lower is better)")
    axes.set_ylabel("clean accuracy on val, % (higher is better)")
    axes.set_xlim(-2, 102)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axes.set_title("What each defence reached in its seconds, on the tuning attacks")
    save_figure(figure, path)


def draw_ranks_by_budget(path: Path, found: Compared, measure: str) -> None:
    """Mean rank of every defence at each data budget."""
    by_budget = {
        r["budget"]: r["ranks"]["mean_rank"]
        for r in found["rankings"]
        if (r["of"], r["measure"]) == ("defences", measure)
    }
    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    budgets = sorted(by_budget)
    for place, entry in enumerate(found["searched"]):
        known = [(at, by_budget[b][entry]) for at, b in enumerate(budgets) if entry in by_budget[b]]
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, y, f"-{_marker(place)}", color=_colour(place), linewidth=1.1, label=entry)
    axes.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
    axes.set_xlabel("clean images a class")
    axes.set_ylabel(f"mean rank by {measure.upper()} (1 is best)")
    axes.invert_yaxis()
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_figure(figure, path)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _marker(place: int) -> str:
    return MARKERS[(place // len(COLOURS) + place) % len(MARKERS)]
