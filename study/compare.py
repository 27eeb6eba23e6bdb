"""`python -m study.compare SUITE.yaml`: every defence tuned alike, judged on what no trial saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bimask.errors import BimaskError
from bimask.progress import Console, outlive_readers
from study.search.interrupts import InterruptedStudyError, LostRayError


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
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join; without it: this machine."),
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option(envvar="BIMASK_OUTPUTS", help="Where folders go, `outputs` here.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(envvar="BIMASK_STORAGE", help="Folder or URI that all nodes reach."),
    ] = None,
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="With --resume: run the code of own nets that it names."),
    ] = False,
    wait: Annotated[
        float,
        typer.Option(envvar="BIMASK_WAIT", min=0, help="Minutes for an autoscaler's first worker."),
    ] = 0,
) -> None:
    """Compare defences: equal seconds of search each, the choices judged on unseen victims."""
    outlive_readers()
    given = {"name": name, "search_seconds": seconds, "concurrency": concurrency}
    overrides: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    try:
        # heavy: after --help and usage errors
        from bimask.nets import code_of_files
        from study.pipeline.comparison import run_comparison

        with code_of_files(trust_code or suite is not None):
            complete = run_comparison(
                suite,
                overrides,
                outputs=outputs or Path("outputs"),
                resume=resume,
                address=address,
                storage=storage,
                wait=wait,
            )
    except InterruptedStudyError as error:
        Console(stderr=True).tell(str(error))
        sys.exit(128 + error.signal)
    except BimaskError as error:
        Console(stderr=True).tell_error(error)
        sys.exit(1 if isinstance(error, LostRayError) else 2)
    except OSError as error:  # of the environment; what has a record is kept
        Console(stderr=True).tell_error(f"{error}; mend it, then go on with --resume NAME.")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    typer.run(main)
