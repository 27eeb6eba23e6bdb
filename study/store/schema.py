"""The types of what crosses from actor to driver to folder to page, and how older folders are read.

Records are plain dicts of JSON types, so that what is sent, written and read is one thing; these types
say what is in them. Whoever reads a folder gets records of today's schema: `trial_record`,
`confirm_record` and `study_summary` check what a file holds and bring what was written under an earlier
schema up to date.

Schema 2 has the number `schema` in every record, and a summary always has `selection` and `aggregate`.
Schema 1 is every folder without that number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from bimask.metrics import Split
from study.spec.config import StudyError
from study.spec.directions import Direction
from study.spec.objectives import Spread
from study.spec.space import Scalar

SCHEMA: Final = 2


class NewerSchemaError(StudyError):
    """A later version wrote it: it is whole, but not for this version to read."""


Role = Literal["tuning", "held_out", "control"]
Configuration = Literal["chosen", "paper_defaults"]
TrialStatus = Literal["COMPLETE", "PRUNED", "FAILED"]
Parameters = dict[str, Scalar]
OF_COMPLETE = ("scores", "seconds", "rounds", "passes")  # what every complete trial leaves
OPEN = ConfigDict(extra="allow")  # what a later version adds is kept


@with_config(OPEN)
class VictimScores(TypedDict, total=False):
    """What one model scores on one split, shares in [0, 1]; of several runs the mean.

    Beside these stands what a defence says of itself and what a probe says, each under its own name.
    """

    clean_accuracy: float
    attack_success: float
    recovery: float
    n_clean: int
    n_triggered: int
    split: Split
    pruned_share: float
    accuracy_drop: float
    risk: float
    arr: float
    rdr: float
    der: float
    rir: float


class Passes(TypedDict):
    """Forward and backward passes of a trial, one a batch."""

    forward: int
    backward: int


@with_config(OPEN)
class Outcome(TypedDict, total=False):
    """What a trial leaves: the quantities over all victims, and what they are made of.

    Attributes:
        scores: victim -> its scores on `val`, the mean over its runs.
        runs: run -> the same, where a victim had several.
        spread: quantity -> its spread over the repeats.
        rungs: place where the trial was looked at -> its losses there.
        seconds: of the trial; in a group an even share of its wall time.
        rounds: steps of the defence over all runs.
    """

    clean_accuracy: float
    attack_success: float
    recovery: float
    pruned_share: float
    accuracy_drop: float
    risk: float
    scores: dict[str, VictimScores]
    runs: dict[str, VictimScores]
    spread: dict[str, Spread]
    rungs: dict[str, list[float]]
    seconds: float
    rounds: int
    passes: Passes
    device: str
    stopped: str


class MemberReport(Outcome):
    """What an actor reports of one trial at its end: its outcome, or why it failed.

    Attributes:
        environment: the reason is no fault of the trial's, which has not ended.
    """

    number: int
    reason: NotRequired[str]
    traceback: NotRequired[str]
    environment: NotRequired[bool]


class FinalReport(TypedDict):
    """An actor's last report: of every trial of its group."""

    final: Literal[True]
    members: list[MemberReport]


class Trouble(TypedDict):
    """What an actor says while it waits for its environment, or goes on."""

    trouble: str


class Member(TypedDict):
    """A trial as it goes out to an actor."""

    number: int
    preset: str | None
    parameters: Parameters


class Group(TypedDict):
    """What an actor is given: trials that run at once, what they are held against, the seconds they
    have together, and where their checkpoints go (`copies`: a bucket that has them too)."""

    members: list[Member]
    limit: NotRequired[float]
    rivals: NotRequired[Bounds]
    checkpoint: NotRequired[str]
    copies: NotRequired[str]


class Bounds(TypedDict):
    """`study.trial.history.StoppingBounds` on its way to an actor."""

    front: list[list[float]]
    lines: dict[str, list[list[float]]]


@with_config(OPEN)
class StepReport(TypedDict):
    """Scores of one victim on `val` while a trial runs: a line of reports.jsonl."""

    number: int
    victim: str
    step: int
    clean_accuracy: NotRequired[float]
    attack_success: NotRequired[float]
    recovery: NotRequired[float]


@with_config(OPEN)
class RoundRow(TypedDict):
    """One step of a run: its number from 0, its loss by terms, their sum, its stage if it has one."""

    step: int
    losses: dict[str, float]
    loss: float
    stage: NotRequired[str]


@with_config(OPEN)
class Provenance(TypedDict):
    """Where a record comes from: digests of study and victims, seed, commit, versions."""

    study: str
    victims: dict[str, str]
    seed: int
    commit: str
    versions: dict[str, str]


@with_config(OPEN)
class TrialRecord(Outcome):
    """A trial that has ended: a line of trials.jsonl.

    Attributes:
        ended: seconds since 1970; 0 where the first versions did not write it down.
        files: of a COMPLETE trial, name -> first 16 hex digits of the SHA-256 of each file in its
            folder, but for pictures.
    """

    schema: int
    number: int
    status: TrialStatus
    reason: str | None
    preset: str | None
    parameters: Parameters
    ended: float
    provenance: Provenance
    files: NotRequired[dict[str, str]]


@with_config(OPEN)
class ConfirmRecord(TypedDict):
    """One purification of the confirmation: a line of confirm.jsonl; without `test` it has a reason."""

    schema: int
    configuration: Configuration
    victim: str
    role: Role
    seed: int
    test: NotRequired[VictimScores]
    accuracy_drop: NotRequired[float]
    seconds: NotRequired[float]
    reason: NotRequired[str]


