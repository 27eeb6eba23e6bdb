"""Before the first trial: is everything there, is there room, and the victims."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bimask.defences.base import Preparation
from bimask.devices import moved
from bimask.errors import BimaskError
from bimask.nets import may_run
from bimask.progress import Console, ToldProgress
from bimask.tasks import Probe
from bimask.victims.progress import VictimBars
from study import search
from study.spec.config import StudyConfig, StudyError
from study.spec.suspect import NAME, Subject, SuspectSpec
from study.trial.cases import Case
from study.trial.suite import cases_of


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


@contextmanager
def _named(victim: str) -> Iterator[None]:
    """What is refused says of which victim; a study may have hundreds."""
    try:
        yield
    except BimaskError as error:
        if victim == NAME:  # there is one suspect
            raise
        raise StudyError(f"The victim {victim}: {error}") from error


def check_images(config: StudyConfig) -> None:
    """Refuse data that are missing, too few or no match for attack or net, before any training.

    Raises:
        BimaskError: naming the first.
    """
    if config.suspect is not None and not may_run(config.suspect.net):
        config.suspect.load_data(config.clean_images_per_class)
    for name, spec in zip(config.suite_names(), config.suite, strict=config.suspect is None):
        with _named(name):
            splits = spec.load_data()
            splits.train.clean_subset(config.clean_images_per_class, seed=config.seed)
            config.task.check_data(spec, splits)


def check_data(config: StudyConfig) -> None:
    """`check_images`, and refuse nets that a defence of the study can do nothing for.

    Where the code of own nets may not run (`bimask.nets.code_of_files`), these are asked nothing.

    Raises:
        BimaskError: naming the first.
    """
    check_images(config)
    for name, net, images in untrained(config):
        for defence in map(config.task.defences.__getitem__, config.defenders):
            with _named(name):
                defence.check(net, images)


def untrained(config: StudyConfig) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The nets of a study before any training that may be asked, with whose they are (`NAME` of the
    suspect) and two images."""
    if config.suspect is not None:
        if may_run(config.suspect.net):
            suspect = config.suspect.load(config.clean_images_per_class)
            yield NAME, suspect.model, suspect.load_data().val.floats()[:2]
        return
    for name, spec in zip(config.suite_names(), config.suite, strict=True):
        if may_run(spec.net):
            with _named(name):
                splits = spec.load_data()
                net = config.task.fresh_net(spec, splits.train).eval()
            yield name, net, splits.val.floats()[:2]


def prepare_victims(
    config: StudyConfig,
    root: Path,
    device: torch.device,
    console: Console,
    *,
    storage: str | None = None,
) -> dict[str, Subject]:
    """The study's suspect, or every victim, trained where it is not cached, with a bar of its epochs.

    Training uses as many threads as a trial, so that a victim does not depend on the machine's cores.

    Args:
        storage: folder or URI where studies share what they trained; None shares nothing.
    """
    torch.set_num_threads(config.cpus_per_trial)
    if config.suspect is not None:
        return {NAME: _prepare_suspect(config.suspect, config.clean_images_per_class, console)}
    victims: dict[str, Subject] = {}
    shared = search.SharedVictims(root, storage)
    with VictimBars(console, config.task.in_short) as bars:
        for name, spec in zip(config.suite_names(), config.suite, strict=True):
            bar = f"victim {name}"
            origin = _origin(spec, root, shared)
            with _named(name):
                victim = config.task.obtain_victim(
                    spec,
                    root,
                    device=device,
                    on_epoch=partial(bars.epoch, bar),
                    on_prepare=partial(bars.preparing, bar),
                )
            if origin == "trained":
                shared.share(spec.digest)
            told = f"{spec.digest}: on test {config.task.told(victim.scores['test'])}"
            bars.ended(bar, f"victim {name} ({origin}), {told}")
            victims[name] = victim
    return victims


def _origin(spec: Any, root: Path, shared: search.SharedVictims) -> str:
    """Where a victim comes from; one that another study has shared is brought here."""
    if (root / spec.digest).is_dir():
        return "cached"
    if spec.given:
        return "given"
    return "fetched" if shared.fetch(spec.digest) else "trained"


def _prepare_suspect(spec: SuspectSpec, for_defence: int, console: Console) -> Subject:
    """The suspect, and in one sentence what its pictures can show."""
    suspect = spec.load(for_defence)
    val, test = suspect.scores["val"], suspect.scores["test"]
    console.tell(
        f"suspect {spec.model}: ACC {val.clean_accuracy:.3f} on {val.n_clean} held-back "
        f"pictures to choose on, {test.clean_accuracy:.3f} on {test.n_clean} to report on, hence in "
        f"steps of {100 / val.n_clean:.1f} and {100 / test.n_clean:.1f} points; {for_defence} of each "
        f"of {len(suspect.classes)} classes are the defence's"
    )
    for note in suspect.notes:
        console.tell(f"note: {note}")
    return suspect


