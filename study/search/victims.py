"""Victims made by Ray tasks, one a task; the driver hears of their progress and keeps their files.

Studies on one machine find each other's below their outputs; those of a cluster in a storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.queue import Queue

from bimask.files.atomic import atomic_directory
from bimask.tasks import task_of
from bimask.victims import EpochLog
from bimask.victims.folders import MANIFEST, WEIGHTS
from study.search import storage as storages
from study.search.cluster import await_room, release_workers
from study.search.embedded.liveness import is_gone
from study.spec.config import StudyError

# name, and what happened: an EpochLog, or what is prepared, the steps done and how many there are
Event = tuple[str, EpochLog | tuple[str, int, int]]
VICTIMS = "victims"  # below a storage
RETRIES = 2  # of a task whose process died; it goes on from its last epoch


def make_victims(
    specs: Mapping[str, Any],
    root: Path,
    *,
    device: str,
    cpus: int,
    gpus: float,
    wait: float = 0,
    on_event: Callable[[Event], None],
    on_end: Callable[[str, str | None], None],
) -> None:
    """Make victims on a cluster that is joined; each is then in `root/DIGEST/` on this machine.

    A task trains below the same path on its node, so that it goes on from what another left there. Data
    sets and own code must be on the nodes.

    Args:
        cpus, gpus: of one victim; `cpus` is its threads, too.
        wait: minutes for an autoscaler to start the first worker.
        on_end: called once a victim, with its name and None, or why it was not made.

    Raises:
        StudyError: no node has such resources.
    """
    with ExitStack() as stack:
        if wait:
            stack.callback(release_workers)
        _require_room(cpus, gpus, wanted=len(specs), wait=wait)
        events = Queue()
        stack.callback(events.shutdown)
        task = ray.remote(_make).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
        running = {  # tasks end with this process; `run_tasks` says why none is cancelled
            task.remote(name, spec, str(root.resolve()), device, cpus, events): (name, spec)
            for name, spec in specs.items()
        }
        while running:
            ended, _ = ray.wait(list(running), timeout=0.5)
            names = {name for name, _ in running.values()}
            for event in events.get_nowait_batch(events.qsize()):
                if event[0] in names:  # the last may come after the end
                    on_event(event)
            for reference in ended:
                name, spec = running.pop(reference)
                on_end(name, _received(reference, root / spec.digest))


def _make(
    name: str, spec: Any, root: str, device: str, cpus: int, events: Queue
) -> dict[str, bytes] | str:
    """The files of a victim, or why there are none."""
    torch.set_num_threads(cpus)

    def tell(what: EpochLog | tuple[str, int, int]) -> None:
        """Without waiting: Ray gives the CPUs of a task that waits to another one."""
        events.actor.put_nowait.remote((name, what))

    def on_prepare(what: str, done: int, of: int) -> None:
        if done == of or done % max(1, of // 50) == 0:  # attacks take thousands of steps
            tell((what, done, of))

    try:
        task_of(spec).obtain_victim(
            spec,
            Path(root),
            device=device,
            on_epoch=tell,
            on_prepare=on_prepare,
        )
    except Exception as error:  # as text: not every error can be sent
        return f"{type(error).__name__}: {error}"
    return {file.name: file.read_bytes() for file in (Path(root) / spec.digest).iterdir()}


def _received(reference: Any, folder: Path) -> str | None:
    """Write the victim's folder, whole or not at all, if it is not there; or say why it is not."""
    try:
        files = ray.get(reference)
    except ray.exceptions.RayError as error:
        if is_gone():  # that says nothing of the victim
            raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if isinstance(files, str):
        return files
    if not folder.exists():
        with atomic_directory(folder) as part:
            for name, content in files.items():
                (part / name).write_bytes(content)
    return None


class SharedVictims:
    """Victims by digest in a storage that all studies reach, and those of one outputs folder.

    Args:
        root: of victims on this machine.
        storage: folder or URI; None shares nothing.
    """

    def __init__(self, root: Path, storage: str | None) -> None:
        self.root = root
        self.place = None if storage is None else f"{storage.rstrip('/')}/{VICTIMS}"

    def fetch(self, digest: str) -> bool:
        """Bring a victim here if another study left it there; whether it did.

        Raises:
            StudyError: the storage cannot be read.
        """
        if self.place is None or (self.root / digest).is_dir():
            return False
        there = f"{self.place}/{digest}"
        try:
            if not _is_whole(there):
                return False
            with atomic_directory(self.root / digest) as part:
                storages.fetch(there, part)
        except (OSError, ValueError) as error:
            if (self.root / digest).is_dir():
                return True  # another study was faster
            raise StudyError(
                f"Cannot read the victim {digest} in {self.place}: {error}; give a folder or URI that "
                "can be read with --storage."
            ) from error
        return True

    def share(self, digest: str) -> None:
        """Leave a victim there for other studies, its manifest last: without it, it is none.

        Raises:
            StudyError: the storage cannot be written.
        """
        if self.place is None:
            return
        there = f"{self.place}/{digest}"
        try:
            if _is_whole(there):
                return
            for file in sorted((self.root / digest).iterdir(), key=lambda one: one.name == MANIFEST):
                storages.put(there, file)
        except (OSError, ValueError) as error:
            raise StudyError(
                f"Cannot write the victim {digest} to {self.place}: {error}; give a folder or URI that "
                "can be written with --storage."
            ) from error


def _require_room(cpus: int, gpus: float, *, wanted: int, wait: float) -> None:
    if not await_room(cpus, gpus, wanted=wanted, wait=wait):
        nodes = sum(node["Alive"] for node in ray.nodes())
        waited = f" after {wait:g} minutes" if wait else ""
        raise StudyError(
            f"A victim asks for {cpus} CPU(s) and {gpus:g} GPU, which none of {nodes} node(s) has"
            f"{waited}; ask for less, or let larger nodes come up (--wait MINUTES)."
        )


def _is_whole(there: str) -> bool:
    """Whether a storage has a victim, written to its end and with nothing that expired since."""
    return all(storages.exists(f"{there}/{name}") for name in (MANIFEST, WEIGHTS))
