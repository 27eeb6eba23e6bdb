"""The confirmation of a choice: what is asked for and has no record yet is run, a record each."""

from __future__ import annotations

from pathlib import Path

from bimask.defences.settings import DefenceConfig
from bimask.progress import Console, ToldProgress
from bimask.victims import Victim
from study import search
from study.spec.config import StudyConfig
from study.store import records
from study.store.environment import patiently
from study.store.files import append_lines
from study.store.schema import Configuration, Confirmation, ConfirmRecord, StudySummary
from study.trial.suite import confirmation, jobs_of


def confirm_choice(
    config: StudyConfig,
    folder: Path,
    summary: StudySummary,
    suite: dict[str, Victim],
    console: Console,
) -> dict[str, Confirmation] | None:
    """The chosen configuration and the paper's defaults of its defence on every victim of the suite, on
    `test`.

    Each run is a line of confirm.jsonl as it ends; those that are there are not run again.

    Returns:
        As `study.trial.suite.confirmation`; None where nothing is to be confirmed.
    """
    settings: dict[Configuration, DefenceConfig] = {}
    if summary["chosen"]:
        settings["chosen"] = config.defence_config(summary["chosen"]["parameters"])
    if config.paper_defaults and (name := _whose(config, summary)) is not None:
        settings["paper_defaults"] = config.task.defences[name].config()
    jobs = jobs_of(config, settings)
    if not jobs:
        return None
    rows = records.read_confirmed(folder)
    known = {(row["configuration"], row["victim"], row["seed"]) for row in rows}
    with ToldProgress(console) as progress:
        task = progress.add_task(f"confirming on {len(suite)} victims", total=len(jobs))
        progress.update(task, completed=len(known))

        def on_done(row: ConfirmRecord) -> None:
            rows.append(row)
            patiently(
                lambda: append_lines(folder / records.CONFIRM, [row]),
                patience=config.environment_timeout,
                say=console.tell,
                what=f"write to {folder}",
            )
            progress.update(task, completed=len(rows))

        search.run_confirmation(config, suite, [job for job in jobs if job.key not in known], on_done)
    return confirmation(rows, suite)


def _whose(config: StudyConfig, summary: StudySummary) -> str | None:
    """The defence whose defaults the choice is held against; of several none, where nothing is
    chosen."""
    if summary["chosen"] is None and config.defenders.several:
        return None
    return config.defenders.name_of(summary["chosen"]["parameters"] if summary["chosen"] else {})
