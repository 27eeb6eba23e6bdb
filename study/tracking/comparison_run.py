"""MLflow's run of a comparison: the parent of its studies' runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from study.tracking.client import key_of, text_of
from study.tracking.mlflow_runs import Status, Tracker, quoted


class ComparisonRun:
    """The run of one comparison, opened again where there is one of its name and digest.

    Args:
        tracker: of a store that is open; its experiment has the run.
    """

    def __init__(self, tracker: Tracker, name: str, digest: str, params: Mapping[str, Any]) -> None:
        self.client, self.experiment_id = tracker.client, tracker.experiment_id
        query = f"tags.comparison = {quoted(name)} and tags.comparison_digest = {quoted(digest)}"
        runs = self.client.search_runs([self.experiment_id], query)
        if runs:
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {"comparison": name, "comparison_digest": digest}
            run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
            self.run_id = run.info.run_id
            for key, value in params.items():
                self.client.log_param(self.run_id, key_of(key), text_of(value))

    def adopt(self, studies: Sequence[str]) -> None:
        """Put the runs of these studies, by their names, below this one."""
        for name in studies:
            for run in self.client.search_runs([self.experiment_id], f"tags.study = {quoted(name)}"):
                self.client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, self.run_id)

    def end(
        self,
        status: Status,
        *,
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
        note: str,
    ) -> None:
        """Write what it came to, and close it."""
        for name, value in metrics.items():
            self.client.log_metric(self.run_id, key_of(name), value)
        for path in artifacts:
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), path.name)
            elif path.is_file():
                self.client.log_artifact(self.run_id, str(path))
        self.client.set_tag(self.run_id, "mlflow.note.content", note)
        self.client.set_terminated(self.run_id, status)
