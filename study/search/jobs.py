"""A study as a job of a cluster elsewhere: sent, watched, left running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient
from rich.text import Text

from bimask.progress import Console
from study.spec.config import StudyError
from study.store.provenance import commit

# Patterns as in .gitignore, which Ray heeds too: .git, .venv, .env and the like, data, results, keys.
# (`.*` would be the folder itself, too, and leave everything here.)
HIDDEN = ".?*"
LEFT_HERE = [HIDDEN, "data", "outputs", "*.pem", "*.key", "*.db", "*.egg-info", "__pycache__"]


def submit(address: str, command: Sequence[str], *, folder: Path, console: Console) -> int:
    """Send `folder` and run a command there; its output is shown until it ends or Ctrl-C.

    Args:
        address: of the dashboard, http://HOST:PORT, as the ssh tunnel gives it.
        command: shell words; $HOME and the like are the head's.
        folder: what the job finds where it starts; see `LEFT_HERE` for what is not sent.

    Returns:
        The job's exit code; 0 after Ctrl-C, which leaves it running.

    Raises:
        StudyError: nobody answers there, or refuses.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)  # its word on every file that stays here
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=" ".join(command),
            runtime_env={
                "working_dir": str(folder),
                "excludes": LEFT_HERE,
                "env_vars": {"BIMASK_COMMIT": commit()},
            },
        )
    except (RuntimeError, ValueError, OSError, RayError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StudyError(
            f"The cluster at {address} does not take the study ({reason}); open the tunnel with `ray "
            "dashboard cluster.yaml`, and see that ~/.ray/auth_token is the cluster's."
        ) from error
    console.tell(f"job {job} at {address}; Ctrl-C leaves it running")
    try:
        asyncio.run(_show(client, job, console))
    except KeyboardInterrupt:
        console.tell("The study goes on.")
        console.tell(f"follow: ray job logs --address {address} --follow {job}")
        console.tell(f"stop:   ray job stop --address {address} {job}")
        return 0
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    console.tell(f"job {job}: {info.status}. {info.message or ''}")
    return info.driver_exit_code or 1


async def _show(client: JobSubmissionClient, job: str, console: Console) -> None:
    async for text in client.tail_job_logs(job):
        console.print(Text(text), end="", soft_wrap=True)  # lines of its own
