"""What a study leaves in its folder, one record a trial, and how it is read back.

outputs/NAME/study.yaml      the study, resolved
outputs/NAME/trials.jsonl    one record a trial, written as it ends
outputs/NAME/trials/007/     masks, pictures, rounds and settings of trial 7
outputs/NAME/reports.jsonl   scores on val while trials run, some rounds a line
outputs/NAME/summary.json    front, chosen trial, scores, seconds
outputs/NAME/confirm.jsonl   one record a run of the confirmation, where there is one
outputs/NAME/best.yaml       the chosen configuration, as `bimask purify` takes it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from safetensors import SafetensorError

from bimask.defences.settings import DefenceConfig
from bimask.errors import BimaskError
from bimask.files.bounded import MALFORMED, dump_yaml, read_json
from bimask.tasks import CLASSIFICATION
from study.spec.config import StudyConfig, StudyError
from study.store import schema
from study.store.environment import first_line
from study.store.files import rows_of, write_text
from study.store.schema import (
    ConfirmRecord,
    Parameters,
    RoundRow,
    StepReport,
    StudySummary,
    TrialRecord,
)

OUTPUTS = Path("outputs")
RESERVED = ("victims", "mlartifacts", "mlflow.db")
STUDY, TRIALS, SUMMARY, BEST = "study.yaml", "trials.jsonl", "summary.json", "best.yaml"
REPORTS, CONFIRM = "reports.jsonl", "confirm.jsonl"
SETTINGS = "purify.yaml"  # in a trial's folder: every setting, as `bimask purify` takes it


def new_folder(
    outputs: Path, name: str, *, chosen_by_user: bool, reserved: Collection[str] = ()
) -> tuple[str, Path]:
    """A folder that does not exist yet, and the study's name in it; nothing is made.

    A name the user gave must be free; the YAML's own name gets a number where it is taken, by a folder
    or among those `reserved` by studies that have no folder yet.

    Raises:
        StudyError: the name is taken.
    """
    if name in RESERVED:
        raise StudyError(f"{name!r} is a name of the outputs folder's own; choose another --name.")
    if not (outputs / name).exists() and name not in reserved:
        return name, outputs / name
    if chosen_by_user:
        raise StudyError(
            f"A study {name!r} exists in {outputs}; choose another --name, or remove that folder."
        )
    number = 2
    while (outputs / f"{name}-{number}").exists() or f"{name}-{number}" in reserved:
        number += 1
    return f"{name}-{number}", outputs / f"{name}-{number}"


Record = TypeVar("Record")


def search_is_over(config: StudyConfig, trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no new trial is to begin: there are as many as asked for, or their time is spent."""
    spent = sum(trial.get("seconds", 0.0) for trial in trials)
    limit = config.search_seconds
    return len(trials) >= config.trials or (limit is not None and spent >= limit)


def read_trials(folder: Path) -> list[TrialRecord]:
    """The records of a study's trials, in the order in which they ended; none where there is no file.

    Raises:
        StudyError: a line that is no record; `study.store.mending.mend` takes such lines out.
    """
    return _records(folder / TRIALS, schema.trial_record)


def read_reports(folder: Path) -> list[StepReport]:
    """The scores on `val` while trials ran, as for `read_trials`."""
    return _records(folder / REPORTS, schema.step_report)


def read_confirmed(folder: Path) -> list[ConfirmRecord]:
    """The runs of a study's confirmation, as for `read_trials`."""
    return _records(folder / CONFIRM, schema.confirm_record)


def read_summary(folder: Path) -> StudySummary:
    """What a study came to.

    Raises:
        StudyError: it has not ended, or its file cannot be read.
    """
    try:
        return schema.study_summary(read_json(folder / SUMMARY))
    except (OSError, ValueError, StudyError) as error:
        raise StudyError(
            f"{folder / SUMMARY} cannot be read ({error}); let the study run to its end."
        ) from error


@contextmanager
def fitting_together(folder: Path) -> Iterator[None]:
    """Records that are each well formed may still contradict each other, where somebody made them up.

    Raises:
        StudyError: what was asked of them within could not be answered.
    """
    try:
        yield
    except BimaskError:
        raise
    except (*MALFORMED, RuntimeError, SafetensorError) as error:
        raise StudyError(
            f"The records in {folder} do not fit together ({type(error).__name__}: "
            f"{first_line(error)}); get the whole folder again."
        ) from error


def read_rounds(path: Path) -> list[RoundRow]:
    """The steps of one run, as a trial left them: NAME.rounds.json.

    Raises:
        StudyError: it cannot be read.
    """
    try:
        return schema.round_rows(read_json(path))
    except (OSError, ValueError, StudyError) as error:
        raise StudyError(f"{path} cannot be read ({error}).") from error


def _records(path: Path, checked: Callable[[Mapping[str, object]], Record]) -> list[Record]:
    found = []
    for line, row in enumerate(rows_of(path), start=1):
        try:
            found.append(checked(row))
        except StudyError as error:
            raise StudyError(f"{path}:{line} cannot be read: {error}.") from error
    return found


def settings_content(config: StudyConfig, parameters: Parameters) -> dict[str, object]:
    """A trial's settings as `bimask purify` takes them: of which defence, every one, and the seed."""
    name = config.defenders.name_of(parameters)
    return content_of(config, name, config.defence_config(parameters))


def content_of(config: StudyConfig, defence: str, settings: DefenceConfig) -> dict[str, object]:
    """The same of settings that are made."""
    task = {} if config.task is CLASSIFICATION else {"task": config.task.name}
    return {**task, "defence": defence, "purify": settings.model_dump(), "seed": config.seed}


def write_yaml(path: Path, content: Mapping[str, object], header: str) -> None:
    """YAML in the order of `content`, under a comment."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    write_text(path, comment + dump_yaml(content))


def load(name: str, outputs: Path | str = OUTPUTS) -> pd.DataFrame:
    """The trials of a study, one row a trial.

    Columns: number, status, reason, preset, clean_accuracy, attack_success and recovery (not of a
    suspect), risk, seconds (of a trial alone; in a group, an even share of it), then `parameters.NAME`,
    `scores.VICTIM.SCORE`, `passes.KIND` and `provenance.*`.

    Raises:
        StudyError: no study of that name.
    """
    path = Path(outputs) / name / TRIALS
    if not path.is_file():
        raise StudyError(f"There is no study {name!r} in {outputs}: {path} is missing.")
    told = [{k: v for k, v in one.items() if k != "files"} for one in read_trials(path.parent)]
    rows = pd.json_normalize(told)
    if rows.empty:  # it has begun, and no trial has ended
        return rows
    return rows.drop(columns="schema").sort_values("number", ignore_index=True)