@dataclass(frozen=True)
class _Piece:
    """Something that is made of a victim before the first trial.

    Attributes:
        make: (model, images, on_step=...) -> what is made; `on_step` is called `steps` times.
        victim: its name.
    """

    doing: str
    make: Callable[..., Any]
    victim: str
    images: Any
    steps: int


def prepare_cases(
    config: StudyConfig,
    victims: Mapping[str, Subject],
    console: Console,
    *,
    workers: int = 0,
    joined: bool = False,
) -> list[Case]:
    """The runs of a trial, each with the probe of its victim and what the defence makes of it.

    Args:
        workers: that make them, where there are several of both; with none, this process does.
        joined: the workers are of a cluster elsewhere, and do it in any case: they may have GPUs.

    Raises:
        BimaskError: what refuses a victim or its images; StudyError where a worker died of it.
    """
    cases = cases_of(config, victims)
    probe = config.task.probe
    pieces = (
        {} if probe is None else {("probe", c.name): _probe_of(probe, c, config.seed) for c in cases}
    )
    for name, preparation in preparations(config).items():
        pieces |= {(name, case.key): _prepared(preparation, case) for case in cases}
    elsewhere = workers > 0 and (joined or min(workers, len(pieces)) > 1)
    make = _made_by_workers if elsewhere else _made_here
    made = dict(zip(pieces, make(config, list(pieces.values()), victims, console), strict=True))
    return [
        replace(
            case,
            probe=made.get(("probe", case.name)),
            prepared={
                name: made[name, case.key] for name in config.defenders if (name, case.key) in made
            },
        )
        for case in cases
    ]


def preparations(config: StudyConfig) -> dict[str, Preparation]:
    """Defence -> what it makes of a victim beforehand, of those that a trial may have and that need
    it."""
    defenders = config.defenders
    found = {
        name: config.task.defences[name].preparation(
            lambda setting, name=name: config.may_use(defenders.flat(name, setting))  # type: ignore[misc]
        )
        for name in defenders
    }
    return {name: made for name, made in found.items() if made is not None}


def _probe_of(probe: Probe, case: Case, seed: int) -> _Piece:
    images = probe.images(case.victim.load_data().val, seed)
    steps = probe.steps(len(case.victim.classes), images)
    return _Piece(f"probing {case.name}", probe.make, case.name, images, steps)


def _prepared(preparation: Preparation, case: Case) -> _Piece:
    steps = preparation.steps(len(case.victim.classes), len(case.clean))
    doing = f"{preparation.doing} for {case.key}"
    return _Piece(doing, preparation.make, case.name, case.clean, steps)


def _made_here(
    config: StudyConfig, pieces: Sequence[_Piece], victims: Mapping[str, Subject], console: Console
) -> list[Any]:
    torch.set_num_threads(config.cpus_per_trial)  # as for victims
    with ToldProgress(console) as progress:
        made = []
        for piece in pieces:
            bar = progress.add_task(piece.doing, total=piece.steps)
            on_step = partial(progress.advance, bar)
            with _named(piece.victim):
                made.append(piece.make(victims[piece.victim].model, piece.images, on_step=on_step))
    return made


def _made_by_workers(
    config: StudyConfig, pieces: Sequence[_Piece], victims: Mapping[str, Subject], console: Console
) -> list[Any]:
    made: dict[int, Any] = {}
    with ToldProgress(console) as progress:
        bar = progress.add_task("probing victims, preparing the defence", total=len(pieces))

        def ended(at: int, result: Any) -> None:
            if isinstance(result, BimaskError):
                with _named(pieces[at].victim):
                    raise result
            if isinstance(result, search.LostTaskError):
                raise StudyError(
                    f"No worker ended {pieces[at].doing} ({result}); look at the nodes' memory, and "
                    "launch again."
                )
            made[at] = result
            progress.advance(bar)

        models = ((name, copy.deepcopy(victim.model).cpu()) for name, victim in victims.items())
        given = [(p.victim, p.make, moved(p.images, "cpu"), config.device_of_a_trial) for p in pieces]
        search.run_tasks(config, _make, models, given, ended)
    return [made[at] for at in range(len(pieces))]


def _make(model: nn.Module, make: Callable[..., Any], images: Any, device: str) -> Any:
    try:
        there = copy.deepcopy(model).to(device)  # what Ray hands out is shared by all tasks of a node
        return make(there, moved(images, device)).to("cpu")
    except BimaskError as error:
        return error
