"""Where a training stands between two epochs: kept in one file, and gone on from with the same bits.

A file of safetensors: weights, the optimiser's moments, the states of the generators, what an attack
has learned; in its header, as JSON, the epoch, the optimiser's and the schedule's numbers, and the key
of the training that it is of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bimask.attacks import Attack
from bimask.files.atomic import atomic_write
from bimask.files.bounded import parsed_json
from bimask.files.moments import below, moments_of, prefixed, put_moments
from bimask.files.tensors import OF_STATES, read_tensors, require_header


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds the state of one training.

    Attributes:
        path: of the file; its folder is made when the first state is saved.
        key: what the training is of. The state of another is never loaded.
    """

    path: Path
    key: str

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write a state, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # copies: tied weights would share memory, which safetensors refuses
        copies = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        about = {"key": self.key, "numbers": json.dumps(numbers)}
        with atomic_write(self.path) as part:
            save_file(copies, part, metadata=about)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state there; None where there is none, a damaged one, or another training's."""
        try:
            if require_header(self.path, OF_STATES)["key"] != self.key:
                return None
            tensors, about = read_tensors(self.path, OF_STATES)
            return tensors, parsed_json(about["numbers"].encode())
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True)
class TrainingState:
    """All that decides the epochs to come, beside the data and the recipe.

    Attributes:
        attack: one that learns with the net, or None.
        draws: the attack's generator.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    draws: torch.Generator
    attack: Attack | None
    device: torch.device

    def save(self, checkpoint: Checkpoint, epoch: int) -> None:
        """Keep the state after so many epochs."""
        tensors = {
            **prefixed("net", self.model.state_dict()),
            **prefixed("moments", moments_of(self.optimizer)),
            "random.torch": torch.random.get_rng_state(),
            "random.attack": self.draws.get_state(),
        }
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self.attack is not None:
            tensors |= prefixed("attack", self.attack.learning_state())
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        numbers = {"epoch": epoch, "groups": groups, "schedule": self.schedule.state_dict()}
        checkpoint.save(tensors, numbers)

    def restore(self, checkpoint: Checkpoint) -> int:
        """Go on from the state that is kept; returns how many epochs it has behind it, 0 for none."""
        if (kept := checkpoint.load()) is None:
            return 0
        tensors, numbers = kept
        self.model.load_state_dict(below("net", tensors))
        put_moments(self.optimizer, below("moments", tensors))
        for group, saved in zip(self.optimizer.param_groups, numbers["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        self.schedule.load_state_dict(numbers["schedule"])
        if self.attack is not None:
            self.attack.resume_learning(below("attack", tensors), self.device)
        self.draws.set_state(tensors["random.attack"])
        torch.random.set_rng_state(tensors["random.torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        return int(numbers["epoch"])
