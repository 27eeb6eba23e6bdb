"""A model in doubt as its user has it: a factory, a file of weights, a folder of clean pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from bimask.data.pictures import PICTURES as PICTURES
from bimask.data.pictures import DataWarning, Size
from bimask.data.pictures import read_picture as read_picture
from bimask.errors import (
    DataError,
    NonFiniteError,
    SettingError,
    VictimError,
    describe,
    warn,
)
from bimask.files.stand_ins import shown
from bimask.nets import Normalised
from bimask.nets.admission import admit
from bimask.nets.answers import logits_of
from bimask.nets.door import Door
from bimask.nets.spec import NetSpec, Statistics
from bimask.nets.weights import (
    StateDict,
    file_sha256,
    input_channels_of,
    last_layers_of,
    put_weights,
    state_dicts,
)

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

    def subset(self, which: Tensor) -> CleanImages:
        """Those at `which`, positions or N booleans."""
        labels = None if self.labels is None else self.labels[which]
        return CleanImages(self.images[which], labels)


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
        notes: sentences on what was decided while it was loaded, for people.
        door: what stands in front of `model`, see `bimask.nets.admission`.
    """

    spec: NetSpec
    model: Normalised
    clean: CleanImages
    classes: tuple[str, ...]
    weights_sha256: str | None
    victim: str | None = None
    wrapped: bool = False
    notes: tuple[str, ...] = ()
    door: Door = field(default_factory=Door)

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
    channels: int | None = None,
    image_size: Size | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Suspect:
    """Build a user's own model and read the user's own pictures; the factory is imported and run.

    Args:
        weights: a file as of `bimask.nets.weights.read_weights`, whatever its name.
        net: one of `NETS`, `torchvision:NAME`, `timm:NAME`, `package.module:factory` or
            `path/to/file.py:factory`.
        clean: pictures in class folders, whose names in order are the classes, or in no folders.
        classes: how many; None means as many as there are class folders.
        channels: 3, or 1 for grey pictures; None means what the first convolution of the weights takes,
            or 3 where they do not say.
        image_size: what to bring the pictures to, (height, width) or the side of a square; None wants
            them to be of one size.
        mean, std: what the model's images are normalised by, one value a channel in [0, 1] units; None
            where the model takes images in [0, 1] as they are.

    Raises:
        DataError: no pictures, unreadable ones, or of several sizes; as many class folders as the
            weights have no classes.
        SettingError: the net cannot be made; classes that nobody said; a mean without a deviation;
            other channels than the weights have.
        VictimError: weights that cannot be read, do not fit, or answer with no numbers.
        ModelError: the model cannot be defended as it is.
    """
    if (mean is None) != (std is None):
        raise SettingError("A mean needs a standard deviation and the other way round; give both.")
    normalise = None if mean is None or std is None else Statistics(mean=list(mean), std=list(std))
    asked = {"net": net, "weights": str(weights), "normalise": normalise}
    found = state_dicts(weights)
    try:
        spec = NetSpec.model_validate(asked | ({} if width is None else {"width": width}))
    except ValidationError as error:
        raise SettingError(describe(error)) from error
    channels, note = _channels(found, channels, weights)
    pictures, names = read_clean(clean, channels=channels, image_size=image_size)
    if classes is None:
        classes = _classes(found, names, weights, clean)
    if names is None or classes != len(names):
        names = tuple(str(position) for position in range(classes))
        pictures = CleanImages(pictures.images, None)
    height, side = pictures.images.shape[-2:]
    size = height if height == side else (height, side)
    used_mean = list(mean) if mean is not None else [0.0] * channels
    used_std = list(std) if std is not None else [1.0] * channels
    model = spec.net_of(used_mean, used_std, channels, len(names), size)
    taken = put_weights(model.net, found, weights)
    try:
        admitted = admit(model, pictures.floats()[:ASKED])
        answered = logits_of(admitted.model, pictures.floats()[:ASKED])
    except NonFiniteError as error:
        raise VictimError(
            f"With the weights {weights} the net answers clean pictures with logits that are NaN or "
            "infinite; get another copy, or give the --mean and --std of its training."
        ) from error
    if answered.shape[1] != len(names):
        raise DataError(
            f"The model answers with {answered.shape[1]} logits, but there are {len(names)} classes; "
            f"give {answered.shape[1]} class folders, or --classes {answered.shape[1]}."
        )
    notes = tuple(said for said in (note, taken, *admitted.findings) if said)
    assert isinstance(admitted.model, Normalised)
    return Suspect(
        spec,
        admitted.model,
        pictures,
        names,
        file_sha256(weights),
        notes=notes,
        door=admitted.door,
    )


