"""`python -m study.launch [STUDY.yaml]`: run a study from victims to the chosen configuration."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer

from bimask.progress import Console, outlive_readers
from study.options import Outputs, Storage, Wait
from study.search.interrupts import GO_ON, ends_of_a_command

SPACES = Path(__file__).parent.parent / "search_spaces"
DEFAULT, SUSPECT = SPACES / "ims_digits.yaml", SPACES / "suspect.yaml"


class Where(TypedDict):
    """Where a study runs: `address`, `storage` and `wait` of `study.pipeline.run.run_study`."""

    address: str | None
    storage: str | None
    wait: float


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
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="Ray cluster to join ('auto', or ADDRESS:PORT) or to send the study to (http://...). "
            "Without it: the cluster running here, or this machine alone.",
        ),
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
        typer.Option("--dry-run", help="Print space, victims, cost and first trials; train nothing."),
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with a study that was cut short.")
    ] = None,
    outputs: Outputs = None,
    storage: Storage = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A suspect of your own, with --net and --clean: search_spaces/suspect.yaml on it."
        ),
    ] = None,
    net: Annotated[
        str | None, typer.Option(help="Its net: FILE.py:factory, package.module:factory or a name.")
    ] = None,
    clean: Annotated[
        Path | None, typer.Option(help="Clean pictures in class folders, in the order of its classes.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Pixels to bring pictures to: 32, or 48x32 (height x width).")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="3, or 1 for grey pictures.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the net, where it takes one.")] = None,
    mean: Annotated[str | None, typer.Option(help="Its normalisation: 0.485,0.456,0.406")] = None,
    std: Annotated[str | None, typer.Option(help="and 0.229,0.224,0.225; default: none.")] = None,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Run the code of own nets also where no file is given: --resume NAME, --dry-run.",
        ),
    ] = False,
    wait: Wait = 0,
) -> None:
    """Search the defence's settings on Ray, record every trial in MLflow, choose the best."""
    outlive_readers()
    given = {"trials": trials, "concurrency": concurrency, "name": name, "seed": seed}
    overrides: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if resume is not None and (dry or leave_out is not None):
        raise typer.BadParameter("--resume goes on with one study, without --dry-run and --leave-out.")
    own: dict[str, str | Path | None] = {"model": model, "net": net, "clean": clean}
    about = {"image_size": image_size, "channels": channels, "width": width, "mean": mean, "std": std}
    path = study or (DEFAULT if resume is None else None)
    here = outputs or Path("outputs")
    where: Where = {"address": address, "storage": storage, "wait": wait}
    with ends_of_a_command(GO_ON):
        # each imports what it needs, which is heavy: after --help and usage errors
        if any(value is not None for value in (*own.values(), *about.values())):
            overrides["suspect"] = suspect_of(own, about)
            path = study or SUSPECT
        from bimask.nets import code_of_files

        # a file on the command line is the user's own; a folder that --resume names may be anybody's
        trusted = trust_code or not (dry or (resume is not None and study is None))
        if dry:
            with code_of_files(trusted):
                complete = _dry_run(path or DEFAULT, overrides, here)
        elif address is not None and address.startswith(("http://", "https://")):
            options = overrides | ({"resume": resume} if resume else {})
            options |= {"leave-out": leave_out} if leave_out else {}
            options |= {"trust-code": None} if trust_code else {}
            if "suspect" in overrides:
                raise typer.BadParameter(
                    "A suspect of your own is studied where its files are; on a cluster write it into "
                    "a YAML (docs/suspects.md)."
                )
            sys.exit(send(address, study, overrides, outputs, options))
        elif leave_out is not None:
            complete = _leave_out(path or DEFAULT, overrides, leave_out, here, where)
        else:
            with code_of_files(trusted):
                complete = _run(path, overrides, resume, here, where)
    sys.exit(0 if complete else 1)


def suspect_of(own: Mapping[str, str | Path | None], about: Mapping[str, Any]) -> dict[str, object]:
    """A study's `suspect` from the command's options.

    Raises:
        StudyError: model, net or pictures are missing, or an option is none.
    """
    from bimask.inspection.words import numbers, size
    from study.spec.config import StudyError

    if missing := [f"--{key}" for key, value in own.items() if value is None]:
        raise StudyError(
            f"A suspect is given as --model, --net and --clean; {' and '.join(missing)} is missing."
        )
    suspect = {key: str(value) for key, value in own.items()}
    read = {
        **about,
        "image_size": size(about["image_size"]),
        "mean": numbers("--mean", about["mean"]),
        "std": numbers("--std", about["std"]),
    }
    return suspect | {key: value for key, value in read.items() if value is not None}


def _dry_run(study: Path, overrides: Mapping[str, object], outputs: Path) -> bool:
    from study.pipeline.dry_run import dry_run
    from study.report.console import wide_console

    dry_run(study, overrides, outputs=outputs, console=wide_console())
    return True


def _leave_out(
    study: Path, overrides: Mapping[str, object], which: str, outputs: Path, where: Where
) -> bool:
    from study.pipeline.leave_out import run_leave_out

    return run_leave_out(study, overrides, which, outputs=outputs, **where)


def _run(
    study: Path | None,
    overrides: Mapping[str, object],
    resume: str | None,
    outputs: Path,
    where: Where,
) -> bool:
    from study.pipeline.run import run_study

    return run_study(study, overrides, outputs=outputs, resume=resume, **where)


def send(
    address: str,
    study: Path | None,
    overrides: Mapping[str, object],
    outputs: Path | None,
    options: Mapping[str, object],
) -> int:
    """Send the study and the folder that we are in to a cluster; storage and MLflow are the head's.

    Args:
        options: of the command, by their names; None for a switch.

    Raises:
        StudyError: the study has mistakes or lies elsewhere, or the cluster does not take it.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
    from study.search.jobs import submit
    from study.spec.config import StudyError
    from study.spec.reading import load_config

    here = Path.cwd()
    if study is not None or "resume" not in options:
        load_config(study or DEFAULT, overrides)
    if study is not None and not study.resolve().is_relative_to(here):
        raise StudyError(
            f"The study {study} is not in {here}, the folder that is sent; start where it is."
        )
    words = ["python", "-m", "study.launch"]
    if study is not None:
        words.append(shlex.quote(str(study.resolve().relative_to(here))))
    for key, value in options.items():
        words += [f"--{key}", *([] if value is None else [shlex.quote(str(value))])]
    # What a job writes where it starts is removed some time after it.
    at_head = '"${BIMASK_OUTPUTS:-$HOME/outputs}"' if outputs is None else shlex.quote(str(outputs))
    return submit(address, [*words, "--outputs", at_head], folder=here, console=Console())


if __name__ == "__main__":
    typer.run(main)
