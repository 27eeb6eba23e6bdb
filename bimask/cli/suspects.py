"""What commands that look at a model in doubt share: the options that say which, and its loading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from bimask.cli.terminal import console
from bimask.data import Splits
from bimask.data.pictures import DataWarning
from bimask.errors import SettingError
from bimask.inspection.knowing import require_knowing
from bimask.inspection.suspect import Suspect, load_suspect
from bimask.inspection.words import numbers, size
from bimask.metrics import EvalSets
from bimask.victims import open_victim
from bimask.victims.as_suspect import suspect_of

Model = Annotated[
    Path | None, typer.Option(help="Your own weights: safetensors, or of torch.save, any name.")
]
Net = Annotated[
    str | None, typer.Option(help="Its net: FILE.py:factory, package.module:factory or a name.")
]
Clean = Annotated[Path | None, typer.Option(help="Folder of clean pictures.")]
Classes = Annotated[int | None, typer.Option(help="How many; default: class folders.")]
ImageSize = Annotated[
    str | None, typer.Option(help="Pixels to bring pictures to: 32, or 48x32 (height x width).")
]
Channels = Annotated[
    int | None, typer.Option(help="3, or 1 for grey pictures; default: what the weights take.")
]
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
    image_size: str | None
    channels: int | None
    width: int | None
    mean: str | None
    std: str | None
    victim: Path | None

    def load(
        self, clean_images_per_class: int, *, seed: int, trust_code: bool, device: torch.device
    ) -> tuple[Suspect, Splits | None, EvalSets | None]:
        """The suspect, and of a victim its splits and what its trigger does on `test`.

        Args:
            clean_images_per_class: of a victim's training split, drawn by `seed`.

        Raises:
            SettingError: both, neither, or options that are none.
        """
        if self.victim is not None and self.model is None:
            found = open_victim(self.victim, own_code=trust_code, device=device)
            splits = found.spec.load_data()
            suspect = suspect_of(found, splits, clean_images_per_class, seed=seed)
            return suspect, splits, found.eval_sets(splits, "test")
        if None in (self.model, self.net, self.clean) or self.victim is not None:
            raise SettingError("Give your own model as --model, --net and --clean, or a --victim.")
        assert self.model is not None
        assert self.net is not None
        assert self.clean is not None
        if self.channels not in (None, 1, 3):
            raise SettingError(f"--channels must be 3, or 1 for grey pictures, got {self.channels}.")
        with shown_warnings():
            own = load_suspect(
                self.model,
                self.net,
                self.clean,
                classes=self.classes,
                channels=self.channels,
                image_size=size(self.image_size),
                width=self.width,
                mean=numbers("--mean", self.mean),
                std=numbers("--std", self.std),
            )
        require_knowing(own.model, own.clean, own.classes)
        for note in own.notes:
            console.tell(f"note: {note}")
        return own, None, None


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print what is warned of pictures as a line of its own; other warnings go their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            yield
        finally:
            for one in caught:
                if issubclass(one.category, DataWarning):
                    console.tell(str(one.message), mark="warning", style="bold yellow")
    for one in caught:
        if not issubclass(one.category, DataWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
