"""One self-contained HTML page about a study: data as JSON, drawn by the page's own script.

`content` tells what the records say, `closeup` what single trials left, `answers` what their models
say; `page/` is what a browser gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import escape
from typing_extensions import NotRequired, TypedDict

from bimask.errors import BimaskError
from bimask.files.pages import plain
from bimask.tasks import task_named
from study.report.answers import Scene, TrialAnswers, VictimAnswers
from study.report.closeup import Curves, Layer, curves, layers, reports_of, stored
from study.report.content import Finished, PageContent, page_content, read, settings_of
from study.report.shown import PicturesOf, Shown
from study.spec.config import StudyError
from study.spec.defences import Defenders
from study.store.records import fitting_together
from study.store.schema import VictimBefore

REPORT = "report.html"
CLOSE_UPS = 24  # trials with curves and masks
ANSWERED = 12  # trials whose models are asked; each costs some passes
# what is asked of a task's models, or drawn by it
SCENES: dict[str, type[Scene] | type[Shown]] = {"classification": Scene, "detection": Shown}
SCRIPTS = (
    "draw.js",
    "state.js",
    "front.js",
    "parallel.js",
    "heat.js",
    "blind.js",
    "unseen.js",
    "tables.js",
    "closeup.js",
    "page.js",
)


class VictimCloseUp(TypedDict):
    """One victim in a trial: curves, masks, and what the models say."""

    curves: Curves | None
    layers: NotRequired[list[Layer]]
    answers: NotRequired[TrialAnswers | PicturesOf]


class CloseUp(TypedDict):
    """One trial."""

    settings: Mapping[str, object]
    victims: dict[str, VictimCloseUp]


class CloseUps(TypedDict):
    """Trials by number, victims by name."""

    trials: dict[int, CloseUp]
    victims: dict[str, VictimAnswers | PicturesOf]


def write_report(
    folder: Path,
    victims: Path,
    out: Path | None = None,
    *,
    say: Callable[[str], object] = lambda _: None,
) -> Path:
    """Write the page of the study in `folder`.

    Args:
        victims: folder of the victims by digest; without a victim in it, the page does without its
            models' answers.
        out: the file, `folder/report.html` if None.
        say: is told a sentence for every victim whose models are not asked.

    Raises:
        StudyError: no study in the folder, or the file cannot be written.
    """
    with fitting_together(folder):
        found = read(folder)
        content = page_content(found)
        text = render({**content, "close_ups": _close_ups(folder, victims, found, content, say)})
    out = out or folder / REPORT
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"Cannot write the report {out} ({error.strerror}); give another file with --out."
        ) from error
    return out


def log_report(path: Path, folder: Path, outputs: Path) -> str:
    """Log a page to its study's run in MLflow; what became of it in a few words, never an error."""
    from study.tracking.mlflow_runs import log_to_study, require_server, tracking_uri  # takes a second

    found = read(folder)
    study = found.study["name"]
    digests = {trial["provenance"]["study"] for trial in found.trials}
    try:
        require_server(uri := tracking_uri(outputs))
        logged = any(log_to_study(uri, study, digest, path) for digest in digests)
    except BimaskError as error:
        return f"not logged: {error}"
    return (
        f"logged to MLflow's run {study!r}" if logged else f"not logged: no run of {study!r} in MLflow"
    )


def render(content: Mapping[str, Any]) -> str:
    """The page: style, data and scripts put into `page/page.html`, nothing else is ever loaded."""
    page = files(__package__) / "page"
    parts = {
        "<!--title-->": str(escape(plain(f"{content['name']}: {content['headline']['title']}"))),
        "/*style*/": (page / "page.css").read_text(encoding="utf-8"),
        "/*data*/": json.dumps(plain(content), separators=(",", ":")).replace("<", "\\u003c"),
        "/*script*/": "\n".join((page / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (page / "page.html").read_text(encoding="utf-8")
    return re.sub("|".join(map(re.escape, parts)), lambda place: parts[place.group()], text)


def _close_ups(
    folder: Path,
    victims: Path,
    study_found: Finished,
    content: PageContent,
    say: Callable[[str], object],
) -> CloseUps:
    """`trials` by number and `victims` by name, for the chosen trial, the paper's and the front."""
    study = study_found.study
    first = [content["chosen"], content["paper"], *content["front"]]
    defenders = Defenders.of(study)
    numbers = list(dict.fromkeys(n for n in first if n is not None))[:CLOSE_UPS]
    trials = {trial["number"]: trial for trial in study_found.trials}
    reports = reports_of(folder)
    known_victims = study_found.summary["victims"] if study_found.summary else {}
    scenes = _scenes(victims, known_victims, study, say)
    found: dict[int, CloseUp] = {}
    for position, number in enumerate(numbers):
        if trials[number]["status"] != "COMPLETE":
            continue
        kept = folder / "trials" / f"{number:03d}"
        settings = settings_of(study, trials[number])
        defence = defenders.defence(trials[number]["parameters"])
        found[number] = {"settings": settings.model_dump(), "victims": {}}
        for name in trials[number]["scores"]:
            tensors = stored(kept, name, defence)
            known, final = reports.get(number, {}).get(name, {}), trials[number]["scores"][name]
            mine: VictimCloseUp = {"curves": curves(kept, name, known, final)}
            scene = scenes.get(name)
            masks = None if tensors is None else defence.masks(tensors, settings)
            if masks is not None:
                mine["layers"] = layers(masks, scene.victim.model if scene else None)
            if tensors is not None and scene is not None and position < ANSWERED:
                mine["answers"] = scene.of_trial(defence, tensors, settings)
            found[number]["victims"][name] = mine
    return {"trials": found, "victims": {name: scene.of_victim() for name, scene in scenes.items()}}


def _scenes(
    root: Path,
    victims: Mapping[str, VictimBefore],
    study: Mapping[str, Any],
    say: Callable[[str], object],
) -> dict[str, Scene | Shown]:
    """A scene for every victim that is still there with its data."""
    scenes: dict[str, Scene | Shown] = {}
    kind = SCENES[task_named(study.get("task")).name]
    for (name, victim), spec in zip(victims.items(), study["victims"], strict=False):
        imported, digest = spec.get("imported"), victim["digest"]
        try:
            scenes[name] = kind.of(Path(imported) if imported else root / digest, digest, study)
        except BimaskError as error:  # the page is about the study; without a victim it says less
            say(f"without the answers of {name}'s models: {error}")
    return scenes
