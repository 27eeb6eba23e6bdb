"""`python -m study.victims SUITE.yaml`: the victims of a suite, as many at once as Ray has room for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bimask.commands import TrustCode
from bimask.progress import outlive_readers
from study.options import Cluster, Storage, Wait
from study.search.interrupts import (
    InterruptedStudyError,
    Interrupts,
    LostRayError,
    ends_of_a_command,
)


def main(
    suite: Annotated[
        Path, typer.Argument(metavar="SUITE.yaml", help="Many victims, such as victims/digits.yaml.")
    ],
    out: Annotated[Path, typer.Option(help="Folder that holds victims.")] = Path("outputs/victims"),
    address: Cluster = None,
    storage: Storage = None,
    cpus_per_victim: Annotated[int, typer.Option(min=1, help="CPUs, and threads, of one.")] = 1,
    gpus_per_victim: Annotated[float, typer.Option(min=0, help="Share of a GPU.")] = 0,
    wait: Wait = 0,
    trust_code: TrustCode = False,
) -> None:
    """Make the victims of a suite on Ray, but for those that OUT has, or the storage."""
    outlive_readers()
    from bimask.nets import code_of_files
    from study.pipeline.prepare import require_writable  # heavy: after --help and usage errors

    interrupts = Interrupts()
    with ends_of_a_command():
        require_writable(out)
        with code_of_files(trust_code), interrupts.in_good_order(lambda: ended(interrupts, suite)):
            failed = make_suite(
                suite,
                out,
                interrupts,
                address=address,
                storage=storage,
                cpus=cpus_per_victim,
                gpus=gpus_per_victim,
                wait=wait,
            )
    sys.exit(1 if failed else 0)


def ended(interrupts: Interrupts, suite: Path) -> InterruptedStudyError | LostRayError:
    """What a signal, or Ray's death, ends the making of victims with; those that are made stay."""
    return interrupts.reason(str(suite), begun=False)


def make_suite(
    suite: Path,
    out: Path,
    interrupts: Interrupts,
    **where: Any,
) -> list[str]:
    """The names of the victims that could not be made; see `main`.

    Args:
        where: `address`, `storage`, `cpus`, `gpus` and `wait` of `make_missing`.
    """
    from bimask.nets import require_trusted
    from bimask.victims import load_suite
    from study.pipeline.making import make_missing

    specs = load_suite(suite)
    for spec in specs.values():  # Ray's workers would not ask
        require_trusted(spec.net)
    return make_missing(
        specs,
        out,
        interrupts=interrupts,
        **where,
        reason=lambda: ended(interrupts, suite),
        last_words=f"{suite} was ended without a word: it was killed, or Ray died; launch it again, "
        "what is trained is kept.",
    )


if __name__ == "__main__":
    typer.run(main)
