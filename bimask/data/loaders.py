"""Data sets by name, and folders of pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bimask.data.images import ImageData, Splits
from bimask.data.pictures import picture_size, read_picture, unreadable
from bimask.errors import DataError
from bimask.files.atomic import atomic_write
from bimask.files.bounded import read_bytes, require_regular
from bimask.files.home import ensure_home
from bimask.files.pictures import MAX_PICTURE_BYTES, class_pictures
from bimask.files.stand_ins import MAX_SIDE
from bimask.files.tensors import load_tensors

T = TypeVar("T")

FOLDER = "imagefolder:"  # before the path, in a data set's name
DECODER = 2  # counted up when pictures are decoded otherwise, so that no older cache is taken
MAX_TABLE = 16 * 2**20  # bytes
VAL_SHARE = 0.1  # of a training set that comes without a validation set
DIGITS_TEST, DIGITS_VAL = 450, 450  # of 1,797; the rest is for training


def cache_folder() -> Path:
    """Where data sets and decoded images are kept: $BIMASK_CACHE, or .cache/bimask at home."""
    place = os.environ.get("BIMASK_CACHE")
    return Path(place) if place else ensure_home() / ".cache" / "bimask"


def load_data(name: str, *, image_size: int | None = None) -> Splits:
    """A data set by name: one of `LOADERS`, or `imagefolder:PATH`.

    Args:
        name: `imagefolder:PATH` is a folder of class folders, or one with `train/` and `test/`.
        image_size: height and width in pixels; None keeps the set's own (16 for digits).

    Raises:
        DataError: unknown name, nothing there and nothing downloaded, unreadable pictures.
    """
    if name.startswith(FOLDER):
        return _image_folder(Path(name.removeprefix(FOLDER)), image_size)
    if name not in LOADERS:
        raise DataError(
            f"Unknown dataset {name!r}; known are {', '.join(sorted(LOADERS))} and imagefolder:PATH."
        )
    return LOADERS[name](image_size)


def _digits(image_size: int | None) -> Splits:
    """scikit-learn's 1,797 digits, 8x8 in 17 grey levels, enlarged to 16x16 unless told otherwise."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) * (255 / 16)
    data = ImageData(
        _resize(images.round().byte(), image_size or 16),
        torch.from_numpy(raw.target).long(),
        tuple(str(digit) for digit in raw.target_names),
    )
    train, held_out = _stratified(data.labels, DIGITS_VAL + DIGITS_TEST)
    val, test = _stratified(data.labels[held_out], DIGITS_TEST)
    return Splits(data.subset(train), data.subset(held_out[val]), data.subset(held_out[test]))


