"""What a task's own pictures show of a victim and of a trial's defended model."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from markupsafe import Markup
from torch import Tensor, nn

from bimask.defences.base import Defence
from bimask.defences.settings import DefenceConfig
from bimask.errors import VictimError
from bimask.tasks import Task, task_named

QUALITY = 85  # of JPEG: there are four pictures a trial and victim


class PicturesOf(TypedDict):
    """What a model does, as data URIs by what is shown."""

    pictures: dict[str, str]


@dataclass(frozen=True)
class Shown:
    """A victim with the evaluation sets of `val` that it is shown with."""

    task: Task
    victim: Any
    sets: Any

    @classmethod
    def of(cls, folder: Path, digest: str, study: Mapping[str, Any]) -> Shown:
        """The victim in `folder`, as the study had it.

        Raises:
            BimaskError: the victim or its data are not there any more, or it is another one by now.
        """
        task = task_named(study.get("task"))
        victim = task.open_victim(folder)  # the study has run its code already
        if victim.spec.digest != digest:
            raise VictimError(f"{folder} holds the victim {victim.spec.digest}, not {digest}.")
        return cls(task, victim, victim.eval_sets(victim.load_data(), "val"))

    def of_victim(self) -> PicturesOf:
        """What the victim does."""
        return self._of(self.victim.model)

    def of_trial(
        self, defence: Defence[Any], tensors: Mapping[str, Tensor], settings: DefenceConfig
    ) -> PicturesOf:
        """What the defended model does."""
        return self._of(defence.restore(self.victim.model, tensors, settings))

    def _of(self, model: nn.Module) -> PicturesOf:
        found = self.task.pictures(self.victim, model, self.sets)
        return {"pictures": {name: _uri(picture) for name, picture in found.items()}}


def _uri(picture: Any) -> Markup:
    """A picture of Pillow's as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
    return Markup("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
