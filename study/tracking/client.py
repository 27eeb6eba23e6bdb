"""MLflow's client, whose words may be a stranger's: the one place through which they reach MLflow.

MLflow refuses keys of other characters than it knows and values that are too long, and a study would
lack what it refused. Its page shows the rest as it is. So keys are spelled and cut, and text has no
control characters.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that is away is asked again by `MlflowQueue`, for as long as it takes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.entities.run import Run
from mlflow.tracking import MlflowClient

from bimask.errors import printable

MOST_IN_A_KEY, MOST_IN_A_VALUE, MOST_IN_A_TEXT = 250, 5_000, 100_000  # characters
ODD = re.compile(r"[^\w./: -]", re.ASCII)


class Client(MlflowClient):
    """MLflow's client; what it is told is spelled as MLflow takes it."""

    def create_run(
        self,
        experiment_id: str,
        start_time: int | None = None,
        tags: Mapping[str, Any] | None = None,
        run_name: str | None = None,
    ) -> Run:
        """See MLflow's."""
        name = None if run_name is None else text_of(run_name, MOST_IN_A_KEY)
        return super().create_run(experiment_id, start_time, _tags(tags), name)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> Any:
        """See MLflow's."""
        rows = [Metric(key_of(m.key), m.value, m.timestamp, m.step) for m in metrics]
        entries = [Param(key_of(p.key), text_of(p.value)) for p in params]
        marks = [RunTag(key_of(t.key), text_of(t.value)) for t in tags]
        return super().log_batch(run_id, rows, entries, marks, synchronous)

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        """See MLflow's."""
        return super().set_tag(run_id, key_of(key), text_of(value), synchronous)

    def create_model_version(
        self,
        name: str,
        source: str,
        run_id: str | None = None,
        tags: dict[str, Any] | None = None,
        run_link: str | None = None,
        description: str | None = None,
        await_creation_for: int = 300,
        model_id: str | None = None,
    ) -> ModelVersion:
        """See MLflow's."""
        told = None if description is None else text_of(description, MOST_IN_A_TEXT)
        return super().create_model_version(
            name,
            source,
            run_id,
            _tags(tags),
            run_link,
            told,
            await_creation_for,
            model_id,
        )


def key_of(name: str) -> str:
    """A key as MLflow takes it; two long names that differ stay apart."""
    spelled = ODD.sub("_", name)
    if len(spelled) <= MOST_IN_A_KEY:
        return spelled
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{spelled[: MOST_IN_A_KEY - 9]}-{digest}"


def text_of(value: object, most: int = MOST_IN_A_VALUE) -> str:
    """A value as text, its lines kept."""
    text = printable_lines("null" if value is None else str(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable_lines(text: str) -> str:
    """Every line of a text without what a page should not show."""
    return "\n".join(map(printable, text.split("\n")))


def _tags(tags: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if tags is None else {key_of(key): text_of(value) for key, value in tags.items()}
