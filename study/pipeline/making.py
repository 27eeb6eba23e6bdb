"""Victims that are not there yet, made on Ray, as many at once as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bimask.progress import Console
from bimask.victims import EpochLog, VictimSpec
from bimask.victims.progress import VictimBars, build
from study import search
from study.search.interrupts import InterruptedStudyError, Interrupts, LostRayError, leave
from study.search.victims import Event, make_victims


def make_missing(
    specs: Mapping[str, VictimSpec],
    out: Path,
    *,
    address: str | None,
    storage: str | None = None,
    cpus: int,
    gpus: float,
    interrupts: Interrupts,
    reason: Callable[[], InterruptedStudyError | LostRayError],
    last_words: str,
) -> list[str]:
    """Make the victims that `out` lacks, and look at the others.

    Args:
        specs: by a name for people.
        storage: folder or URI where studies share what they trained; None shares nothing.
        reason: why it ended, where a signal came or Ray died.
        last_words: said where this process is killed.

    Returns:
        The names of the victims that could not be made.
    """
    failed: list[str] = []
    shared = search.SharedVictims(out, storage)
    missing = {
        name: spec
        for name, spec in specs.items()
        if not spec.place(out).is_dir() and (spec.given or not shared.fetch(spec.digest))
    }
    with VictimBars(Console()) as bars:

        def on_event(event: Event) -> None:
            name, what = event
            if isinstance(what, EpochLog):
                bars.epoch(name, what)
            else:
                bars.preparing(name, *what)

        def on_end(name: str, why: str | None) -> None:
            if why is not None:
                failed.append(name)
                bars.failed(name, why)
            elif not build(name, specs[name], out, torch.device("cpu"), bars, made=name in missing):
                failed.append(name)
            elif name in missing and not specs[name].given:
                shared.share(specs[name].digest)

        for name in [name for name in specs if name not in missing]:
            on_end(name, None)
        if missing:
            try:
                search.set_last_words(last_words)
                with interrupts.defer():
                    own = search.start_ray(address)
                with interrupts.watch(search.ray_gone(own=own), lambda: leave(reason())):
                    make_victims(
                        missing,
                        out,
                        device="cuda" if gpus else "cpu",
                        cpus=cpus,
                        gpus=gpus,
                        on_event=on_event,
                        on_end=on_end,
                    )
            finally:
                search.stop_ray()
    return failed
