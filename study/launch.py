"""`python -m study.launch [STUDY.yaml]`: run a study from victims to the chosen configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bimask.errors import BimaskError
from study.interrupts import InterruptedStudyError

DEFAULT = Path(__file__).parent.parent / "search_spaces" / "ims_digits.yaml"


def main(
    study: Annotated[
        Path | None,
        typer.Argument(metavar="[STUDY.yaml]", show_default="search_spaces/ims_digits.yaml"),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Trials, instead of the file's.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Actors at once; each runs `trials_per_actor` trials.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: 'auto', or ADDRESS:PORT.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study and its folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the file's.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with a study that was cut short.")
    ] = None,
    outputs: Annotated[Path, typer.Option(help="Where the study's folder goes.")] = Path("outputs"),
) -> None:
    """Search the defence's settings on Ray, record every trial in MLflow, choose the best."""
    from study.run import run_study  # heavy: after --help and usage errors

    overrides = {"trials": trials, "concurrency": concurrency, "name": name, "seed": seed}
    try:
        complete = run_study(
            study or (DEFAULT if resume is None else None),
            {key: value for key, value in overrides.items() if value is not None},
            outputs=outputs,
            address=address,
            resume=resume,
        )
    except BimaskError as error:
        message = f"[bold red]error[/]: {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except InterruptedStudyError as error:
        Console(stderr=True).print(str(error), soft_wrap=True)
        sys.exit(128 + error.signal)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    typer.run(main)
