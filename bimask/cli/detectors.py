"""`python -m bimask purify` of a detector, which its clean data tell: they are annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from bimask.cli.suspects import Choice, read_settings, shown_warnings
from bimask.cli.terminal import console, progress_bar
from bimask.detection.before_after import look, require_knowing, risk_of
from bimask.detection.cleaned import save_cleaned
from bimask.detection.defences import DEFENCES
from bimask.detection.defences.base import Pictures
from bimask.detection.defences.risk import AdversarialRisk
from bimask.detection.metrics import DetectionSets, evaluate
from bimask.detection.nets.detector import Detector
from bimask.detection.objects import DetectionData
from bimask.detection.page import TRIGGERED, shown_of
from bimask.detection.purify import defence_of, purify
from bimask.detection.suspects import Suspect, hold_back, load_suspect
from bimask.detection.victims import load_victim
from bimask.detection.victims.as_suspect import held_back_of, suspect_of
from bimask.errors import DataError, ModelError, SettingError
from bimask.inspection.words import size, whole_numbers
from bimask.masking.copies import copied
from bimask.nets.cleaned import MODEL, REPORT

KNOWING = 32  # pictures, at most, that a suspect is asked before it is repaired
RISK_SEED = 1


@dataclass(frozen=True)
class Given:
    """What a detector is repaired with.

    Attributes:
        suspect: with the pictures to learn on.
        held: those to look at the result with; perhaps none.
        sets: what its trigger does on `test`, if it is known.
    """

    suspect: Suspect
    held: DetectionData
    sets: DetectionSets | None = None


def purify_detector(
    out: Path,
    config: Path | None,
    choice: Choice,
    *,
    pictures: Path | None,
    label_ids: str | None,
    clean_images_per_class: int,
    held_back: float,
    seed: int | None,
    inverse: bool,
    device: torch.device,
    trust_code: bool,
) -> None:
    """Repair a detector, and write its folder; arguments as of `purify_command`."""
    _refuse_classifiers_options(choice, inverse)
    default = next(iter(DEFENCES.values())).config()
    settings, seed = read_settings(config, seed, DEFENCES, default)
    if choice.victim is not None and (choice.model, choice.net, choice.clean) != (None, None, None):
        raise SettingError("Give your own detector as --model, --net and --clean, or a --victim.")
    if choice.victim is not None:
        given = _victim(choice.victim, clean_images_per_class, seed=seed, trust_code=trust_code)
    else:
        given = _own(choice, pictures, whole_numbers("--label-ids", label_ids), held_back)
    for note in given.suspect.notes:
        console.tell(f"note: {note}")
    learned, held = given.suspect.clean.to(device), given.held.to(device)
    model = copied(given.suspect.model).to(device).eval()
    assert isinstance(model, Detector)
    asked = held if len(held) else learned
    if odd := require_knowing(model, asked.subset(range(min(len(asked), KNOWING)))):
        console.tell(odd, mark="warning", style="bold yellow")
    with shown_warnings(UserWarning), progress_bar("steps", settings.steps(len(learned))) as advance:
        result = purify(
            model,
            learned,
            settings,
            generator=torch.Generator().manual_seed(seed),
            on_step=lambda _log: advance(1),
        )
    repaired = result.model()
    looks = {"learned": look(model, repaired, learned)}
    if not result.changed or looks["learned"].same:
        console.tell(
            "no weight moved, or none that the answers depend on, so the detector finds what it "
            "found before; nothing was written. Try other settings, or more pictures.",
            mark="nothing changed",
            style="bold red",
        )
        raise typer.Exit(1)
    if len(held):
        looks["held_back"] = look(model, repaired, held)
    risk, reason = _risk(model, held)
    scores = None
    if given.sets is not None:
        sets = given.sets.to(device)
        scores = {"before": evaluate(model, sets), "after": evaluate(repaired, sets)}
    manifest = save_cleaned(
        out,
        given.suspect,
        defence_of(settings).name,
        result,
        looks,
        shown_of(model, repaired, asked, _pictures_of(risk)),
        longest_side=max(learned.longest_side, held.longest_side),
        seed=seed,
        risk=None if risk is None else risk_of(risk, repaired),
        reason=reason,
        scores=scores,
    )
    _tables(manifest)
    console.tell(f"cleaned detector: {out / MODEL}")
    console.tell(f"report: {out / REPORT}")


def _own(
    choice: Choice, pictures: Path | None, label_ids: Sequence[int] | None, held_back: float
) -> Given:
    """A user's own detector."""
    if choice.model is None or choice.net is None:
        raise SettingError("Give your own detector as --model, --net and --clean, or a --victim.")
    assert choice.clean is not None
    with shown_warnings():
        suspect = load_suspect(
            choice.model,
            choice.net,
            choice.clean,
            pictures=pictures,
            outputs=choice.classes,
            label_ids=label_ids,
            width=choice.width,
            image_size=_side(choice.image_size),
        )
    learned, held = hold_back(suspect.clean, held_back)
    boxes = f"{choice.clean} has boxes, so the model is taken for a detector."
    return Given(replace(suspect, clean=learned, notes=(boxes, *suspect.notes)), held)


