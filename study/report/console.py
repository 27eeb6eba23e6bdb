"""What a user sees while a study runs, and at its end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from rich.table import Table

from bimask.nets import is_own
from bimask.progress import Console, ToldProgress
from bimask.tasks import CLASSIFICATION, Task
from study.analysis.blind import PROMISE
from study.report import REPORT
from study.spec.config import StudyConfig
from study.spec.objectives import Spread, backdoor_left, known_scores, number
from study.spec.space import Scalar
from study.store import records
from study.store.schema import (
    Confirmation,
    LeaveOneOut,
    Parameters,
    Selection,
    Spreads,
    StudySummary,
    TrialRecord,
)
from study.tracking.mlflow_runs import Tracker

COLUMN = 3  # characters of a column beside its text: two spaces and a line


def wide_console() -> Console:
    """Standard output, with tables whole in a log."""
    return Console(width=None if sys.stdout.isatty() else 140)


@contextmanager
def trial_progress(
    console: Console, trials: int, at_once: int, task: Task = CLASSIFICATION
) -> Iterator[Callable[[list[TrialRecord]], None]]:
    """A bar of finished trials with the best scores so far."""
    with ToldProgress(console) as progress:
        bar = progress.add_task(f"trials, {at_once} at once", total=trials)

        def on_change(done: list[TrialRecord]) -> None:
            complete = [r for r in done if r["status"] == "COMPLETE"]
            text = f"trials, {at_once} at once"
            if complete:
                by = backdoor_left(complete[0])
                best = min(complete, key=lambda r: number(r, by))
                left, kept = number(best, by), number(best, task.quality)
                text += f"; least {task.short(by)} {left:.3f} at {task.short(task.quality)} {kept:.3f}"
            for status in ("PRUNED", "FAILED"):
                if count := sum(r["status"] == status for r in done):
                    text += f"; {count} {status.lower()}"
            progress.update(bar, completed=len(done), description=text)

        yield on_change


def show(
    console: Console,
    config: StudyConfig,
    summary: StudySummary,
    tracker: Tracker,
    victims: Path,
    folder: Path,
) -> None:
    """The front as a table, the choice, and the two commands to type next."""
    chosen = summary["chosen"]
    shown = list(config.task.metrics) if config.suspect is None else [config.task.quality, "risk"]
    heads = [f"{config.task.short(name)} %" for name in shown]
    taken = sum(COLUMN + len(head) for head in [*heads, "trial *"])
    points = [trial["parameters"] for trial in summary["front"]]
    several = config.defenders.several
    searched = [] if several else fitting(list(config.space), points, console.width - taken - 1)
    table = Table(title=f"Pareto front of {summary['name']} (val)", title_justify="left")
    for column in ("trial", *heads, *searched):
        table.add_column(column, justify="right")
    for column in ("defence", "its settings") if several else ():
        table.add_column(column)
    for trial in summary["front"]:
        values = {**trial["val"], "risk": trial.get("risk")}
        mark = chosen is not None and trial["number"] == chosen["number"]
        table.add_row(
            f"{trial['number']}{' *' if mark else ''}",
            *(f"{100 * number(values, name):.1f}" for name in shown),
            *(_short(trial["parameters"].get(name, "")) for name in searched),
            *(_of_its_defence(config, trial["parameters"]) if several else ()),
            style="bold green" if mark else None,
        )
    console.print(table)
    if hidden := 0 if several else len(config.space) - len(searched):
        console.tell(
            f"{hidden} more settings of each trial: {folder / records.TRIALS}, {folder / REPORT}"
        )
    console.tell(
        f"hypervolume {summary['hypervolume']:.4f} against {summary['reference_point']}; "
        f"{summary['n_complete']} COMPLETE, {summary['n_pruned']} PRUNED, {summary['n_failed']} FAILED"
    )
    for one, label in ((summary["paper_defaults"], "paper's defaults"), (chosen, "chosen")):
        if one:
            scores = ", ".join(
                f"{config.task.short(name)} {value:.3f}"
                for name, value in known_scores(one["test"]).items()
            )
            console.tell(f"on test, {label} (trial {one['number']}): {scores}")
    _show_selection(console, summary["selection"])
    show_suite(console, summary.get("suite") or {}, config.task)
    if (folder / REPORT).is_file():
        console.tell(f"page:  {folder / REPORT}")
    if (command := tracker.ui_command()) is not None:
        console.tell("look:  " + command)
    console.tell("runs:  " + tracker.link())
    if chosen is None:
        kept = config.task.metrics[config.task.quality].name
        console.tell(
            f"no trial keeps a {kept} of {summary['min_clean_accuracy']:.3f} on val and the "
            "constraints; run more trials or widen the space.",
            mark="Nothing chosen",
            style="bold yellow",
        )
        return
    where = shlex.join(["--config", str(folder / records.BEST), "--out", str(folder / "cleaned")])
    reuse = f"python -m bimask purify {_whom(config, victims)} {where}{_trust(config)}"
    console.tell(f"reuse: {reuse}")


def _of_its_defence(config: StudyConfig, parameters: Parameters) -> tuple[str, str]:
    """A trial's defence, and the searched of its settings."""
    name = config.defenders.name_of(parameters)
    searched = {key: value for key, value in parameters.items() if key in config.space}
    own = config.defenders.own(name, searched)
    return name, ", ".join(f"{key} {_short(value)}" for key, value in own.items())


