"""The choices of a comparison on victims that no trial saw: what has no record yet is run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from bimask.defences.settings import DefenceConfig
from bimask.progress import Console, ToldProgress
from bimask.victims import obtain_victim
from study import search
from study.analysis.comparison import Searched
from study.pipeline.last_words import FrontSoFar
from study.pipeline.prepare import find_room
from study.search.interrupts import InterruptedStudyError, Interrupts, LostRayError, leave
from study.search.judging import run_judgements
from study.spec.comparison import ComparisonConfig
from study.spec.config import StudyConfig
from study.store import comparison as store
from study.store.comparison import JudgedRecord
from study.store.environment import patiently
from study.store.files import append_lines
from study.store.mending import mend_lines
from study.store.schema import Parameters
from study.trial.judging import Judgement


def judging_study(config: ComparisonConfig) -> StudyConfig:
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


def judge_choices(
    config: ComparisonConfig,
    judging: StudyConfig,
    searched: Mapping[str, Searched],
    folder: Path,
    console: Console,
    *,
    part_of: str,
    address: str | None,
    wait: float,
) -> tuple[list[JudgedRecord], int]:
    """The records of all runs, and how many runs came to nothing since their process died.

    Args:
        part_of: the name of what is gone on with.
    """
    for note in mend_lines(folder / store.JUDGED, store.judged_record, "this run is run again"):
        console.tell(note)
    found = store.read_judged(folder)
    known = {(r["entry"], r["budget"], r["victim"], r["seed"]) for r in found}
    jobs = [job for job in _jobs(config, searched) if job.key not in known]
    if not jobs:
        return found, 0
    console.rule("judging")
    interrupts, total = Interrupts(), len(found) + len(jobs)

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
        return interrupts.reason(part_of, begun=True)

    with interrupts.in_good_order(reason), ExitStack() as stack:
        stack.callback(search.stop_ray)
        FrontSoFar(part_of, begun=True).tell()
        with interrupts.defer():
            own = search.start_ray(address, console.tell)
        stack.enter_context(interrupts.watch(search.ray_gone(own=own), lambda: leave(reason())))
        if wait:
            stack.callback(search.release_workers)
        find_room(judging, wait, console)
        root, needed = folder.parent / "victims", {job.victim for job in jobs}
        victims = (
            (spec.digest, obtain_victim(spec, root)) for spec in judging.suite if spec.digest in needed
        )
        progress = stack.enter_context(ToldProgress(console))
        task = progress.add_task("judging the choices", total=total)
        progress.update(task, completed=len(found))
        run_judgements(judging, victims, jobs, on_done, console.tell)
    return found, total - len(found)


def _jobs(config: ComparisonConfig, searched: Mapping[str, Searched]) -> list[Judgement]:
    """Everything that is judged, the main budget first."""
    settings: dict[str, DefenceConfig] = {}
    for entry in config.entries():
        chosen: Parameters | None = searched[entry.name]["chosen"]
        if chosen is not None:
            settings[entry.name] = config.settings_of(entry, chosen)
    budgets = sorted(config.budgets, key=lambda budget: (budget != config.main_budget, budget))
    return [
        Judgement(entry, one, budget, part, spec.digest, config.seed + 1 + spec.seed)
        for budget in budgets
        for entry, one in settings.items()
        for part, specs in config.judged(budget).items()
        for spec in specs
    ]
