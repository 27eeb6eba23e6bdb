"""A trial that may be promoted: its settings, its evidence on `test`, and how to gather more of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bimask.defences.base import Defence
from bimask.defences.settings import DefenceConfig
from bimask.errors import BimaskError
from bimask.progress import Console, ToldProgress
from bimask.tasks import defence_of
from bimask.victims import Victim
from study.promotion.evidence import CONFIRMED, TestEvidence, Verdict, evidence_of, judge
from study.spec.config import StudyConfig, StudyError
from study.spec.keys import Confirm
from study.spec.reading import load_config
from study.store import records
from study.store.files import write_text
from study.store.mending import fault_of
from study.store.provenance import commit
from study.trial.suite import confirm, confirmation, jobs_of


@dataclass(frozen=True)
class Candidate:
    """One trial of a finished study.

    Attributes:
        folder: of the study.
        number: of the trial.
        settings: of the defence.
        commits: of the sources that measured the evidence, of those that the trial ran with, and of
            those here.
        evidence: scores on `test`; None where there are only those on `val`.
    """

    config: StudyConfig
    folder: Path
    number: int
    settings: DefenceConfig
    commits: tuple[str, str, str]
    evidence: TestEvidence | None

    @property
    def defence(self) -> Defence[Any]:
        """The defence whose settings these are."""
        return defence_of(self.settings)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the study's and the trial's settings: what is registered once."""
        deciding = [self.config.digest, self.settings.model_dump(mode="json"), self.config.seed]
        if self.config.defenders.several:
            deciding.append(self.defence.name)
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def read_candidate(name: str, outputs: Path, trial: int | None) -> Candidate:
    """A study's chosen trial, or another COMPLETE one.

    Raises:
        StudyError: no such study, unfinished or older than what is needed; no such trial, or one whose
            files are not those that it left.
    """
    folder = outputs / name
    records.load(name, outputs)  # says if there is no such study
    config = load_config(folder / records.STUDY)
    if config.suspect is not None:
        raise StudyError(
            f"The study {name!r} is of a suspect, whose attack success nobody can measure, so no "
            f"gate can be judged; use its {records.BEST} with `python -m bimask purify`."
        )
    summary = records.read_summary(folder)
    if trial is None:
        if summary["chosen"] is None:
            raise StudyError(f"The study {name!r} chose no trial; give one with --trial, or run more.")
        trial = summary["chosen"]["number"]
    known = {row["number"]: row for row in records.read_trials(folder)}
    if (record := known.get(trial)) is None or record["status"] != "COMPLETE":
        raise StudyError(f"The study {name!r} has no COMPLETE trial {trial}.")
    if fault := fault_of(folder / "trials" / f"{trial:03d}", record):
        raise StudyError(
            f"Trial {trial} of {name!r} cannot be promoted: {fault}; run it again with `python -m "
            f"study.launch {' '.join(config.resuming)}`."
        )
    settings = config.defence_config(record["parameters"])
    evidence = evidence_of(folder, summary, trial, config.task)
    measured = evidence.commit if evidence is not None else None
    ran = record["provenance"]["commit"]
    commits = (measured or ran, ran, commit())
    return Candidate(config, folder, trial, settings, commits, evidence)


def verdicts_of(candidate: Candidate) -> list[Verdict]:
    """All gates of the study, and the sources' state.

    Raises:
        StudyError: the study has no gates.
    """
    if candidate.config.gates is None:
        raise StudyError(
            f"The study has no gates; add `gates:` to {candidate.folder / records.STUDY}, such as "
            "`gates: {accuracy_drop: 0.03, attack_success: 0.05}` (they decide no result)."
        )
    study = candidate.folder.name
    command = f"run `python -m study.promote {study} --trial {candidate.number} --confirm`"
    places = ("evidence", "trial", "here")
    dirty = [where for where, c in zip(places, candidate.commits, strict=True) if _dirty(c)]
    remark = f"uncommitted changes ({', '.join(dirty)}): commit, and measure again" if dirty else ""
    tree = Verdict(
        "sources", " / ".join(dict.fromkeys(candidate.commits)), "committed", not dirty, remark
    )
    return [*judge(candidate.config.gates, candidate.evidence, command), tree]


def _dirty(one: str) -> bool:
    return one.endswith("-dirty")


def confirm_trial(candidate: Candidate, victims: dict[str, Victim], console: Console) -> None:
    """Purify every victim of the study with several seeds, scored on `test`, and keep the scores."""
    config = candidate.config
    asked = config.confirmation or Confirm()
    config = config.model_copy(update={"confirm": asked})
    jobs = jobs_of(config, {"chosen": candidate.settings})
    rows = []
    with ToldProgress(console) as progress:
        task = progress.add_task(f"confirming on {len(victims)} victims", total=len(jobs))
        for job in jobs:
            try:
                rows.append(confirm(job, victims[job.victim], config))
            except BimaskError as error:
                rows.append(job.failed(str(error)))
            progress.update(task, advance=1)
    found = confirmation(rows, victims)
    assert found is not None
    place = candidate.folder / CONFIRMED
    place.mkdir(exist_ok=True)
    content = found["chosen"] | {"commit": commit(), "runs": rows}
    write_text(place / f"{candidate.number:03d}.json", json.dumps(content, indent=2) + "\n")


def load_victims(config: StudyConfig, outputs: Path) -> dict[str, Victim]:
    """Every victim of the study's suite, from where the study left them."""
    folders = [spec.place(outputs / "victims") for spec in config.suite]
    return {
        name: config.task.open_victim(folder)
        for name, folder in zip(config.suite_names(), folders, strict=True)
    }
