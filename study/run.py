"""A study from start to end: check, victims, search, choice, report on `test`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file

from bimask.config import PurifyConfig
from bimask.devices import resolve_device
from bimask.metrics import Scores, evaluate
from bimask.nets import is_own
from bimask.victim import EpochLog, Victim, obtain_victim
from study import records, search
from study.config import StudyConfig, StudyError, load_config
from study.pareto import OBJECTIVES, ParetoFront, choose
from study.plots import draw_front, draw_victims
from study.provenance import commit, versions
from study.tracking import Tracker, redacted, require_server, tracking_uri
from study.trial import SCORES, Case, purified

FRONT_PICTURE, VICTIM_PICTURES = "front.png", "victims"


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
    for name, spec in zip(config.victim_names(), config.victims, strict=True):
        cached = (root / spec.digest).is_dir()
        known = cached or spec.weights is not None
        with _bar(console) as progress:
            task = progress.add_task(f"victim {name}", total=spec.epochs, visible=not known)

            def on_epoch(log: EpochLog) -> None:
                text = f"victim {name}"  # noqa: B023
                if log.scores is not None:
                    text += (
                        f"  ACC {log.scores.clean_accuracy:.3f}  ASR {log.scores.attack_success:.3f}"
                    )
                progress.update(task, completed=log.epoch, description=text)  # noqa: B023

            victims[name] = obtain_victim(spec, root, device=device, on_epoch=on_epoch)
        scores = victims[name].scores["test"]
        origin = "cached" if cached else "trained" if spec.weights is None else "given"
        console.print(
            f"victim {name} ({origin}, {spec.digest}): on test ACC "
            f"{scores.clean_accuracy:.3f}, ASR {scores.attack_success:.3f}, RA {scores.recovery:.3f}"
        )
    return victims


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def trial_progress(
    console: Console, trials: int, at_once: int
) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A bar of finished trials with the best scores so far."""
    with _bar(console) as progress:
        task = progress.add_task(f"trials, {at_once} at once", total=trials)

        def on_change(done: list[dict[str, Any]]) -> None:
            complete = [r for r in done if r["status"] == "COMPLETE"]
            text = f"trials, {at_once} at once"
            if complete:
                best = min(complete, key=lambda r: r["attack_success"])
                text += f"; least ASR {best['attack_success']:.3f} at ACC {best['clean_accuracy']:.3f}"
            if failed := len(done) - len(complete):
                text += f"; {failed} failed"
            progress.update(task, completed=len(done), description=text)

        yield on_change


def summarise(
    config: StudyConfig, folder: Path, trials: list[dict[str, Any]], victims: dict[str, Victim]
) -> dict[str, Any]:
    """Front, hypervolume, chosen trial with its `test` scores; writes best.yaml and the picture."""
    complete = sorted((t for t in trials if t["status"] == "COMPLETE"), key=lambda t: int(t["number"]))
    front = ParetoFront.of(complete)
    before = {
        name: sum(getattr(victim.scores["val"], name) for victim in victims.values()) / len(victims)
        for name in SCORES
    }
    bound = before["clean_accuracy"] - config.choose.max_accuracy_drop
    position = choose(complete, min_clean_accuracy=bound)
    chosen = None if position is None else complete[position]
    paper = next((t for t in complete if t["preset"] == search.PAPER), None)
    on_front = [complete[i] for i in front.indices]
    draw_front(
        folder / FRONT_PICTURE,
        title=f"{config.name}: {len(complete)} trials on {', '.join(victims)}",
        trials=complete,
        front=[t["number"] for t in on_front],
        chosen=None if chosen is None else chosen["number"],
        victim=before,
        min_clean_accuracy=bound,
    )
    summary: dict[str, Any] = {
        "name": config.name,
        "n_trials": len(trials),
        "n_complete": len(complete),
        "n_failed": len(trials) - len(complete),
        "hypervolume": front.hypervolume(config.reference_point.model_dump()),
        "reference_point": config.reference_point.model_dump(),
        "front": [_point(t) for t in on_front],
        "chosen": chosen and _measured(config, folder, chosen, victims),
        "paper_defaults": paper and _measured(config, folder, paper, victims),
        "victims": {
            name: {"digest": victim.spec.digest}
            | {split: asdict(scores) for split, scores in victim.scores.items()}
            for name, victim in victims.items()
        },
        "min_clean_accuracy": bound,
    }
    if chosen is not None:
        settings = _settings(config, chosen)
        records.write_yaml(
            folder / records.BEST,
            {"purify": settings.model_dump(), "seed": config.seed}
            | {"study": config.name, "trial": chosen["number"]},
            f"trial {chosen['number']} of study {config.name}\n"
            "use: python -m bimask purify --victim VICTIM --config THIS_FILE --out CLEANED",
        )
    return summary


