"""A comparison of defences from start to end: a study each, the choices judged, tables and page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from bimask.nets import require_trusted
from bimask.progress import Console
from study.analysis import comparison as analysis
from study.analysis.comparison import Compared, Searched
from study.pipeline.choosing import refused_by
from study.pipeline.judging import judge_choices, judging_study
from study.pipeline.making import make_all
from study.pipeline.naming import named
from study.pipeline.opening import open_tracker
from study.pipeline.prepare import check_images, require_writable
from study.pipeline.run import run_in
from study.report import comparison as report
from study.report.console import wide_console
from study.search.interrupts import InterruptedStudyError, Interrupts, LostRayError
from study.spec.comparison import ComparisonConfig, Entry, load_comparison
from study.spec.config import StudyConfig, StudyError
from study.store import comparison as store
from study.store import records
from study.store.files import locked, write_text
from study.store.schema import TrialRecord
from study.store.session import Identity, reopen
from study.tracking.comparison_run import ComparisonRun
from study.tracking.mlflow_runs import require_server, tracking_uri


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
    require_writable(outputs)
    with ExitStack() as stack:
        if resume is not None:
            config, folder = store.reopen(outputs, resume, path, overrides)
            stack.enter_context(locked(folder))
        elif path is not None:
            config, folder = stack.enter_context(
                named(load_comparison(path, overrides), outputs, chosen_by_user="name" in overrides)
            )
        else:
            raise StudyError("There is nothing to compare; give a YAML file, or --resume NAME.")
        interrupts = Interrupts()

        def reason() -> InterruptedStudyError | LostRayError:
            return interrupts.reason(config.name, begun=resume is not None or folder.exists())

        with interrupts.in_good_order(reason):
            return compare_in(config, folder, begun=resume is not None, **where)


def compare_in(
    config: ComparisonConfig,
    folder: Path,
    *,
    begun: bool,
    part_of: str | None = None,
    address: str | None = None,
    storage: str | None = None,
    wait: float = 0,
) -> bool:
    """Run a comparison, or go on with it, in its folder among the outputs, which is held.

    Args:
        begun: whether the folder is there.
        part_of: the name of the protocol that it belongs to: that is gone on with.
        address, storage, wait: as of `study.pipeline.run.run_in`.

    Returns:
        Whether every defence was tuned and judged. What is raised is as of `run_comparison`.
    """
    console, again = wide_console(), part_of or config.name
    where: dict[str, Any] = {"address": address, "storage": storage, "wait": wait, "part_of": again}
    outputs, judging = folder.parent, judging_study(config)
    require_server(uri := tracking_uri(outputs))
    refused = _refused(config, judging)
    if not begun:
        store.begin(folder, config)
    tracker = open_tracker(uri, outputs, judging, console)
    run = ComparisonRun(tracker, folder, config, _params(config), console.tell)
    try:
        console.rule("victims")
        remedy = "a comparison without them is begun under another --name"
        make_all(config.suite(), config, outputs / "victims", remedy=remedy, **where)
        searched: dict[str, Searched] = {}
        for entry in config.entries():
            if entry.name in refused:
                searched[entry.name] = {**_nothing(config, entry), "reason": refused[entry.name]}
                continue
            if not entry.tuned:
                searched[entry.name] = {**_nothing(config, entry), "chosen": {}}
                continue
            console.rule(entry.name)
            searched[entry.name] = _tuned(config.study_of(entry), outputs, console, where)
        judged, missing = judge_choices(
            config, judging, searched, folder, console, part_of=again, address=address, wait=wait
        )
        found = analysis.compare(config, searched, judged, _trials(config, searched, outputs))
        _write(folder, found)
    except BaseException:
        run.close("KILLED")
        raise
    told = " ".join(report.verdict(found))
    files = (store.PAGE, store.CSV, store.TABLES, store.COMPARISON, store.JUDGED, report.PICTURES)
    run.end(
        [outputs / one["study"] for one in searched.values()],
        metrics=_metrics(found),
        artifacts=[folder / name for name in files],
        note=f"{told} The page is the artifact {store.PAGE}.",
    )
    _show(console, found, folder)
    if missing:
        console.tell(
            f"{missing} runs of the choices came to nothing, since their process died; "
            f"--resume {again} runs them."
        )
    whole = all("reason" not in one for one in searched.values()) and not missing
    return whole and all("test" in record for record in judged)


def _trials(
    config: ComparisonConfig, searched: Mapping[str, Searched], outputs: Path
) -> dict[str, list[TrialRecord]]:
    """The records of each defence's study; ablations are none of the rivals."""
    return {
        entry.name: records.read_trials(outputs / searched[entry.name]["study"])
        for entry in config.entries()
        if not entry.held and searched[entry.name]["trials"]
    }


def _refused(config: ComparisonConfig, judging: StudyConfig) -> dict[str, str]:
    """Entry -> why its defence can do nothing for these nets.

    Raises:
        BimaskError: data are missing or do not fit, or no defence is left.
    """
    entries = config.entries()
    tuning = config.study_of(entries[0])  # all tune on the same victims
    for study in (tuning, judging):
        for spec in study.suite:
            require_trusted(spec.net)
        check_images(study)
    names = list(dict.fromkeys(entry.defence for entry in entries))
    refused = refused_by(judging, names) | refused_by(tuning, names)
    if refused.keys() >= set(names):
        raise StudyError(f"No defence can be compared: {refused[names[0]]}")
    return {entry.name: refused[entry.defence] for entry in entries if entry.defence in refused}


def _nothing(config: ComparisonConfig, entry: Entry) -> Searched:
    """Of an entry that no trial was of."""
    return {
        "study": config.study_of(entry).name,
        "trials": 0,
        "complete": 0,
        "seconds": 0.0,
        "chosen": None,
        "hypervolume": 0.0,
        "front": [],
    }


def _tuned(study: StudyConfig, outputs: Path, console: Console, where: Mapping[str, Any]) -> Searched:
    """What the study of a defence comes to: run, gone on with, or read where it has ended.

    Raises:
        StudyError: its folder is of another study.
    """
    folder = outputs / study.name
    with ExitStack() as stack:
        begun = (folder / records.STUDY).is_file()
        if begun and (known := Identity.load(folder).digest) != study.digest:
            raise StudyError(
                f"{folder} is a study of other settings (its digest is {known}, and {study.digest} is "
                "wanted); remove it, or compare under another --name."
            )
        if begun and (whole := _ended(study, folder)) is not None:
            return whole
        if begun:
            study, folder = reopen(outputs, study.name, None, {"concurrency": study.concurrency})
            stack.enter_context(locked(folder))
        else:
            study, folder = stack.enter_context(named(study, outputs, chosen_by_user=True))
        summary = run_in(study, folder, resume=begun, **where)
    return analysis.searched_of(summary, records.read_trials(folder))


def _ended(study: StudyConfig, folder: Path) -> Searched | None:
    """The same of a study that has ended; None of one that is to be gone on with, or mended."""
    try:
        trials = records.read_trials(folder)
        if not records.search_is_over(study, trials):
            return None
        summary = records.read_summary(folder)
    except StudyError:
        return None
    return analysis.searched_of(summary, trials) if summary["n_trials"] == len(trials) else None


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
