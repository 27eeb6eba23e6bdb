"""The stores of a study are opened: waited for where another process holds them, and said so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bimask.progress import Console
from study.spec.config import StudyConfig
from study.store.environment import locked_by_another, patiently
from study.tracking.credentials import redacted
from study.tracking.mlflow_runs import Tracker

Done = TypeVar("Done")


def say(console: Console, text: str) -> None:
    """A sentence about what goes otherwise than it should; names in it are shown as they are."""
    console.tell(text, style="yellow")


def open_tracker(uri: str, outputs: Path, config: StudyConfig, console: Console) -> Tracker:
    """MLflow's store, once it is free; that it had moved is said."""
    tracker = in_mlflow(uri, config, console, lambda: Tracker(uri, outputs / "mlartifacts"))
    if tracker.moved is not None:
        say(console, tracker.moved)
    return tracker


def in_mlflow(uri: str, config: StudyConfig, console: Console, action: Callable[[], Done]) -> Done:
    """Do something in MLflow's store, which may be done twice, as soon as nobody locks it.

    Raises:
        StudyError: it is locked for the study's `environment_timeout`.
    """
    return patiently(
        action,
        patience=config.environment_timeout,
        say=lambda text: say(console, text),
        what=f"use the MLflow store {redacted(uri)}",
        passes=locked_by_another,
    )