def _stratified(labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Positions of the rest and of `held_out` samples that keep the classes' shares; fixed."""
    from sklearn.model_selection import train_test_split

    rest, held = train_test_split(
        np.arange(len(labels)), test_size=held_out, stratify=labels.numpy(), random_state=0
    )
    return torch.from_numpy(rest), torch.from_numpy(held)


def _cifar10(image_size: int | None) -> Splits:
    from torchvision.datasets import CIFAR10

    folder = cache_folder() / "cifar10"
    parts = _fetch(
        "cifar10", folder, lambda: [CIFAR10(folder, t, download=True) for t in (True, False)]
    )
    train, test = (
        ImageData(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
            tuple(part.classes),
        )
        for part in parts
    )
    return _with_val(_resized(train, image_size), _resized(test, image_size))


def _gtsrb(image_size: int | None) -> Splits:
    from torchvision.datasets import GTSRB

    folder, size = cache_folder() / "gtsrb", image_size or 32
    parts = _fetch(
        "gtsrb", folder, lambda: [GTSRB(folder, s, download=True) for s in ("train", "test")]
    )
    classes = tuple(str(label) for label in range(43))
    train, test = (_decode(part._samples, classes, size, f"gtsrb-{i}") for i, part in enumerate(parts))
    return _with_val(train, test)


def _tiny_imagenet(image_size: int | None) -> Splits:
    from torchvision.datasets.utils import download_and_extract_archive

    folder, size = cache_folder() / "tiny-imagenet", image_size or 64
    root = folder / "tiny-imagenet-200"
    archive = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    if not root.is_dir():
        _fetch("tiny-imagenet", folder, lambda: download_and_extract_archive(archive, str(folder)))
    classes, training = class_pictures(root / "train")
    index = {name: label for label, name in enumerate(classes)}
    lines = [
        line.split("\t")
        for line in read_bytes(root / "val" / "val_annotations.txt", MAX_TABLE).decode().splitlines()
    ]
    testing = [(str(root / "val" / "images" / line[0]), index[line[1]]) for line in lines]
    return _with_val(
        _decode(training, classes, size, "tiny-imagenet-train"),
        _decode(testing, classes, size, "tiny-imagenet-test"),
    )


LOADERS: dict[str, Callable[[int | None], Splits]] = {
    "cifar10": _cifar10,
    "digits": _digits,
    "gtsrb": _gtsrb,
    "tiny-imagenet": _tiny_imagenet,
}


def _fetch(name: str, folder: Path, make: Callable[[], T]) -> T:
    """Let torchvision find or download a set, or say which folder to fill."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return make()
    except (OSError, RuntimeError, BadZipFile) as error:
        raise DataError(
            f"The dataset {name} is not in {folder} and cannot be downloaded "
            f"({type(error).__name__}: {error}); put torchvision's files for it there, or go online."
        ) from error


def _image_folder(path: Path, image_size: int | None) -> Splits:
    classes, listed = _listed(path)
    size = image_size or _common_size([file for samples in listed for file, _ in samples], path)
    parts = [_decode(samples, classes, size, path.name) for samples in listed]
    if len(parts) == 2:
        return _with_val(parts[0], parts[1])
    if len(parts[0]) < 3:
        raise DataError(f"{path} holds {len(parts[0])} pictures; training, val and test need 3.")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(parts[0])))
    held_out = max(1, len(order) * 15 // 100)
    test, val, train = order.split([held_out, held_out, len(order) - 2 * held_out])
    return Splits(parts[0].subset(train), parts[0].subset(val), parts[0].subset(test))


def _listed(path: Path) -> tuple[tuple[str, ...], list[list[tuple[str, int]]]]:
    """Classes, and files with labels: of train/ and test/ where there are both, else of all."""
    if not path.is_dir():
        raise DataError(f"There is no folder {path}; imagefolder:PATH needs one of class folders.")
    split = (path / "train").is_dir() and (path / "test").is_dir()
    roots = [path / "train", path / "test"] if split else [path]
    try:
        found = [class_pictures(root) for root in roots]
    except OSError as error:
        raise DataError(f"{path} holds no pictures in class folders: {error}.") from error
    classes = found[0][0]
    if split and found[1][0] != classes:
        odd = sorted(set(classes) ^ set(found[1][0]))
        raise DataError(f"{path}: train/ and test/ must hold the same classes; they differ in {odd}.")
    return classes, [samples for _, samples in found]


def pictures_digest(path: Path) -> str:
    """64 hex digits of the pictures that `imagefolder:PATH` is: their places below it and their bytes.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    samples = [sample for part in _listed(path)[1] for sample in part]
    return _content(path, _stamp(samples, 0))


@lru_cache(maxsize=8)
def _content(path: Path, _stamp: str) -> str:
    """The same, once a process for files of the same places, sizes and times."""
    content = hashlib.sha256()
    for file in (file for samples in _listed(path)[1] for file, _ in samples):
        try:
            held = Path(file).read_bytes()
        except OSError as error:
            raise unreadable(file, error) from error
        place = Path(file).relative_to(path).as_posix()
        content.update(f"{place}|{len(held)}|{hashlib.sha256(held).hexdigest()}\n".encode())
    return content.hexdigest()


def _common_size(files: list[str], path: Path) -> int:
    """The one square size of all pictures, or an error that asks for one."""
    sizes = {picture_size(file) for file in files}
    height, width = next(iter(sizes))
    if max(height, width) > MAX_SIDE:
        raise DataError(
            f"The pictures in {path} have {width}x{height} pixels, but models take sides of at most "
            f"{MAX_SIDE}; give `image_size` to bring all to one square."
        )
    if len(sizes) > 1 or width != height:
        raise DataError(
            f"The pictures in {path} have {len(sizes)} sizes, such as {width}x{height}; give "
            "`image_size` to bring all to one square."
        )
    return int(width)


def _decode(
    samples: list[tuple[str, int]], classes: tuple[str, ...], size: int, name: str
) -> ImageData:
    """Pictures as RGB of size x size, decoded once; the second time they come from the cache."""
    stamp = _stamp(samples, size)
    cached = cache_folder() / "decoded" / f"{name}-{size}-{stamp[:16]}.safetensors"
    if cached.is_file():
        try:
            found = load_tensors(cached)
            return ImageData(found["images"], found["labels"], classes)
        except (SafetensorError, KeyError):
            cached.unlink()  # cut short by a crash: decode again
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    for row, (file, _) in enumerate(samples):
        images[row] = read_picture(file, 3, size)
    labels = torch.tensor([label for _, label in samples])
    cached.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cached) as part:
        save_file({"images": images, "labels": labels}, part)
    return ImageData(images, labels, classes)


def _stamp(samples: list[tuple[str, int]], size: int) -> str:
    """Changes with any file's place, label, size or time; reads none."""
    stamp = hashlib.sha256(f"{DECODER}|{size}".encode())
    for file, label in samples:
        try:
            require_regular(file, MAX_PICTURE_BYTES)  # before a digest or a decoder opens it
            status = os.stat(file)
        except (OSError, ValueError) as error:
            raise unreadable(file, error) from error
        stamp.update(f"{file}|{label}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return stamp.hexdigest()


def _with_val(train: ImageData, test: ImageData) -> Splits:
    """Hold out a fixed tenth of the training set as `val`."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
    val = max(1, int(len(train) * VAL_SHARE))
    return Splits(train.subset(order[val:]), train.subset(order[:val]), test)


def _resized(data: ImageData, size: int | None) -> ImageData:
    if size is None or size == data.images.shape[-1]:
        return data
    return ImageData(_resize(data.images, size), data.labels, data.classes)


def _resize(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) uint8 -> (N, C, size, size) uint8, bilinear, antialiased when shrinking."""
    if images.shape[-2:] == (size, size):
        return images
    enlarged = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return enlarged.round().clamp(0, 255).byte()
