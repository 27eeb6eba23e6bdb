"""What commands that look at a model in doubt share: the options that say which, and its loading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from bimask.errors import SettingError
from bimask.metrics import EvalSets
from bimask.own_model import Suspect, load_suspect, suspect_of
from bimask.victim import open_victim

Model = Annotated[
    Path | None, typer.Option(help="Your own weights: .safetensors, or tensors in .pt, .pth.")
]
Net = Annotated[
    str | None, typer.Option(help="Its net: FILE.py:factory, package.module:factory or a name.")
]
Clean = Annotated[Path | None, typer.Option(help="Folder of clean pictures.")]
Classes = Annotated[int | None, typer.Option(help="How many; default: class folders.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels to bring pictures to.")]
Channels = Annotated[int, typer.Option(help="3, or 1 for grey pictures.")]
Width = Annotated[int | None, typer.Option(help="Of the net, where it takes one.")]
Mean = Annotated[str | None, typer.Option(help="Your normalisation: 0.485,0.456,0.406")]
Std = Annotated[str | None, typer.Option(help="and 0.229,0.224,0.225; default: none.")]
KnownVictim = Annotated[
    Path | None, typer.Option(help="Instead of your own: a victim's folder, trigger known.")
]
CleanImagesPerClass = Annotated[int, typer.Option(help="With --victim.")]


@dataclass(frozen=True)
class Choice:
    """A user's answer to the options above: a model of their own, or a victim."""

    model: Path | None
    net: str | None
    clean: Path | None
    classes: int | None
    image_size: int | None
    channels: int
    width: int | None
    mean: str | None
    std: str | None
    victim: Path | None

    def load(
        self, clean_images_per_class: int, *, seed: int, trust_code: bool, device: torch.device
    ) -> tuple[Suspect, EvalSets | None]:
        """The suspect, and of a victim what its trigger does on `test`.

        Args:
            clean_images_per_class: of a victim's training split, drawn by `seed`.

        Raises:
            SettingError: both, neither, or options that are none.
        """
        if self.victim is not None and self.model is None:
            found = open_victim(self.victim, own_code=trust_code, device=device)
            splits = found.spec.load_data()
            suspect = suspect_of(found, splits, clean_images_per_class, seed=seed)
            return suspect, found.eval_sets(splits, "test")
        if None in (self.model, self.net, self.clean) or self.victim is not None:
            raise SettingError("Give your own model as --model, --net and --clean, or a --victim.")
        assert self.model is not None
        assert self.net is not None
        assert self.clean is not None
        own = load_suspect(
            self.model,
            self.net,
            self.clean,
            classes=self.classes,
            channels=self.channels,
            image_size=self.image_size,
            width=self.width,
            mean=_numbers("--mean", self.mean),
            std=_numbers("--std", self.std),
        )
        return own, None


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingError(
            f"{option} must be numbers with commas, one a channel, got {text!r}."
        ) from error
