"""A comparison of defences from start to end: a study each, the choices judged, tables and page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from bimask.defences.settings import DefenceConfig
from bimask.devices import resolve_device
from bimask.errors import BimaskError
from bimask.nets import require_trusted
from bimask.progress import Console, ToldProgress
from bimask.victims import Victim
from study import search
from study.analysis import comparison as analysis
from study.analysis.comparison import Compared, Searched
from study.pipeline.last_words import FrontSoFar
from study.pipeline.naming import named
from study.pipeline.opening import open_tracker
from study.pipeline.prepare import check_data, find_room, prepare_victims, require_writable
from study.pipeline.run import run_in
from study.report import comparison as report
from study.report.console import wide_console
from study.search.interrupts import InterruptedStudyError, Interrupts, LostRayError, leave
from study.search.judging import run_judgements
from study.spec.comparison import ComparisonConfig, Entry, load_comparison
from study.spec.config import StudyConfig, StudyError
from study.store import comparison as store
from study.store import records
from study.store.comparison import JudgedRecord
from study.store.environment import patiently
from study.store.files import append_lines, locked, write_text
from study.store.schema import Parameters
from study.store.session import reopen
from study.tracking.comparison_run import ComparisonRun
from study.tracking.mlflow_runs import require_server, tracking_uri
from study.trial.judging import Judgement


def run_comparison(
    path: Path | None,
    overrides: Mapping[str, object],
    *,
    outputs: Path,
    resume: str | None = None,
    **where: Any,
) -> bool:
    """Run the comparison in a YAML file, or go on with one.

    Args:
        where: `address`, `storage` and `wait` of `study.pipeline.run.run_in`.

    Returns:
        Whether every defence was tuned and judged.

    Raises:
        BimaskError: before the first trial, for anything that would make the comparison fail.
        InterruptedStudyError: a signal ended it, in good order.
        LostRayError: Ray died under it.
    """
    console = wide_console()
    require_writable(outputs)
    with ExitStack() as stack:
        if resume is not None:
            config, folder = store.reopen(outputs, resume, path, overrides)
        elif path is not None:
            config = load_comparison(path, overrides)
            name, folder = records.new_folder(outputs, config.name, chosen_by_user="name" in overrides)
            config = config.model_copy(update={"name": name})
        else:
            raise StudyError("There is nothing to compare; give a YAML file, or --resume NAME.")
        stack.enter_context(locked(folder))
        judging = _judging(config)
        require_server(uri := tracking_uri(outputs))
        refused = _refused(config, judging)
        if resume is None:
            store.begin(folder, config)
        tracker = open_tracker(uri, outputs, judging, console)
        run = ComparisonRun(tracker, config.name, config.digest, _params(config))
        searched: dict[str, Searched] = {}
        for entry in config.entries():
            if entry.name in refused:
                searched[entry.name] = _nothing(config, entry, refused[entry.name])
                continue
            console.rule(entry.name)
            searched[entry.name] = _tuned(
                config.study_of(entry), outputs, console, {**where, "part_of": config.name}
            )
        judged = _judged(config, judging, searched, folder, console, where)
        trials = {
            name: records.read_trials(outputs / one["study"])
            for name, one in searched.items()
            if one["trials"]
        }
        found = analysis.compare(config, searched, judged, trials)
        _write(folder, found)
        run.adopt([one["study"] for one in searched.values()])
        told = " ".join(report.verdict(found))
        files = (store.PAGE, store.CSV, store.TABLES, store.COMPARISON, store.JUDGED, report.PICTURES)
        run.end(
            "FINISHED",
            metrics=_metrics(found),
            artifacts=[folder / name for name in files],
            note=f"{told} The page is the artifact {store.PAGE}.",
        )
        _show(console, found, folder)
    whole = all("reason" not in one for one in searched.values())
    return whole and all("test" in record for record in judged)


def _judging(config: ComparisonConfig) -> StudyConfig:
    """A study whose suite are the victims that choices are judged on; only its suite is ever used."""
    parts = config.judged()
    return config.study_of(config.entries()[0]).model_copy(
        update={
            "name": config.name,
            "victims": parts["unseen_seed"],
            "held_out": parts["held_out"],
            "controls": parts["control"],
            "clean_images_per_class": max(config.budgets),
        }
    )


def _refused(config: ComparisonConfig, judging: StudyConfig) -> dict[str, str]:
    """Entry -> why its defence can do nothing for these nets; data that do not fit are an error."""
    refused: dict[str, str] = {}
    for entry in config.entries():
        study = config.study_of(entry)
        for spec in study.suite:
            require_trusted(spec.net)
        suite = judging.model_copy(update={"defence": study.defence})
        try:
            check_data(study)
            check_data(suite)
        except BimaskError as error:
            refused[entry.name] = str(error)
    if len(refused) == len(config.entries()):
        raise StudyError(f"No defence can be compared: {next(iter(refused.values()))}")
    return refused


def _nothing(config: ComparisonConfig, entry: Entry, reason: str) -> Searched:
    return {
        "study": config.study_of(entry).name,
        "trials": 0,
        "complete": 0,
        "seconds": 0.0,
        "chosen": None,
        "hypervolume": 0.0,
        "front": [],
        "reason": reason,
    }


def _tuned(study: StudyConfig, outputs: Path, console: Console, where: Mapping[str, Any]) -> Searched:
    """What the study of a defence comes to: run, gone on with, or read where it has ended."""
    folder = outputs / study.name
    with ExitStack() as stack:
        begun = (folder / records.STUDY).is_file()
        if begun and (whole := _ended(study, folder)) is not None:
            return whole
        if begun:
            study, folder = reopen(outputs, study.name, None, {"concurrency": study.concurrency})
            stack.enter_context(locked(folder))
        else:
            study, folder = stack.enter_context(named(study, outputs, chosen_by_user=True))
        summary = run_in(study, folder, resume=begun, **where)
    found = analysis.searched_of(summary, records.read_trials(folder))
    if summary["chosen"] is None:
        found["reason"] = "no trial was complete"
    return found


def _ended(study: StudyConfig, folder: Path) -> Searched | None:
    """The same of a study that has ended; None of one that is to be gone on with."""
    trials = records.read_trials(folder)
    if not records.search_is_over(study, trials):
        return None
    try:
        summary = records.read_summary(folder)
    except StudyError:
        return None
    return analysis.searched_of(summary, trials) if summary["n_trials"] == len(trials) else None


def _judged(
    config: ComparisonConfig,
    judging: StudyConfig,
    searched: Mapping[str, Searched],
    folder: Path,
    console: Console,
    where: Mapping[str, Any],
) -> list[JudgedRecord]:
    """The choices on victims that no trial saw; what has a record is not run again."""
    found = store.read_judged(folder)
    known = {(r["entry"], r["budget"], r["victim"], r["seed"]) for r in found}
    jobs = [job for job in _jobs(config, searched) if job.key not in known]
    if not jobs:
        return found
    console.rule("judging")
    interrupts = Interrupts()

    def on_done(record: JudgedRecord) -> None:
        found.append(record)
        patiently(
            lambda: append_lines(folder / store.JUDGED, [record]),
            patience=judging.environment_timeout,
            say=console.tell,
            what=f"write to {folder}",
            given_up=lambda: interrupts.ended,
        )
        progress.update(task, completed=len(found))

    def reason() -> InterruptedStudyError | LostRayError:
        return interrupts.reason(config.name, begun=True)

    with interrupts.in_good_order(reason), ExitStack() as stack:
        stack.callback(search.stop_ray)
        FrontSoFar(config.name, begun=True).tell()
        with interrupts.defer():
            own = search.start_ray(where.get("address"), console.tell)
        stack.enter_context(interrupts.watch(search.ray_gone(own=own), lambda: leave(reason())))
        find_room(judging, where.get("wait", 0), console)
        device = resolve_device(judging.device)
        suite = prepare_victims(judging, folder.parent / "victims", device, console)
        victims = {one.spec.digest: one for one in suite.values() if isinstance(one, Victim)}
        progress = stack.enter_context(ToldProgress(console))
        task = progress.add_task("judging the choices", total=len(found) + len(jobs))
        progress.update(task, completed=len(found))
        run_judgements(judging, victims, jobs, on_done)
    return found


def _jobs(config: ComparisonConfig, searched: Mapping[str, Searched]) -> list[Judgement]:
    """Everything that is judged, the main budget first."""
    settings: dict[str, DefenceConfig] = {}
    for entry in config.entries():
        chosen: Parameters | None = searched[entry.name]["chosen"]
        if chosen is not None:
            settings[entry.name] = config.study_of(entry).defence_config(chosen)
    budgets = sorted(config.budgets, key=lambda budget: (budget != config.main_budget, budget))
    return [
        Judgement(entry, one, budget, part, spec.digest, config.seed + 1 + spec.seed)
        for budget in budgets
        for entry, one in settings.items()
        for part, specs in config.judged().items()
        for spec in specs
    ]


def _write(folder: Path, found: Compared) -> None:
    write_text(folder / store.TABLES, json.dumps(found, indent=2) + "\n")
    write_text(folder / store.CSV, analysis.table(found).to_csv(index=False))
    write_text(folder / store.PAGE, report.render(found, report.draw(folder, found)))


def _params(config: ComparisonConfig) -> dict[str, object]:
    return {
        "defences": ", ".join(entry.name for entry in config.entries()),
        "search_seconds": config.search_seconds,
        "budgets": ", ".join(map(str, config.budgets)),
        "seed": config.seed,
    }


def _metrics(found: Compared) -> dict[str, float]:
    """ENTRY/PART/BUDGET/SCORE -> mean."""
    return {
        f"{cell['entry']}/{cell['part']}/{cell['budget']}/{name}": value["mean"]
        for cell in found["cells"]
        for name, value in cell["scores"].items()
    }


def _show(console: Console, found: Compared, folder: Path) -> None:
    """The table of the main budget, and where the page is."""
    budget = found["main_budget"]
    for part, title in report.PARTS.items():
        table = Table(title=f"{title}, {budget} images a class, on test", title_justify="left")
        table.add_column("defence")
        for name in ("ACC %", "ASR %", "RA %", "DER %", "points lost", "n", "failed"):
            table.add_column(name, justify="right")
        for cell in found["cells"]:
            if (cell["budget"], cell["part"]) == (budget, part):
                shown = ("clean_accuracy", "attack_success", "recovery", "der", "accuracy_drop")
                values = [report.percent(cell["scores"].get(name)) for name in shown]
                table.add_row(cell["entry"], *values, str(cell["n"]), str(cell["n_failed"]))
        console.print(table)
    for sentence in report.verdict(found):
        console.tell(sentence)
    console.tell(f"page: {folder / store.PAGE}")
