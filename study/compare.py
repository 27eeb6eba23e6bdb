"""`python -m study.compare SUITE.yaml`: every defence tuned alike, judged on what no trial saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bimask.progress import outlive_readers
from study.options import Cluster, Outputs, Storage, Wait
from study.search.interrupts import GO_ON, ends_of_a_command


def main(
    suite: Annotated[Path | None, typer.Argument(metavar="[SUITE.yaml]")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the comparison and its folder.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of search for every defence, instead of the file's.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Trials at once.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with a comparison that was cut short.")
    ] = None,
    address: Cluster = None,
    outputs: Outputs = None,
    storage: Storage = None,
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="With --resume: run the code of own nets that it names."),
    ] = False,
    wait: Wait = 0,
) -> None:
    """Compare defences: equal seconds of search each, the choices judged on unseen victims."""
    outlive_readers()
    given = {"name": name, "search_seconds": seconds, "concurrency": concurrency}
    overrides: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    # heavy: after --help and usage errors
    from bimask.nets import code_of_files

    with ends_of_a_command(GO_ON), code_of_files(trust_code or suite is not None):
        from study.pipeline.comparison import run_comparison

        complete = run_comparison(
            suite,
            overrides,
            outputs=outputs or Path("outputs"),
            resume=resume,
            address=address,
            storage=storage,
            wait=wait,
        )
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    typer.run(main)
