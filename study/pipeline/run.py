"""A study from start to end: check, victims, search, choice, report on `test`."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from bimask.devices import resolve_device
from bimask.nets import require_trusted
from bimask.progress import Console
from bimask.victims import Victim
from study import search
from study.pipeline.choosing import accepted
from study.pipeline.closing import close, make_report
from study.pipeline.confirm import confirm_choice
from study.pipeline.last_words import FrontSoFar
from study.pipeline.naming import named
from study.pipeline.opening import in_mlflow, open_tracker, say
from study.pipeline.prepare import (
    check_data,
    find_room,
    prepare_cases,
    prepare_victims,
)
from study.pipeline.summary import summarise
from study.report import REPORT
from study.report.console import show, trial_progress, wide_console
from study.report.pictures import FRONT_PICTURE, draw_front, draw_victims
from study.search.interrupts import InterruptedStudyError, Interrupts, LostRayError, leave
from study.search.warm_start import Earlier, read_earlier
from study.spec.config import StudyConfig, StudyError
from study.spec.defences import KEY
from study.spec.reading import load_config
from study.spec.suspect import Subject
from study.store import records
from study.store.environment import patiently
from study.store.files import locked, write_text
from study.store.mending import mend
from study.store.provenance import commit, versions
from study.store.schema import StudySummary, TrialRecord
from study.store.session import Identity, begin, reopen
from study.tracking.credentials import redacted
from study.tracking.mlflow_runs import Status, Tracker, require_server, tracking_uri
from study.tracking.queue import MlflowQueue
from study.tracking.recorder import Recorder
from study.trial.cases import Case

VICTIM_PICTURES = "victims"
Done = TypeVar("Done")
PATIENCE, SHORT_PATIENCE = 180.0, 5.0  # seconds that the end waits for an MLflow that takes nothing


def run_study(
    path: Path | None,
    overrides: Mapping[str, object],
    *,
    outputs: Path,
    address: str | None,
    resume: str | None = None,
    storage: str | None = None,
    wait: float = 0,
) -> bool:
    """Run the study in a YAML file, or go on with one; everything it leaves is under `outputs`.

    Args:
        path: the YAML; None with `resume` means the study as it was begun.
        resume: name of a study that was begun and cut short, at whatever moment.
        storage: where trials leave their checkpoints, a folder or URI that all nodes reach; None is the
            study's folder.
        wait: minutes for an autoscaler to bring up the first worker; 0 takes the nodes that are up.

    Returns:
        Whether any trial was COMPLETE.

    Raises:
        BimaskError: before the first trial, for anything that would make the study fail.
        InterruptedStudyError: a signal ended it, in good order.
        LostRayError: Ray died under it.
    """
    understood = partial(accepted, say=partial(say, wide_console()))
    with ExitStack() as stack:
        if resume is not None:
            config, folder = reopen(outputs, resume, path, overrides, understood=understood)
            stack.enter_context(locked(folder))
        elif path is not None:
            config, folder = stack.enter_context(
                named(
                    understood(load_config(path, overrides)),
                    outputs,
                    chosen_by_user="name" in overrides,
                )
            )
        else:
            raise StudyError("There is no study to run; give a YAML file, or --resume NAME.")
        summary = run_in(
            config, folder, address=address, storage=storage, wait=wait, resume=resume is not None
        )
    return bool(summary["n_complete"])


def run_in(
    config: StudyConfig,
    folder: Path,
    *,
    address: str | None = None,
    storage: str | None = None,
    wait: float = 0,
    resume: bool = False,
    part_of: str | None = None,
) -> StudySummary:
    """Run a study, or go on with it, in its folder among the outputs, which is held; its summary.

    `address`, `storage` and `wait` are those of `run_study`, and what is raised is.

    Args:
        part_of: the name of the comparison that it belongs to: that is gone on with.
    """
    interrupts, resumed_as = Interrupts(), part_of or config.name
    again = [] if part_of else config.resuming
    front = FrontSoFar(resumed_as, begun=resume or part_of is not None, again=again)

    def reason() -> InterruptedStudyError | LostRayError:
        return interrupts.reason(resumed_as, begun=front.begun, again=again)

    def leave_at_once() -> None:
        leave(reason(), front.text)

    with interrupts.in_good_order(reason):
        summary = _run_in(
            config, folder, interrupts, front, leave_at_once, address, storage, wait, resume
        )
    return summary


def _run_in(
    config: StudyConfig,
    folder: Path,
    interrupts: Interrupts,
    front: FrontSoFar,
    leave_at_once: Callable[[], None],
    address: str | None,
    storage: str | None,
    wait: float,
    resume: bool,
) -> StudySummary:
    """`run_in`, up to a KeyboardInterrupt for all that `interrupts` knows of."""
    started, outputs = time.perf_counter(), folder.parent
    console = wide_console()
    device = resolve_device(config.device)
    uri = tracking_uri(outputs)
    require_server(uri)
    for spec in [config.suspect] if config.suspect else config.suite:
        require_trusted(spec.net)
    check_data(config)
    earlier = read_earlier(config)
    with ExitStack() as stack:
        if resume:
            for note in mend(folder):
                say(console, note)
            tracker = open_tracker(uri, outputs, config, console)
            if _is_whole(config, folder, tracker):
                whole = records.read_summary(folder)
                console.tell(f"The study {config.name} is finished, all {whole['n_trials']} trials.")
                return whole
        concurrency, own = 0, True
        if config.confirmation or not records.search_is_over(config, records.read_trials(folder)):
            stack.callback(search.stop_ray)
            front.tell()
            with interrupts.defer():
                own = search.start_ray(address, console.tell)
            stack.enter_context(interrupts.watch(search.ray_gone(own=own), leave_at_once))
            if wait:
                stack.callback(search.release_workers)
            concurrency = find_room(config, wait, console)
            with console.status("asking every node", spinner="dots"):
                nodes = search.check_nodes(config, storage or str(outputs.resolve()), uri, own=own)
            console.tell(f"{nodes} node(s) checked, {concurrency} actors at once")
        told = f"{config.trials} trials, MLflow at {redacted(uri)}"
        console.tell(told, mark=config.name, style="bold")
        suite = prepare_victims(config, outputs / "victims", device, console, storage=storage)
        identity = Identity.of(config, suite, outputs / "victims")
        if resume:
            begun = Identity.load(folder)
            begun.require_same(identity)
            in_mlflow(uri, config, console, lambda: _start_in_mlflow(config, begun, tracker, suite))
        else:
            tracker = open_tracker(uri, outputs, config, console)
            _begin(config, folder, identity, tracker, suite, console)
            front.tell(begun=True)
        study = _Study(
            config, folder, suite, earlier, tracker, console, concurrency, not own, storage, front
        )
        summary = study.run(started, interrupts)
        with interrupts.hold():
            show(console, config, summary, tracker, outputs / "victims", folder)
    return summary


def _is_whole(config: StudyConfig, folder: Path, tracker: Tracker) -> bool:
    """Whether nothing is left to do: no trial, no summary, nothing that MLflow lacks."""
    try:
        summary = records.read_summary(folder)
    except StudyError:
        return False
    confirmed = config.confirmation is None or not summary["n_complete"] or "suite" in summary
    trials = records.read_trials(folder)  # one may have been lost since
    searched = summary["n_trials"] == len(trials) and records.search_is_over(config, trials)
    return searched and confirmed and tracker.has_whole(Identity.load(folder).study_id, len(trials))


def _begin(
    config: StudyConfig,
    folder: Path,
    identity: Identity,
    tracker: Tracker,
    victims: dict[str, Subject],
    console: Console,
) -> None:
    """Make the study's folder and open the parent run: both, or nothing stays."""
    begin(folder, config, identity)
    try:
        in_mlflow(
            tracker.uri, config, console, lambda: _start_in_mlflow(config, identity, tracker, victims)
        )
    except BaseException:
        shutil.rmtree(folder)
        raise


