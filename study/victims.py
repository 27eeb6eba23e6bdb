"""`python -m study.victims SUITE.yaml`: the victims of a suite, as many at once as Ray has room for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bimask.commands import TrustCode
from bimask.progress import Console, outlive_readers
from study.search.interrupts import (
    InterruptedStudyError,
    Interrupts,
    LostRayError,
    ends_of_a_command,
    leave,
)


def main(
    suite: Annotated[
        Path, typer.Argument(metavar="SUITE.yaml", help="Many victims, such as victims/digits.yaml.")
    ],
    out: Annotated[Path, typer.Option(help="Folder that holds victims.")] = Path("outputs/victims"),
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: 'auto', or ADDRESS:PORT.")
    ] = None,
    cpus_per_victim: Annotated[int, typer.Option(min=1, help="CPUs, and threads, of one.")] = 1,
    gpus_per_victim: Annotated[float, typer.Option(min=0, help="Share of a GPU.")] = 0,
    trust_code: TrustCode = False,
) -> None:
    """Make the victims of a suite on Ray, but for those that OUT has."""
    outlive_readers()
    from bimask.nets import code_of_files
    from study.pipeline.prepare import require_writable  # heavy: after --help and usage errors

    interrupts = Interrupts()
    with ends_of_a_command():
        require_writable(out)
        with code_of_files(trust_code), interrupts.in_good_order(lambda: ended(interrupts, suite)):
            failed = make_suite(suite, out, address, cpus_per_victim, gpus_per_victim, interrupts)
    sys.exit(1 if failed else 0)


def ended(interrupts: Interrupts, suite: Path) -> InterruptedStudyError | LostRayError:
    """What a signal, or Ray's death, ends the making of victims with; those that are made stay."""
    return interrupts.reason(str(suite), begun=False)


def make_suite(
    suite: Path,
    out: Path,
    address: str | None,
    cpus: int,
    gpus: float,
    interrupts: Interrupts,
) -> list[str]:
    """The names of the victims that could not be made; see `main`."""
    import torch

    from bimask.nets import require_trusted
    from bimask.victims import EpochLog, load_suite
    from bimask.victims.progress import VictimBars, build
    from study.search import ray_gone, set_last_words, start_ray, stop_ray
    from study.search.victims import Event, make_victims

    specs, failed = load_suite(suite), []
    for spec in specs.values():  # Ray's workers would not ask
        require_trusted(spec.net)
    missing = {name: spec for name, spec in specs.items() if not spec.place(out).is_dir()}
    with VictimBars(Console()) as bars:

        def on_event(event: Event) -> None:
            name, what = event
            if isinstance(what, EpochLog):
                bars.epoch(name, what)
            else:
                bars.preparing(name, *what)

        def on_end(name: str, reason: str | None) -> None:
            if reason is not None:
                failed.append(name)
                bars.failed(name, reason)
            elif not build(name, specs[name], out, torch.device("cpu"), bars, made=name in missing):
                failed.append(name)

        for name in [name for name in specs if name not in missing]:
            on_end(name, None)
        if missing:
            try:
                set_last_words(
                    f"{suite} was ended without a word: it was killed, or Ray died; launch it again, "
                    "what is trained is kept."
                )
                with interrupts.defer():
                    own = start_ray(address)
                gone = ray_gone(own=own)
                with interrupts.watch(gone, lambda: leave(ended(interrupts, suite))):
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
                stop_ray()
    return failed


if __name__ == "__main__":
    typer.run(main)
