"""What a trial may take: time and memory. Beyond it the trial ends, and says why."""

from __future__ import annotations

import faulthandler
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

STACK = "stack.txt"  # where every thread stood when the time was over
# Where a study sets no `trial_timeout`, a trial that hangs must not hold it for ever:
DAY = 86_400.0  # seconds for a trial before it is known what trials take
LEAST = 600.0  # seconds that every trial has
KNOWN = 5  # complete trials from which it is known
TIMES = 10  # what the slowest of them took
PROJECTED_FROM = 0.1  # share of its limit from which on a trial's end is projected
MARGIN = 2.0  # times the seconds that are left: steps of one trial do not all cost the same


def default_timeout(took: Sequence[float]) -> float:
    """Seconds that a trial has where the study does not say, given what complete trials took."""
    return DAY if len(took) < KNOWN else max(LEAST, TIMES * max(took))


@contextmanager
def time_limit(seconds: float | None, folder: Path) -> Iterator[None]:
    """End this process, with the place where it hangs in `folder`/stack.txt, after so many seconds.

    The watch is a thread of the interpreter's own and needs no lock, so code that never comes back to
    Python is ended as well.
    """
    if seconds is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STACK).open("w") as file:
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    (folder / STACK).unlink(missing_ok=True)


def where_it_hung(folder: Path) -> str | None:
    """The innermost place of ours in the stack that a time limit left; None where it left none."""
    path = folder / STACK
    lines = path.read_text().splitlines() if path.is_file() else []
    threads = "\n".join(lines).split("\nThread ")
    ours = [text for text in threads if "study/search/actor.py" in text.replace("\\", "/")]
    frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', (ours or [""])[0])
    return "{}, line {}, in {}".format(*frames[0]) if frames else None


def too_long(seconds: float, place: str | None, *, given: bool) -> str:
    """Why a group of trials failed that the limit of so many seconds ended.

    Args:
        given: it is the study's `trial_timeout`, and no default.
    """
    hung = f"; it was at {place}" if place else ""
    if given:
        return f"took longer than `trial_timeout` allows ({seconds:g} s){hung}"
    return (
        f"took longer than a trial has by default ({seconds:g} s: {TIMES} times the slowest one, "
        f"{LEAST / 60:g} minutes at least); set `trial_timeout` where trials may take longer{hung}"
    )


def projected_timeout(limit: float | None, *, spent: float, left: float) -> str | None:
    """Why a trial is ended before its limit ends it: at its pace it takes far longer.

    Without it, trials of a slow method would all run until their time is over, and a search of few
    minutes would learn nothing of it.

    Args:
        limit: seconds of the study's `trial_timeout`; None is none.
        spent: seconds so far.
        left: seconds of the steps that are left, over all victims, at the pace of those behind it.
    """
    if limit is None or not left or spent < PROJECTED_FROM * limit or left <= MARGIN * (limit - spent):
        return None
    return (
        f"after {spent:.3g} s it would take {left:.3g} s more at its pace, and `trial_timeout` allows "
        f"{limit:g} s"
    )


def gpu_memory_limit(share: float) -> None:
    """Leave this process its share of the memory of its GPU, where it has less than a whole one: the
    actors beside it have theirs. Beyond it torch raises; passes of a population are sized by it."""
    if 0 < share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


@contextmanager
def memory_limit(gib: float | None) -> Iterator[None]:
    """Refuse this process more than so many GiB beyond what it holds now.

    An allocation beyond that raises here, in torch or in Python, and does not get as far as the
    kernel's killer, which may choose any process of the machine. Nothing is limited but on Linux.
    """
    if gib is None or sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmData:\s+(\d+) kB", status)
    held = int(match[1]) * 1024 if match else 0
    limit = held + int(gib * 2**30)
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
