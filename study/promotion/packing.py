"""A promoted trial as a model to register: purified, packed, asked, described."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from bimask.defences.base import DefenceResult, Passes
from bimask.defences.simple import Defended, Step
from bimask.errors import ExportError
from bimask.files.bounded import dump_yaml
from bimask.files.tensors import read_tensors
from bimask.tasks import defend, load_predictor
from bimask.victims import Victim
from study.promotion.candidate import Candidate
from study.promotion.evidence import Verdict
from study.promotion.registry import as_png, save_model
from study.spec.config import StudyError
from study.store import records

SERVED = 1e-5  # what a number may differ by between answers of the packed model and the one in memory
ASKED = 64  # images of `test`


@contextmanager
def packed(candidate: Candidate, name: str, victim: Victim) -> Iterator[tuple[Path, list[Path]]]:
    """A purified victim as a model ready to register, in a folder that goes away again; with its report
    and manifest. What the trial stored is taken, and the defence is run where that is not there.

    Raises:
        ExportError: the packed model answers otherwise than the purified one.
    """
    config, settings, task = candidate.config, candidate.settings, candidate.config.task
    splits, model = victim.spec.load_data(), copy.deepcopy(victim.model)
    clean = splits.train.clean_subset(config.clean_images_per_class, seed=config.seed)
    result = stored(candidate, name, model)
    if result is None:
        generator = torch.Generator().manual_seed(config.seed)
        result = defend(model, clean.floats(), settings, labels=clean.labels, generator=generator)
    with tempfile.TemporaryDirectory(prefix="bimask-promote-") as temporary:
        cleaned, best = Path(temporary) / "cleaned", Path(temporary) / records.BEST
        task.save_cleaned(
            cleaned,
            victim,
            splits,
            result,
            clean_images_per_class=config.clean_images_per_class,
            seed=config.seed,
        )
        records.write_yaml(
            best,
            records.content_of(config, candidate.defence.name, settings)
            | {"study": candidate.folder.name, "trial": candidate.number},
            f"trial {candidate.number} of study {candidate.folder.name}, promoted on victim {name}",
        )
        packed_model = Path(temporary) / "model"
        loaded = save_model(packed_model, cleaned, best, clean.images[0])
        asked = splits.test.images[:ASKED]
        answers = loaded.predict([as_png(image) for image in asked])
        in_memory = load_predictor(cleaned, own_code=True)
        error = apart(answers, in_memory([image.permute(1, 2, 0).numpy() for image in asked]))
        if not error <= SERVED:
            raise ExportError(
                f"The packed model answers otherwise than the purified one: numbers differ by "
                f"{error:.3g}, {SERVED:g} is allowed; nothing was registered."
            )
        yield packed_model, [cleaned / "report.html", cleaned / "manifest.json", best]


def apart(one: Any, other: Any) -> float:
    """The largest difference between two numbers at the same place of two answers; infinite where they
    differ in anything else, NaN where a number is."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        one, other = list(one.values()), [other[name] for name in one]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = torch.tensor([0.0, *map(apart, one, other)])
        return float(found.max())  # of torch, which keeps NaN
    return 0.0 if type(one) is type(other) and one == other else math.inf


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
    per_class, task = candidate.config.clean_images_per_class, candidate.config.task
    settings = indent(dump_yaml(candidate.settings.model_dump()), "    ")  # no text can end it
    return f"""# Trial {candidate.number} of the study {candidate.folder.name}

A configuration of the defence `{candidate.defence.name}`, and the victim `{victim_name}`
purified with it. Images in, as arrays (height, width, channels) or PNGs in base64;
{task.answers} out.

**Meant for** purifying models like the study's victims with {per_class} clean images a class.
**Not known:** what it does to other nets, data and attacks than those below.

## Measured on test, each victim purified anew with every seed

| victim | role | {task.price} drop | attack success | its deviation | seeds |
|---|---|---|---|---|---|
{rows}

## Gates

| gate | value | limit |
|---|---|---|
{gates}

## Configuration

{settings}
"""
