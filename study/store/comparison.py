"""What a comparison leaves in its folder, and how it is read back.

outputs/NAME/comparison.yaml   the comparison, resolved
outputs/NAME/judged.jsonl      one record a run of a choice on a victim that no trial saw
outputs/NAME/comparison.json   the tables
outputs/NAME/comparison.csv    the same, one row a defence, budget and part
outputs/NAME/comparison.html   the page
outputs/NAME.DEFENCE           the study that tuned a defence
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from bimask.files.atomic import atomic_directory
from study.spec.comparison import RUNNING, ComparisonConfig, Part, load_comparison
from study.spec.config import StudyError
from study.store.files import begun_folder, rows_of, write_text
from study.store.records import write_yaml
from study.store.schema import OPEN, VictimScores

COMPARISON, JUDGED, ID = "comparison.yaml", "judged.jsonl", "comparison_id"
TABLES, CSV, PAGE = "comparison.json", "comparison.csv", "comparison.html"


@with_config(OPEN)
class JudgedRecord(TypedDict):
    """A choice on one victim with so many clean images a class: a line of judged.jsonl.

    Attributes:
        entry: the row of the comparison.
        victim: its digest; `attack` and `victim_seed` say what it is.
        before, test: the victim's and the defended model's scores; without `test` there is a reason.
        forward, backward: passes of a batch through the network.
        own: what the defence says of itself.
    """

    schema: int
    entry: str
    budget: int
    part: Part
    victim: str
    attack: str
    victim_seed: int
    seed: int
    before: VictimScores
    test: NotRequired[VictimScores]
    arr: NotRequired[float]
    rdr: NotRequired[float]
    der: NotRequired[float]
    seconds: NotRequired[float]
    forward: NotRequired[int]
    backward: NotRequired[int]
    own: NotRequired[dict[str, float]]
    reason: NotRequired[str]


RECORD = TypeAdapter(JudgedRecord)


def read_judged(folder: Path) -> list[JudgedRecord]:
    """The records of a comparison, as they were written.

    Raises:
        StudyError: a line that is no record.
    """
    return [judged_record(row) for row in rows_of(folder / JUDGED)]


def judged_record(row: Mapping[str, object]) -> JudgedRecord:
    """A line of judged.jsonl.

    Raises:
        StudyError: it is no record.
    """
    try:
        return RECORD.validate_python(row)
    except ValidationError as error:
        raise StudyError(f"it is no record ({error.errors()[0]['msg']})") from error


def begin(folder: Path, config: ComparisonConfig) -> None:
    """Make the comparison's folder, whole or not at all."""
    content = config.model_dump(mode="json")
    content["defences"] = config.names
    with atomic_directory(folder) as part:
        write_yaml(part / COMPARISON, content, f"comparison {config.name}, resolved")
        write_text(part / ID, uuid.uuid4().hex + "\n")


def comparison_id(folder: Path) -> str:
    """What tells this comparison from others of its name; of one without it, its folder's name."""
    try:
        return (folder / ID).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return folder.name


def reopen(
    outputs: Path, name: str, path: Path | None, overrides: Mapping[str, object]
) -> tuple[ComparisonConfig, Path]:
    """The comparison NAME and its folder, to be gone on with.

    Raises:
        StudyError: there is no such comparison, or it would be another one.
    """
    folder = begun_folder(outputs, "comparison", name, COMPARISON)
    begun = load_comparison(folder / COMPARISON)
    config = load_comparison(path or folder / COMPARISON, {**overrides, "name": name})
    if config.digest != begun.digest:
        raise StudyError(
            f"The comparison {name!r} was begun with other settings; only {', '.join(sorted(RUNNING))} "
            "may change. Start a new one under another --name."
        )
    return config, folder
