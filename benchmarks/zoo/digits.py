"""Small digits models for the audit: clean ones and backdoored ones, in two sets that share nothing.

    python -m benchmarks.zoo.digits   # trains what is not there: 88 models of 5 to 15 s each

Seeds, widths and targets differ from model to model; an attack that a training does not learn (ASR on
`val` below 0.9) is trained again with the next seed, so every backdoored model has a backdoor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bimask.errors import VictimRefusedError
from bimask.victims import VictimSpec, obtain_victim

Part = Literal["calibration", "measurement"]

FOLDER = Path("outputs/benchmarks/zoo")
SEEDS: dict[Part, int] = {"calibration": 1000, "measurement": 5000}
CLEAN, OF_AN_ATTACK = 20, 4  # models of a part
TARGET_OFFSETS: dict[Part, int] = {"calibration": 0, "measurement": 3}
WIDTHS = range(8, 17)
TRIES = 5

# What digits need beside the published values: see benchmarks/victims.py.
ATTACKS: dict[str, dict[str, Any]] = {
    "badnets": {},
    "blended": {},
    "wanet": {"attack": {"strength": 1.5}, "epochs": 60},
    "low_frequency": {},
    "sig": {"attack": {"delta": 0.6}, "poisoning_rate": 0.08, "epochs": 60},
    "bpp": {"attack": {"squeeze_num": 4}},
}


@dataclass(frozen=True)
class Member:
    """One model of the zoo; `attack` and `target` are None for a clean one."""

    part: Part
    name: str
    attack: str | None
    target: int | None
    model: nn.Module


def members(part: Part) -> Iterator[Member]:
    """The models of a part, clean and backdoored by turns, trained where they are not kept."""
    for position in range(max(CLEAN, OF_AN_ATTACK * len(ATTACKS))):
        if position < CLEAN:
            yield clean(part, position)
        yield backdoored(part, position)


def clean(part: Part, position: int) -> Member:
    """A model that nobody poisoned; half of them are trained for as long as a WaNet."""
    seed = SEEDS[part] + 10 * position + 7
    spec = VictimSpec(
        poisoning_rate=0,
        width=WIDTHS[(5 * position) % len(WIDTHS)],
        seed=seed,
        epochs=30 + 30 * (position % 2),
    )
    victim = obtain_victim(spec, FOLDER / "victims")
    return Member(part, f"clean-{seed}", None, None, victim.model)


def backdoored(part: Part, position: int) -> Member:
    """Four models an attack; every class is the target of some."""
    attack, settings = _attack_of(position)
    target = (position + position // 5 + TARGET_OFFSETS[part]) % 10
    for attempt in range(TRIES):
        seed = SEEDS[part] + 10 * position + attempt
        spec = VictimSpec(
            **settings
            | {"attack": {"name": attack, "target": target} | settings.get("attack", {})}
            | {"width": WIDTHS[(4 * position + 2) % len(WIDTHS)], "seed": seed}
            | {"min_attack_success": 0.9, "min_clean_accuracy": 0.9}
        )
        try:
            victim = obtain_victim(spec, FOLDER / "victims")
        except VictimRefusedError as error:
            print(f"{attack}-{seed}: {error}", flush=True)
            continue
        return Member(part, f"{attack}-{seed}", attack, target, victim.model)
    raise VictimRefusedError(f"{attack} towards class {target} was not learned in {TRIES} trainings.")


def _attack_of(position: int) -> tuple[str, dict[str, Any]]:
    """The first five attacks by turns, then the sixth: its models came later."""
    names = list(ATTACKS)
    name = names[position % 5] if position < 5 * OF_AN_ATTACK else names[5]
    return name, ATTACKS[name]


def main() -> None:
    torch.set_num_threads(1)
    parts: list[Part] = [part for part in SEEDS if part in sys.argv[1:] or not sys.argv[1:]]
    for part in parts:
        for member in members(part):
            print(json.dumps({"part": part, "name": member.name, "target": member.target}), flush=True)


if __name__ == "__main__":
    main()