def _victim(folder: Path, clean_images_per_class: int, *, seed: int, trust_code: bool) -> Given:
    """A victim as its defender would have it: pictures of the training split, and of `val` to look."""
    victim = load_victim(folder, own_code=trust_code)
    splits = victim.load_data()
    suspect = suspect_of(victim, splits, clean_images_per_class, seed=seed)
    return Given(suspect, held_back_of(splits), victim.eval_sets(splits, "test"))


def _refuse_classifiers_options(choice: Choice, inverse: bool) -> None:
    """Say which options mean nothing for a detector."""
    given = {"--channels": choice.channels, "--mean": choice.mean, "--std": choice.std}
    odd = [name for name, value in given.items() if value is not None] + ["--inverse"] * inverse
    if odd:
        raise SettingError(
            f"{', '.join(odd)} mean nothing for a detector, which normalises colours in [0, 1] itself "
            "and has no inverse twin; leave them out."
        )


def _side(text: str | None) -> int | None:
    """The longest side that pictures are brought to."""
    found = size(text)
    if isinstance(found, tuple):
        raise SettingError(
            f"--image-size of a detector is the longest side of a picture, such as {max(found)}, got "
            f"{text!r}."
        )
    return found


def _risk(model: Detector, held: DetectionData) -> tuple[AdversarialRisk | None, str]:
    """What asks for held-out risk, or why there is none."""
    if not len(held):
        return None, "no pictures are held back; give a larger --held-back."
    pictures = Pictures(held.floats(), held.targets)
    try:
        with progress_bar("perturbing", AdversarialRisk.steps(len(held))) as advance:
            generator = torch.Generator().manual_seed(RISK_SEED)
            risk = AdversarialRisk.of(model, pictures, generator, on_step=lambda: advance(1))
            return risk, ""
    except (DataError, ModelError) as error:
        return None, str(error)


def _pictures_of(risk: AdversarialRisk | None) -> dict[str, Sequence[Tensor]]:
    """Perturbed pictures by branch."""
    return {} if risk is None else {weak.branch: weak.images for weak in risk.weak}


def _tables(manifest: dict[str, Any]) -> None:
    table = Table("on clean pictures", "mAP@50", "mAP@[.5:.95]", "pictures", "objects")
    for part, row in manifest["on_clean_pictures"].items():
        for name in ("before", "after"):
            precision = [f"{row[name][score]:.3f}" for score in ("map50", "map")]
            counts = [str(row[what]) for what in ("pictures", "objects")]
            table.add_row(f"{part.replace('_', ' ')}, {name}", *precision, *counts)
    console.print(table)
    if "after" in manifest:
        table = Table("with the known trigger, on test", *TRIGGERED)
        for name in ("before", "after"):
            table.add_row(name, *(f"{manifest[name][score]:.3f}" for score in TRIGGERED))
        console.print(table)
    if not manifest["risk"]:
        console.tell(f"risk was not measured: {manifest['no_risk']}")
        return
    table = Table("on pictures held back", "weak objects of the suspect", "still weak")
    for name, row in manifest["risk"]["branches"].items():
        share = "none" if row["share"] is None else f"{row['share']:.2f}"
        table.add_row(name, str(row["objects"]), share)
    table.add_row("risk, the mean", "", f"{manifest['risk']['risk']:.2f}")
    console.print(table)
