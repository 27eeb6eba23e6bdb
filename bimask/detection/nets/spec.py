"""Which net a detector has, and what its labels mean."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bimask.detection.nets.detector import Detector
from bimask.detection.nets.named import build_detector, check_detector, require_answers
from bimask.errors import VictimError
from bimask.nets import is_own, source_of
from bimask.nets.spec import stamped
from bimask.nets.weights import file_sha256


class DetectorNetSpec(BaseModel):
    """A detector by name, with weights of its own or without; see `bimask.detection.nets.named`.

    Paths are as seen from the working directory. The net takes pictures in [0, 1] and normalises them
    itself, as torchvision's do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    net: str = Field(
        "small_fcos", description="or torchvision:NAME, module:factory, path/to/file.py:factory"
    )
    width: int | None = Field(None, ge=1, description="channels; null is the net as published")
    image_size: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="pixels of a picture's longer side, in memory and in the net; null keeps that of "
        "the files, and the net's",
    )
    label_ids: tuple[int, ...] | None = Field(
        None, description="what the net calls each class; null is torchvision's convention"
    )
    outputs: int | None = Field(
        None, ge=1, description="classes that the net is made for, if they are more than the data's"
    )
    weights: str | None = Field(None, description="a file of weights, whatever its name: no training")
    weights_sha256: str | None = Field(None, description="of the file; filled in unless given")
    net_sha256: str | None = Field(None, description="of an own net's file; filled in unless given")

    @model_validator(mode="before")
    @classmethod
    def _stamped(cls, given: Any) -> Any:
        """Files go into the digest by their content, so that it can be had without them later."""
        return stamped(given, check_detector)

    @model_validator(mode="after")
    def _known_net(self) -> DetectorNetSpec:
        check_detector(self.net)  # SettingError is a ValueError: pydantic reports it
        return self

    def fresh_net(self, num_classes: int, size: tuple[int, int] | None = None) -> Detector:
        """The detector with new weights; an own factory is imported and run.

        Args:
            size: height and width of a picture that it is asked for once; None asks nothing.

        Raises:
            SettingError: it cannot be made, see `build_detector`.
            ModelError: it is no detector.
            VictimError: the file of an own net is another one than when the spec was made.
        """
        if self.net_sha256 is not None and file_sha256(source_of(self.net)) != self.net_sha256:
            raise VictimError(
                f"The code of the net {self.net!r} changed since the spec was made; put the old file "
                "back, or make the victim anew."
            )
        detector = build_detector(
            self.net,
            num_classes=num_classes,
            width=self.width,
            image_size=self.image_size,
            label_ids=self.label_ids,
            outputs=self.outputs,
        )
        if size is not None:
            require_answers(detector, *size)
        return detector

    def require_at_most(self, numbers: int, num_classes: int) -> None:
        """Refuse a net that is larger than its file of weights, before memory is taken for it.

        Own nets are let pass: their code is trusted, or was not run.

        Raises:
            VictimError: it has more than so many numbers.
            SettingError: it cannot be made.
        """
        if is_own(self.net):
            return
        with torch.device("meta"):
            detector = self.fresh_net(num_classes)
        asked = sum(value.numel() for value in detector.state_dict().values())
        if asked > numbers:
            raise VictimError(
                f"{self.net} for {num_classes} classes has {asked} numbers, but its file of weights "
                f"holds {numbers}: they do not fit."
            )
