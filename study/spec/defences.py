"""Which defences a study searches, and how the settings of several stand in one flat space.

A study of one names it, and its parameters have the names of its settings:

    defence: clp
    space: {u: {kind: float, low: 1, high: 5}}

A study of several lists them, or says `all`: every defence that can work on the study's nets
(`study.pipeline.choosing`). Its file says `space` and `fixed` by defence, and a point of `start` names
its own:

    defences: [ims, clp]
    space: {clp: {u: {kind: float, low: 1, high: 5}}}     # ims: the ranges of its own settings
    fixed: {ims: {profile: fast}}
    start: [{defence: clp, u: 3}]

Everywhere behind the file that is one flat space. The categorical parameter `defence` comes first; a
setting is the parameter `NAME.setting`, as `clp.u`, which exists where `defence` is `NAME`, by the
`when` that any parameter may have. Under these names it stands in `study.yaml`, in records, in Optuna's
storage and in MLflow, and `fixed` has `NAME.setting`, too. A defence without a point of its own in
`start` is begun with once, with its profile's or published values as far as they lie in its ranges:
else a sampler might never look at it. A list of one is a study of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bimask.defences.base import Defence
from bimask.defences.settings import DefenceConfig
from bimask.errors import SettingError
from bimask.tasks import CLASSIFICATION, Task, task_named
from study.spec.space import Parameter, Scalar, expanded, possible, ranges, setting_problems

IMS = CLASSIFICATION.defence  # what a study without a word of it searches
ALL = "all"
KEY = "defence"  # the parameter that chooses


@dataclass(frozen=True)
class Defenders:
    """The defences of a study, and the names that their settings have in it.

    Attributes:
        names: one or more, among the task's.
        several: whether the parameter `defence` chooses one, and settings bear its name.
    """

    names: tuple[str, ...]
    several: bool
    task: Task = CLASSIFICATION

    @classmethod
    def of(cls, study: Mapping[str, Any]) -> Defenders:
        """Of a study as its file has it, checked or not. In the place of an unknown defence stands the
        task's usual one, and in that of a list that is none all defences, so that nothing else is found
        fault with."""
        task, name, listed = task_named(study.get("task")), study.get(KEY), study.get("defences")
        if listed is None:
            known_name = isinstance(name, str) and name in task.defences
            return cls((str(name) if known_name else task.defence,), False, task)
        sound = isinstance(listed, list) and all(isinstance(one, str) for one in listed)
        known = tuple(one for one in dict.fromkeys(listed) if one in task.defences) if sound else ()
        sound = bool(known) and len(known) == len(listed) and name is None
        return cls(known if sound else tuple(task.defences), True, task)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def name_of(self, parameters: Mapping[str, Any]) -> str:
        """The defence of a trial with these parameters."""
        return str(parameters[KEY]) if self.several else self.names[0]

    def defence(self, parameters: Mapping[str, Any]) -> Defence[Any]:
        """The same, itself."""
        return self.task.defences[self.name_of(parameters)]

    def flat(self, name: str, setting: str) -> str:
        """What a defence's setting is called in the study."""
        return f"{name}.{setting}" if self.several else setting

    def parameters(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A defence with these settings, as a trial's parameters."""
        chosen = {KEY: name} if self.several else {}
        return chosen | {self.flat(name, setting): value for setting, value in settings.items()}

    def own(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """What is a defence's of some flat values, under its settings' own names."""
        if not self.several:
            return dict(values)
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

    def settings(self, fixed: Mapping[str, Any], parameters: Mapping[str, Any]) -> DefenceConfig:
        """All settings in a trial: what is fixed for its defence, then its parameters."""
        name = self.name_of(parameters)
        config: type[DefenceConfig] = self.task.defences[name].config
        return config.model_validate({**self.own(name, fixed), **self.own(name, parameters)})

    def problems(self, name: str, value: Any) -> list[str]:
        """What is wrong with the value of a flat name, a sentence each."""
        if not self.several:
            return setting_problems(name, value, self.task.defences[self.names[0]].config)
        known = ", ".join(self.names)
        if name == KEY:
            return (
                [] if value in self.names else [f"{value!r} is none of the study's defences, {known}"]
            )
        owner, dot, setting = name.partition(".")
        if not dot or owner not in self.names:
            return [f"stands under none of the study's defences; give it under one of {known}"]
        return setting_problems(setting, value, self.task.defences[owner].config)

    def lacking(self, number: str) -> list[str]:
        """Those whose results never say this number of themselves."""
        return [name for name in self.names if number not in self.task.defences[name].numbers]


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """A study's content with its space, what is fixed and its first points in full, and flat.

    What is malformed stays as it is, for the checks behind this; what is complete already stays, too.
    """
    if given.get("defences") is None:
        return _of_one(given)
    given = {KEY: None} | dict(given)
    defenders = Defenders.of(given)
    space, fixed = given.get("space") or {}, given.get("fixed") or {}
    start = given.get("start") or []
    if not isinstance(space, dict) or not isinstance(fixed, dict) or not _are_mappings(start):
        return given
    found = given | _flat(defenders, space, fixed, start)
    return _alone(found, defenders) if len(defenders.names) == 1 else found


def left(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A complete study of several with these of its defences alone."""
    defenders = Defenders.of(given)
    out = [f"{name}." for name in defenders if name not in names]

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if not key.startswith(tuple(out))}

    chosen = {"kind": "categorical", "choices": list(names)}
    return complete(
        {
            **given,
            "defences": list(names),
            "space": kept(given["space"]) | {KEY: chosen},
            "fixed": kept(given["fixed"]),
            "start": [point for point in given["start"] if point.get(KEY) in names],
        }
    )


def _of_one(given: Mapping[str, Any]) -> dict[str, Any]:
    defenders = Defenders.of(given)
    settings = defenders.task.defences[defenders.names[0]].config
    fixed = given.get("fixed")
    own: dict[str, Any] = {}
    if "space" not in given and (searched := _ranges(settings, fixed)):
        own["space"] = searched
        held = fixed if isinstance(fixed, dict) else {}
        if given.get("paper_defaults") is False and not given.get("start"):
            own["start"] = [_first_point(settings, searched, held)]
    if isinstance(fixed, dict):
        space = given.get("space", own.get("space"))
        own["fixed"] = expanded(fixed, space if isinstance(space, dict) else {}, settings)
    if KEY in given and given[KEY] is None:
        own[KEY] = defenders.task.defence
    return {**given, **own}


def _flat(
    defenders: Defenders, space: dict[str, Any], fixed: dict[str, Any], start: list[dict[str, Any]]
) -> dict[str, Any]:
    known = KEY in space  # it is complete, and lacks what it was made to lack
    spaces, fixes = _by_defence(space, defenders), _by_defence(fixed, defenders)
    points = [_flat_point(point) for point in start]
    begun = {point.get(KEY) for point in points}
    chosen: Any = {"kind": "categorical", "choices": list(defenders.names)}
    searched: dict[str, Any] = {KEY: space.get(KEY, chosen)}
    held: dict[str, Any] = {}
    for name in defenders:
        settings, mine = defenders.task.defences[name].config, fixes.pop(name, {})
        own = spaces.pop(name, {} if known else _ranges(settings, mine))
        searched |= {f"{name}.{key}": _conditioned(value, name) for key, value in own.items()}
        held |= {f"{name}.{key}": value for key, value in expanded(mine, own, settings).items()}
        if not known and name not in begun and len(defenders.names) > 1:
            points.append(defenders.parameters(name, _first_point(settings, own, mine)))
    for others, into in ((spaces, searched), (fixes, held)):  # of no defence here: told in `problems`
        for name, values in others.items():
            into |= {f"{name}.{key}" if name else key: value for key, value in values.items()}
    return {"space": searched, "fixed": held, "start": points}


def _by_defence(values: Mapping[str, Any], defenders: Defenders) -> dict[str, dict[str, Any]]:
    """Defence -> setting -> value, of what is written by defence or flat; of no defence under ""."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, dot, setting = str(key).partition(".")
        if dot:
            found.setdefault(name, {})[setting] = value
        elif (isinstance(value, dict) and "kind" not in value) or (
            value is None and name in defenders.names
        ):
            found.setdefault(name, {}).update(value or {})
        elif name != KEY:
            found.setdefault("", {})[name] = value
    return found


def _conditioned(parameter: Any, name: str) -> Any:
    """A parameter of a defence, under the condition that it is chosen."""
    if not isinstance(parameter, dict) or not isinstance(parameter.get("when", {}), dict):
        return parameter
    when = {KEY: name} | {
        _flat_name(key, name): value for key, value in parameter.get("when", {}).items()
    }
    return parameter | {"when": when}


def _flat_point(point: Mapping[str, Any]) -> dict[str, Any]:
    return {_flat_name(key, point.get(KEY)): value for key, value in point.items()}


def _flat_name(key: str, name: Any) -> str:
    return key if key == KEY or "." in key or name is None else f"{name}.{key}"


def _first_point(settings: type[DefenceConfig], space: Any, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What a defence begins with: its profile's or published values, as far as they lie in the
    space."""
    try:
        values = settings.model_validate(fixed)
        searched = TypeAdapter(dict[str, Parameter]).validate_python(space)
    except (ValidationError, SettingError):  # told elsewhere
        return {}
    point: dict[str, Scalar] = {name: getattr(values, name, None) for name in searched}
    return {name: value for name, value in point.items() if possible(searched[name], value)}


def _alone(found: dict[str, Any], defenders: Defenders) -> dict[str, Any]:
    """The study of the only defence of a list."""
    (name,) = defenders.names

    def own(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key.removeprefix(f"{name}."): value for key, value in values.items() if key != KEY}

    space = own(found["space"])
    for key, parameter in space.items():
        if isinstance(parameter, dict) and isinstance(parameter.get("when"), dict):
            space[key] = parameter | {"when": own(parameter["when"])}
    start = [own(point) for point in found["start"]]
    return found | {
        KEY: name,
        "defences": None,
        "space": space,
        "fixed": own(found["fixed"]),
        "start": start,
    }


def _ranges(settings: type[DefenceConfig], fixed: Any) -> dict[str, dict[str, Any]]:
    """What is searched where a study says nothing: a defence's own ranges, but for what is fixed."""
    held = set(fixed) if isinstance(fixed, dict) else set()
    return {name: one for name, one in ranges(settings).items() if name not in held}


def _are_mappings(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
