"""backdoor-toolbox's folders: a poisoned training set, and the model that was trained on it.

Format: github.com/vtu81/backdoor-toolbox, as its files show it.

    poisoned_train_set/DATASET/TYPE_RATIO.../   imgs or data/<i>.png, labels, poison_indices, *.pt
    clean_set/DATASET/test_split/               data/<i>.png, labels

Its triggered test images are made when they are needed and never stored, so that the stored poisoned
*training* images stand in for them. Neither their true labels nor the net's name are in the files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bimask.attacks import TriggeredData
from bimask.data import ImageData
from bimask.errors import InteropError
from bimask.files.png import check_extent, inside, read_png
from bimask.files.safe import as_integers, dense, load_foreign, state_dict
from bimask.files.stand_ins import shown
from bimask.interop.datasets import DATASETS, read_clean
from bimask.nets.fitting import fit_net
from bimask.victims.imported import ImportedVictim, assemble

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

NORMALISATIONS: dict[str, Statistics] = {
    "cifar10": (DATASETS["cifar10"].mean, DATASETS["cifar10"].std),
    "gtsrb": ((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)),
}
NOTE = (
    "The triggered images are poisoned training images, since backdoor-toolbox stores no others: "
    "their ASR and RA are those of training."
)


def is_toolbox(path: Path) -> bool:
    """A model in a folder with labels and poisoned positions."""
    folder = path if path.is_dir() else path.parent
    return (folder / "labels").is_file() and (folder / "poison_indices").is_file()


def model_file(folder: Path) -> Path:
    """The one model in a folder, without those that a defence wrote there; a file is itself.

    Raises:
        InteropError: there is none, or which one is meant is not clear.
    """
    if not folder.is_dir():
        return folder
    models = [path for path in sorted(folder.glob("full_*.pt")) if path.is_file()]
    if len(models) != 1:
        raise InteropError(
            f"{folder} holds {len(models)} models full_*.pt, but one is read; give the file itself."
        )
    return models[0]


def read_toolbox(
    path: Path,
    *,
    clean_data: str | None = None,
    net: str | None = None,
    device: torch.device | str = "cpu",
) -> ImportedVictim:
    """The victim of a folder `poisoned_train_set/DATASET/NAME`, or of a model file in it.

    Args:
        clean_data: clean images of both splits, as of `read_clean`, in the order of the poisoned ones.
        net: as of `fit_net`.

    Raises:
        InteropError: hostile, broken, or without net and clean data.
    """
    model = model_file(path)
    folder, dataset = model.absolute().parent, model.absolute().parent.parent.name
    if dataset not in NORMALISATIONS:
        raise InteropError(
            f"{folder} is below {shown(dataset)}, but backdoor-toolbox's folders are read below "
            f"{' or '.join(NORMALISATIONS)}."
        )
    if net is None:
        raise InteropError(f"Which net {model} is of is not in the file; say it with --net.")
    if clean_data is None:
        raise InteropError(
            f"{folder} has no true labels of its poisoned images; give the clean training and test "
            "images with --clean-data."
        )
    mean, std = NORMALISATIONS[dataset]
    conventions = DATASETS[dataset]
    classes, size = conventions.classes, (conventions.side, conventions.side)
    weights = fit_net(
        net,
        state_dict(load_foreign(model), str(model)),
        num_classes=classes,
        mean=mean,
        std=std,
        what=str(model),
    )
    labels = _labels(folder / "labels", classes)
    poisoned = _positions(folder / "poison_indices", len(labels))
    covers = folder / "cover_indices"
    cover = _positions(covers, len(labels)) if covers.is_file() else []
    train = read_clean(dataset, clean_data, size=size, channels=3, train=True)
    _refuse_other_order(train, labels, {*poisoned, *cover}, str(folder))
    true = train.labels[torch.tensor(poisoned)]
    attack = torch.tensor(labels)[torch.tensor(poisoned)]
    counts = (attack != true).nonzero().flatten()
    if not len(counts):
        raise InteropError(
            f"All {len(poisoned)} poisoned images of {folder} have their true label (a clean-label "
            "attack), so that no attack success can be counted on them."
        )
    rows = torch.tensor(poisoned)[counts]
    images = _images(folder, rows, len(labels), size)
    test = _test_split(folder, dataset, size) or read_clean(dataset, clean_data, size=size, channels=3)
    return assemble(
        device=device,
        source="backdoor-toolbox",
        net=net,
        weights=weights,
        dataset=dataset,
        clean=test,
        triggered=TriggeredData(images, attack[counts], true[counts]),
        clean_index=torch.arange(len(rows)),
        counterparts=train.images[rows],
        notes=(NOTE,),
    )


def _test_split(folder: Path, dataset: str, size: tuple[int, int]) -> ImageData | None:
    """The clean test images that it keeps beside its poisoned sets, if they are there."""
    root = folder.parents[2]
    split = root / "clean_set" / dataset / "test_split"
    if not (split / "labels").is_file():
        return None
    labels = _labels(inside(split / "labels", root), DATASETS[dataset].classes)
    images = _numbered(split, torch.arange(len(labels)), size)
    return ImageData(
        images, torch.tensor(labels), tuple(str(c) for c in range(DATASETS[dataset].classes))
    )


def _labels(path: Path, classes: int) -> list[int]:
    labels = _integers(path)
    if min(labels) < 0 or max(labels) >= classes:
        raise InteropError(
            f"{path} has labels from {min(labels)} to {max(labels)}, but must stay in 0 to "
            f"{classes - 1}."
        )
    return labels


def _positions(path: Path, total: int) -> list[int]:
    positions = _integers(path)
    if min(positions) < 0 or max(positions) >= total or len(set(positions)) < len(positions):
        raise InteropError(f"{path} must hold different positions from 0 to {total - 1}.")
    return positions


def _integers(path: Path) -> list[int]:
    try:
        return as_integers(load_foreign(path), "it")
    except InteropError as error:
        if str(error).startswith("it "):
            raise InteropError(f"{path}: {error}.") from None
        raise


def _refuse_other_order(train: ImageData, labels: list[int], changed: set[int], what: str) -> None:
    if len(train) != len(labels):
        raise InteropError(
            f"{what} has {len(labels)} images, but the clean training set has {len(train)}; give "
            "the one it was made of with --clean-data."
        )
    for position, (stored, clean) in enumerate(zip(labels, train.labels.tolist(), strict=True)):
        if stored != clean and position not in changed:
            raise InteropError(
                f"The clean training set is another one than {what} was made of, or in another "
                f"order: image {position} has class {clean}, but {stored} there."
            )


def _images(folder: Path, rows: Tensor, total: int, size: tuple[int, int]) -> Tensor:
    """(M, 3, H, W) uint8 at these positions of the poisoned training set."""
    if not (folder / "imgs").is_file():
        return _numbered(folder, rows, size)
    stored = load_foreign(folder / "imgs")
    wanted = (total, 3, *size)
    if not isinstance(stored, Tensor) or tuple(stored.shape) != wanted or not dense(stored):
        got = tuple(stored.shape) if isinstance(stored, Tensor) else shown(stored)
        raise InteropError(f"{folder / 'imgs'} must be a tensor of shape {wanted}, got {got}.")
    images = stored[rows].float()
    if not ((images >= 0) & (images <= 1)).all():
        raise InteropError(f"{folder / 'imgs'} must hold numbers from 0 to 1; it was saved otherwise.")
    return (images * 255).round().byte()


def _numbered(folder: Path, rows: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    check_extent(len(rows), 3, height, width)
    files = [inside(folder / "data" / f"{row}.png", folder) for row in rows.tolist()]
    return torch.stack([read_png(file, channels=3, height=height, width=width) for file in files])
