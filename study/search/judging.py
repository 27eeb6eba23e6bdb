"""The runs of a comparison on the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bimask.errors import BimaskError
from bimask.victims import Victim
from study.search.tasks import LostTaskError, run_tasks
from study.spec.config import StudyConfig
from study.store.comparison import JudgedRecord
from study.trial.judging import Judgement, judge


def run_judgements(
    config: StudyConfig,
    victims: Iterable[tuple[str, Victim]],
    jobs: Sequence[Judgement],
    on_done: Callable[[JudgedRecord], None],
    say: Callable[[str], object] = lambda _: None,
) -> None:
    """Run all jobs, as many at once as there is room for.

    Args:
        config: of a study of the comparison; it says what a run may take of the machine.
        victims: with their digests; one after another is sent to the cluster.
        on_done: called with the record of each job as it ends; one that the defence failed at has a
            `reason` and no scores.
        say: told in a sentence of a job from which nothing came back. That is no verdict on the
            defence, and leaves no record.
    """

    def ended(at: int, result: JudgedRecord | LostTaskError) -> None:
        if isinstance(result, LostTaskError):
            say(f"A run of {jobs[at].entry} came to nothing: {result}")
        else:
            on_done(result)

    run_tasks(config, _run, victims, [(job.victim, job, config) for job in jobs], ended)


def _run(victim: Victim, job: Judgement, config: StudyConfig) -> JudgedRecord:
    try:
        return judge(job, victim, device=config.device_of_a_trial)
    except BimaskError as error:
        return {**job.about(victim), "reason": f"{type(error).__name__}: {error}"}
