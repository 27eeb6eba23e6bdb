"""MLflow: one parent run a study, one nested run a trial. The only file that imports mlflow.

One writer, the driver, and few calls: a trial costs one batch of parameters, one or two of metrics
and its artifacts. The schema of a SQLite store is made here, before any other process can touch it.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

from study.spec.config import StudyError
from study.store.databases import sqlite_path, sqlite_url
from study.tracking.client import Client, text_of
from study.tracking.credentials import move_credentials, redacted
from study.tracking.local_store import follow_move, held

logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what we say
EXPERIMENT, ARTIFACTS = "bimask", "mlartifacts"
# What MLflow's page asks an experiment for before it shows training runs and not a chat's traces.
KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
Status = Literal["FINISHED", "FAILED", "KILLED"]
RUN_STATUS: dict[str, Status] = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAILED": "FAILED"}
LOCAL_PAGE = "http://127.0.0.1:5000"  # where `mlflow ui` answers unless told otherwise
BATCH = 1000  # metrics in one request, MLflow's own limit


class Tracker:
    """The runs of one study.

    Args:
        uri: of the store, see `tracking_uri`.
        artifacts: folder for the artifacts of an experiment that is new in a SQLite store.

    Attributes:
        moved: that the store is elsewhere than it was, and what was done about it, or None.

    Raises:
        StudyError: a store that cannot be opened.
    """

    def __init__(self, uri: str, artifacts: Path) -> None:
        self.uri = uri
        location = artifacts.resolve().as_uri() if uri.startswith("sqlite:") else None
        try:
            with held(uri, make_tables):
                self.moved = follow_move(uri, artifacts)
                self.client = Client(self.uri)
                self.experiment_id = self._experiment(location)
        except Exception as error:  # alembic has errors of its own
            raise StudyError(
                f"The MLflow store {redacted(self.uri)} cannot be opened ({_first_line(error)}); mend "
                "MLFLOW_TRACKING_URI, or unset it to use a SQLite file beside the outputs."
            ) from error
        self.parent_id = ""
        self.runs: dict[int, str] = {}
        self.ended: set[int] = set()

    def _experiment(self, location: str | None) -> str:
        """The id of the experiment, which is made where there is none."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(
                    name, artifact_location=location, tags={KIND: TRAINING}
                )
            except MlflowException:  # another study made it in the meantime, through a server
                if (found := self.client.get_experiment_by_name(name)) is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ValueError(f"its experiment {name!r} is deleted; set MLFLOW_EXPERIMENT_NAME")
        if KIND not in found.tags:
            self.client.set_experiment_tag(found.experiment_id, KIND, TRAINING)
        return str(found.experiment_id)

    def start_study(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        *,
        scores: Sequence[str] = (),
        settings: Sequence[str] = (),
    ) -> None:
        """Open the parent run: the one with this tag `study_id` again, if there is one.

        Args:
            scores: metrics of a trial that `link` shows; sorted by the last, which is to be low.
            settings: parameters of a trial that `link` shows.
        """
        found = self._search(f"tags.study_id = '{tags['study_id']}'") if "study_id" in tags else []
        if found:
            self.parent_id = found[0].info.run_id
            self._open_again(self.parent_id)
            self.look()
        else:
            run = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
            self.parent_id = run.info.run_id
        self._log(self.parent_id, params=params)
        if scores:
            self._share_view(scores, settings)

    def _share_view(self, scores: Sequence[str], settings: Sequence[str]) -> None:
        """Keep a view of the trials for `link` to name, as the UI's own button *Share* does."""
        columns = [f"metrics.`{name}`" for name in scores] + [f"params.`{name}`" for name in settings]
        view = {
            "searchFilter": f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent_id}'",
            "orderByKey": columns[len(scores) - 1],
            "orderByAsc": True,
            "selectedColumns": columns,
        }
        self.client.set_experiment_tag(
            self.experiment_id, f"mlflow.sharedViewState.{self.parent_id}", json.dumps(view)
        )

    def has_whole(self, study_id: str, trials: int) -> bool:
        """Whether a study and all its trials have ended here."""
        found = self._search(f"tags.study_id = '{study_id}'")
        if not found or found[0].info.status not in ("FINISHED", "FAILED"):
            return False
        self.parent_id = found[0].info.run_id
        self.look()
        return len(self.ended) == trials

    def _search(self, query: str) -> list[Run]:
        """All runs that a query finds, the earliest first."""
        found: list[Run] = []
        token: str | None = None
        while token != "":
            page = self.client.search_runs(
                [self.experiment_id], query, order_by=["attributes.start_time"], page_token=token
            )
            found += page
            token = page.token or ""
        return found

    def look(self) -> None:
        """See which trials have runs: a call may have arrived though its answer did not.

        Of two runs of a trial the later is deleted.
        """
        self.runs, self.ended = {}, set()
        for run in self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent_id}'"):
            number = int(run.data.tags.get("trial", -1))
            if number in self.runs:
                self.client.delete_run(run.info.run_id)
                continue
            self.runs[number] = run.info.run_id
            pruned = run.data.tags.get("status") == "PRUNED" and run.info.status == "KILLED"
            if run.info.status in ("FINISHED", "FAILED") or pruned:
                self.ended.add(number)

    def log_folder(self, folder: Path) -> None:
        """Log a folder's files to the parent run, in a folder of the same name."""
        self.client.log_artifacts(self.parent_id, str(folder), folder.name)

    def start_trial(self, number: int, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the nested run of a trial, or open it again."""
        if number in self.runs:
            self._open_again(self.runs[number])
        else:
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
        self._log(self.runs[number], params=params)

    def _open_again(self, run_id: str) -> None:
        self.client.update_run(run_id, status="RUNNING")
        if "reason" in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, "reason")

    def end_trial(
        self,
        number: int,
        *,
        at: float | None = None,
        metrics: Mapping[str, float] | None = None,
        histories: Mapping[str, list[tuple[int, float]]] | None = None,
        artifacts: Path | None = None,
        reason: str | None = None,
        pruned: bool = False,
    ) -> None:
        """Write what a trial ended with and close its run: FAILED where there is a reason.

        MLflow knows no PRUNED: such a run is KILLED, and its tag `status` says PRUNED, as that of
        others says COMPLETE or FAILED.

        The run is closed last, so one that is closed holds everything; all of it may be written again.

        Args:
            at: when it ended, in seconds since 1970.
            metrics: final values.
            histories: metric -> (step, value) pairs.
            artifacts: a folder whose files are all logged.
        """
        run_id = self.runs[number]
        self._log(run_id, metrics=metrics, histories=histories, at=at)
        if artifacts is not None:
            self.client.log_artifacts(run_id, str(artifacts))
        if reason is not None:
            self.client.set_tag(run_id, "reason", reason)
        ended = "PRUNED" if pruned else "COMPLETE" if reason is None else "FAILED"
        self.client.set_tag(run_id, "status", ended)
        self.client.set_terminated(run_id, RUN_STATUS[ended], None if at is None else _ms(at))

    def end_study(
        self,
        *,
        metrics: Mapping[str, float],
        artifacts: list[Path],
        status: Status = "FINISHED",
        note: str = "",
        front: Collection[int] = (),
        chosen: int | None = None,
    ) -> None:
        """Write the study's summary to the parent run and close it, and what is open of its trials.

        Args:
            status: KILLED for a study that is to be gone on with, as are then its open trials.
            note: what the UI shows at the top of the study's run, Markdown.
            front: numbers of the trials on the front; tagged, so that the UI's search finds them.
            chosen: the one that is tagged as chosen.
        """
        self._log(self.parent_id, metrics=metrics)
        self.client.set_tag(self.parent_id, MLFLOW_RUN_NOTE, note)
        self._mark("pareto", "front", front)
        self._mark("chosen", "yes", [] if chosen is None else [chosen])
        for path in artifacts:
            self.client.log_artifact(self.parent_id, str(path))
        self.close_open_trials(
            "the study ended before the trial did", "KILLED" if status == "KILLED" else "FAILED"
        )
        self.client.set_terminated(self.parent_id, status)

    def _mark(self, tag: str, value: str, numbers: Collection[int]) -> None:
        """Tag these trials, and take the tag off others that had it before the study went on."""
        query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent_id}' and tags.{tag} = '{value}'"
        for run in self._search(query):
            if int(run.data.tags["trial"]) not in numbers:
                self.client.delete_tag(run.info.run_id, tag)
        for number in numbers:
            self.client.set_tag(self.runs[number], tag, value)

    def abort(self, reason: str, status: Status = "FAILED") -> None:
        """End the study when the end came unexpected, and its open trials as KILLED."""
        self.close_open_trials(reason, "KILLED")
        self.client.set_tag(self.parent_id, "reason", reason)
        self.client.set_terminated(self.parent_id, status)

    def close_open_trials(self, reason: str, status: Status = "FAILED") -> None:
        """End every nested run that is still RUNNING, so that none stays so for ever."""
        for run_id in self.runs.values():
            if self.client.get_run(run_id).info.status == "RUNNING":
                self.client.set_tag(run_id, "reason", reason)
                self.client.set_terminated(run_id, status)

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        histories: Mapping[str, list[tuple[int, float]]] | None = None,
        at: float | None = None,
    ) -> None:
        now = _ms(time.time() if at is None else at)  # the same again is the same point for MLflow
        rows = [Metric(name, value, now, 0) for name, value in (metrics or {}).items()]
        for name, pairs in (histories or {}).items():
            rows += [Metric(name, value, now, step) for step, value in pairs]
        entries = [Param(name, text_of(value)) for name, value in (params or {}).items()]
        self.client.log_batch(run_id, metrics=rows[:BATCH], params=entries)
        for start in range(BATCH, len(rows), BATCH):
            self.client.log_batch(run_id, metrics=rows[start : start + BATCH])

    def ui_command(self) -> str | None:
        """What a user types before `link` can be opened; None where a server runs."""
        if is_server(self.uri):
            return None
        return shlex.join(["mlflow", "ui", "--backend-store-uri", redacted(self.uri)])

    def link(self) -> str:
        """Where MLflow's page shows the study's trials with their scores and settings."""
        at = redacted(self.uri).rstrip("/") if is_server(self.uri) else LOCAL_PAGE
        shown = f"workflowType=machine_learning&viewStateShareKey={self.parent_id}"
        return f"{at}/#/experiments/{self.experiment_id}/runs?{shown}"

    def artifact_link(self, name: str) -> str:
        """A file of the parent run, as a link from within MLflow's page."""
        return f"#/experiments/{self.experiment_id}/runs/{self.parent_id}/artifacts/{name}"


def log_to_study(uri: str, name: str, digest: str, path: Path) -> bool:
    """Log a file to the parent run of a study that has ended; False where the store has no such run.

    Args:
        digest: of the study, since a store may hold studies of one name from several places.

    Raises:
        StudyError: the store cannot be asked.
    """
    if (file := sqlite_path(uri)) is not None and not file.is_file():
        return False  # MLflow would make one
    try:
        with held(uri, make_tables):
            if file is not None:
                follow_move(uri, file.parent / ARTIFACTS)
            client = Client(uri)
        found = client.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))
        query = f"run_name = {quoted(name)} and tags.study_digest = {quoted(digest)}"
        runs = client.search_runs([found.experiment_id], query) if found is not None else []
        if not runs:
            return False
        client.log_artifact(runs[0].info.run_id, str(path))
    except (MlflowException, SQLAlchemyError, OSError, ValueError, ImportError) as error:
        raise StudyError(
            f"The MLflow store {redacted(uri)} does not take {path.name} ({_first_line(error)})."
        ) from error
    return True


def quoted(name: object) -> str:
    """A name in a search of MLflow's, which knows no way to write a quotation mark.

    Raises:
        StudyError: it has one.
    """
    if "'" in str(name) or "\\" in str(name):
        raise StudyError(f"Got the name {name}; MLflow finds none with a quotation mark, give another.")
    return f"'{name}'"


def tracking_uri(outputs: Path) -> str:
    """MLFLOW_TRACKING_URI without its secrets, or a SQLite file in `outputs`.

    Raises:
        StudyError: it is set to what is no address.
    """
    move_credentials()
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(outputs / "mlflow.db")


def is_server(uri: str) -> bool:
    """Whether a store is a server, not a file."""
    return uri.startswith(("http://", "https://"))


def require_server(uri: str) -> None:
    """Ask an HTTP server for a sign of life: MLflow itself would retry for minutes.

    Raises:
        StudyError: it does not answer.
    """
    if not is_server(uri):
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


def make_tables(uri: str) -> None:
    """Make MLflow's tables in a file that has none."""
    Client(uri).search_experiments(max_results=1)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