def _start_in_mlflow(
    config: StudyConfig, identity: Identity, tracker: Tracker, victims: dict[str, Subject]
) -> None:
    tracker.start_study(
        config.name,
        {"trials": config.trials, "seed": config.seed, "sampler": config.sampler}
        | {"selection": config.selection, "victims": ", ".join(victims)}
        | ({"defences": ", ".join(config.defenders)} if config.defenders.several else {}),
        {"study": config.name, "study_id": identity.study_id, "study_digest": config.digest}
        | {"objectives": json.dumps(config.directions), "commit": commit()}
        | {f"victim.{name}": victim.spec.digest for name, victim in victims.items()}
        | {f"version.{package}": number for package, number in versions().items()},
        scores=[config.task.quality, "attack_success" if config.suspect is None else "risk"],
        # of several defences the settings would be as many columns as there are settings in all
        settings=[KEY] if config.defenders.several else list(config.space),
    )


@dataclass
class _Study:
    """A study whose folder and parent run are open."""

    config: StudyConfig
    folder: Path
    suite: dict[str, Subject]
    earlier: Earlier
    tracker: Tracker
    console: Console
    concurrency: int
    joined: bool  # the cluster is one that was there
    storage: str | None
    front: FrontSoFar

    @property
    def victims(self) -> dict[str, Subject]:
        """Those that trials see."""
        return {name: self.suite[name] for name in self.config.victim_names()}

    def run(self, started: float, interrupts: Interrupts) -> StudySummary:
        """Search, choose, report: the summary, of what there is where `interrupts` ended the search."""
        mirror = MlflowQueue(self.tracker, self._say_what_happens)
        patience = SHORT_PATIENCE
        try:
            cases = prepare_cases(
                self.config,
                self.victims,
                self.console,
                workers=self.concurrency,
                joined=self.joined,
            )
            if self.config.suspect is None:  # else nobody knows what its trigger does
                draw_victims(self.folder / VICTIM_PICTURES, [case for case in cases if not case.repeat])
                mirror.log_folder(self.folder / VICTIM_PICTURES)
            searching = time.perf_counter()
            in_trials = self._search(cases, mirror, interrupts)
            wall = time.perf_counter() - searching
            with interrupts.hold():
                trials = records.read_trials(self.folder)
                summary = self._patiently(
                    lambda: summarise(self.config, self.folder, trials, self.victims), interrupts
                )
                self._patiently(
                    lambda: draw_front(self.folder / FRONT_PICTURE, trials, summary, self.config.task),
                    interrupts,
                )
            summary["seconds"] = {
                "in_trials": in_trials,
                "harness": max(0.0, wall * self.concurrency - in_trials),
            }
            with interrupts.ask_first():
                if not interrupts.ended:
                    # a study of a suspect has nothing to confirm
                    known = cast(dict[str, Victim], self.suite)
                    suite = confirm_choice(self.config, self.folder, summary, known, self.console)
                    if suite is not None:
                        summary["suite"] = suite
            with interrupts.hold():
                summary["seconds"]["total"] = time.perf_counter() - started
                text = json.dumps(summary, indent=2) + "\n"
                self._patiently(lambda: write_text(self.folder / records.SUMMARY, text), interrupts)
                status: Status = "FINISHED" if summary["n_complete"] else "FAILED"
                make_report(self.folder, self.folder.parent / "victims", self.console)
                page = self.tracker.artifact_link(REPORT)
                status = "KILLED" if interrupts.ended else status
                close(mirror, self.folder, summary, status, page, self.config.task)
            patience = PATIENCE
            return summary
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            mirror.abort("the study was stopped", "KILLED" if stopped else "FAILED")
            raise
        finally:
            with interrupts.hold():
                missing = mirror.close(lambda: SHORT_PATIENCE if interrupts.ended else patience)
            if missing:
                words = ["python", "-m", "study.launch", *self.config.resuming]
                again = shlex.join([*words, "--outputs", str(self.folder.parent)])
                self.console.tell(
                    f"nothing is lost; tell it later with `{again}`.",
                    mark=f"MLflow lacks {missing} entries",
                    style="bold yellow",
                )

    def _search(self, cases: list[Case], mirror: MlflowQueue, interrupts: Interrupts) -> float:
        """Run what has no record yet; seconds that went into trials."""
        digests = {name: victim.spec.digest for name, victim in self.victims.items()}
        at_once = min(self.config.trials, self.concurrency * self.config.group_size)
        with trial_progress(self.console, self.config.trials, at_once, self.config.task) as on_change:

            def changed(done: list[TrialRecord]) -> None:
                on_change(done)
                self.front.set(self.config, done)

            recorder = Recorder(self.config, self.folder, mirror, digests, changed)
            before = len(recorder.records)
            recorder.show_again(self.tracker.ended)
            changed(recorder.records)
            search.run_search(
                self.config,
                cases,
                recorder,
                folder=self.folder,
                concurrency=self.concurrency,
                earlier=self.earlier,
                storage=self.storage,
                interrupts=interrupts,
                say=self._say,
            )
        return sum(record.get("seconds", 0.0) for record in recorder.records[before:])

    def _say(self, text: str) -> None:
        say(self.console, text)

    def _patiently(self, action: Callable[[], Done], interrupts: Interrupts) -> Done:
        """Write to the study's folder, as soon as it takes it."""
        return patiently(
            action,
            patience=self.config.environment_timeout,
            say=self._say,
            what=f"write to {self.folder}",
            given_up=lambda: interrupts.ended,
        )

    def _say_what_happens(self, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.console.tell(
            f"{reason[:200]}; the study goes on, and tells it again until it does.",
            mark="MLflow does not take what it is told",
            style="yellow",
        )
