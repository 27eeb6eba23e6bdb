"""A promoted trial as a model to register: purified, packed, asked, described."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from bimask.cleaned.before_after import before_after
from bimask.cleaned.folder import load_cleaned, save_cleaned
from bimask.defences.base import DefenceResult, Passes
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.purify import defend
from bimask.defences.simple import Defended, Step
from bimask.errors import ExportError
from bimask.files.bounded import dump_yaml
from bimask.files.tensors import read_tensors
from bimask.metrics import evaluate
from bimask.victims import Victim
from bimask.victims.as_suspect import suspect_of
from study.promotion.candidate import Candidate
from study.promotion.evidence import Verdict
from study.promotion.registry import as_png, save_model
from study.spec.config import StudyError
from study.store import records

SERVED = 1e-5  # what a probability may differ by between the packed model and the one in memory


@contextmanager
def packed(candidate: Candidate, name: str, victim: Victim) -> Iterator[tuple[Path, list[Path]]]:
    """A purified victim as a model ready to register, in a folder that goes away again; with its report
    and manifest. What the trial stored is taken, and the defence is run where that is not there.

    Raises:
        ExportError: the packed model answers otherwise than the purified one.
    """
    config, settings = candidate.config, candidate.settings
    splits = victim.spec.load_data()
    suspect = suspect_of(victim, splits, config.clean_images_per_class, seed=config.seed)
    images = suspect.clean.floats()
    model, labels = copy.deepcopy(victim.model), suspect.clean.labels
    result = stored(candidate, name, model)
    if result is None:
        generator = torch.Generator().manual_seed(config.seed)
        result = defend(model, images, settings, labels=labels, generator=generator)
    purified, twin = result.model(), candidate.defence.twin(model, result.tensors, settings)
    own = settings if isinstance(settings, PurifyConfig) else None
    looked = before_after(model, purified, images, labels, twin=twin, config=own)
    test = victim.eval_sets(splits, "test")
    scores = {"before": evaluate(model, test), "after": evaluate(purified, test)}
    with tempfile.TemporaryDirectory(prefix="bimask-promote-") as temporary:
        cleaned, best = Path(temporary) / "cleaned", Path(temporary) / records.BEST
        save_cleaned(cleaned, suspect, result, looked, seed=config.seed, scores=scores)
        records.write_yaml(
            best,
            {"defence": candidate.defence.name, "purify": settings.model_dump(), "seed": config.seed}
            | {"study": candidate.folder.name, "trial": candidate.number},
            f"trial {candidate.number} of study {candidate.folder.name}, promoted on victim {name}",
        )
        packed_model = Path(temporary) / "model"
        loaded = save_model(packed_model, cleaned, best, suspect.clean.images[0])
        asked = splits.test.images[:64]
        answers: Any = loaded.predict([as_png(image) for image in asked])
        got = torch.tensor([list(answer["probabilities"].values()) for answer in answers])
        in_memory = load_cleaned(cleaned, own_code=True).model
        with torch.no_grad():
            error = (got - in_memory(asked.float() / 255).softmax(1)).abs().max().item()
        if not error <= SERVED:
            raise ExportError(
                f"The packed model answers otherwise than the purified one: probabilities differ by "
                f"{error:.3g}, {SERVED:g} is allowed; nothing was registered."
            )
        yield packed_model, [cleaned / "report.html", cleaned / "manifest.json", best]


def stored(candidate: Candidate, name: str, model: nn.Module) -> DefenceResult | None:
    """What the trial's first run on a victim ended with: it had the study's seed and the same images.

    Returns:
        None for a victim that no trial had, and where an earlier version stored it.
    """
    defence, folder = candidate.defence, candidate.folder / "trials"
    path = folder / f"{candidate.number:03d}" / f"{name}.{defence.stem}.safetensors"
    rounds = path.with_name(f"{name}.rounds.json")
    if not path.is_file() or not rounds.is_file():
        return None
    try:
        tensors, cost = read_tensors(path)
        if "seconds" not in cost:
            return None
        passes, seconds = Passes(int(cost["forward"]), int(cost["backward"])), float(cost["seconds"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{path} cannot be read ({error}); run the trial again with `python -m study.launch "
            f"{' '.join(candidate.config.resuming)}`."
        ) from error
    history = tuple(
        Step(log["step"], log["losses"], log["loss"]) for log in records.read_rounds(rounds)
    )
    return Defended(defence, model, candidate.settings, tensors, {}, history, passes, seconds)


def tags_of(candidate: Candidate, victim_name: str, victim: Victim) -> dict[str, str]:
    """Where a version comes from and what it was judged by, as MLflow tags."""
    assert candidate.evidence is not None
    attack_success, accuracy_drop = candidate.evidence.rank()
    return {
        "candidate": candidate.digest,
        "study": candidate.folder.name,
        "study_digest": candidate.config.digest,
        "trial": str(candidate.number),
        "commit": candidate.commits[2],
        "trial_commit": candidate.commits[1],
        "seed": str(candidate.config.seed),
        "purified_victim": victim_name,
        "victim_digest": victim.spec.digest,
        "victims_digest": candidate.evidence.victims_digest,
        "test.attack_success": f"{attack_success:.6f}",
        "test.accuracy_drop": f"{accuracy_drop:.6f}",
    }


def card_of(candidate: Candidate, verdicts: list[Verdict], victim_name: str) -> str:
    """The model card, as Markdown: what it is, what it is for, what was measured, what it is not."""
    assert candidate.evidence is not None
    rows = "\n".join(
        f"| {name} | {v['role']} | {v['accuracy_drop']['mean']:.4f} "
        f"| {v['attack_success']['mean']:.4f} | {v['attack_success']['std']:.4f} "
        f"| {v['attack_success']['n']} |"
        for name, v in candidate.evidence.victims.items()
        if "attack_success" in v
    )
    gates = "\n".join(f"| {v.gate} | {v.value} | {v.limit} |" for v in verdicts)
    per_class = candidate.config.clean_images_per_class
    settings = indent(dump_yaml(candidate.settings.model_dump()), "    ")  # no text can end it
    return f"""# Trial {candidate.number} of the study {candidate.folder.name}

A configuration of the defence `{candidate.defence.name}`, and the victim `{victim_name}`
purified with it. Images in, as arrays (height, width, channels) or PNGs in base64; classes and
probabilities out.

**Meant for** purifying models like the study's victims with {per_class} clean images a class.
**Not known:** what it does to other nets, data and attacks than those below.

## Measured on test, each victim purified anew with every seed

| victim | role | accuracy drop | attack success | its deviation | seeds |
|---|---|---|---|---|---|
{rows}

## Gates

| gate | value | limit |
|---|---|---|
{gates}

## Configuration

{settings}
"""