def _channels(found: list[StateDict], given: int | None, weights: Path) -> tuple[int, str]:
    """How many channels the images have, and a sentence where the weights decide it."""
    said = {channels: name for name, channels in filter(None, map(input_channels_of, found))}
    if len(said) != 1 or given in said:
        return given or 3, ""
    (channels, name), *_ = said.items()
    takes = f"the first convolution in {weights}, {shown(name)}, takes {channels}"
    if given is not None:
        raise SettingError(
            f"The images shall have {given} channels, but {takes}; give --channels {channels}, or "
            "leave it out."
        )
    if channels == 3:
        return 3, ""
    return channels, f"Pictures are read as grey ones, since {takes} channel."


def _classes(found: list[StateDict], names: tuple[str, ...] | None, weights: Path, clean: Path) -> int:
    """How many classes there are where nobody said it: as many as class folders, if those are as many
    as the rows of some last layer in the weights, as far as the weights say it."""
    by_size = sorted(found, key=lambda state: state.numbers)
    ends = [end for state in by_size for end in last_layers_of(state).items()]
    if names is None:
        looks = f" (the weights look like {ends[-1][1]})" if ends else ""
        raise SettingError(
            f"The pictures in {clean} are in no class folders, so nothing says how many classes the "
            f"model has; give --classes{looks}."
        )
    if ends and len(names) not in {rows for _, rows in ends}:
        name, rows = ends[-1]
        shown_names = ", ".join([*map(shown, names[:10]), *(["..."] if len(names) > 10 else [])])
        raise DataError(
            f"The weights {weights} end in {rows} classes ({shown(name)}), but {clean} has "
            f"{len(names)} class folders ({shown_names}); "
            f"{'add what is missing' if len(names) < rows else 'take away what is too much'}, or give "
            f"--classes {rows}, which leaves the labels out."
        )
    return len(names)