def _whom(config: StudyConfig, victims: Path) -> str:
    if config.suspect is not None:
        return config.suspect.options
    return shlex.join(["--victim", str(config.victims[0].place(victims))])


def fitting(names: list[str], points: Sequence[Parameters], room: int) -> list[str]:
    """The settings whose columns fit into so many characters, whole, in their order: where not all do,
    those that differ most between the points, relative to the largest of their values."""
    widths = {
        name: COLUMN + max(len(name), *(len(_short(p.get(name, ""))) for p in points), 1)
        for name in names
    }
    kept: set[str] = set()
    for name in sorted(names, key=lambda name: -_difference([p.get(name) for p in points])):
        if sum(widths[n] for n in kept) + widths[name] <= room:
            kept.add(name)
    return [name for name in names if name in kept]


def _difference(values: Sequence[Scalar]) -> float:
    """How much values differ, in [0, 1] for numbers of one sign; 1 where some are no numbers."""
    known = [value for value in values if value is not None]
    if not known or all(value == known[0] for value in known):
        return 0.0
    numbers = [value for value in known if isinstance(value, int | float)]
    if len(numbers) < len(known):
        return 1.0
    return float((max(numbers) - min(numbers)) / max(abs(value) for value in numbers))


def _trust(config: StudyConfig) -> str:
    """What allows the code that a victim's folder names; a suspect's is named by the user."""
    return " --trust-code" if config.victims and is_own(config.victims[0].net) else ""


def _show_selection(console: Console, selection: Selection) -> None:
    """Blind choice beside the oracle's, and what the blind one is worth."""
    used = selection["used"]
    for who, trial in (("oracle", selection["oracle"]), ("blind", selection["blind"])):
        if trial is not None:
            left = f"risk on val {number(trial, 'risk'):.3f}"
            if "attack_success" in trial["val"]:
                val, test = trial["val"]["attack_success"], trial["test"]["attack_success"]
                left = f"ASR on val {val:.3f}, on test {test:.3f}"
            console.tell(
                f"{who} choice{' (used)' if who == used else ''}: trial {trial['number']}, {left}"
            )
    if (rank := selection["spearman"]) is not None:
        console.tell(f"blind risk against true ASR: Spearman {rank['rho']:.2f} over {rank['n']} trials")
    if used == "blind":
        console.tell(PROMISE)


def show_suite(
    console: Console, suite: Mapping[str, Confirmation], task: Task = CLASSIFICATION
) -> None:
    """What the choice is worth on every victim of the suite, on test, over the seeds."""
    for configuration, found in suite.items():
        title = f"{configuration.replace('_', ' ')}, purified anew, on test: mean (least to most)"
        table = Table(title=title, title_justify="left")
        drop = f"{task.short(task.quality)} drop, points"
        left, recovered = (f"{task.short(name)} %" for name in ("attack_success", task.recovered))
        for column in ("victim", "role", "runs", drop, left, recovered):
            table.add_column(column, justify="left" if column in ("victim", "role") else "right")
        rows: list[tuple[str, str, Spreads]] = [
            *((name, one["role"], one) for name, one in found["victims"].items()),
            *(("all", role, one) for role, one in found["roles"].items()),
        ]
        for name, role, one in rows:
            if "attack_success" not in one:
                table.add_row(name, role, "0", *["-"] * 3)
                continue
            known = cast(Mapping[str, Spread], one)
            spreads = [known["accuracy_drop"], known["attack_success"], known[task.recovered]]
            table.add_row(
                name,
                role.replace("_", " "),
                str(one["attack_success"]["n"]),
                *(
                    f"{100 * s['mean']:.1f} ({100 * s['min']:.1f} to {100 * s['max']:.1f})"
                    for s in spreads
                ),
                style="bold" if name == "all" else None,
            )
        console.print(table)


def show_leave_out(console: Console, found: LeaveOneOut, task: Task = CLASSIFICATION) -> None:
    """What each choice loses on the attack that it never saw."""
    table = Table(title=f"Leave one attack out ({found['scored_on']})", title_justify="left")
    kept = task.short(task.quality)
    for column in (
        *("attack", "ASR % unseen", "ASR % seen", "ASR lost"),
        *(f"{kept} % unseen", f"{kept} lost"),
    ):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for attack, row in found["attacks"].items():
        seen, unseen, loss = row["with"], row["without"], row["loss"]
        if seen is None or unseen is None or loss is None:
            table.add_row(attack, *["nothing chosen"] * 5)
            continue
        values = [unseen["attack_success"], seen["attack_success"], loss["attack_success"]]
        values += [unseen[task.quality], loss[task.quality]]
        table.add_row(attack, *(f"{100 * value:.1f}" for value in values))
    console.print(table)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
