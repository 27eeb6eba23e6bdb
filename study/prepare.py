"""Before the first trial: is everything there, is there room, and the victims."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from bimask.commands.terminal import VictimBars, described
from bimask.trigger_pool import TriggerPool
from bimask.victim import obtain_victim
from study import search
from study.blind import make_probe, steps_of_probe
from study.config import StudyConfig, StudyError
from study.console import progress_bar
from study.suite import cases_of
from study.suspect import NAME, Subject, SuspectSpec
from study.trial import Case


def require_writable(outputs: Path) -> None:
    """Make `outputs`, or say in one sentence why nothing can be written there."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        probe = outputs / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StudyError(
            f"Cannot write to the folder {outputs} ({error.strerror}); give another with --outputs."
        ) from error


def find_room(config: StudyConfig, wait: float, console: Console) -> int:
    """How many actors run at once; the wait for the first worker is shown."""
    with console.status("asking for workers", spinner="dots") as status:
        began = time.monotonic()

        def on_wait() -> None:
            waited = (time.monotonic() - began) / 60
            status.update(f"waiting for the first worker, {waited:.0f} of {wait:g} minutes")

        return search.check_resources(config, wait=wait, on_wait=on_wait)


def check_data(config: StudyConfig) -> None:
    """Refuse data that are missing, too few or no match for attack or net, before any training."""
    if config.suspect is not None:
        config.suspect.load(config.clean_images_per_class)
    for spec in config.suite:
        splits = spec.load_data()
        splits.train.clean_subset(config.clean_images_per_class, seed=config.seed)
        attack = spec.build_attack()
        if not attack.has_state:  # else the trigger is made with the victim, and refused there
            attack.triggered(splits.val)
        spec.fresh_net(splits.train)


def prepare_victims(
    config: StudyConfig, root: Path, device: torch.device, console: Console
) -> dict[str, Subject]:
    """The study's suspect, or every victim, trained where it is not cached, with a bar of its epochs.

    Training uses as many threads as a trial, so that a victim does not depend on the machine's cores.
    """
    torch.set_num_threads(config.cpus_per_trial)
    if config.suspect is not None:
        return {NAME: _prepare_suspect(config.suspect, config.clean_images_per_class, console)}
    victims: dict[str, Subject] = {}
    with VictimBars(console) as bars:
        for name, spec in zip(config.suite_names(), config.suite, strict=True):
            bar = f"victim {name}"
            cached = (root / spec.digest).is_dir()
            victim = obtain_victim(
                spec,
                root,
                device=device,
                on_epoch=partial(bars.epoch, bar),
                on_prepare=partial(bars.preparing, bar),
            )
            origin = "cached" if cached else "given" if spec.given else "trained"
            bars.ended(bar, f"victim {name} ({origin}), {described(victim)}")
            victims[name] = victim
    return victims


def _prepare_suspect(spec: SuspectSpec, for_defence: int, console: Console) -> Subject:
    """The suspect, and in one sentence what its pictures can show."""
    suspect = spec.load(for_defence)
    val, test = suspect.scores["val"], suspect.scores["test"]
    console.print(
        f"suspect {spec.model}: ACC {val.clean_accuracy:.3f} on {val.n_clean} held-back pictures to "
        f"choose on, {test.clean_accuracy:.3f} on {test.n_clean} to report on, hence in steps of "
        f"{100 / val.n_clean:.1f} and {100 / test.n_clean:.1f} points; {for_defence} of each of "
        f"{len(suspect.classes)} classes are the defence's",
        soft_wrap=True,
        highlight=False,
    )
    return suspect


def prepare_cases(config: StudyConfig, victims: Mapping[str, Subject], console: Console) -> list[Case]:
    """The runs of a trial, each with the probe of its victim and with triggers to learn against."""
    torch.set_num_threads(config.cpus_per_trial)  # as for victims
    cases = cases_of(config, victims)
    probes, pools = {}, {}
    with progress_bar(console) as progress:
        for name, victim in {case.name: case.victim for case in cases}.items():
            task = progress.add_task(f"probing {name}", total=steps_of_probe(victim))
            on_step = partial(progress.advance, task)
            probes[name] = make_probe(victim, seed=config.seed, on_step=on_step)
        for case in cases if config.may_use("class_triggers") else []:
            steps = TriggerPool.steps(len(case.victim.classes), len(case.clean))
            task = progress.add_task(f"searching triggers for {case.key}", total=steps)
            on_step = partial(progress.advance, task)
            pools[case.key] = TriggerPool.search(case.victim.model, case.clean, on_step=on_step)
    return [replace(case, probe=probes[case.name], pool=pools.get(case.key)) for case in cases]
