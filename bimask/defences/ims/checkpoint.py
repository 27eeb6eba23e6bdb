"""Where a population stands between two rounds: kept in one file, and gone on from with the same bits.

A state holds what decides the rounds to come (masks, selections, moments, perturbations, the state of
every member's generator, stage, round, progress) and what has been logged. The net, the images and the
settings are the caller's to give again; the state refuses other settings.

    state = PopulationState.of(population)      # between two rounds
    state.save(path)
    ...
    population = PopulationPurifier(model, images, configs, generators=generators)
    PopulationState.load(path).put_into(population)
    results = population.run()                  # as if nothing had been between
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

from torch import Tensor

from bimask.defences.base import Passes
from bimask.defences.ims.member import Member
from bimask.defences.ims.population import PopulationPurifier
from bimask.defences.ims.result import RoundLog
from bimask.defences.state import DefenceState
from bimask.errors import NonFiniteError, SettingError


class PopulationState(DefenceState):
    """What a population is at, between two rounds; `generator.ROW` among its tensors are bytes."""

    @classmethod
    def of(cls, population: PopulationPurifier) -> PopulationState:
        """The state of a population that is between two rounds.

        Raises:
            SettingError: a member without a generator of its own: what it draws cannot be gone on from.
        """
        tensors = {name: tensor.cpu().clone() for name, tensor in _tensors(population).items()}
        for member in population.members:
            if member.generator is None:
                raise SettingError(
                    f"Member {member.row} has no generator of its own, so its state cannot be kept; "
                    "give one a member in `generators`."
                )
            tensors[f"generator.{member.row}"] = member.generator.get_state()
        seconds = time.perf_counter() - population.started
        return cls(tensors, [_standing(member) for member in population.members], seconds)

    def put_into(self, population: PopulationPurifier) -> None:
        """Bring a new population of the same model, images and settings to where this one stood.

        Raises:
            SettingError: other settings, or tensors of other shapes; the population is left as it was.
        """
        settings = [member.config.model_dump(mode="json") for member in population.members]
        if settings != [standing["config"] for standing in self.members]:
            raise SettingError(
                f"The state is of {len(self.members)} member(s) with other settings than the "
                f"{len(settings)} to go on; give those that it was kept with."
            )
        wanted = _tensors(population)
        mine = {name: t for name, t in self.tensors.items() if not name.startswith("generator.")}
        shapes = {name: tuple(tensor.shape) for name, tensor in mine.items()}
        if (expected := {name: tuple(tensor.shape) for name, tensor in wanted.items()}) != shapes:
            raise SettingError(
                f"The state has tensors {shapes}, but this model and these images need {expected}; "
                "give those that it was kept with."
            )
        for name, tensor in wanted.items():
            tensor.copy_(mine[name])
        population.started = time.perf_counter() - self.seconds
        for member, standing in zip(population.members, self.members, strict=True):
            if member.generator is not None:
                member.generator.set_state(self.tensors[f"generator.{member.row}"])
            _stand(member, standing)
            if standing["finished"] is not None:
                population.finish(member, seconds=standing["finished"])


def _tensors(population: PopulationPurifier) -> dict[str, Tensor]:
    """The population's own tensors, one row a member, that a round reads and writes."""
    named = {
        "state": population.state,
        "kept": population.kept,
        "best_losses": population.best_losses,
        "first": population.adamw.first,
        "second": population.adamw.second,
    }
    own, universal = population.perturbations.own, population.perturbations.universal
    if own is not None and universal is not None:
        named |= {"own": own, "universal": universal}
    return named


def _standing(member: Member) -> dict[str, Any]:
    """Where a member stands, as JSON types."""
    result = member.result
    failed = isinstance(result, NonFiniteError)
    return {
        "config": member.config.model_dump(mode="json"),
        "stages": list(member.stages),
        "round": member.round,
        "best": member.plateau.best if math.isfinite(member.plateau.best) else None,
        "stale": member.plateau.stale,
        "passes": asdict(member.passes),
        "rounds": [asdict(log) for log in member.rounds],
        "failure": str(result) if failed else None,
        "finished": None if result is None or isinstance(result, NonFiniteError) else result.seconds,
    }


def _stand(member: Member, standing: dict[str, Any]) -> None:
    """Bring a member to where another of its settings stood."""
    member.stages = list(standing["stages"])
    member.begin_stage()
    member.round = standing["round"]
    member.plateau.best = math.inf if standing["best"] is None else standing["best"]
    member.plateau.stale = standing["stale"]
    member.passes = Passes(**standing["passes"])
    member.rounds = [RoundLog(**log) for log in standing["rounds"]]
    member.result = None if standing["failure"] is None else NonFiniteError(standing["failure"])
