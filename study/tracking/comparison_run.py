"""MLflow's run of a comparison: the parent of its studies' runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

from study.spec.comparison import ComparisonConfig
from study.spec.config import StudyError
from study.store.comparison import comparison_id
from study.store.environment import first_line
from study.store.session import Identity
from study.tracking.mlflow_runs import BATCH, Status, Tracker, quoted


class ComparisonRun:
    """The run of one comparison, opened again where there is one.

    The comparison's folder is the truth, and MLflow's run a copy: where MLflow takes nothing, that is
    said, and the comparison goes on.

    Args:
        tracker: of a store that is open; its experiment has the run.
        folder: of the comparison.
        say: told in a sentence what MLflow does not take.
    """

    def __init__(
        self,
        tracker: Tracker,
        folder: Path,
        config: ComparisonConfig,
        params: Mapping[str, Any],
        say: Callable[[str], object],
    ) -> None:
        self.client, self.experiment_id, self.say = tracker.client, tracker.experiment_id, say
        self.name, self.run_id = config.name, ""
        self._told(lambda: self._open(folder, config, params))

    def _open(self, folder: Path, config: ComparisonConfig, params: Mapping[str, Any]) -> None:
        own = comparison_id(folder)
        query = f"tags.comparison_id = {quoted(own)}"
        if runs := self.client.search_runs([self.experiment_id], query):
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        tags = {"comparison": config.name, "comparison_id": own, "comparison_digest": config.digest}
        run = self.client.create_run(self.experiment_id, run_name=config.name, tags=tags)
        self.run_id = run.info.run_id
        entries = [Param(key, str(value)) for key, value in params.items()]
        self.client.log_batch(self.run_id, params=entries)

    def end(
        self,
        studies: Sequence[Path],
        *,
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
        note: str,
    ) -> None:
        """Write what it came to, put the runs of its studies below it, and close it.

        Args:
            studies: their folders; one that was never begun has none.
        """

        def write() -> None:
            for folder in studies:
                self._adopt(folder)
            now = int(time.time() * 1000)
            rows = [Metric(name, value, now, 0) for name, value in metrics.items()]
            for start in range(0, len(rows), BATCH):
                self.client.log_batch(self.run_id, metrics=rows[start : start + BATCH])
            for path in artifacts:
                if path.is_dir():
                    self.client.log_artifacts(self.run_id, str(path), path.name)
                elif path.is_file():
                    self.client.log_artifact(self.run_id, str(path))
            self.client.set_tag(self.run_id, MLFLOW_RUN_NOTE, note)

        self._told(write)
        self.close("FINISHED")

    def _adopt(self, folder: Path) -> None:
        """Put a study's run, and not those of its trials, below this one."""
        try:
            own = Identity.load(folder).study_id
        except StudyError:
            return
        for run in self.client.search_runs([self.experiment_id], f"tags.study_id = {quoted(own)}"):
            self.client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, self.run_id)

    def close(self, status: Status) -> None:
        """End the run."""
        self._told(lambda: self.client.set_terminated(self.run_id, status))

    def _told(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (MlflowException, SQLAlchemyError, OSError) as error:
            self.say(
                f"MLflow does not take what a comparison tells it ({first_line(error)}); the folder "
                f"has all of it, and --resume {self.name} tells it again."
            )
