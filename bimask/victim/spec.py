"""What a victim is made of."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bimask.attacks import Attack, build_attack
from bimask.data import LOADERS, Splits, load_data
from bimask.net_spec import NetSpec


class VictimSpec(NetSpec):
    """All that a victim is made of. Two specs that differ in nothing but bounds share a digest.

    The recipe is that of `bimask.training.fit` on the training split; the last epoch is kept, nothing
    is chosen on `val` or `test`.

    With `weights` nothing is trained: the net is loaded from them and its scores under the attack's
    trigger are measured. Settings of the training then decide nothing.

    With a `poisoning_rate` of 0 it is a clean control, trained on clean images alone. The attack is
    then the trigger whose rate of success is reported; none is asked for.
    """

    dataset: str = "digits"
    image_size: int | None = Field(None, ge=4, le=1024)
    attack: dict[str, Any] = Field(default_factory=lambda: {"name": "badnets"})
    poisoning_rate: float = Field(0.1, ge=0, le=1, description="0 makes a clean control")
    poisoning_rate_of: Literal["dataset", "target_class"] = "dataset"
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    shift: int = Field(1, ge=0, description="augmentation: random shift by up to this many pixels")
    flip: bool = Field(False, description="augmentation: random horizontal flip")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of training's passes")
    seed: int = Field(0, ge=0)
    min_clean_accuracy: float = Field(0.5, ge=0, le=1, description="bound on val")
    min_attack_success: float = Field(0.5, ge=0, le=1, description="bound on val")

    @model_validator(mode="after")
    def _known_names(self) -> VictimSpec:
        if self.dataset not in LOADERS and not self.dataset.startswith("imagefolder:"):
            known = ", ".join(sorted(LOADERS))
            raise ValueError(
                f"unknown dataset {self.dataset!r}, known are {known} and imagefolder:PATH"
            )
        if "name" not in self.attack:
            raise ValueError("`attack` needs a `name`")
        build_attack(**self.attack)  # SettingError is a ValueError: pydantic reports it
        return self

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything that decides the weights; files count by their content."""
        bounds_and_paths = {"min_clean_accuracy", "min_attack_success", "weights"}
        deciding = self.model_dump(exclude=bounds_and_paths)
        if self.net_sha256 is not None:
            deciding["net"] = self.net.rpartition(":")[2]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_control(self) -> bool:
        """Whether it has no backdoor."""
        return self.poisoning_rate == 0

    @property
    def name(self) -> str:
        """For people: dataset and attack, or "clean"."""
        dataset = Path(self.dataset.removeprefix("imagefolder:")).name
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset).strip("-") or "images"
        return f"{readable}-{'clean' if self.is_control else self.attack['name']}"

    def build_attack(self) -> Attack:
        """The attack with its hyper-parameters; a victim's own is ready for images as well."""
        return build_attack(**self.attack)

    def recipe(self) -> dict[str, Any]:
        """What `bimask.training.fit` is told of net and training."""
        keys = {"epochs", "batch_size", "lr", "weight_decay", "shift", "flip", "precision", "seed"}
        return {"fresh_net": self.fresh_net} | self.model_dump(include=keys)

    def rates(self) -> dict[str, Any]:
        """What the attack is told of how many samples to poison."""
        return {"rate": self.poisoning_rate, "rate_of": self.poisoning_rate_of}

    def load_data(self) -> Splits:
        """The clean data the victim was made from."""
        return load_data(self.dataset, image_size=self.image_size)
