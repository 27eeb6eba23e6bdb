"""The pages of the reference, made of the code: settings, keys of a study, commands, the API."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import typer
import typer.cli
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bimask.__main__ import app
from bimask.defences.base import Defence
from bimask.defences.settings import Search
from bimask.detection.victims import DetectorSpec
from bimask.tasks import TASKS
from bimask.victims import VictimSpec
from study.spec.config import StudyConfig
from study.spec.detection import DetectionStudy

API = {
    "Defend": ("bimask", ("purify", "PurifyConfig", "PurifyResult", "PopulationPurifier", "MaskSet")),
    "The contract of a defence": (
        "bimask.defences.base",
        ("Defence", "DefenceResult", "CleanData", "Preparation"),
    ),
    "Victims": ("bimask", ("Victim", "VictimSpec", "obtain_victim", "load_victim", "train_victim")),
    "Detectors": (
        "bimask.detection",
        ("purify", "load_suspect", "load_cleaned", "Detector", "DetectionData", "DetectionScores"),
    ),
    "Measure": ("bimask", ("evaluate", "EvalSets", "Scores")),
    "A study's records": ("study", ("run", "load")),
}


def write(folder: Path) -> None:
    """Write all of them; a page is touched only where it changes."""
    folder.mkdir(exist_ok=True)
    pages = {"settings": settings(), "study": study(), "commands": commands(), "api": api()}
    pages |= {f"defences/{title}": defence(title, found) for title, found in defences().items()}
    (folder / "defences").mkdir(exist_ok=True)
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def defences() -> dict[str, Defence[Any]]:
    """Every defence of every task; those of detectors have names that say so."""
    return {
        name if task.name == "classification" else f"{task.name}-{name}": found
        for task in TASKS.values()
        for name, found in task.defences.items()
    }


def defence(name: str, found: Defence[Any]) -> str:
    """The page of a defence: what its module says of it, and its settings."""
    module = sys.modules[type(found).__module__]
    title, _, text = inspect.cleandoc(module.__doc__ or "").partition("\n")
    needs = (
        "It learns from the labels of the clean images."
        if found.needs_labels
        else ("It is handed no labels.")
    )
    return (
        f"# {name}\n\n{title}\n{text}\n\n{needs}\n\n## Settings\n\nA study searches what has a range; "
        f"defaults are the published values.\n\n{table(found.config)}"
    )


def settings() -> str:
    """Every setting of every defence."""
    parts = ["# Settings of the defences\n\nDefaults are the published values.\n"]
    for name, defence in defences().items():
        lines = (type(defence).__doc__ or "").strip().splitlines()
        parts.append(f"## {name}\n\n{lines[0]}\n\n{table(defence.config)}")
    return "\n".join(parts)


def study() -> str:
    """Every key of a study's YAML, and of a victim in it."""
    own = DetectionStudy.__annotations__
    return (
        f"# Keys of a study\n\n{table(StudyConfig)}\n## Keys of a victim\n\n{table(VictimSpec)}\n"
        f"## Keys of a study of detectors\n\nThe others are as above.\n\n{table(DetectionStudy, own)}\n"
        f"## Keys of a detector that is a victim\n\n{table(DetectorSpec)}"
    )


def table(model: type[BaseModel], names: Container[str] | None = None) -> str:
    rows = [
        f"| `{name}` | {_default(info)} | {_searched(info)} | {info.description or ''} |"
        for name, info in model.model_fields.items()
        if names is None or name in names
    ]
    return "| key | default | searched | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def commands() -> str:
    """The commands of `python -m bimask`, with their options."""
    command: Any = typer.main.get_command(app)
    text: str = typer.cli.get_docs_for_click(
        obj=command, ctx=typer.Context(command), name="python -m bimask", title="Commands"
    )
    return text


def api() -> str:
    """Classes and functions by what they are for."""
    parts = ["# API\n"]
    for title, (module, names) in API.items():
        parts.append(f"## {title}\n")
        for name in names:
            found: Any = getattr(__import__(module, fromlist=[name]), name)
            kind = "autoclass" if isinstance(found, type) else "autofunction"
            place = f"{found.__module__}.{found.__qualname__}"
            members = "\n:members:" if kind == "autoclass" and not issubclass(found, BaseModel) else ""
            parts.append(f"```{{eval-rst}}\n.. {kind}:: {place}{_indented(members)}\n```\n")
    return "\n".join(parts)


def _indented(text: str) -> str:
    return text.replace("\n", "\n   ")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default_factory_takes_validated_data:
        return "by other keys"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see there"
    return f"`{value}`" if value is not None else "null"


def _searched(info: FieldInfo) -> str:
    marks = [mark for mark in info.metadata if isinstance(mark, Search)]
    return "".join(f"{m.low:g} to {m.high:g}{', log' if m.log else ''}" for m in marks)
