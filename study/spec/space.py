"""The search space: which settings of the defence are searched, between which bounds.

    mask_lr:     {kind: float, low: 0.01, high: 0.1, log: true}
    inner_steps: {kind: int, low: 3, high: 8}
    norm:        {kind: categorical, choices: [linf, l2]}
    step_size:   {kind: float, low: 0.01, high: 0.1, when: {inner_optimizer: adamw}}

A parameter with `when` exists only in trials whose earlier parameters have those values; elsewhere
the setting keeps its fixed or published value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bimask.defences.settings import DefenceConfig

Scalar = bool | int | float | str | None


class Suggests(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int: ...
    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Scalar: ...


class _Parameter(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    when: dict[str, Scalar] = Field(default_factory=dict)

    def active(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the parameter exists, given the values chosen so far."""
        return all(name in chosen and chosen[name] == value for name, value in self.when.items())


class _Range(_Parameter):
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _bounds(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"`low < high` must hold, but low={self.low:g}, high={self.high:g}")
        if self.log and not self.low > 0:
            raise ValueError(f"`low > 0` must hold on a log scale, but low={self.low:g}")
        return self


class FloatParameter(_Range):
    """Real numbers from low to high, both included."""

    kind: Literal["float"]

    def suggest(self, trial: Suggests, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def probes(self) -> list[Scalar]:
        """Values that must all be valid for the parameter to be: both ends, and one inside."""
        return [self.low, self.high, self.low + 0.382 * (self.high - self.low)]


class IntParameter(_Range):
    """Whole numbers from low to high, both included."""

    kind: Literal["int"]
    low: int
    high: int

    def suggest(self, trial: Suggests, name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log)

    def probes(self) -> list[Scalar]:
        return [self.low, self.high]


class CategoricalParameter(_Parameter):
    """One of the choices."""

    kind: Literal["categorical"]
    choices: list[Scalar] = Field(min_length=2)

    @model_validator(mode="after")
    def _distinct(self) -> CategoricalParameter:
        if len(set(map(repr, self.choices))) < len(self.choices):
            raise ValueError(f"choices must differ, got {self.choices}")
        return self

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        return trial.suggest_categorical(name, self.choices)

    def probes(self) -> list[Scalar]:
        return self.choices


Parameter = Annotated[FloatParameter | IntParameter | CategoricalParameter, Field(discriminator="kind")]


def suggest(space: Mapping[str, Parameter], trial: Suggests) -> dict[str, Scalar]:
    """One value for every active parameter, asked of `trial` in the order of the space."""
    chosen: dict[str, Scalar] = {}
    for name, parameter in space.items():
        if parameter.active(chosen):
            chosen[name] = parameter.suggest(trial, name)
    return chosen


def ranges(settings: type[DefenceConfig]) -> dict[str, dict[str, Any]]:
    """The space of a defence whose YAML says none, as a YAML would: `Search` beside its fields."""
    return {
        name: {
            "kind": "int" if kind is int else "float",
            "low": range_.low,
            "high": range_.high,
            "log": range_.log,
        }
        for name, (range_, kind) in settings.searched().items()
    }


def problems(
    space: Mapping[str, Parameter], fixed: Mapping[str, Any], told: Callable[[str, Any], list[str]]
) -> list[tuple[str, str]]:
    """What is wrong with a space and its fixed settings, as (place, sentence); empty if nothing.

    Args:
        told: name, value -> what is wrong with it by the defence's own settings.
    """
    found = []
    for name, value in fixed.items():
        place = f"fixed.{name}"
        if name in space:
            found.append((place, "is searched in `space` as well; drop one of the two"))
        found += [(place, text) for text in told(name, value)]
    earlier: dict[str, Parameter] = {}
    for name, parameter in space.items():
        place = f"space.{name}"
        texts = [t for value in parameter.probes() for t in told(name, value)]
        found += [(place, text) for text in dict.fromkeys(texts)]
        for parent, value in parameter.when.items():
            if parent not in earlier:
                found.append((f"{place}.when", f"{parent!r} must be a parameter above this one"))
            elif parent in earlier and not possible(earlier[parent], value):
                found.append((f"{place}.when", f"{parent!r} never takes the value {value!r}"))
        earlier[name] = parameter
    return found


def start_problems(
    space: Mapping[str, Parameter], start: Sequence[Mapping[str, Scalar]]
) -> list[tuple[str, str]]:
    """What is wrong with the points to try first, as (place, sentence)."""
    return [
        (f"start.{row}.{name}", f"{value!r} is not in the space")
        for row, point in enumerate(start)
        for name, value in point.items()
        if name not in space or not possible(space[name], value)
    ]


def expanded(
    fixed: Mapping[str, Any], space: Mapping[str, Any], settings: type[DefenceConfig]
) -> dict[str, Any]:
    """Fixed settings with what a `profile` among them stands for, but for what is searched."""
    name = fixed.get("profile")
    if not isinstance(name, str) or name not in settings.PROFILES:
        return dict(fixed)
    beside = {key: value for key, value in fixed.items() if key != "profile"}
    return {key: value for key, value in settings.PROFILES[name].items() if key not in space} | beside


def possible(parameter: Parameter, value: Scalar) -> bool:
    """Whether a parameter can take a value."""
    if isinstance(parameter, CategoricalParameter):
        return value in parameter.choices
    return isinstance(value, int | float) and parameter.low <= value <= parameter.high


def setting_problems(name: str, value: Any, settings: type[DefenceConfig]) -> list[str]:
    """What the defence's configuration says of one setting."""
    if name == "profile":
        known = ", ".join(settings.PROFILES) or "none"
        return [f"there is no profile {value!r}; known are {known}"]
    if name not in settings.model_fields:
        known = ", ".join(sorted(settings.model_fields))
        return [f"is no setting of the defence; its settings are {known}"]
    try:
        settings.model_validate({name: value})
    except ValidationError as error:
        return [f"{problem['msg']}, got {problem['input']!r}" for problem in error.errors()]
    return []
