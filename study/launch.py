"""`python -m study.launch [STUDY.yaml]`: run a study from victims to the chosen configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

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
    leave_out: Annotated[
        str | None,
        typer.Option(
            metavar="ATTACK|all", help="Also without this attack, or each in turn: what is lost on it?"
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Print space, victims, cost and first trials; run nothing."),
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with a study that was cut short.")
    ] = None,
    outputs: Annotated[Path, typer.Option(help="Where the study's folder goes.")] = Path("outputs"),
) -> None:
    """Search the defence's settings on Ray, record every trial in MLflow, choose the best."""
    overrides = {"trials": trials, "concurrency": concurrency, "name": name, "seed": seed}
    given = {key: value for key, value in overrides.items() if value is not None}
    if resume is not None and (dry or leave_out is not None):
        raise typer.BadParameter("--resume goes on with one study, without --dry-run and --leave-out.")
    try:
        if dry:
            complete = _dry_run(study or DEFAULT, given, outputs)
        elif leave_out is not None:
            complete = _leave_out(study or DEFAULT, given, leave_out, outputs, address)
        else:
            complete = _run(study, given, resume, outputs, address)
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


# Each imports what it needs, which is heavy: after --help and usage errors.


def _dry_run(study: Path, overrides: dict[str, Any], outputs: Path) -> bool:
    from study.console import wide_console
    from study.dry_run import dry_run

    dry_run(study, overrides, outputs=outputs, console=wide_console())
    return True


def _leave_out(
    study: Path, overrides: dict[str, Any], which: str, outputs: Path, address: str | None
) -> bool:
    from study.protocol import run_leave_out

    return run_leave_out(study, overrides, which, outputs=outputs, address=address)


def _run(
    study: Path | None,
    overrides: dict[str, Any],
    resume: str | None,
    outputs: Path,
    address: str | None,
) -> bool:
    from study.run import run_study

    path = study or (DEFAULT if resume is None else None)
    return run_study(path, overrides, outputs=outputs, address=address, resume=resume)


if __name__ == "__main__":
    typer.run(main)
