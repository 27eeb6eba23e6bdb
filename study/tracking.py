"""MLflow: one parent run a study, one nested run a trial. The only file that imports mlflow.

One writer, the driver, and few calls: a trial costs one batch of parameters, one or two of metrics
and its artifacts. The schema of a SQLite store is made here, before any other process can touch it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

from study.config import StudyError

EXPERIMENT = "bimask"
TrialStatus = Literal["COMPLETE", "PRUNED", "FAILED"]
RUN_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAILED": "FAILED"}
BATCH = 1000  # metrics in one request, MLflow's own limit


class Tracker:
    """The runs of one study.

    Args:
        uri: of the store, see `tracking_uri`.
        artifacts: folder for the artifacts of an experiment that is new in a SQLite store.

    Raises:
        StudyError: a store that cannot be opened.
    """

    def __init__(self, uri: str, artifacts: Path) -> None:
        self.uri = uri
        location = artifacts.resolve().as_uri() if uri.startswith("sqlite:") else None
        try:
            self.client = MlflowClient(self.uri)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self.client.get_experiment_by_name(name)
            if found is not None and found.lifecycle_stage != "active":
                raise ValueError(f"its experiment {name!r} is deleted; set MLFLOW_EXPERIMENT_NAME")
            self.experiment_id = (
                found.experiment_id
                if found is not None
                else self.client.create_experiment(name, artifact_location=location)
            )
        except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
            raise StudyError(
                f"The MLflow store {redacted(self.uri)} cannot be opened ({_first_line(error)}); mend "
                "MLFLOW_TRACKING_URI, or unset it to use a SQLite file beside the outputs."
            ) from error
        self.parent_id = ""
        self.runs: dict[int, str] = {}

    def start_study(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the parent run."""
        run = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
        self.parent_id = run.info.run_id
        self._log(self.parent_id, params=params)

    def log_folder(self, folder: Path) -> None:
        """Log a folder's files to the parent run, in a folder of the same name."""
        self.client.log_artifacts(self.parent_id, str(folder), folder.name)

    def start_trial(self, number: int, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the nested run of a trial."""
        run = self.client.create_run(
            self.experiment_id,
            tags={
                MLFLOW_PARENT_RUN_ID: self.parent_id,
                MLFLOW_RUN_NAME: f"trial-{number:03d}",
                "trial": str(number),
                **tags,
            },
        )
        self.runs[number] = run.info.run_id
        self._log(run.info.run_id, params=params)

    def end_trial(
        self,
        number: int,
        *,
        metrics: Mapping[str, float] | None = None,
        histories: Mapping[str, list[tuple[int, float]]] | None = None,
        artifacts: Path | None = None,
        reason: str | None = None,
        status: TrialStatus | None = None,
    ) -> None:
        """Write what a trial ended with and close its run.

        Args:
            status: of the trial, COMPLETE, or FAILED where there is a reason; a tag says it as well,
                since MLflow knows no PRUNED and calls such a run KILLED.
            metrics: final values.
            histories: metric -> (step, value) pairs.
            artifacts: a folder whose files are all logged.
        """
        run_id = self.runs[number]
        status = status or ("COMPLETE" if reason is None else "FAILED")
        try:
            self._log(run_id, metrics=metrics, histories=histories)
            if artifacts is not None:
                self.client.log_artifacts(run_id, str(artifacts))
            if reason is not None:
                self.client.set_tag(run_id, "reason", reason[:5000])
            self.client.set_tag(run_id, "status", status)
        finally:
            self.client.set_terminated(run_id, RUN_STATUS[status])

    def end_study(
        self, *, metrics: Mapping[str, float], artifacts: list[Path], failed: bool = False
    ) -> None:
        """Write the study's summary to the parent run and close it."""
        try:
            self._log(self.parent_id, metrics=metrics)
            for path in artifacts:
                self.client.log_artifact(self.parent_id, str(path))
        finally:
            self.close_open_trials("the study ended before the trial did")
            self.client.set_terminated(self.parent_id, "FAILED" if failed else "FINISHED")

    def describe(self, text: str) -> None:
        """What the UI shows at the top of the study's run, Markdown."""
        self.client.set_tag(self.parent_id, MLFLOW_RUN_NOTE, text)

    def mark_front(self, numbers: Iterable[int], chosen: int | None) -> None:
        """Tag the trials of the front, and the chosen one, so that the UI's search finds them."""
        for number in numbers:
            self.client.set_tag(self.runs[number], "pareto", "front")
        if chosen is not None:
            self.client.set_tag(self.runs[chosen], "chosen", "yes")

    def abort(self, reason: str) -> None:
        """End the study and every open trial as FAILED, also when the end came unexpected."""
        self.close_open_trials(reason)
        self.client.set_tag(self.parent_id, "reason", reason)
        self.client.set_terminated(self.parent_id, "FAILED")

    def close_open_trials(self, reason: str) -> None:
        """End every nested run that is still RUNNING, so that none stays so for ever."""
        for run_id in self.runs.values():
            if self.client.get_run(run_id).info.status == "RUNNING":
                self.client.set_tag(run_id, "reason", reason)
                self.client.set_terminated(run_id, "FAILED")

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        histories: Mapping[str, list[tuple[int, float]]] | None = None,
    ) -> None:
        now = int(time.time() * 1000)
        rows = [Metric(name, value, now, 0) for name, value in (metrics or {}).items()]
        for name, pairs in (histories or {}).items():
            rows += [Metric(name, value, now, step) for step, value in pairs]
        entries = [Param(name, _text(value)) for name, value in (params or {}).items()]
        self.client.log_batch(run_id, metrics=rows[:BATCH], params=entries)
        for start in range(BATCH, len(rows), BATCH):
            self.client.log_batch(run_id, metrics=rows[start : start + BATCH])

    def ui_command(self) -> str:
        """What a user types to look at the runs."""
        if self.uri.startswith(("http://", "https://")):
            return f"open {redacted(self.uri)}"
        return f"mlflow ui --backend-store-uri {redacted(self.uri)}"


def log_to_study(uri: str, name: str, digest: str, path: Path) -> bool:
    """Log a file to the parent run of a study that has ended; False where the store has no such run.

    Args:
        digest: of the study, since a store may hold studies of one name from several places.

    Raises:
        StudyError: the store cannot be asked.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return False  # MLflow would make one
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))
        query = f"run_name = '{name}' and tags.study_digest = '{digest}'"
        runs = client.search_runs([found.experiment_id], query) if found is not None else []
        if not runs:
            return False
        client.log_artifact(runs[0].info.run_id, str(path))
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        raise StudyError(
            f"The MLflow store {redacted(uri)} does not take {path.name} ({_first_line(error)})."
        ) from error
    return True


def tracking_uri(outputs: Path) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in `outputs`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(outputs / 'mlflow.db').resolve()}"


def redacted(uri: str) -> str:
    """The URI without user and password."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def require_server(uri: str) -> None:
    """Ask an HTTP server for a sign of life: MLflow itself would retry for minutes.

    Raises:
        StudyError: it does not answer.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        parts = urlsplit(uri)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise StudyError(
            f"The MLflow server {redacted(uri)} does not answer ({error}); start it "
            "or unset MLFLOW_TRACKING_URI to use a SQLite file beside the outputs."
        ) from error


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
