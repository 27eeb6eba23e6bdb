"""The confirmation's purifications."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bimask.errors import NonFiniteError
from bimask.victims import Victim
from study.search.tasks import LostTaskError, run_tasks
from study.spec.config import StudyConfig
from study.store.schema import ConfirmRecord
from study.trial.suite import Job, confirm


def run_confirmation(
    config: StudyConfig,
    victims: Mapping[str, Victim],
    jobs: Sequence[Job],
    on_done: Callable[[ConfirmRecord], None],
) -> None:
    """Run all jobs, as many at once as there is room for.

    Args:
        on_done: called with the record of each job as it ends; one that failed has a `reason` and no
            scores.
    """

    def ended(at: int, result: ConfirmRecord | LostTaskError) -> None:
        on_done(jobs[at].failed(str(result)) if isinstance(result, LostTaskError) else result)

    run_tasks(config, _run, victims.items(), [(job.victim, job, config) for job in jobs], ended)


def _run(victim: Victim, job: Job, config: StudyConfig) -> ConfirmRecord:
    try:
        return confirm(job, victim, config, device=config.device_of_a_trial)
    except NonFiniteError as error:
        return job.failed(f"NonFiniteError: {error}")
