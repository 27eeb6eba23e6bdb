"""What a victim is made of."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bimask.attacks import Attack, build_attack
from bimask.data import FOLDER, LOADERS, Splits, load_data, pictures_digest
from bimask.errors import DataError, VictimError
from bimask.nets.spec import NetSpec
from bimask.victims.imported import ImportedVictim
from bimask.victims.imported_files import load_imported
from bimask.victims.stored import StoredTrigger, shared_out, stamped

MOST_IN_A_NAME = 100  # characters: it is a part of files' names
BOUNDS = ("min_clean_accuracy", "min_attack_success")


class VictimSpec(NetSpec):
    """All that a victim is made of. Two specs that differ in nothing but bounds share a digest.

    The recipe is that of `bimask.victims.training.fit` on the training split; the last epoch is kept,
    nothing is chosen on `val` or `test`.

    With `weights` nothing is trained: the net is loaded from them and its scores under the attack's
    trigger are measured. Settings of the training then decide nothing.

    With a `poisoning_rate` of 0 it is a clean control, trained on clean images alone. The attack is
    then the trigger whose rate of success is reported; none is asked for.

    With `imported`, a folder that `python -m bimask import` wrote, all is in the folder, and nothing
    but the bounds can be given beside it. Its stored images are shared out to the defender, `val` and
    `test`; see `bimask.victims.stored`.
    """

    dataset: str = "digits"
    dataset_sha256: str | None = Field(
        None, description="of the pictures of an imagefolder; filled in unless given"
    )
    image_size: int | None = Field(None, ge=4, le=1024)
    attack: dict[str, Any] = Field(default_factory=lambda: {"name": "badnets"})
    poisoning_rate: float = Field(0.1, ge=0, le=1, description="0 makes a clean control")
    poisoning_rate_of: Literal["dataset", "target_class"] = "dataset"
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    optimizer: Literal["sgd", "adamw"] | None = Field(
        None, description="null is sgd; transformers need adamw, with an `lr` such as 0.0003"
    )
    warmup: float | None = Field(
        None, gt=0, lt=1, description="share of the steps in which `lr` is reached; null is 0.3"
    )
    sam_rho: float | None = Field(
        None,
        gt=0,
        description="train by sharpness-aware minimisation with an adaptive perturbation of this size, "
        "to a flat minimum; null does without",
    )
    shift: int = Field(1, ge=0, description="augmentation: random shift by up to this many pixels")
    flip: bool = Field(False, description="augmentation: random horizontal flip")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of training's passes; bfloat16 where the device has instructions for it"
    )
    seed: int = Field(0, ge=0)
    imported: str | None = Field(None, description="folder of an imported victim")
    imported_sha256: str | None = Field(None, description="of its manifest; filled in unless given")
    min_clean_accuracy: float = Field(0.5, ge=0, le=1, description="bound on val")
    min_attack_success: float = Field(0.5, ge=0, le=1, description="bound on val")

    @model_validator(mode="before")
    @classmethod
    def _stamped_import(cls, given: Any) -> Any:
        """As files of weights: what the folder holds counts, not where it is."""
        if not isinstance(given, dict) or not isinstance(given.get("imported"), str):
            return given
        if given.get("imported_sha256") is not None:
            return given
        try:
            return stamped(given)
        except VictimError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="before")
    @classmethod
    def _stamped_pictures(cls, given: Any) -> Any:
        """As files of weights; null lets the path count, as in manifests that say nothing."""
        if not isinstance(given, dict) or "dataset_sha256" in given:
            return given
        if not str(given.get("dataset")).startswith(FOLDER):
            return given
        try:
            return given | {"dataset_sha256": pictures_digest(_folder(given["dataset"]))}
        except DataError:  # they may be on another machine; `load_data` says what is wrong
            return given

    @model_validator(mode="after")
    def _nothing_beside_an_import(self) -> VictimSpec:
        if self.imported is not None:
            free = {"net", "width", "imported", "imported_sha256", *BOUNDS}
            own = self.model_dump(exclude=free)
            usual = type(self)().model_dump(exclude=free)
            if odd := sorted(key for key in own if own[key] != usual.get(key)):
                raise ValueError(
                    f"the folder of `imported` says all but the bounds; leave {', '.join(odd)} out"
                )
        return self

    @model_validator(mode="after")
    def _known_names(self) -> VictimSpec:
        if self.dataset not in LOADERS and not self.dataset.startswith(FOLDER):
            known = ", ".join(sorted(LOADERS))
            raise ValueError(
                f"unknown dataset {self.dataset!r}, known are {known} and imagefolder:PATH"
            )
        if self.dataset_sha256 is not None and not self.dataset.startswith(FOLDER):
            raise ValueError(f"`dataset_sha256` is of pictures, but the dataset is {self.dataset}")
        if "name" not in self.attack:
            raise ValueError("`attack` needs a `name`")
        attack = build_attack(**self.attack)  # SettingError is a ValueError: pydantic reports it
        if self.sam_rho is not None and attack.batchwise and attack.has_state:
            raise ValueError(
                f"`sam_rho` takes two gradients of a batch, and {self.attack['name']} learns from one; "
                "leave it out"
            )
        return self

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything that decides the weights; files count by their content."""
        deciding = self.model_dump(exclude={*BOUNDS, "weights", "imported"})
        if self.dataset_sha256 is not None:
            deciding["dataset"] = FOLDER
        if self.net_sha256 is not None:
            deciding["net"] = self.net.rpartition(":")[2]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_control(self) -> bool:
        """Whether it has no backdoor."""
        return self.poisoning_rate == 0

    @property
    def given(self) -> bool:
        """Whether its weights are from elsewhere, so that nothing is trained."""
        return self.weights is not None or self.imported is not None

    def place(self, root: Path) -> Path:
        """Its folder: in `root`, or where it was imported to."""
        return root / self.digest if self.imported is None else Path(self.imported)

    @property
    def attack_name(self) -> str:
        """Of the attack it was made with; of an imported one, whose files may not say, its own name."""
        return str(self.attack["name"]) if self.imported is None else self.name

    @property
    def name(self) -> str:
        """For people: dataset and attack, or "clean"; of an imported one its folder's name."""
        if self.imported is not None:
            return _readable(Path(self.imported).name)
        dataset = _folder(self.dataset).name
        return f"{_readable(dataset)}-{'clean' if self.is_control else self.attack['name']}"

    def build_attack(self) -> Attack:
        """The attack with its hyper-parameters; a victim's own is ready for images as well."""
        if self.imported is not None:
            return StoredTrigger()
        return build_attack(**self.attack)

    def load_imported(self) -> ImportedVictim:
        """The victim in the folder of `imported`.

        Raises:
            VictimError: there is no such folder, or it is another one's by now.
            InteropError: its files are damaged.
        """
        if self.imported is None:
            raise VictimError(f"{self.name} is not imported.")
        if stamped({"imported": self.imported})["imported_sha256"] != self.imported_sha256:
            raise VictimError(
                f"The imported victim {self.imported} changed since the spec was made; put the old one "
                "back, or leave `imported_sha256` out."
            )
        return load_imported(Path(self.imported))

    def recipe(self) -> dict[str, Any]:
        """What `bimask.victims.training.fit` is told of net and training."""
        keys = {"epochs", "batch_size", "lr", "weight_decay", "shift", "flip", "precision", "seed"}
        keys |= {"optimizer", "warmup", "sam_rho"}
        return {"fresh_net": self.fresh_net} | self.model_dump(include=keys)

    def rates(self) -> dict[str, Any]:
        """What the attack is told of how many samples to poison."""
        return {"rate": self.poisoning_rate, "rate_of": self.poisoning_rate_of}

    def load_data(self) -> Splits:
        """The clean data the victim was made from; of an imported one those that came with it.

        Raises:
            VictimError: the pictures changed since the spec was made.
            DataError: as of `bimask.data.load_data`.
        """
        if self.imported is not None:
            return shared_out(self.load_imported())[0]
        promised = self.dataset_sha256
        if promised is not None and pictures_digest(_folder(self.dataset)) != promised:
            raise VictimError(
                f"The pictures in {_folder(self.dataset)} changed since the spec was made; put the old "
                "ones back, or leave `dataset_sha256` out."
            )
        return load_data(self.dataset, image_size=self.image_size)


def _folder(dataset: str) -> Path:
    return Path(dataset.removeprefix(FOLDER))


def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")[:MOST_IN_A_NAME] or "images"
