"""The trials that `benchmarks.blind` judges: random settings on victims of attacks never tuned on.

    python -m benchmarks.blind_runs          # 30 settings a victim, 5 s each on one thread

The same settings on every victim, drawn from the space of `make study`. Masks and true scores are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.zoo.digits import ATTACKS
from bimask.data import Splits
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.defence import Ims
from bimask.defences.purify import defence_of
from bimask.defences.settings import DefenceConfig
from bimask.errors import NonFiniteError
from bimask.metrics import evaluate
from bimask.victims import Victim, VictimSpec, obtain_victim
from study.spec.reading import load_config
from study.spec.space import suggest
from study.trial.cases import Case
from study.trial.run import run_trials

FOLDER = Path("outputs/benchmarks/blind")
SPACE = Path("search_spaces/ims_digits.yaml")
SETTINGS = 30
AT_ONCE = 3
SEED = 1  # of victims, settings, clean images and defence: the study that proxies were built on has 0
TARGETS = {"badnets": 3, "blended": 5, "wanet": 8, "low_frequency": 6, "sig": 2}


@dataclass(frozen=True)
class Judged:
    """One setting on one victim, with what only the attacker knows."""

    number: int
    config: PurifyConfig
    masks: dict[str, torch.Tensor]
    val: dict[str, Any]
    test: dict[str, Any]

    def model(self, victim: Victim, *, inverse: bool = False) -> nn.Module:
        make = Ims().twin if inverse else Ims().restore
        return make(victim.model, self.masks, self.config)


def victim_of(attack: str) -> tuple[Victim, Splits]:
    """The victim of an attack; no study and no audit knows it."""
    changes = ATTACKS[attack]
    settings = {"name": attack, "target": TARGETS[attack]} | changes.get("attack", {})
    spec = VictimSpec(**changes | {"attack": settings, "seed": SEED, "min_attack_success": 0.8})
    return obtain_victim(spec, FOLDER / "victims"), spec.load_data()


def settings() -> list[DefenceConfig]:
    """Random settings, the same for every victim."""
    config = load_config(SPACE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    return [config.defence_config(suggest(config.space, study.ask())) for _ in range(SETTINGS)]


def run(attack: str) -> None:
    """Purify the victim with the settings that are not kept yet."""
    victim, splits = victim_of(attack)
    study = load_config(SPACE, {"seed": SEED})
    case, test = Case.of(attack, victim, study), victim.eval_sets(splits, "test")
    configs, folder = settings(), FOLDER / attack
    restore = defence_of(configs[0]).restore
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, SETTINGS, AT_ONCE):
        group = range(first, min(first + AT_ONCE, SETTINGS))
        numbers = [n for n in group if not (folder / f"{n:03d}.json").exists()]
        results = run_trials([configs[n] for n in numbers], [case], seed=SEED) if numbers else []
        for number, result in zip(numbers, results, strict=True):
            if isinstance(result, NonFiniteError):
                continue
            ended = result.cases[attack]
            tensors = ended.tensors
            scores = {
                "config": configs[number].model_dump(),
                "val": asdict(ended.scores),
                "test": asdict(evaluate(restore(victim.model, tensors, configs[number]), test)),
                "seconds": result.seconds,
            }
            save_file(tensors, folder / f"{number:03d}.safetensors")
            (folder / f"{number:03d}.json").write_text(json.dumps(scores, indent=1) + "\n")
            print(attack, number, round(ended.numbers["attack_success"], 3), flush=True)


def judged(attack: str) -> Iterator[Judged]:
    """What `run` kept."""
    for path in sorted((FOLDER / attack).glob("*.json")):
        kept = json.loads(path.read_text())
        masks = load_file(path.with_suffix(".safetensors"))
        config = PurifyConfig.model_validate(kept["config"])
        yield Judged(int(path.stem), config, masks, kept["val"], kept["test"])


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    for attack in sys.argv[1:] or TARGETS:
        run(attack)


if __name__ == "__main__":
    main()
