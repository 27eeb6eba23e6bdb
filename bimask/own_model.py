"""A model in doubt as its user has it: a factory, a file of weights, a folder of clean pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from bimask.config import describe
from bimask.data import Splits
from bimask.errors import DataError, NonFiniteError, SettingError, VictimError
from bimask.metrics import predict
from bimask.net_spec import NetSpec, Statistics
from bimask.nets import Normalised
from bimask.suspect import file_sha256, load_weights
from bimask.victim import Victim

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
ASKED = 64  # clean pictures that a model must answer with numbers


@dataclass(frozen=True)
class CleanImages:
    """The defender's images.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, or None where nobody said them. The defence needs none; they are for
            the accuracy before and after.
    """

    images: Tensor
    labels: Tensor | None

    def floats(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.float() / 255


@dataclass(frozen=True)
class Suspect:
    """A model in doubt, and the clean images to look at it with.

    Attributes:
        spec: which net it is.
        model: images in [0, 1] -> logits, in eval mode.
        clean: what the defender has.
        classes: names, as many as the model has logits.
        weights_sha256: of the file the weights came from; None for a victim's.
        victim: digest of the victim that it is, or None.
        wrapped: whether that file names its tensors as `model` does, with the normalisation's, or as
            the factory's own net does.
    """

    spec: NetSpec
    model: Normalised
    clean: CleanImages
    classes: tuple[str, ...]
    weights_sha256: str | None
    victim: str | None = None
    wrapped: bool = False

    @property
    def origin(self) -> str:
        """For people: the weights' file by its hash, or the victim by its digest."""
        return f"victim {self.victim}" if self.victim else f"weights {self.weights_sha256}"


def load_suspect(
    weights: Path,
    net: str,
    clean: Path,
    *,
    classes: int | None = None,
    channels: int = 3,
    image_size: int | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Suspect:
    """Build a user's own model and read the user's own pictures; the factory is imported and run.

    Args:
        weights: .safetensors, or a .pt or .pth that holds tensors alone.
        net: one of `NETS`, `torchvision:NAME`, `timm:NAME`, `package.module:factory` or
            `path/to/file.py:factory`.
        clean: pictures in class folders, whose names in order are the classes, or in no folders.
        classes: how many; None means as many as there are class folders.
        channels: 3, or 1 for grey pictures.
        image_size: height and width to bring the pictures to; None wants them to be of one square size.
        mean, std: what the model's images are normalised by, one value a channel in [0, 1] units; None
            where the model takes images in [0, 1] as they are.

    Raises:
        DataError: no pictures, unreadable ones, or of several sizes.
        SettingError: the net cannot be made; classes that nobody said; a mean without a deviation.
        VictimError: weights that cannot be read, do not fit, or answer with no numbers.
    """
    pictures, names = read_clean(clean, channels=channels, image_size=image_size)
    if classes is None and names is None:
        raise SettingError(
            f"The pictures in {clean} are in no class folders, so nothing says how many classes the "
            "model has; give --classes."
        )
    if names is None or (classes is not None and classes != len(names)):
        assert classes is not None
        names = tuple(str(position) for position in range(classes))
        pictures = CleanImages(pictures.images, None)
    if (mean is None) != (std is None):
        raise SettingError("A mean needs a standard deviation and the other way round; give both.")
    normalise = None if mean is None or std is None else Statistics(mean=list(mean), std=list(std))
    if not weights.is_file():
        raise VictimError(f"There is no file of weights {weights}; mend its path.")
    asked = {"net": net, "weights": str(weights), "normalise": normalise}
    try:
        spec = NetSpec.model_validate(asked | ({} if width is None else {"width": width}))
    except ValidationError as error:
        raise SettingError(describe(error)) from error
    size = pictures.images.shape[-1]
    used_mean = list(mean) if mean is not None else [0.0] * channels
    used_std = list(std) if std is not None else [1.0] * channels
    model = spec.net_of(used_mean, used_std, channels, len(names), size)
    load_weights(model.net, weights)
    try:
        predict(model, pictures.images[:ASKED])
    except NonFiniteError as error:
        raise VictimError(
            f"With the weights {weights} the net answers clean pictures with logits that are NaN or "
            "infinite; get another copy, or give the --mean and --std of its training."
        ) from error
    return Suspect(spec, model.eval(), pictures, names, file_sha256(weights))


def read_clean(
    folder: Path, *, channels: int = 3, image_size: int | None = None
) -> tuple[CleanImages, tuple[str, ...] | None]:
    """The pictures in a folder, and the names of its class folders, if it has such.

    Pictures directly in the folder have no labels; of class folders, the position of a name among the
    sorted ones is the label.

    Raises:
        DataError: no folder, no pictures, an unreadable one, or several sizes and no `image_size`.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; give one of clean pictures.")
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and _pictures(path))
    files = [(path, label) for label, home in enumerate(inside) for path in _pictures(home)]
    if not inside:
        files = [(path, -1) for path in _pictures(folder)]
    if not files:
        raise DataError(
            f"{folder} holds no pictures ({', '.join(PICTURES)}), neither directly nor in class "
            "folders."
        )
    rows = [read_picture(path, channels, image_size) for path, _ in files]
    sizes = {tuple(row.shape[1:]) for row in rows}
    if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
        height, width = next(iter(sizes))
        raise DataError(
            f"The pictures in {folder} have {len(sizes)} sizes, such as {width}x{height}; give an "
            "image size to bring all to one square."
        )
    labels = torch.tensor([label for _, label in files]) if inside else None
    names = tuple(path.name for path in inside) if inside else None
    return CleanImages(torch.stack(rows), labels), names


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in PICTURES)


def read_picture(path: Path, channels: int, image_size: int | None) -> Tensor:
    """One picture as (C, H, W) uint8.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            converted = picture.convert("RGB" if channels == 3 else "L")
            if image_size is not None and converted.size != (image_size, image_size):
                converted = converted.resize((image_size, image_size), Image.Resampling.BILINEAR)
            pixels = np.array(converted)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"Cannot read the picture {path}: {error}.") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def suspect_of(victim: Victim, splits: Splits, clean_images_per_class: int, *, seed: int) -> Suspect:
    """A victim of ours as its defender would have it: clean images of the training split alone."""
    clean = splits.train.clean_subset(clean_images_per_class, seed=seed)
    assert isinstance(victim.model, Normalised)
    return Suspect(
        victim.spec,
        victim.model,
        CleanImages(clean.images, clean.labels),
        victim.classes,
        weights_sha256=None,
        victim=victim.spec.digest,
        wrapped=True,
    )
