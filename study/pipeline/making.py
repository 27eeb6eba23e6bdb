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
from study.spec.comparison import ComparisonConfig
from study.spec.config import StudyError


def make_all(
    specs: Mapping[str, VictimSpec],
    config: ComparisonConfig,
    out: Path,
    *,
    part_of: str,
    remedy: str,
    address: str | None,
    storage: str | None,
    wait: float,
) -> None:
    """Make the victims of comparisons that are not there yet, each with a trial's share of the machine.

    Args:
        config: of one of them; it says what a trial may take.
        part_of: the name of what is gone on with.
        remedy: what leaves victims out that cannot be made.
        address, storage, wait: as of `make_missing`.

    Raises:
        StudyError: some could not be made; the others are kept.
        InterruptedStudyError: a signal ended it, in good order.
        LostRayError: Ray died under it.
    """
    interrupts = Interrupts()

    def reason() -> InterruptedStudyError | LostRayError:
        return interrupts.reason(part_of, begun=True)

    with interrupts.in_good_order(reason):
        failed = make_missing(
            specs,
            out,
            address=address,
            storage=storage,
            cpus=config.cpus_per_trial,
            gpus=config.gpus_per_trial,
            wait=wait,
            interrupts=interrupts,
            reason=reason,
            last_words=f"{part_of} was ended without a word: it was killed, or Ray died; go on with "
            f"--resume {part_of}.",
        )
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(specs)} victims could not be made, {failed[0]} first; --resume "
            f"{part_of} tries them again, and {remedy}."
        )


def make_missing(
    specs: Mapping[str, VictimSpec],
    out: Path,
    *,
    address: str | None,
    storage: str | None = None,
    cpus: int,
    gpus: float,
    wait: float = 0,
    interrupts: Interrupts,
    reason: Callable[[], InterruptedStudyError | LostRayError],
    last_words: str,
) -> list[str]:
    """Make the victims that `out` lacks, and look at the others.

    Args:
        specs: by a name for people.
        storage: folder or URI where studies share what they trained; None shares nothing.
        wait: minutes for an autoscaler to start the first worker.
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
    console = Console()
    if missing and wait:
        console.tell(f"asking for workers; the first has {wait:g} minutes to come up")
    with VictimBars(console) as bars:

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
                        wait=wait,
                        on_event=on_event,
                        on_end=on_end,
                    )
            finally:
                search.stop_ray()
    return failed
