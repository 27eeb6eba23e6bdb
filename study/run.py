"""A study from start to end: check, victims, search, choice, report on `test`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bimask.config import PurifyConfig
from bimask.devices import resolve_device
from bimask.victim import EpochLog, Victim, obtain_victim
from study import records, search
from study.config import StudyConfig, StudyError, load_config
from study.console import progress_bar, show, trial_progress, wide_console
from study.plots import draw_victims
from study.provenance import commit, versions
from study.report import REPORT, write_report
from study.report.content import headline
from study.suite import cases_of, confirmation, confirmation_metrics, jobs_of
from study.summary import FRONT_PICTURE, summarise
from study.tracking import Tracker, redacted, require_server, tracking_uri
from study.warm_start import read_earlier

VICTIM_PICTURES = "victims"


def run_study(path: Path, overrides: dict[str, Any], *, outputs: Path, address: str | None) -> bool:
    """Run the study in a YAML file; everything it leaves is under `outputs`.

    Returns:
        Whether any trial was COMPLETE.

    Raises:
        BimaskError: before the first trial, for anything that would make the study fail.
    """
    config, given = load_config(path, overrides), "name" in overrides
    return bool(run_config(config, outputs=outputs, address=address, name_given=given)["n_complete"])


def run_config(
    config: StudyConfig, *, outputs: Path, address: str | None, name_given: bool = False
) -> dict[str, Any]:
    """Run a study; everything it leaves is under `outputs`.

    Args:
        name_given: the name must be free; else a number is put to it where it is taken.

    Returns:
        Its summary.
    """
    started = time.perf_counter()
    console = wide_console()
    device = resolve_device(config.device)
    require_writable(outputs)
    name, folder = records.new_folder(outputs, config.name, chosen_by_user=name_given)
    config = config.model_copy(update={"name": name})

    uri = tracking_uri(outputs)
    require_server(uri)
    check_data(config)
    earlier = read_earlier(config)
    search.start_ray(address)
    try:
        concurrency = search.check_resources(config)
        console.print(
            f"[bold]{name}[/]: {config.trials} trials, MLflow at {redacted(uri)}", soft_wrap=True
        )
        suite = prepare_victims(config, outputs / "victims", device, console)
        victims = {name: suite[name] for name in config.victim_names()}
        cases = cases_of(config, victims)
        tracker = Tracker(uri, outputs / "mlartifacts")
        _begin(config, folder, tracker, victims)
        try:
            draw_victims(folder / VICTIM_PICTURES, [case for case in cases if not case.repeat])
            tracker.log_folder(folder / VICTIM_PICTURES)
            searching = time.perf_counter()
            digests = {name: victim.spec.digest for name, victim in victims.items()}
            at_once = min(config.trials, concurrency * config.trials_per_actor)
            with trial_progress(console, config.trials, at_once) as on_change:
                recorder = records.Recorder(config, folder, tracker, digests, on_change)
                search.run_search(
                    config, cases, recorder, folder=folder, concurrency=concurrency, earlier=earlier
                )
            wall = time.perf_counter() - searching
            summary = summarise(config, folder, recorder.records, victims)
            confirmed = confirm_choice(config, folder, summary, suite, console)
            if confirmed is not None:
                summary["suite"] = confirmed
            in_trials = sum(record.get("seconds", 0.0) for record in recorder.records)
            summary["seconds"] = {
                "total": time.perf_counter() - started,
                "in_trials": in_trials,
                "harness": max(0.0, wall * concurrency - in_trials),
            }
            (folder / records.SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
            make_report(folder, outputs / "victims", console)
            close(tracker, folder, summary)
        except BaseException:
            tracker.abort("the study was stopped")
            raise
    finally:
        search.stop_ray()
    show(console, config, summary, tracker, outputs / "victims", folder)
    return summary


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
            | {"objectives": json.dumps(config.directions)}
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
    for spec in config.suite:
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
    for name, spec in zip(config.suite_names(), config.suite, strict=True):
        cached = (root / spec.digest).is_dir()
        known = cached or spec.weights is not None
        with progress_bar(console) as progress:
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


def make_report(folder: Path, victims: Path, console: Console) -> None:
    """The study's page; whatever keeps it from being drawn must not cost the study its end."""
    try:
        write_report(folder, victims)
    except Exception as error:
        console.print(f"no report ({error}); try: python -m study.report {folder.name}", soft_wrap=True)


def confirm_choice(
    config: StudyConfig,
    folder: Path,
    summary: dict[str, Any],
    suite: dict[str, Victim],
    console: Console,
) -> dict[str, Any] | None:
    """The chosen configuration and the paper's defaults on every victim of the suite, on `test`.

    Each run is a line of confirm.jsonl as it ends. None where nothing is to be confirmed.
    """
    settings = {}
    if summary["chosen"]:
        settings["chosen"] = config.purify_config(summary["chosen"]["parameters"])
    if config.paper_defaults:
        settings["paper_defaults"] = PurifyConfig()
    jobs = jobs_of(config, settings)
    if not jobs:
        return None
    rows: list[dict[str, Any]] = []
    with progress_bar(console) as progress, (folder / records.CONFIRM).open("a") as file:
        task = progress.add_task(f"confirming on {len(suite)} victims", total=len(jobs))

        def on_done(row: dict[str, Any]) -> None:
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.update(task, completed=len(rows))

        search.run_confirmation(config, suite, jobs, on_done)
    return confirmation(rows, suite)


def close(tracker: Tracker, folder: Path, summary: dict[str, Any]) -> None:
    """The summary in MLflow's parent run."""
    metrics = {"hypervolume": summary["hypervolume"], "n_failed": summary["n_failed"]}
    chosen = summary["chosen"] and summary["chosen"]["number"]
    if summary["chosen"]:
        metrics |= {f"chosen/{name}": value for name, value in summary["chosen"]["val"].items()}
        metrics |= {f"chosen/test/{n}": value for n, value in summary["chosen"]["test"].items()}
    count = {status: summary[f"n_{status.lower()}"] for status in ("COMPLETE", "PRUNED", "FAILED")}
    told = headline(summary, count)
    tracker.describe(f"**{told['title']}.** {told['text']} The page about it: `{REPORT}` below.")
    tracker.mark_front([point["number"] for point in summary["front"]], chosen)
    metrics |= confirmation_metrics(summary.get("suite") or {})
    names = (REPORT, FRONT_PICTURE, records.SUMMARY, records.STUDY, records.BEST, records.CONFIRM)
    tracker.end_study(
        metrics=metrics,
        artifacts=[folder / name for name in names if (folder / name).is_file()],
        failed=not summary["n_complete"],
    )
