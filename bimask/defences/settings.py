"""The settings of a defence, and which of them a study searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from bimask.errors import SettingError, describe
from bimask.files.bounded import read_yaml
from bimask.files.stand_ins import shown

ABOUT = ("defence", "seed", "study", "trial")  # what a file of settings says beside them


@dataclass(frozen=True)
class Search:
    """The range of a setting that a study searches unless its YAML says otherwise.

    Stands in a field's `Annotated`, beside its bounds. Both ends are included; whole numbers where the
    field is an int.
    """

    low: float
    high: float
    log: bool = False


class DefenceConfig(BaseModel):
    """The settings of a defence; the defaults are the published ones.

    Class attributes:
        PROFILES: name -> settings that differ from the published ones; `profile: NAME` among settings
            stands for them, under those beside it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    PROFILES: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _with_profile(cls, given: Any) -> Any:
        if isinstance(given, dict) and "profile" in given:
            beside = {key: value for key, value in given.items() if key != "profile"}
            return {**cls.profile_settings(given["profile"]), **beside}
        return given

    @classmethod
    def profile_settings(cls, name: object) -> Mapping[str, Any]:
        """The settings of a profile that differ from the published ones.

        Raises:
            SettingError: no such profile.
        """
        if not isinstance(name, str) or name not in cls.PROFILES:
            known = ", ".join(cls.PROFILES) or "none"
            raise SettingError(f"Unknown profile {name!r}; known are {known}.")
        return cls.PROFILES[name]

    @classmethod
    def searched(cls) -> dict[str, tuple[Search, type[int] | type[float]]]:
        """Setting -> the range that a study searches, and the kind of its numbers."""
        return {
            name: (mark, int if info.annotation is int else float)
            for name, info in cls.model_fields.items()
            for mark in info.metadata
            if isinstance(mark, Search)
        }

    def steps(self, images: int) -> int:
        """How many steps a run on so many images has at most."""
        return 1

    def samples(self, count: int, images: int) -> list[tuple[Self, int]]:
        """Short runs from whose first `count` steps the time of a whole one follows: settings, and how
        many steps one of theirs stands for."""
        return [(self, self.steps(images))]

    def unprepared(self) -> Self:
        """These settings without what `Defence.preparation` makes beforehand."""
        return self

    def warnings(self) -> list[str]:
        """What is odd about these settings, a sentence each: they run, but not as one would think."""
        return []

    @classmethod
    def profile(cls, name: str, **changes: Any) -> Self:
        """The settings of a profile with changes.

        Raises:
            SettingError: no such profile.
        """
        return cls.model_validate({**cls.profile_settings(name), **changes})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """The settings in a YAML file, such as a study's best.yaml: under `purify`, or at the top.

        Raises:
            SettingError: no such file, not a mapping, or settings that do not fit, all named.
        """
        try:
            content = read_yaml(path)
        except (OSError, ValueError) as error:
            raise SettingError(f"Cannot read the configuration {path}: {error}.") from error
        if not isinstance(content, dict):
            raise SettingError(f"{path} must hold `setting: value` lines, got {shown(content)}.")
        try:
            beside = {key: value for key, value in content.items() if key not in ABOUT}
            return cls.model_validate(content.get("purify", beside))
        except ValidationError as error:
            raise SettingError(f"{path}: {describe(error)}") from error
