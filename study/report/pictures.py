"""Pictures, as PNG: a study's victims, its Pareto front, the masks of a trial. matplotlib only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bimask.files.drawn import save_figure
from bimask.masking.masks import MaskSet
from bimask.tasks import CLASSIFICATION, Task
from study.report.headline import scores_before
from study.spec.defences import KEY
from study.spec.objectives import backdoor_left, number
from study.store.schema import StudySummary, TrialRecord
from study.trial.cases import Case

# Okabe-Ito: distinct to colour-blind readers, and each role has a marker of its own as well.
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#999999", "#000000"
# Of defences: Okabe-Ito's, then Tol's; the legend and the table of trials name them as well.
PALETTE = (
    BLUE,
    ORANGE,
    GREEN,
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A5195",
    "#8C510A",
    "#B2182B",
    "#1B7837",
)
MARKS = (("D", "o"), ("P", "v"), ("X", "<"))  # on the front, and dominated
FRONT_PICTURE = "front.png"
AXES = {"attack_success": "attack success rate", "risk": "risk (short cuts still followed)"}


def draw_front(
    path: Path,
    trials: Sequence[TrialRecord],
    summary: StudySummary,
    task: Task = CLASSIFICATION,
) -> None:
    """Clean quality against attack success, or a suspect's risk, on `val` for every complete trial.

    The victims as they were are a point of their own; a suspect, of which no risk is known, is none.
    """
    complete = [trial for trial in trials if trial["status"] == "COMPLETE"]
    front = [point["number"] for point in summary["front"]]
    chosen, paper = (one and one["number"] for one in (summary["chosen"], summary["paper_defaults"]))
    victim = scores_before(summary, "val") or {}
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    by = backdoor_left(victim)
    quality = task.quality
    points = {t["number"]: (100 * number(t, by), 100 * number(t, quality)) for t in complete}
    if front:
        x, y = zip(*sorted(points[number] for number in front), strict=True)
        several = any(KEY in trial["parameters"] for trial in complete)  # and blue is one of them
        axes.step(x, y, where="post", color=GREY if several else BLUE, linewidth=1.2)
    for group in _groups(complete, front):
        x, y = zip(*(points[number] for number in group.numbers), strict=True)
        axes.scatter(
            x,
            y,
            color=group.colour,
            marker=group.marker,
            s=group.size,
            zorder=group.layer,
            label=group.label,
        )
    if paper is not None:
        axes.scatter(
            *points[paper],
            color=ORANGE,
            marker="s",
            s=70,
            zorder=4,
            label=f"paper's defaults (trial {paper})",
        )
    if by in victim:
        axes.scatter(
            100 * victim[by],
            100 * victim[quality],
            color=BLACK,
            marker="X",
            s=90,
            zorder=4,
            label="victim, before",
        )
    if chosen is not None:
        axes.scatter(
            *points[chosen],
            facecolor="none",
            edgecolor=GREEN,
            marker="o",
            s=220,
            linewidth=2.4,
            zorder=5,
            label=f"chosen (trial {chosen})",
        )
    asked = 100 * summary["min_clean_accuracy"]
    axes.axhline(asked, color=GREEN, linestyle=":", linewidth=1)
    axes.text(100, asked, f"{task.price} asked for", color=GREEN, ha="right", va="bottom")
    axes.set_xlabel(f"{AXES[by]} on val, % (lower is better)")
    axes.set_ylabel(f"{task.metrics[quality].name} on val, % (higher is better)")
    axes.set_xlim(-3, 103)
    axes.set_title(f"{summary['name']}: {len(complete)} trials on {', '.join(summary['victims'])}")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower center", fontsize=8, ncols=2)
    save_figure(figure, path)


@dataclass(frozen=True)
class _Group:
    """Trials that look alike; a label None is in the legend already."""

    numbers: list[int]
    colour: str
    label: str | None
    marker: str = "o"
    size: int = 36
    layer: int = 2


def _groups(complete: Sequence[TrialRecord], front: Sequence[int]) -> list[_Group]:
    """The trials on the front and the dominated ones, of several defences each in its colour."""
    by_defence: dict[str | None, list[int]] = {}
    for trial in complete:
        name = trial["parameters"].get(KEY)
        by_defence.setdefault(None if name is None else str(name), []).append(trial["number"])
    found = []
    for at, (name, numbers) in enumerate(by_defence.items()):
        best = [number for number in numbers if number in front]
        others = [number for number in numbers if number not in front]
        if name is None:
            found += [
                _Group(others, GREY, "dominated"),
                _Group(best, BLUE, "Pareto front", size=46, layer=3),
            ]
            continue
        lap, place = divmod(at, len(PALETTE))  # beyond the palette other marks stand for other defences
        colour, mark = PALETTE[place], lap % len(MARKS)
        found.append(_Group(best, colour, name, MARKS[mark][0], 52, 3))
        found.append(_Group(others, colour, None if best else name, MARKS[mark][1], 26))
    return [group for group in found if group.numbers]


def draw_victims(folder: Path, cases: Sequence[Case]) -> None:
    """A gallery of every victim as NAME.png: what its trigger does, on images of `val`."""
    folder.mkdir(exist_ok=True)
    for case in cases:
        case.task.draw_victim(folder / f"{case.name}.png", case.victim, case.val)


def draw_masks(path: Path, masks: MaskSet, title: str) -> None:
    """Every channel's mask factor and selection, one row a layer, channels sorted by their factor."""
    keeps, selections = masks.keeps(), masks.by_site(masks.selection)
    sites = list(masks.sites)
    widest = max(masks.sites.values())
    figure = Figure(figsize=(11, 1.2 + 0.24 * len(sites)), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    order = {site: keep.detach().argsort().numpy() for site, keep in keeps.items()}
    columns = {"factor a' of the kept model": keeps, "selection s (1 = shared)": selections}
    for axes, (label, values) in zip(panels, columns.items(), strict=True):
        grid = np.full((len(sites), widest), np.nan)
        for row, site in enumerate(sites):
            channel = values[site].detach().numpy()[order[site]]
            grid[row, : len(channel)] = channel
        image = axes.imshow(
            np.ma.masked_invalid(grid),
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=0,
            vmax=1,
        )
        axes.set_xlabel("channels of the layer, sorted by factor")
        axes.set_title(label, fontsize=10)
    panels[0].set_yticks(range(len(sites)), sites, fontsize=7)
    figure.colorbar(image, ax=panels, shrink=0.8)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
