"""Many victims from one YAML file, compactly."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bimask.errors import MOST_PROBLEMS, SettingError, describe, first_of
from bimask.files.bounded import read_yaml
from bimask.victims.spec import VictimSpec

MAX_VICTIMS = 1000  # of one file


class VictimSuite(BaseModel):
    """Every one of `victims`, with the keys of `common`, once for each combination of `each`.

    Keys and values are those of `VictimSpec`; a victim's own keys go before those of `common`. So

        common: {dataset: digits, epochs: 30}
        each: {seed: [0, 1, 2]}
        victims:
          - {attack: {name: badnets}}
          - {attack: {name: wanet}, epochs: 60}

    are six victims. See victims/digits.yaml.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    common: dict[str, Any] = Field(default_factory=dict)
    each: dict[str, list[Any]] = Field(default_factory=dict)
    victims: list[dict[str, Any]] = Field(min_length=1)

    def specs(self) -> dict[str, VictimSpec]:
        """Name -> spec, in the file's order; names are for people and distinct.

        Raises:
            SettingError: every problem, one a line.
        """
        found: list[tuple[str, VictimSpec]] = []
        problems: list[str] = []
        count = len(self.victims) * math.prod(map(len, self.each.values()))
        if count > MAX_VICTIMS:
            raise SettingError(
                f"`each` makes {count} victims of {len(self.victims)}, but a suite has at most "
                f"{MAX_VICTIMS}; split it."
            )
        for position, own in enumerate(self.victims):
            if len(problems) > MOST_PROBLEMS:
                break
            twice = sorted(self.each.keys() & (self.common | own).keys())
            if twice:
                problems.append(f"victims.{position}: {twice[0]!r} is in `each` as well")
                continue
            for combination in itertools.product(*self.each.values()):
                crossed = dict(zip(self.each, combination, strict=True))
                told = ", ".join(f"{key} {value}" for key, value in crossed.items())
                try:
                    spec = VictimSpec.model_validate(self.common | own | crossed)
                except ValidationError as error:
                    where = f"victims.{position}" + (f" ({told})" if told else "")
                    problems.append(f"{where}: {describe(error)}")
                else:
                    found.append((", ".join(filter(None, (spec.name, told))), spec))
        digests: set[str] = set()
        for name, spec in found:
            if spec.digest in digests:
                problems.append(f"victims: {name} is listed twice")
            digests.add(spec.digest)
        if problems:
            raise SettingError(*first_of(problems))
        names = Counter(name for name, _ in found)
        return {
            name if names[name] == 1 else f"{name} ({spec.digest[:6]})": spec for name, spec in found
        }


def load_suite(path: Path) -> dict[str, VictimSpec]:
    """The victims of a suite's file by name.

    Raises:
        SettingError: no file, no YAML, or every problem in it, one a line.
    """
    try:
        suite = VictimSuite.model_validate(read_yaml(path))
    except ValidationError as error:
        raise SettingError(f"{path}: {describe(error)}") from error
    except (OSError, ValueError) as error:
        raise SettingError(f"Cannot read the suite {path}: {error}.") from error
    try:
        return suite.specs()
    except SettingError as error:
        raise SettingError(*(f"{path}: {line}" for line in error.lines)) from error
