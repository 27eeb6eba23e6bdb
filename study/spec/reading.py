"""A study's YAML: read, checked as a whole, every problem at once with its file, line and key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from bimask.errors import MOST_PROBLEMS, brief, first_of
from bimask.files.bounded import (
    MAX_YAML_BYTES,
    parsed_yaml,
    read_bytes,
    require_rereadable,
)
from bimask.tasks import DETECTION
from study.spec import space as spaces
from study.spec.config import StudyConfig, StudyError
from study.spec.defences import Defenders, complete
from study.spec.space import Parameter
from study.spec.suspect import beside_problems


def load_config(path: Path, overrides: Mapping[str, object] | None = None) -> StudyConfig:
    """Read and check a study.

    Args:
        path: a YAML file.
        overrides: top-level keys that replace the file's, as given on the command line.

    Raises:
        StudyError: no file, no YAML, or a list of every problem with file, line and key.
    """
    try:
        content = read_bytes(path, MAX_YAML_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudyError(
            f"Cannot read the study {path} ({reason}); give a YAML file such as "
            "search_spaces/ims_digits.yaml."
        ) from error
    found_places: list[tuple[dict[str, int], list[str]]] = []
    try:
        raw = parsed_yaml(content, lambda root: found_places.append(_places(root)))
    except ValueError as error:
        raise StudyError(f"{path} is not YAML that is read: {error}.") from error
    if not isinstance(raw, dict):
        raise StudyError(f"{path} must hold `key: value` lines, got {type(raw).__name__}.")
    (lines, duplicates), *_ = found_places
    raw = complete({**raw, **(overrides or {})})
    found = [(place, "is given twice") for place in duplicates] + beside_problems(raw)
    kind = study_of(raw)
    try:
        config = kind.model_validate(raw)
    except ValidationError as error:
        config = None
        reported = error.errors(include_url=False)
        found += [_problem(kind, problem) for problem in reported[:MOST_PROBLEMS]]
        found += [("", f"{problem['loc']}") for problem in reported[MOST_PROBLEMS:]]
    space = _readable_space(raw.get("space"))
    found += spaces.problems(space, _mapping(raw.get("fixed")), Defenders.of(raw).problems)
    if config is not None:
        found += spaces.start_problems(config.space, config.start)
    if config is not None and not found:
        found += [
            (f"controls.{row}.poisoning_rate", f"a control is clean: 0, got {spec.poisoning_rate:g}")
            for row, spec in enumerate(config.controls)
            if not spec.is_control
        ]
    if config is not None and not found:
        names = config.suite_names()
        try:
            require_rereadable(config.model_dump())  # it is written resolved, and read by --resume
        except ValueError as error:
            large = f"with every key filled in it has {error}; list fewer victims or points"
            found.append(("", f"{large}, or split it into several studies"))
        if not found and len(set(names)) == len(names):
            return config
        if len(set(names)) < len(names):
            found.append(("victims", "the same victim is listed twice"))
    problems = dict.fromkeys(found)  # one that is of no key has no place
    rows = [": ".join(filter(None, (_where(path, p, lines), p, text))) for p, text in problems]
    raise StudyError(*first_of(rows))


def study_of(content: Mapping[str, Any]) -> type[StudyConfig]:
    """The settings of a study whose file says this; those of classifiers say what is wrong with a task
    that there is not."""
    if content.get("task") != DETECTION.name:
        return StudyConfig
    from study.spec.detection import DetectionStudy  # torchvision's detectors take a second

    return DetectionStudy


def _problem(kind: type[StudyConfig], problem: Any) -> tuple[str, str]:
    """One of pydantic's problems as place and sentence."""
    kinds = {"float", "int", "categorical"}  # the discriminator, not a key of the file
    parts = [str(part) for part in problem["loc"]]
    place = ".".join(
        part for i, part in enumerate(parts) if not (parts[0] == "space" and i == 2 and part in kinds)
    )
    if problem["type"] == "extra_forbidden":
        close = get_close_matches(parts[-1], _keys_beside(kind, problem["loc"]), n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else "remove it or mend its spelling"
        return place, f"unknown key; {hint}"
    if problem["type"] == "missing":
        return place, "is missing; every study needs it"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = "" if problem["type"] == "value_error" else f", got {brief(problem['input'])}"
    return place, f"{message[0].lower()}{message[1:]}{shown}"


def _keys_beside(kind: type[StudyConfig], loc: tuple[str | int, ...]) -> set[str]:
    """The keys that a study may have where `loc` has one, by the schema."""
    schema = kind.model_json_schema()

    def resolved(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "$ref" in node:
            yield from resolved(schema["$defs"][node["$ref"].rpartition("/")[2]])
        for other in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from resolved(other)
        yield node

    def below(node: dict[str, Any], part: str | int) -> dict[str, Any] | bool | None:
        if isinstance(part, int):
            return node.get("items")
        return node.get("properties", {}).get(part, node.get("additionalProperties"))

    nodes = list(resolved(schema))
    for part in loc[:-1]:
        steps = [step for node in nodes if isinstance(step := below(node, part), dict)]
        # the tag of a union is in `loc`, but no step
        nodes = [other for step in steps for other in resolved(step)] or nodes
    return {key for node in nodes for key in node.get("properties", ())}


def _readable_space(raw: Any) -> dict[str, Parameter]:
    """The parameters that can be read; the others pydantic has reported already."""
    adapter: TypeAdapter[Parameter] = TypeAdapter(Parameter)
    readable = {}
    for name, value in _mapping(raw).items():
        try:
            readable[str(name)] = adapter.validate_python(value)
        except ValidationError:
            continue
    return readable


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _places(root: yaml.Node) -> tuple[dict[str, int], list[str]]:
    """Line of every key, by its dotted place; and the places given twice."""
    lines: dict[str, int] = {}
    duplicates: list[str] = []

    def walk(node: yaml.Node, prefix: str) -> None:
        for place, mark, child in _children(node, prefix):
            if place in lines:
                duplicates.append(place)
            lines[place] = mark.line + 1
            walk(child, f"{place}.")

    walk(root, "")
    return lines, duplicates


def _children(node: yaml.Node, prefix: str) -> Iterator[tuple[str, yaml.Mark, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark, value
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark, value


def _where(path: Path, place: str, lines: dict[str, int]) -> str:
    """File and line of a place, or of the nearest place above it that the file has."""
    parts = place.split(".")
    while parts:
        if (line := lines.get(".".join(parts))) is not None:
            return f"{path}:{line}"
        parts.pop()
    return str(path)
