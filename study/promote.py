"""`python -m study.promote NAME`: hand a study's configuration to production, if its gates hold."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from bimask.commands import TrustCode, refusals
from bimask.nets import code_of_files
from bimask.progress import Console
from bimask.victims import Victim
from study.promotion.candidate import (
    Candidate,
    confirm_trial,
    load_victims,
    read_candidate,
    verdicts_of,
)
from study.promotion.evidence import Verdict
from study.spec.config import StudyError
from study.store.records import fitting_together

if TYPE_CHECKING:
    from study.promotion.registry import Registry, Version


def beats(tags: Mapping[str, str], champion: Version | None) -> tuple[bool, str]:
    """Whether a candidate takes the alias, and one sentence why."""
    if champion is None:
        return True, "there is no champion yet"
    theirs = champion.tags
    if theirs.get("victims_digest") != tags["victims_digest"]:
        return False, (
            f"champion {champion.number} was judged on other victims, so the two cannot be compared; "
            "run both configurations in a study on the same victims"
        )

    def rank(of: Mapping[str, str]) -> tuple[float, float]:
        return float(of["test.attack_success"]), float(of["test.accuracy_drop"])

    mine, other = rank(tags), rank(theirs)
    numbers = f"ASR {mine[0]:.4f} v {other[0]:.4f}, drop on clean inputs {mine[1]:.4f} v {other[1]:.4f}"
    return mine < other, f"against champion {champion.number} on the same victims: {numbers}"


def apply(
    candidate: Candidate,
    verdicts: list[Verdict],
    victims: dict[str, Victim],
    victim_name: str | None,
    registry: Registry,
    console: Console,
) -> None:
    """Register the candidate unless it is there, and crown it if it beats the champion."""
    from study.promotion.packing import card_of, packed, tags_of
    from study.tracking.mlflow_runs import Tracker

    same = [one for one in registry.versions() if one.tags.get("candidate") == candidate.digest]
    if same:
        console.tell(f"{registry.name} version {same[-1].number} is this candidate: nothing to do")
        return
    name = victim_name or candidate.config.victim_names()[0]
    if name not in victims:
        raise StudyError(f"The study has no victim {name!r}; it has {', '.join(victims)}.")
    tags = tags_of(candidate, name, victims[name])
    with packed(candidate, name, victims[name]) as (model, files):
        tracker = Tracker(registry.uri, candidate.folder.parent / "mlartifacts")
        card = card_of(candidate, verdicts, name)
        one = registry.register(model, tracker, tags, card, files)
    console.tell(f"registered: {registry.name} version {one.number}")
    better, why = beats(tags, registry.champion())
    if better:
        registry.set_champion(one)
    console.tell(f"champion: {'now' if better else 'not'} version {one.number}; {why}")


def show_verdicts(candidate: Candidate, verdicts: list[Verdict], console: Console) -> None:
    """The gates as a table, and what to do about those that fail."""
    table = Table(
        title=f"trial {candidate.number} of {candidate.folder.name} (test, worst victim)",
        title_justify="left",
    )
    for column in ("gate", "value", "limit", "verdict"):
        table.add_column(column)
    for one in verdicts:
        style = "green" if one.passed else "bold red"
        verdict = Text("passed" if one.passed else "FAILED", style)
        table.add_row(one.gate, one.value, one.limit, verdict)
    console.print(table)
    for one in verdicts:
        if one.remark:
            console.tell(f"{one.gate}: {one.remark}")


def main(
    study: Annotated[str, typer.Argument(metavar="NAME", help="Of a finished study.")],
    trial: Annotated[int | None, typer.Option(help="Instead of the chosen one.")] = None,
    apply_: Annotated[bool, typer.Option("--apply", help="Register; else only show.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Back to the champion before.")] = False,
    confirm_: Annotated[
        bool, typer.Option("--confirm", help="First purify every victim with several seeds.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--as", help="Name of the registered model; default: the study's.")
    ] = None,
    victim: Annotated[str | None, typer.Option(help="Which is purified; default: the first.")] = None,
    outputs: Annotated[Path, typer.Option(help="Where studies are.")] = Path("outputs"),
    trust_code: TrustCode = False,
) -> None:
    """Judge a study's configuration by its gates; with --apply, register it and what it purified."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    with refusals(), code_of_files(trust_code):
        held = promote(study, trial, apply_, rollback, confirm_, model, victim, outputs, console)
    sys.exit(0 if held else 1)


def promote(
    study: str,
    trial: int | None,
    apply_: bool,
    rollback: bool,
    confirm_: bool,
    model: str | None,
    victim: str | None,
    outputs: Path,
    console: Console,
) -> bool:
    """What `main` does; whether every gate holds."""
    from study.promotion.registry import Registry  # mlflow: after --help and usage errors
    from study.tracking.mlflow_runs import tracking_uri

    if rollback:
        before, now = Registry(tracking_uri(outputs), model or study).rollback()
        console.tell(f"champion: version {now} again, no longer {before}")
        return True
    with fitting_together(outputs / study):
        candidate = read_candidate(study, outputs, trial)
    if confirm_:
        confirm_trial(candidate, load_victims(candidate.config, outputs), console)
        candidate = read_candidate(study, outputs, trial)
    with fitting_together(outputs / study):
        verdicts = verdicts_of(candidate)
    show_verdicts(candidate, verdicts, console)
    if not all(one.passed for one in verdicts):
        console.tell("a gate fails", mark="not promoted", style="bold red")
        return False
    if not apply_:
        console.tell("every gate holds; nothing was registered: add --apply")
        return True
    victims = load_victims(candidate.config, outputs)
    registry = Registry(tracking_uri(outputs), model or study)
    apply(candidate, verdicts, victims, victim, registry, console)
    return True


if __name__ == "__main__":
    typer.run(main)
