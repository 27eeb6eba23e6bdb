"""Victims made by Ray tasks, one a task; the driver hears of their progress and keeps their files.

Studies on one machine find each other's below their outputs; those of a cluster in a storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    on_event: Callable[[Event], None],
    on_end: Callable[[str, str | None], None],
) -> None:
    """Make victims on a cluster that is joined; each is then in `root/DIGEST/` on this machine.

    A task trains below the same path on its node, so that it goes on from what another left there. Data
    sets and own code must be on the nodes.

    Args:
        cpus, gpus: of one victim; `cpus` is its threads, too.
        on_end: called once a victim, with its name and None, or why it was not made.

    Raises:
        StudyError: no node has such resources.
    """
    _require_room(cpus, gpus)
    events = Queue()
    task = ray.remote(_make).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
    running = {
        task.remote(name, spec, str(root.resolve()), device, cpus, events): (name, spec)
        for name, spec in specs.items()
    }
    try:
        while running:
            ended, _ = ray.wait(list(running), timeout=0.5)
            for event in events.get_nowait_batch(events.qsize()):
                on_event(event)
            for reference in ended:
                name, spec = running.pop(reference)
                on_end(name, _received(reference, root / spec.digest))
    finally:
        for reference in running:
            ray.cancel(reference)
        events.shutdown()


def _make(
    name: str, spec: Any, root: str, device: str, cpus: int, events: Queue
) -> dict[str, bytes] | str:
    """The files of a victim, or why there are none."""
    torch.set_num_threads(cpus)

    def on_prepare(what: str, done: int, of: int) -> None:
        if done == of or done % max(1, of // 50) == 0:  # attacks take thousands of steps
            events.put((name, (what, done, of)))

    try:
        task_of(spec).obtain_victim(
            spec,
            Path(root),
            device=device,
            on_epoch=lambda log: events.put((name, log)),
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


def _require_room(cpus: int, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise StudyError(
            f"A victim asks for {cpus} CPU(s) and {gpus:g} GPU, which none of {len(nodes)} node(s) "
            "has; lower --cpus-per-victim or --gpus-per-victim, or wait until larger nodes are up."
        )


def _is_whole(there: str) -> bool:
    """Whether a storage has a victim, written to its end and with nothing that expired since."""
    return all(storages.exists(f"{there}/{name}") for name in (MANIFEST, WEIGHTS))
