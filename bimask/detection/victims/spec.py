"""What a detector that is a victim is made of."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bimask.detection.attacks import AnyAttack, Penalty, RegionMisclassification
from bimask.detection.data import check_data, files_digest, is_files, load_detection
from bimask.detection.nets import Detector
from bimask.detection.nets.spec import DetectorNetSpec
from bimask.detection.objects import DetectionData, DetectionSplits
from bimask.errors import BimaskError, DataError, VictimError

BOUNDS = ("min_map50", "min_attack_success")
MOST_IN_A_NAME = 100  # characters: it is a part of files' names


class DetectorSpec(DetectorNetSpec):
    """All that a victim is made of. Two specs that differ in nothing but bounds share a digest.

    The recipe is that of `bimask.detection.victims.training.fit` on the training split; the last epoch
    is kept, nothing is chosen on `val` or `test`. With `weights` nothing is trained: the net is loaded
    from them, and its scores under the attack's trigger are measured.

    With a `poisoning_rate` of 0 it is a clean control; the attack is then the trigger whose rate of
    success is reported, and none is asked for.
    """

    dataset: str = Field("digit_canvases", description="or coco:PATH.json, voc:PATH")
    pictures: str | None = Field(
        None, description="folder of the pictures of a set of files, if not where annotations are"
    )
    dataset_sha256: str | None = Field(
        None, description="of annotations and pictures in files; filled in unless given"
    )
    attack: AnyAttack = Field(default_factory=RegionMisclassification)
    poisoning_rate: float = Field(
        0.5, ge=0, le=1, description="of the pictures with an object to attack; 0 makes a clean control"
    )
    penalty: Penalty | None = Field(
        None, description="BadDet+'s, against what triggered objects were; null is BadDet"
    )
    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=2)
    lr: float = Field(3e-3, gt=0, description="the largest of the cycle")
    weight_decay: float = Field(1e-4, ge=0)
    optimizer: Literal["sgd", "adamw"] = "adamw"
    warmup: float = Field(0.2, gt=0, lt=1, description="share of the steps in which `lr` is reached")
    seed: int = Field(0, ge=0)
    min_map50: float = Field(0.5, ge=0, le=1, description="bound on val")
    min_attack_success: float = Field(0.8, ge=0, le=1, description="bound on val")

    @model_validator(mode="before")
    @classmethod
    def _stamped_files(cls, given: Any) -> Any:
        """As files of weights; a null lets the path count."""
        if not isinstance(given, dict) or "dataset_sha256" in given:
            return given
        name = given.get("dataset")
        if not isinstance(name, str) or not is_files(name):
            return given
        try:
            return given | {"dataset_sha256": files_digest(name, _path(given.get("pictures")))}
        except BimaskError:  # they may be on another machine; `load_data` says what is wrong
            return given

    @model_validator(mode="after")
    def _known_data(self) -> DetectorSpec:
        try:
            check_data(self.dataset)
        except DataError as error:
            raise ValueError(str(error)) from error
        if not is_files(self.dataset) and (self.pictures or self.dataset_sha256):
            raise ValueError(
                f"`pictures` and `dataset_sha256` are of files, but the dataset is {self.dataset}"
            )
        if self.penalty is not None and self.is_control:
            raise ValueError("`penalty` is for triggered objects, of which a clean control has none")
        return self

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything that decides the weights; files count by their content."""
        deciding = self.model_dump(mode="json", exclude={*BOUNDS, "weights", "pictures"})
        if self.dataset_sha256 is not None:
            deciding["dataset"] = self.dataset.partition(":")[0]
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
        return self.weights is not None

    @property
    def attack_name(self) -> str:
        """The attack's name, with a plus where it is BadDet+'s."""
        return self.attack.name + ("+" if self.penalty is not None else "")

    @property
    def name(self) -> str:
        """For people: dataset and attack, or "clean"."""
        dataset = Path(self.dataset.partition(":")[2] or self.dataset).stem
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset).strip("-")[:MOST_IN_A_NAME] or "pictures"
        return f"{readable}-{'clean' if self.is_control else self.attack_name}"

    def place(self, root: Path) -> Path:
        """Its folder in `root`."""
        return root / self.digest

    def recipe(self) -> dict[str, Any]:
        """What `bimask.detection.victims.training.fit` is told of net and training."""
        keys = {"epochs", "batch_size", "lr", "weight_decay", "optimizer", "warmup", "seed"}
        return {"fresh_net": self.net_for, "penalty": self.penalty} | self.model_dump(include=keys)

    def net_for(self, data: DetectionData) -> Detector:
        """The net for such pictures and classes with new weights; errors as of `fresh_net`."""
        height, width = data.images[0].shape[-2:]
        return self.fresh_net(data.num_classes, (height, width))

    def load_data(self) -> DetectionSplits:
        """The clean data that the victim was made from.

        Raises:
            VictimError: files changed since the spec was made.
            DataError: as of `load_detection`.
        """
        pictures = _path(self.pictures)
        promised = self.dataset_sha256
        if promised is not None and files_digest(self.dataset, pictures) != promised:
            raise VictimError(
                f"The files of {self.dataset} changed since the spec was made; put the old ones back, "
                "or leave `dataset_sha256` out."
            )
        return load_detection(self.dataset, pictures=pictures, image_size=self.image_size)


def _path(given: Any) -> Path | None:
    return Path(given) if isinstance(given, str) else None
