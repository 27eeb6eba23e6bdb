"""What commands that look at a model in doubt share: the options that say which, and its loading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bimask.cli.terminal import console
from bimask.data import Splits
from bimask.data.pictures import PICTURES, DataWarning
from bimask.defences import settings_from
from bimask.defences.base import Defence
from bimask.defences.settings import DefenceConfig
from bimask.errors import SettingError
from bimask.files.atomic import parsed_manifest
from bimask.files.bounded import read_yaml
from bimask.inspection.knowing import require_knowing
from bimask.inspection.suspect import Suspect, load_suspect
from bimask.inspection.words import numbers, size
from bimask.metrics import EvalSets
from bimask.victims import open_victim
from bimask.victims.as_suspect import suspect_of
from bimask.victims.folders import MANIFEST

Model = Annotated[
    Path | None, typer.Option(help="Your own weights: safetensors, or of torch.save, any name.")
]
Net = Annotated[
    str | None, typer.Option(help="Its net: FILE.py:factory, package.module:factory or a name.")
]
Clean = Annotated[
    Path | None, typer.Option(help="Folder of clean pictures; of a detector, their annotations.")
]
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


def is_annotated(clean: Path) -> bool:
    """Whether clean data are a detector's: annotations in a JSON, or a folder in VOC's form. Pictures
    alone, in class folders or none, are a classifier's."""
    if not clean.is_dir():
        return clean.suffix.lower() == ".json"
    beside = {path.stem for path in clean.iterdir() if path.suffix.lower() in PICTURES}
    return (clean / "Annotations").is_dir() or any(path.stem in beside for path in clean.glob("*.xml"))


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

    @property
    def of_detector(self) -> bool:
        """Whether the model is a detector, as far as clean data or a victim's manifest say it."""
        if self.victim is None:
            return self.clean is not None and is_annotated(self.clean)
        try:
            return bool(parsed_manifest(self.victim / MANIFEST)[0]["task"] == "detection")
        except (OSError, ValueError, LookupError, TypeError):
            return False  # whoever opens it says what is wrong

    def load(
        self, clean_images_per_class: int, *, seed: int, trust_code: bool, device: torch.device
    ) -> tuple[Suspect, Splits | None, EvalSets | None]:
        """The suspect, and of a victim its splits and what its trigger does on `test`.

        Args:
            clean_images_per_class: of a victim's training split, drawn by `seed`.

        Raises:
            SettingError: both, neither, or options that are none.
        """
        if self.of_detector:
            raise SettingError(
                "The model is a detector, for which there is `bimask purify` alone; audit and sites "
                "know classifiers."
            )
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


def read_settings(
    config: Path | None, seed: int | None, known: Mapping[str, Defence[Any]], default: DefenceConfig
) -> tuple[DefenceConfig, int]:
    """The settings in a YAML file of one of the known defences, or the default ones, and the file's
    seed, unless one is given."""
    if config is None:
        return default, seed or 0
    if str(config).startswith("models:"):
        raise SettingError(
            f"{config} is in MLflow's registry, which `bimask` knows nothing of; use `python -m "
            "study.purify` with the same options."
        )
    settings = settings_from(config, known)
    if seed is None:
        seed = read_yaml(config).get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise SettingError(f"`seed` must be a whole number >= 0, got {seed!r}.")
    return settings, seed


@contextmanager
def shown_warnings(kind: type[Warning] = DataWarning) -> Iterator[None]:
    """Print what is warned of pictures, or of another kind, as a line of its own; other warnings go
    their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kind)
        try:
            yield
        finally:
            for one in caught:
                if issubclass(one.category, kind):
                    console.tell(str(one.message), mark="warning", style="bold yellow")
    for one in caught:
        if not issubclass(one.category, kind):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
