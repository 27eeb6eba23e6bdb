"""The events of trials become records in the study's folder, files, and runs in MLflow."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from study.spec.config import StudyConfig, StudyError
from study.spec.directions import DIRECTIONS, SCORES
from study.spec.objectives import known_scores, numbers_in
from study.store.files import append_lines, replaced_folder, write_text
from study.store.mending import digests_of
from study.store.provenance import commit, versions
from study.store.records import (
    REPORTS,
    SETTINGS,
    TRIALS,
    read_reports,
    read_rounds,
    read_trials,
    settings_content,
    write_yaml,
)
from study.store.schema import (
    SCHEMA,
    Member,
    MemberReport,
    Outcome,
    Parameters,
    StepReport,
    TrialRecord,
    TrialStatus,
)
from study.tracking.mlflow_runs import Tracker
from study.tracking.queue import MlflowQueue

# What a trial leaves beside its objectives, as far as there is any.
RESULTS = ("scores", "runs", "spread", "rungs", "seconds", "rounds", "passes", "device")
REPORTED = ("number", "victim", "step", *SCORES)
KINDS: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")


@dataclass(frozen=True)
class OpenTrial:
    """A trial that runs.

    Attributes:
        group: how many trials share its actor, itself included.
        started: seconds since 1970.
    """

    member: Member
    group: int
    started: float


def _part(result: MemberReport, names: Iterable[str]) -> Outcome:
    found: Mapping[str, object] = result
    return cast(Outcome, {name: found[name] for name in names if name in found})


class Recorder:
    """Turns the events of trials into records, files and MLflow runs.

    Records that the folder holds already are read; their trials have ended.

    Args:
        config: the study.
        folder: its folder, which exists.
        tracker: what tells MLflow: a `MlflowQueue`, or an open `Tracker`.
        victims: victim name -> digest.
        on_change: called with all finished records whenever there is one more.

    Attributes:
        records: of all trials that have ended.
        open: number -> what is known of a trial that runs.
        unwritten: records that wait for `write`, or for room on the disk.
    """

    def __init__(
        self,
        config: StudyConfig,
        folder: Path,
        tracker: Tracker | MlflowQueue,
        victims: dict[str, str],
        on_change: Callable[[list[TrialRecord]], None],
    ) -> None:
        self.config, self.folder, self.tracker = config, folder, tracker
        self.victims = victims
        self.on_change = on_change
        self.records = read_trials(folder)
        self.unwritten: list[TrialRecord] = []
        self.open: dict[int, OpenTrial] = {}
        self.histories: dict[int, dict[str, dict[int, float]]] = {}
        for report in read_reports(folder):
            self._remember(report)
        (folder / TRIALS).touch()

    def knows(self, number: int) -> bool:
        """Whether the trial has begun, or has ended already."""
        return number in self.open or any(r["number"] == number for r in self.records)

    def started(
        self, number: int, preset: str | None, parameters: Parameters, *, group: int = 1
    ) -> None:
        """A trial has begun, or goes on: its run is opened in MLflow.

        Args:
            group: how many trials share its actor, itself included.
        """
        trial: Member = {"number": number, "preset": preset, "parameters": parameters}
        self.open[number] = OpenTrial(trial, group, time.time())
        self._show_start(trial)

    def _show_start(self, trial: Member | TrialRecord) -> None:
        preset = trial["preset"]
        settings = self.config.defence_config(trial["parameters"])
        tags = {"preset": preset or "search", "study": self.config.name, "commit": commit()}
        tags |= {"study_digest": self.config.digest, "seed": str(self.config.seed)}
        tags["defence"] = self.config.defenders.name_of(trial["parameters"])
        tags |= {f"victim.{name}": digest for name, digest in self.victims.items()}
        if warnings := settings.warnings():
            tags["warning"] = " ".join(warnings)
        # what differs between trials: with constants in, the UI's parallel coordinates drown in them
        parameters = self.config.defenders.parameters(tags["defence"], settings.model_dump())
        searched = [
            name
            for name in self.config.space
            if name in trial["parameters"] or (preset and name in parameters)
        ]
        params = {name: parameters[name] for name in searched}
        self.tracker.start_trial(trial["number"], params, tags)

    def reported(self, result: StepReport) -> None:
        """An intermediate report: scores of one victim on val after some rounds."""
        found: Mapping[str, object] = result
        report = cast(StepReport, {key: found[key] for key in REPORTED if key in found})
        self._remember(report)
        with suppress(OSError):  # a point of a curve is worth no trial
            append_lines(self.folder / REPORTS, [report], durable=False)

    def _remember(self, report: StepReport) -> None:
        history = self.histories.setdefault(report["number"], {})
        for name, value in known_scores(report).items():
            points = history.setdefault(f"{report['victim']}/{name}", {})
            points[report["step"]] = value  # a trial that went on from a checkpoint reports some again

    def completed(self, number: int, result: MemberReport, artifacts: Path) -> None:
        """A trial has ended with finite objectives; its files are on the disk when this returns.

        Raises:
            OSError: they cannot be kept now. The trial is still open, and this may be called again.
        """
        with replaced_folder(kept := self._kept(number)) as part:
            shutil.copytree(artifacts, part, dirs_exist_ok=True)
            self._write_settings(part, number)
        outcome, files = _part(result, (*DIRECTIONS, *RESULTS)), digests_of(kept)
        self._end(self.open.pop(number), "COMPLETE", None, outcome, files)

    def _write_settings(self, kept: Path, number: int) -> None:
        write_yaml(
            kept / SETTINGS,
            settings_content(self.config, self.open[number].member["parameters"]),
            f"trial {number} of study {self.config.name}, every setting",
        )

    def pruned(self, number: int, result: MemberReport) -> None:
        """A trial was stopped early: it keeps the scores that it had, and has no objectives."""
        self._end(self.open.pop(number), "PRUNED", result["stopped"], _part(result, RESULTS))

    def failed(self, number: int, reason: str, *, details: str | None = None) -> None:
        """A trial has ended without a result; one that has ended before stays as it is.

        Args:
            details: goes into its folder as error.txt.
        """
        if number not in self.open:
            return
        if details is not None:
            with suppress(OSError), replaced_folder(self._kept(number)) as part:
                write_text(part / "error.txt", details)  # a full disk is said elsewhere
        trial = self.open.pop(number)
        seconds = (time.time() - trial.started) / trial.group
        self._end(trial, "FAILED", reason, {"seconds": seconds})

    def _end(
        self,
        trial: OpenTrial,
        status: TrialStatus,
        reason: str | None,
        result: Outcome,
        files: dict[str, str] | None = None,
    ) -> None:
        record: TrialRecord = {
            "schema": SCHEMA,
            "number": trial.member["number"],
            "status": status,
            "reason": reason,
            "preset": trial.member["preset"],
            "parameters": trial.member["parameters"],
            **result,  # type: ignore[typeddict-item]
            "ended": time.time(),
            "provenance": {
                "study": self.config.digest,
                "victims": self.victims,
                "seed": self.config.seed,
                "commit": commit(),
                "versions": versions(),
            },
        }
        if files is not None:
            record["files"] = files
        self.unwritten.append(record)

    def write(self) -> list[TrialRecord]:
        """Put the records of trials that have ended on the disk, all at once, and show them in MLflow.

        Returns:
            Those records.

        Raises:
            OSError: the disk does not take them now. They wait for the next call.
        """
        if not self.unwritten:
            return []
        append_lines(self.folder / TRIALS, self.unwritten)
        written, self.unwritten = self.unwritten, []
        self.records += written
        for record in written:
            with suppress(OSError):  # the record stands; `--resume` tells MLflow what it lacks
                self._show_end(record)
        self.on_change(self.records)
        return written

    def show_again(self, shown: Collection[int]) -> None:
        """Tell MLflow of all trials that have ended, but those it has whole (`shown`)."""
        for record in self.records:
            if record["number"] not in shown:
                self._show_start(record)
                self._show_end(record)

    def _show_end(self, record: TrialRecord) -> None:
        number, at = record["number"], record["ended"]
        curves = {name: sorted(p.items()) for name, p in self.histories.get(number, {}).items()}
        if record["status"] != "COMPLETE":
            self.tracker.end_trial(
                number,
                at=at,
                histories=curves,
                reason=record["reason"],
                pruned=record["status"] == "PRUNED",
            )
            return
        losses = _losses(self._kept(number))
        for victim, scores in record["scores"].items():
            last = len(losses.get(f"{victim}/loss/loss", []))
            for name, value in known_scores(scores).items():
                # the last point of the curve, and so what MLflow shows
                curves.setdefault(f"{victim}/{name}", []).append((last, value))
        metrics = numbers_in(record, (*DIRECTIONS, "rounds"))
        metrics |= {f"{name}_std": one["std"] for name, one in record.get("spread", {}).items()}
        metrics |= {f"passes_{kind}": record["passes"][kind] for kind in KINDS}
        self.tracker.end_trial(
            number, at=at, metrics=metrics, histories=curves | losses, artifacts=self._kept(number)
        )

    def _kept(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03d}"


def _losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss term -> (step, value) of every round, from the rounds a trial left."""
    histories: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("*.rounds.json")):
        victim = path.name.removesuffix(".rounds.json")
        with suppress(StudyError):  # a curve is worth no trial
            for log in read_rounds(path):
                for name, value in {"loss": log["loss"], **log["losses"]}.items():
                    histories.setdefault(f"{victim}/loss/{name}", []).append((log["step"], value))
    return histories
