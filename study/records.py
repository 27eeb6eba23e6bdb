"""What a study leaves in its folder, one record a trial, and how it is read back.

outputs/NAME/study.yaml      the study, resolved
outputs/NAME/trials.jsonl    one record a trial, written as it ends
outputs/NAME/trials/007/     masks, pictures and rounds of trial 7
outputs/NAME/summary.json    front, chosen trial, scores, seconds
outputs/NAME/best.yaml       the chosen configuration, as `bimask purify` takes it
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from bimask.config import PurifyConfig
from study.config import StudyConfig, StudyError
from study.provenance import commit, versions
from study.trial import SCORES

if TYPE_CHECKING:
    from study.tracking import Tracker

OUTPUTS = Path("outputs")
RESERVED = ("victims", "mlartifacts", "mlflow.db")
STUDY, TRIALS, SUMMARY, BEST = "study.yaml", "trials.jsonl", "summary.json", "best.yaml"


class Recorder:
    """Turns the events of trials into records, files and MLflow runs.

    Args:
        config: the study.
        folder: its folder, which exists.
        tracker: an open study in MLflow.
        victims: victim name -> digest.
        on_change: called with all finished records whenever there is one more.
    """

    def __init__(
        self,
        config: StudyConfig,
        folder: Path,
        tracker: Tracker,
        victims: dict[str, str],
        on_change: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.config, self.folder, self.tracker = config, folder, tracker
        self.victims = victims
        self.on_change = on_change
        self.records: list[dict[str, Any]] = []
        self.open: dict[int, dict[str, Any]] = {}
        (folder / TRIALS).touch()

    def knows(self, number: int) -> bool:
        """Whether the trial has begun, or has ended already."""
        return number in self.open or any(r["number"] == number for r in self.records)

    def started(
        self, number: int, preset: str | None, parameters: dict[str, Any], *, group: int = 1
    ) -> None:
        """A trial has begun: its run is opened in MLflow.

        Args:
            group: how many trials share its actor, itself included.
        """
        settings = PurifyConfig() if preset else self.config.purify_config(parameters)
        self.open[number] = {
            "number": number,
            "preset": preset,
            "parameters": parameters,
            "purify": settings.model_dump(),
            "group": group,
            "started": time.time(),
            "history": {},
        }
        tags = {"preset": preset or "search", "study": self.config.name, "commit": commit()}
        tags |= {"study_digest": self.config.digest, "seed": str(self.config.seed)}
        tags |= {f"victim.{name}": digest for name, digest in self.victims.items()}
        if (warning := settings.unreachable_budget()) is not None:
            tags["warning"] = warning
        self.tracker.start_trial(number, settings.model_dump(), tags)

    def reported(self, number: int, result: dict[str, Any]) -> None:
        """An intermediate report: scores of one victim on val after some rounds.

        A trial that is run again reports the same steps again; they count once.
        """
        history = self.open[number]["history"]
        for name in SCORES:
            points = history.setdefault(f"{result['victim']}/{name}", [])
            if (point := (result["step"], result[name])) not in points:
                points.append(point)

    def completed(self, number: int, result: dict[str, Any], artifacts: Path) -> None:
        """A trial has ended with finite objectives."""
        kept = self.folder / "trials" / f"{number:03d}"
        shutil.copytree(artifacts, kept)
        trial = self.open.pop(number)
        metrics = {name: result[name] for name in (*SCORES, "seconds", "rounds")}
        losses = _losses(kept)
        rounds = {victim: len(losses[f"{victim}/loss/loss"]) for victim in result["scores"]}
        for victim, scores in result["scores"].items():
            for name in SCORES:  # the last point of the curve, and so what MLflow shows
                point = (rounds[victim], scores[name])
                trial["history"].setdefault(f"{victim}/{name}", []).append(point)
        metrics |= {f"passes_{kind}": count for kind, count in result["passes"].items()}
        keys = (*SCORES, "scores", "seconds", "rounds", "passes", "device")
        self._append(trial, "COMPLETE", None, {key: result[key] for key in keys})
        self.tracker.end_trial(
            number,
            metrics=metrics,
            histories=trial["history"] | losses,
            artifacts=kept,
        )

    def failed(self, number: int, reason: str, *, details: str | None = None) -> None:
        """A trial has ended without a result; one that has ended before stays as it is.

        Args:
            details: goes into its folder as error.txt.
        """
        if number not in self.open:
            return
        if details is not None:
            kept = self.folder / "trials" / f"{number:03d}"
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "error.txt").write_text(details)
        trial = self.open.pop(number)
        seconds = (time.time() - trial["started"]) / trial["group"]
        self._append(trial, "FAILED", reason, {"seconds": seconds})
        self.tracker.end_trial(number, histories=trial["history"], reason=reason)

    def _append(
        self, trial: dict[str, Any], status: str, reason: str | None, result: dict[str, Any]
    ) -> None:
        record = {
            "number": trial["number"],
            "status": status,
            "reason": reason,
            "preset": trial["preset"],
            "parameters": trial["parameters"],
            **result,
            "provenance": {
                "study": self.config.digest,
                "victims": self.victims,
                "seed": self.config.seed,
                "commit": commit(),
                "versions": versions(),
            },
        }
        self.records.append(record)
        with (self.folder / TRIALS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.on_change(self.records)


def _losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss term -> (step, value) of every round, from the rounds a trial left."""
    histories: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("*.rounds.json")):
        victim = path.name.removesuffix(".rounds.json")
        for log in json.loads(path.read_text()):
            for name, value in {"loss": log["loss"], **log["losses"]}.items():
                histories.setdefault(f"{victim}/loss/{name}", []).append((log["step"], value))
    return histories


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


def write_yaml(path: Path, content: dict[str, Any], header: str) -> None:
    """YAML in the order of `content`, under a comment."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    path.write_text(comment + yaml.safe_dump(content, sort_keys=False))


def load(name: str, outputs: Path | str = OUTPUTS) -> pd.DataFrame:
    """The trials of a study, one row a trial.

    Columns: number, status, reason, preset, clean_accuracy, attack_success, recovery, seconds (of a
    trial alone; in a group, an even share of the group's), then `parameters.NAME`,
    `scores.VICTIM.SCORE`, `passes.KIND` and `provenance.*`.

    Raises:
        StudyError: no study of that name.
    """
    path = Path(outputs) / name / TRIALS
    if not path.is_file():
        raise StudyError(f"There is no study {name!r} in {outputs}: {path} is missing.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return pd.json_normalize(rows).sort_values("number", ignore_index=True)
