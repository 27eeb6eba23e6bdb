"""A protocol: every attack at every poisoning rate, on every net and data set, as data.

The IMS paper runs 288 cases (8 attacks, 4 nets, 3 data sets, 3 rates; section 5.1). Each pair of a net
and a data set is a comparison of its own: its studies tune on some attacks at one rate, and every case
is then judged, with the choice beside the published settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bimask.errors import describe, first_of
from bimask.files.bounded import read_yaml
from bimask.victims import VictimSpec
from study.spec.comparison import ComparisonConfig, problems_of
from study.spec.config import StudyError

NAMED = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
OF_VICTIMS = ("name", "common", "tuning", "variants", "held_out")  # of a comparison, made from the grid
UNBOUNDED = {"min_clean_accuracy": 0.0, "min_attack_success": 0.0}
EXAMPLE = "search_spaces/protocol.yaml"


@dataclass(frozen=True)
class Case:
    """One attack at one rate on one net and data set; `rate` is None for a twin without a backdoor."""

    dataset: str
    net: str
    attack: str
    rate: float | None


class ProtocolConfig(BaseModel):
    """A protocol. See search_spaces/protocol.yaml for the paper's.

    `datasets`, `nets` and `attacks` are names with the settings that a victim of them has; what two of
    them set is taken from the attack first, then the net.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAMED, max_length=40)
    datasets: dict[str, dict[str, Any]] = Field(min_length=1, max_length=50)
    nets: dict[str, dict[str, Any]] = Field(min_length=1, max_length=50)
    attacks: dict[str, dict[str, Any]] = Field(min_length=1, max_length=50)
    rates: list[float] = Field(min_length=1, max_length=20, description="of poisoning, ascending")
    tuning: list[str] = Field(min_length=1, description="attacks that trials are scored on, on val")
    tuning_rate: float | None = Field(None, description="that trials see; null: the largest")
    except_: list[dict[str, Any]] = Field(
        default_factory=list,
        alias="except",
        description="cases that cannot be, by any of dataset, net, attack and rate",
    )
    comparison: dict[str, Any] = Field(
        description="the rest of each comparison: defences, published, search_seconds, seeds ..."
    )

    @field_validator("datasets", "nets", "attacks")
    @classmethod
    def _short_names(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in given:
            if not name.replace("_", "").replace("-", "").isalnum() or len(name) > 30:
                raise ValueError(f"a name has letters, digits, - and _, 30 at most, got {name!r}")
        return given

    @model_validator(mode="after")
    def _fits(self) -> ProtocolConfig:
        if sorted(set(self.rates)) != self.rates or not 0 < self.rates[0] <= self.rates[-1] <= 1:
            raise ValueError(f"rates rise, above 0 and to 1 at most, got {self.rates}")
        if unknown := [name for name in self.tuning if name not in self.attacks]:
            raise ValueError(f"`tuning` names {unknown[0]!r}, which is none of `attacks`")
        if len(set(self.tuning)) < len(self.tuning):
            raise ValueError(f"`tuning` names each attack once, got {', '.join(self.tuning)}")
        if self.rate_of_tuning not in self.rates:
            raise ValueError(f"`tuning_rate` is one of {self.rates}, got {self.tuning_rate}")
        if known := [key for key in self.comparison if key in OF_VICTIMS]:
            raise ValueError(f"`comparison` has no {known[0]!r}: the grid says it")
        axes = {"dataset": self.datasets, "net": self.nets, "attack": self.attacks, "rate": self.rates}
        for one in self.except_:
            for axis, value in one.items():
                if axis not in axes or value not in axes[axis]:
                    raise ValueError(f"`except` names {axis} {value!r}, which the protocol has not")
        return self

    @property
    def rate_of_tuning(self) -> float:
        """The poisoning rate of the victims that trials see."""
        return self.rates[-1] if self.tuning_rate is None else self.tuning_rate

    @property
    def digest(self) -> str:
        """Sixteen hex digits of all comparisons."""
        digests = [config.digest for config in self.comparisons().values()]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]

    def cases(self) -> list[Case]:
        """All attacks at all rates on all nets and data sets, but for `except`."""
        return [
            case
            for dataset in self.datasets
            for net in self.nets
            for attack in self.attacks
            for rate in self.rates
            if not self._left_out(case := Case(dataset, net, attack, rate))
        ]

    def comparisons(self) -> dict[tuple[str, str], ComparisonConfig]:
        """(data set, net) -> the comparison that has its cases.

        Raises:
            ValidationError: its settings do not fit.
        """
        found = {}
        for dataset in self.datasets:
            for net in self.nets:
                if content := self._comparison(dataset, net):
                    found[dataset, net] = ComparisonConfig.model_validate(content)
        return found

    def case_of(self) -> dict[str, Case]:
        """Victim's digest -> its case, of all that choices are judged on."""
        found: dict[str, Case] = {}
        for (dataset, net), config in self.comparisons().items():
            for case, own in self._victims(dataset, net):
                found |= {spec.digest: case for spec in config.specs([own], config.seeds.judged)}
            for spec in config.judged()["control"]:
                found[spec.digest] = Case(dataset, net, "clean", None)
        return found

    def suite(self) -> dict[str, VictimSpec]:
        """Digest -> every victim, those of trials, too."""
        return {
            spec.digest: spec
            for config in self.comparisons().values()
            for spec in config.suite().values()
        }

    def tuned(self, case: Case) -> bool:
        """Whether trials see a victim of the case, of another seed than those that are judged."""
        return case.attack in self.tuning and case.rate == self.rate_of_tuning

    def _left_out(self, case: Case) -> bool:
        return any(
            all(getattr(case, axis) == value for axis, value in one.items()) for one in self.except_
        )

    def _victims(self, dataset: str, net: str) -> list[tuple[Case, dict[str, Any]]]:
        """What each case's victims have beyond those of its data set and net.

        An attack that is not learned at a rate is a finding there; trials need victims that obey.
        """
        return [
            (
                case,
                {
                    **({} if self.tuned(case) else UNBOUNDED),
                    **self.attacks[case.attack],
                    "poisoning_rate": case.rate,
                },
            )
            for case in self.cases()
            if (case.dataset, case.net) == (dataset, net)
        ]

    def _comparison(self, dataset: str, net: str) -> dict[str, Any]:
        """A comparison's content; nothing where all of its cases are left out."""
        victims = self._victims(dataset, net)
        if not victims:
            return {}
        seen = [(case, own) for case, own in victims if case.attack in self.tuning]
        return {
            **self.comparison,
            "name": f"{self.name}.{dataset}.{net}",
            "common": {**self.datasets[dataset], **self.nets[net]},
            "tuning": [own for case, own in seen if self.tuned(case)],
            "variants": [own for case, own in seen if not self.tuned(case)],
            "held_out": [own for case, own in victims if case.attack not in self.tuning],
        }


def load_protocol(path: Path, overrides: Mapping[str, object] | None = None) -> ProtocolConfig:
    """Read and check a protocol with all of its comparisons and their studies.

    Args:
        overrides: `name`, and keys of `comparison`.

    Raises:
        StudyError: no file, no YAML, or settings that do not fit, all named.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"Cannot read the protocol {path}: {error}; give a YAML file such as {EXAMPLE}."
        ) from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} must hold `key: value` lines, got {type(content).__name__}.")
    given = dict(overrides or {})
    if "name" in given:
        content["name"] = given.pop("name")
    if isinstance(content.get("comparison"), dict):
        content["comparison"] = content["comparison"] | given
    try:
        config = ProtocolConfig.model_validate(content)
        found = [
            f"{path}: {one.name}: {problem}"
            for one in config.comparisons().values()
            for problem in problems_of(one)
        ]
    except ValidationError as error:
        raise StudyError(f"{path}: {describe(error)}") from error
    if found:
        raise StudyError("\n".join(first_of(list(dict.fromkeys(found)))))
    return config
