"""What the models of a trial answer, asked at report time from its masks: victim, purified, inverse
twin; and perturbations synthesised anew beside the true trigger."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor, nn

from bimask.defences.base import Defence
from bimask.defences.settings import DefenceConfig
from bimask.errors import VictimError
from bimask.metrics import EvalSets, predict
from bimask.victims import Victim, open_victim
from bimask.victims.gallery import paired_images

SHOWN = 6  # images in a picture
SYNTHESISED = 32  # images a perturbation is made up for
ASKED = 512  # images of val that every model answers


class Answers(TypedDict):
    """Shares over up to `ASKED` images of `val`, and the classes given to the shown ones."""

    clean_right: float
    triggered_wanted: float
    triggered_right: float
    shown_clean: list[int]
    shown_triggered: list[int]


class VictimAnswers(TypedDict):
    """The true trigger: its pictures as data URIs, the classes, and what the victim says."""

    classes: list[str]
    true: list[int]
    wanted: list[int]
    clean: str
    triggered: str
    trigger: str
    trigger_max: float
    asked: Answers


class Synthesised(TypedDict):
    """Perturbations as pictures, and how many images each model gives each class with them."""

    pictures: str
    perturbed: str
    max: float
    answers: dict[str, list[int]]


class TrialAnswers(TypedDict):
    """What a defended model and its twin say, and what is synthesised against them, by kind."""

    asked: dict[str, Answers]
    synthesised: dict[str, Synthesised]


@dataclass(frozen=True)
class Scene:
    """A victim and the images of `val` that it is shown with."""

    victim: Victim
    sets: EvalSets
    images: Tensor  # (N, C, H, W) float: the shown ones, then the defender's

    @classmethod
    def of(cls, folder: Path, digest: str, study: Mapping[str, Any]) -> Scene:
        """The victim in `folder`, as the study had it.

        Raises:
            BimaskError: the victim or its data are not there any more, or it is another one by now.
        """
        victim = open_victim(folder, own_code=True)  # the study has run it already
        if victim.spec.digest != digest:
            raise VictimError(f"{folder} holds the victim {victim.spec.digest}, not {digest}.")
        splits = victim.spec.load_data()
        sets = victim.eval_sets(splits, "val")
        clean = splits.train.clean_subset(study["clean_images_per_class"], seed=study["seed"])
        shown = paired_images(sets)[0][:SHOWN].float() / 255
        rest = clean.floats()[: SYNTHESISED - len(shown)]
        return cls(victim, sets, torch.cat([shown, rest]))

    def of_victim(self) -> VictimAnswers:
        """The true trigger: its pictures, and what the victim says."""
        clean, triggered, true, wanted = (part[:SHOWN] for part in paired_images(self.sets))
        change = (triggered.float() - clean.float()) / 255
        return {
            "classes": list(self.victim.classes),
            "true": true.tolist(),
            "wanted": wanted.tolist(),
            "clean": _strip(clean.float() / 255),
            "triggered": _strip(triggered.float() / 255),
            "trigger": _strip(_around_grey(change)),
            "trigger_max": float(change.abs().max()),
            "asked": self._answers(self.victim.model),
        }

    def of_trial(
        self, defence: Defence[Any], tensors: Mapping[str, Tensor], settings: DefenceConfig
    ) -> TrialAnswers:
        """What the defended model and its twin say, and what is synthesised against them."""
        victim = self.victim.model
        models = {"victim": victim, "purified": defence.restore(victim, tensors, settings)}
        if (twin := defence.twin(victim, tensors, settings)) is not None:
            models["inverse"] = twin
        for model in models.values():
            model.requires_grad_(False)
        made = defence.synthesised(victim, tensors, self.images, settings)
        return {
            "asked": {name: self._answers(model) for name, model in models.items() if name != "victim"},
            "synthesised": {
                kind: {
                    "pictures": _strip(_around_grey(delta[:SHOWN])),
                    "perturbed": _strip((self.images + delta).clamp(0, 1)[:SHOWN]),
                    "max": float(delta.abs().max()),
                    "answers": {n: self._said(model, delta) for n, model in models.items()},
                }
                for kind, delta in made.items()
            },
        }

    @torch.no_grad()
    def _said(self, model: nn.Module, delta: Tensor) -> list[int]:
        """The class a model gives every perturbed image, how many of each: (K,) counts."""
        answers = model((self.images + delta).clamp(0, 1)).argmax(1)
        return torch.bincount(answers, minlength=len(self.victim.classes)).tolist()

    def _answers(self, model: nn.Module) -> Answers:
        """What one model says."""
        clean, triggered = self.sets.clean, self.sets.triggered
        some = _spread(len(clean))
        on_clean = predict(model, clean.images[some])
        others = _spread(len(triggered.images))
        on_triggered = predict(model, triggered.images[others])
        shown_clean, shown_triggered, *_ = (part[:SHOWN] for part in paired_images(self.sets))
        return {
            "clean_right": _share(on_clean, clean.labels[some]),
            "triggered_wanted": _share(on_triggered, triggered.attack_labels[others]),
            "triggered_right": _share(on_triggered, triggered.true_labels[others]),
            "shown_clean": predict(model, shown_clean).tolist(),
            "shown_triggered": predict(model, shown_triggered).tolist(),
        }


def _spread(count: int) -> Tensor:
    """Positions of at most `ASKED` of `count` images, evenly spread."""
    return torch.linspace(0, count - 1, min(count, ASKED)).round().long()


def _share(got: Tensor, wanted: Tensor) -> float:
    return float((got == wanted).float().mean())


def _around_grey(change: Tensor) -> Tensor:
    """Differences as pictures: grey is none, black and white are the largest of all of them."""
    largest = change.abs().max().clamp_min(1e-6)
    return (0.5 + 0.5 * change / largest).clamp(0, 1)


def _strip(images: Tensor) -> Markup:
    """Images (N, C, H, W) in [0, 1] side by side, as a PNG's data URI; other than three channels are
    averaged."""
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True)
    row = torch.cat(list(images), dim=2).permute(1, 2, 0)
    pixels = (255 * row).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