@with_config(OPEN)
class Spreads(TypedDict):
    """Scores over the runs of a confirmation, and how many runs failed."""

    clean_accuracy: NotRequired[Spread]
    attack_success: NotRequired[Spread]
    recovery: NotRequired[Spread]
    accuracy_drop: NotRequired[Spread]
    n_failed: int


@with_config(OPEN)
class VictimSpreads(Spreads):
    """The same of one victim, with its own scores on `test`."""

    role: Role
    digest: str
    before: NotRequired[VictimScores]


@with_config(OPEN)
class Confirmation(TypedDict):
    """What one configuration is worth on every victim and every role, on `test`."""

    victims: dict[str, VictimSpreads]
    roles: dict[str, Spreads]


@with_config(OPEN)
class Point(TypedDict):
    """A trial in a summary: its settings, and scores, objectives and risk on `val`."""

    number: int
    parameters: Parameters
    val: dict[str, float]
    risk: NotRequired[float | None]
    objectives: dict[str, float]


@with_config(OPEN)
class Measured(Point):
    """A trial with its scores on `test`: over all victims, and of each."""

    test: dict[str, float]
    victims: dict[str, VictimScores]


class RankCorrelation(TypedDict):
    """Spearman's rho of risk and attack success over n trials, with its p-value."""

    rho: float
    p: float
    n: int


@with_config(OPEN)
class Selection(TypedDict):
    """The oracle's choice and the blind one, see `study.analysis.blind.compare`."""

    used: Literal["oracle", "blind"]
    oracle: Measured | None
    blind: Measured | None
    regret: dict[Split, float] | None
    spearman: RankCorrelation | None


@with_config(OPEN)
class VictimBefore(TypedDict):
    """A victim as it was: its digest and its own scores."""

    digest: str
    val: VictimScores
    test: VictimScores


Unseen = TypedDict(
    "Unseen",
    {
        "without": dict[str, float] | None,
        "with": dict[str, float] | None,
        "loss": dict[str, float] | None,
    },
)
"""A row of the leave-one-out table: the choice without the attack, that with it, what was lost."""


class LeaveOneOut(TypedDict):
    """What a choice loses on an attack that it never saw, by attack."""

    exact: bool
    scored_on: str
    attacks: dict[str, Unseen]


class Seconds(TypedDict):
    """Where a study's seconds went: in trials, in what is around them, and in all."""

    in_trials: float
    harness: float
    total: NotRequired[float]


@with_config(OPEN)
class StudySummary(TypedDict):
    """What a study comes to: summary.json."""

    schema: int
    name: str
    n_trials: int
    n_complete: int
    n_pruned: int
    n_failed: int
    n_feasible: NotRequired[int]
    objectives: dict[str, Direction]
    aggregate: dict[str, str | float]
    hypervolume: float
    reference_point: dict[str, float]
    front: list[Point]
    selection: Selection
    chosen: Measured | None
    paper_defaults: Measured | None
    victims: dict[str, VictimBefore]
    min_clean_accuracy: float
    leave_one_out: NotRequired[LeaveOneOut]
    seconds: NotRequired[Seconds]
    suite: NotRequired[dict[str, Confirmation]]


Row = TypeVar("Row", TrialRecord, StepReport, ConfirmRecord, StudySummary, list[RoundRow])
TRIAL, REPORT = TypeAdapter(TrialRecord), TypeAdapter(StepReport)
ROUNDS = TypeAdapter(list[RoundRow])
CONFIRMED, SUMMARY = TypeAdapter(ConfirmRecord), TypeAdapter(StudySummary)


def trial_record(found: Mapping[str, object]) -> TrialRecord:
    """A line of trials.jsonl, of whatever schema."""
    record = _checked(TRIAL, {"reason": None, "preset": None, "ended": 0.0}, found)
    if record["status"] == "COMPLETE":
        for name in OF_COMPLETE:
            if name not in record:
                raise StudyError(f"{name}: a complete trial has it, and this record has not")
    return record


def step_report(found: Mapping[str, object]) -> StepReport:
    """A line of reports.jsonl; it has no number of a schema."""
    return _valid(REPORT, found)


def round_rows(found: object) -> list[RoundRow]:
    """The content of NAME.rounds.json; it has no number of a schema."""
    return _valid(ROUNDS, found)


def confirm_record(found: Mapping[str, object]) -> ConfirmRecord:
    """A line of confirm.jsonl, of whatever schema."""
    return _checked(CONFIRMED, {}, found)


def study_summary(found: Mapping[str, object]) -> StudySummary:
    """The content of summary.json, of whatever schema."""
    chosen = found.get("chosen") if isinstance(found, dict) else None
    selection = {"used": "oracle", "oracle": chosen, "blind": None, "regret": None, "spearman": None}
    lacking = {"n_pruned": 0, "aggregate": {}, "paper_defaults": None, "selection": selection}
    return _checked(SUMMARY, lacking, found)


def _checked(adapter: TypeAdapter[Row], lacking: Mapping[str, object], found: object) -> Row:
    """What a file holds as a record of today.

    Args:
        lacking: what records of schema 1 may be without.

    Raises:
        StudyError: it is none.
        NewerSchemaError: a later version wrote it.
    """
    if not isinstance(found, dict):
        raise StudyError(f"it is {type(found).__name__}, and a record is an object of JSON")
    schema = found.get("schema", 1)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise NewerSchemaError(
            f"its schema is {schema!r}, and this version reads up to {SCHEMA}; use the version that "
            "wrote it"
        )
    today = (dict(lacking) if schema < SCHEMA else {}) | found | {"schema": SCHEMA}
    return _valid(adapter, today)


def _valid(adapter: TypeAdapter[Row], found: object) -> Row:
    try:
        return adapter.validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StudyError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