def _point(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial as it stands in the summary: number, parameters and scores on val."""
    return {
        "number": trial["number"],
        "parameters": trial["parameters"],
        "val": {name: trial[name] for name in SCORES},
    }


def _settings(config: StudyConfig, trial: dict[str, Any]) -> PurifyConfig:
    paper = trial["preset"] == search.PAPER
    return PurifyConfig() if paper else config.purify_config(trial["parameters"])


def _measured(
    config: StudyConfig, folder: Path, trial: dict[str, Any], victims: dict[str, Victim]
) -> dict[str, Any]:
    """A trial with its scores on `test`, measured from its saved masks, mean over the victims."""
    settings = _settings(config, trial)
    per_victim: dict[str, Scores] = {}
    for name, victim in victims.items():
        masks = load_file(folder / "trials" / f"{trial['number']:03d}" / f"{name}.masks.safetensors")
        sets = victim.eval_sets(victim.spec.load_data(), "test")
        per_victim[name] = evaluate(purified(victim.model, masks, settings), sets)
    mean = {
        name: sum(getattr(scores, name) for scores in per_victim.values()) / len(per_victim)
        for name in SCORES
    }
    return _point(trial) | {
        "test": mean,
        "victims": {
            name: asdict(scores)
            | {
                "arr": scores.arr(victims[name].scores["test"]),
                "rdr": scores.rdr(victims[name].scores["test"]),
                "der": scores.der(victims[name].scores["test"]),
                "rir": scores.rir(victims[name].scores["test"]),
            }
            for name, scores in per_victim.items()
        },
    }


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


def show(
    console: Console,
    config: StudyConfig,
    summary: dict[str, Any],
    tracker: Tracker,
    victims: Path,
    folder: Path,
) -> None:
    """The front as a table, the choice, and the two commands to type next."""
    chosen = summary["chosen"]
    searched = list(config.space)
    table = Table(title=f"Pareto front of {summary['name']} (val)", title_justify="left")
    for column in ("trial", "ACC %", "ASR %", "RA %", *searched):
        table.add_column(column, justify="right")
    for trial in summary["front"]:
        mark = chosen is not None and trial["number"] == chosen["number"]
        table.add_row(
            f"{trial['number']}{' *' if mark else ''}",
            *(f"{100 * trial['val'][name]:.1f}" for name in SCORES),
            *(_short(trial["parameters"].get(name, "")) for name in searched),
            style="bold green" if mark else None,
        )
    console.print(table)
    console.print(
        f"hypervolume {summary['hypervolume']:.4f} against {summary['reference_point']}; "
        f"{summary['n_complete']} COMPLETE, {summary['n_failed']} FAILED"
    )
    for trial, label in ((summary["paper_defaults"], "paper's defaults"), (chosen, "chosen")):
        if trial:
            scores = ", ".join(
                f"{short} {trial['test'][name]:.3f}"
                for short, name in zip(("ACC", "ASR", "RA"), SCORES, strict=True)
            )
            console.print(f"on test, {label} (trial {trial['number']}): {scores}")
    console.print("look:  " + tracker.ui_command(), soft_wrap=True)
    if chosen is None:
        console.print(
            "[bold yellow]Nothing chosen[/]: no trial keeps a clean accuracy of "
            f"{summary['min_clean_accuracy']:.3f} on val; run more trials or widen the space."
        )
        return
    digest = next(iter(summary["victims"].values()))["digest"]
    trust = " --trust-code" if is_own(config.victims[0].net) else ""
    console.print(
        f"reuse: python -m bimask purify --victim {victims / digest} --config "
        f"{folder / records.BEST} --out {folder / 'cleaned'}{trust}",
        soft_wrap=True,
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