def read_clean(
    folder: Path, *, channels: int = 3, image_size: Size | None = None
) -> tuple[CleanImages, tuple[str, ...] | None]:
    """The pictures in a folder, and the names of its class folders, if it has such.

    Pictures directly in the folder have no labels; of class folders, the position of a name among the
    sorted ones is the label. What is hidden, by a dot before its name, counts nothing. A `DataWarning`
    says where pictures are left out, or are all of one colour or all the same.

    Args:
        channels: 3, or 1 for grey.
        image_size: what to bring the pictures to, (height, width) or the side of a square; None wants
            them to be of one size.

    Raises:
        DataError: no folder, no pictures, an unreadable one, several sizes and no `image_size`, or an
            empty folder beside class folders.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; give one of clean pictures.")
    homes = _class_folders(folder)
    files = [(path, label) for label, home in enumerate(homes) for path in _pictures(home)]
    if not homes:
        files = [(path, -1) for path in _pictures(folder)]
    if not files:
        raise DataError(
            f"{folder} holds no pictures ({', '.join(PICTURES)}), neither directly nor in class "
            "folders."
        )
    rows = [read_picture(path, channels, image_size) for path, _ in files]
    sizes = sorted({tuple(row.shape[1:]) for row in rows})
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sizes[0], sizes[-1]
        raise DataError(
            f"The pictures in {folder} have {len(sizes)} sizes, such as {width}x{height} and "
            f"{other_width}x{other_height}; give an image size to bring all to one."
        )
    images, labels = torch.stack(rows), torch.tensor([label for _, label in files])
    _warn_of_monotony(folder, images, labels, homes or [folder])
    names = tuple(path.name for path in homes) if homes else None
    return CleanImages(images, labels if homes else None), names


def _class_folders(folder: Path) -> list[Path]:
    """Folders with pictures in a folder, by name; none where its pictures are directly in it."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    hidden = [path for path in inside if path.name.startswith(".") and _pictures(path)]
    inside = [path for path in inside if not path.name.startswith(".")]
    homes = [path for path in inside if _pictures(path)]
    if not homes:
        return []
    if empty := [path.name for path in inside if path not in homes]:
        raise DataError(
            f"{folder} has folders without a picture ({', '.join(map(shown, empty[:5]))}) beside "
            f"{len(homes)} class folders; left out, they would shift the labels behind them, so put "
            f"pictures ({', '.join(PICTURES)}) directly into them, or take them away."
        )
    if hidden:
        warn(
            f"{folder} has {len(hidden)} hidden folders with pictures, such as "
            f"{shown(hidden[0].name)}, which are no classes and are left out.",
            DataWarning,
        )
    if stray := _pictures(folder):
        warn(
            f"{folder} has {len(stray)} pictures beside its class folders, such as "
            f"{shown(stray[0].name)}, which have no class and are left out.",
            DataWarning,
        )
    return homes


def _warn_of_monotony(folder: Path, images: Tensor, labels: Tensor, homes: list[Path]) -> None:
    """Say where all pictures of a folder, (N, C, H, W), have one colour each, or are the same."""
    first = images.flatten(2)[..., :1]
    plain = (images.flatten(2) == first).all(2).all(1)
    parts = [labels == label for label in labels.unique()]
    if alike := [home for home, part in zip(homes, parts, strict=True) if plain[part].all()]:
        warn(
            f"All pictures in {_named(alike, folder)} have one colour each, so nothing can be seen on "
            "them; are they the right ones?",
            DataWarning,
        )
    elif same := [
        home
        for home, part in zip(homes, parts, strict=True)
        if part.sum() > 1 and bool((images[part] == images[part][:1]).all())
    ]:
        warn(
            f"All pictures in {_named(same, folder)} are the same; are they the right ones?",
            DataWarning,
        )
    elif len(images) > 1 and bool((images == images[:1]).all()):
        warn(
            f"All {len(images)} pictures in {folder} are the same; are they the right ones?",
            DataWarning,
        )


def _named(homes: list[Path], folder: Path) -> str:
    """Folders for a message: a few by name."""
    if homes == [folder]:
        return f"{folder}"
    some = ", ".join(shown(home.name) for home in homes[:5])
    return f"{len(homes)} class folders of {folder} ({some})"


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURES and path.is_file() and not path.name.startswith(".")
    )


def hold_back(clean: CleanImages, answers: Tensor, share: float) -> tuple[CleanImages, CleanImages]:
    """Clean pictures in two parts: to learn on, and held back to look at the result with.

    Args:
        answers: (N,) the suspect's classes of them; labels, where there are some, count instead.
        share: of the pictures of each class that is held back, in [0, 1); rounded down. Within a class
            the SHA-256 of the pixels decides, so neither names nor dates do.
    """
    classes = answers.cpu() if clean.labels is None else clean.labels
    keys = [hashlib.sha256(image.contiguous().numpy().data).digest() for image in clean.images]
    held = torch.zeros(len(clean.images), dtype=torch.bool)
    for label in classes.unique():
        mine = sorted((classes == label).nonzero().flatten().tolist(), key=keys.__getitem__)
        held[mine[: int(share * len(mine))]] = True
    return clean.subset(~held), clean.subset(held)
