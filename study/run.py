"""A study from start to end: check, victims, search, choice, report on `test`."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bimask.commands.terminal import VictimBars, described
from bimask.devices import resolve_device
from bimask.victim import Victim, obtain_victim
from study import records, search
from study.config import StudyConfig, StudyError, load_config
from study.console import show, trial_progress
from study.pareto import OBJECTIVES
from study.plots import draw_victims
from study.provenance import commit, versions
from study.summary import FRONT_PICTURE, summarise
from study.tracking import Tracker, redacted, require_server, tracking_uri
from study.trial import Case

VICTIM_PICTURES = "victims"


def run_study(path: Path, overrides: dict[str, Any], *, outputs: Path, address: str | None) -> bool:
    """Run the study in a YAML file; everything it leaves is under `outputs`.

    Returns:
        Whether any trial was COMPLETE.

    Raises:
        BimaskError: before the first trial, for anything that would make the study fail.
    """
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 140)  # tables whole in a log
    config = load_config(path, overrides)
    device = resolve_device(config.device)
    require_writable(outputs)
    name, folder = records.new_folder(outputs, config.name, chosen_by_user="name" in overrides)
    config = config.model_copy(update={"name": name})

    uri = tracking_uri(outputs)
    require_server(uri)
    check_data(config)
    search.start_ray(address)
    try:
        concurrency = search.check_resources(config)
        console.print(
            f"[bold]{name}[/]: {config.trials} trials, MLflow at {redacted(uri)}", soft_wrap=True
        )
        victims = prepare_victims(config, outputs / "victims", device, console)
        cases = [Case.of(name, victim, config) for name, victim in victims.items()]
        tracker = Tracker(uri, outputs / "mlartifacts")
        _begin(config, folder, tracker, victims)
        try:
            draw_victims(folder / VICTIM_PICTURES, cases)
            tracker.log_folder(folder / VICTIM_PICTURES)
            searching = time.perf_counter()
            digests = {name: victim.spec.digest for name, victim in victims.items()}
            at_once = min(config.trials, concurrency * config.trials_per_actor)
            with trial_progress(console, config.trials, at_once) as on_change:
                recorder = records.Recorder(config, folder, tracker, digests, on_change)
                search.run_search(config, cases, recorder, folder=folder, concurrency=concurrency)
            wall = time.perf_counter() - searching
            summary = summarise(config, folder, recorder.records, victims)
            in_trials = sum(record.get("seconds", 0.0) for record in recorder.records)
            summary["seconds"] = {
                "total": time.perf_counter() - started,
                "in_trials": in_trials,
                "harness": max(0.0, wall * concurrency - in_trials),
            }
            (folder / records.SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
            close(tracker, folder, summary)
        except BaseException:
            tracker.abort("the study was stopped")
            raise
    finally:
        search.stop_ray()
    show(console, config, summary, tracker, outputs / "victims", folder)
    return bool(summary["n_complete"])


def _begin(config: StudyConfig, folder: Path, tracker: Tracker, victims: dict[str, Victim]) -> None:
    """Open the parent run, then the study's folder with its resolved study.yaml."""
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise StudyError(
            f"{folder} was made by another study in the meantime; choose another --name."
        ) from error
    try:
        tracker.start_study(
            config.name,
            {"trials": config.trials, "seed": config.seed, "sampler": config.sampler}
            | {"selection": config.selection, "victims": ", ".join(victims)},
            {"study": config.name, "study_digest": config.digest, "commit": commit()}
            | {"objectives": json.dumps(OBJECTIVES)}
            | {f"victim.{name}": victim.spec.digest for name, victim in victims.items()}
            | {f"version.{package}": number for package, number in versions().items()},
        )
    except BaseException:
        folder.rmdir()
        raise
    header = f"study {config.name}, resolved"
    records.write_yaml(folder / records.STUDY, config.model_dump(), header)


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


def check_data(config: StudyConfig) -> None:
    """Refuse data that are missing, too few or no match for attack or net, before any training."""
    for spec in config.victims:
        splits = spec.load_data()
        splits.train.clean_subset(config.clean_images_per_class, seed=config.seed)
        attack = spec.build_attack()
        if not attack.has_state:  # else the trigger is made with the victim, and refused there
            attack.triggered(splits.val)
        spec.fresh_net(splits.train)


def prepare_victims(
    config: StudyConfig, root: Path, device: torch.device, console: Console
) -> dict[str, Victim]:
    """Every victim of the study, trained where it is not cached, with a bar of its epochs.

    Training uses as many threads as a trial, so that a victim does not depend on the machine's cores.
    """
    torch.set_num_threads(config.cpus_per_trial)
    victims = {}
    with VictimBars(console) as bars:
        for name, spec in zip(config.victim_names(), config.victims, strict=True):
            bar = f"victim {name}"
            cached = (root / spec.digest).is_dir()
            victims[name] = obtain_victim(
                spec,
                root,
                device=device,
                on_epoch=partial(bars.epoch, bar),
                on_prepare=partial(bars.preparing, bar),
            )
            given = spec.weights is not None or spec.imported is not None
            origin = "cached" if cached else "given" if given else "trained"
            bars.ended(bar, f"victim {name} ({origin}), {described(victims[name])}")
    return victims


def close(tracker: Tracker, folder: Path, summary: dict[str, Any]) -> None:
    """The summary in MLflow's parent run."""
    metrics = {"hypervolume": summary["hypervolume"], "n_failed": summary["n_failed"]}
    if summary["chosen"]:
        metrics |= {f"chosen/{name}": value for name, value in summary["chosen"]["val"].items()}
        metrics |= {f"chosen/test/{n}": value for n, value in summary["chosen"]["test"].items()}
    names = (FRONT_PICTURE, records.SUMMARY, records.STUDY, records.BEST)
    tracker.end_study(
        metrics=metrics,
        artifacts=[folder / name for name in names if (folder / name).is_file()],
        failed=not summary["n_complete"],
    )
