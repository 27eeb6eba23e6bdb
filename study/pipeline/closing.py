"""The end of a study: its page, and its summary in MLflow."""

from __future__ import annotations

import shlex
from pathlib import Path

from bimask.progress import Console
from bimask.tasks import CLASSIFICATION, Task
from study.analysis.blind import blind_metrics
from study.report import REPORT, write_report
from study.report.headline import headline
from study.report.pictures import FRONT_PICTURE
from study.store import records
from study.store.schema import StudySummary, TrialStatus
from study.tracking.mlflow_runs import Status, Tracker
from study.tracking.queue import MlflowQueue
from study.trial.suite import confirmation_metrics


def make_report(folder: Path, victims: Path, console: Console) -> None:
    """The study's page; whatever keeps it from being drawn must not cost the study its end."""
    try:
        write_report(folder, victims)
    except Exception as error:
        again = shlex.join(
            ["python", "-m", "study.report", folder.name, "--outputs", str(folder.parent)]
        )
        console.tell(f"no report ({error}); try: {again}")


def close(
    mirror: Tracker | MlflowQueue,
    folder: Path,
    summary: StudySummary,
    status: Status,
    page: str,
    task: Task = CLASSIFICATION,
) -> None:
    """The summary in MLflow's parent run.

    Args:
        page: where MLflow's UI shows the study's page.
    """
    metrics = {"hypervolume": summary["hypervolume"], "n_failed": summary["n_failed"]}
    if chosen := summary["chosen"]:
        metrics |= {f"chosen/{name}": value for name, value in chosen["val"].items()}
        if (risk := chosen["risk"]) is not None:
            metrics["chosen/risk"] = risk
        metrics |= {f"chosen/test/{n}": value for n, value in chosen["test"].items()}
    metrics |= confirmation_metrics(summary.get("suite") or {}) | blind_metrics(summary["selection"])
    names = (REPORT, FRONT_PICTURE, records.SUMMARY, records.STUDY, records.BEST, records.CONFIRM)
    count: dict[TrialStatus, int] = {
        "COMPLETE": summary["n_complete"],
        "PRUNED": summary["n_pruned"],
        "FAILED": summary["n_failed"],
    }
    told = headline(summary, count, task)
    mirror.end_study(
        metrics=metrics,
        artifacts=[folder / name for name in names if (folder / name).is_file()],
        status=status,
        note=f"**{told['title']}.** {told['text']} [The study's page]({page}) shows all of it.",
        front=[point["number"] for point in summary["front"]],
        chosen=chosen and chosen["number"],
    )
