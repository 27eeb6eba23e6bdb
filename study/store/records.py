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

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from study.spec.config import StudyConfig, StudyError
from study.store.files import read_lines, write_text

OUTPUTS = Path("outputs")
RESERVED = ("victims", "mlartifacts", "mlflow.db")
STUDY, TRIALS, SUMMARY, BEST = "study.yaml", "trials.jsonl", "summary.json", "best.yaml"
REPORTS, CONFIRM = "reports.jsonl", "confirm.jsonl"
SETTINGS = "purify.yaml"  # in a trial's folder: every setting, as `bimask purify` takes it


def new_folder(outputs: Path, name: str, *, chosen_by_user: bool) -> tuple[str, Path]:
    """A folder that does not exist yet, and the study's name in it; nothing is made.

    A name the user gave must be free; the YAML's own name gets a number where it is taken.

    Raises:
        StudyError: the name is taken.
    """
    if name in RESERVED:
        raise StudyError(f"{name!r} is a name of the outputs folder's own; choose another --name.")
    if not (outputs / name).exists():
        return name, outputs / name
    if chosen_by_user:
        raise StudyError(
            f"A study {name!r} exists in {outputs}; choose another --name, or remove that folder."
        )
    number = 2
    while (outputs / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}", outputs / f"{name}-{number}"


def settings_content(config: StudyConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """A trial's settings as `bimask purify` takes them: of which defence, every one, and the seed."""
    settings = config.defence_config(parameters).model_dump()
    return {"defence": config.defence, "purify": settings, "seed": config.seed}


def write_yaml(path: Path, content: dict[str, Any], header: str) -> None:
    """YAML in the order of `content`, under a comment."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    write_text(path, comment + yaml.safe_dump(content, sort_keys=False))


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
    return pd.json_normalize(read_lines(path)).sort_values("number", ignore_index=True)
