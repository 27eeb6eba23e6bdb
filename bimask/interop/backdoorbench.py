"""BackdoorBench's `attack_result.pt`: version 2 with pictures in folders, version 1 with them inside.

Format: github.com/SCLBD/BackdoorBench, as its files show it. The model, its data set by name, and the
triggered test images with both labels. Clean images are not in it: they are read from the data set.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bimask.attacks import TriggeredData
from bimask.data import ImageData, cache_folder
from bimask.errors import InteropError
from bimask.files.png import check_extent, inside, read_png, reroot
from bimask.files.safe import as_integers, load_foreign, state_dict
from bimask.files.stand_ins import StoredPicture, shown
from bimask.interop.attack_log import compare_with_log
from bimask.interop.datasets import DATASETS, Conventions, read_clean
from bimask.nets.fitting import BACKDOORBENCH_NETS, TORCHVISION, fit_net
from bimask.victims.imported import ImportedVictim, assemble

ATTACK_FILE = "attack_result.pt"
KEYS = frozenset(
    {"model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test"}
)

Item = tuple[object, int, int, int]  # picture or its path, attack label, true label, clean index


def is_attack_result(content: object) -> bool:
    """BackdoorBench's own rule: the eight keys are there; others may be."""
    return isinstance(content, dict) and content.keys() >= KEYS


def read_attack_result(
    path: Path, *, clean_data: str | None = None, device: torch.device | str = "cpu"
) -> ImportedVictim:
    """The victim in `attack_result.pt`, scored as BackdoorBench scores it.

    ASR and RA count the stored test images, which leave out the target class under all-to-one; ACC
    counts all clean test images.

    Args:
        clean_data: folder of the clean data, or `imagefolder:PATH`; None looks for `data/NAME` in the
            folder of the file and three above it.
        device: what the scores are measured on.

    Raises:
        InteropError: hostile, broken, of another format, or without its pictures or clean data.
    """
    return from_content(load_foreign(path), path, clean_data=clean_data, device=device)


def from_content(
    content: Any, path: Path, *, clean_data: str | None = None, device: torch.device | str = "cpu"
) -> ImportedVictim:
    """The same, of what `load_foreign` gave."""
    what = str(path)
    conventions, dataset, classes = header(content, what)
    height, width, channels = _image_size(content["img_size"], conventions, what)
    state = state_dict(content["model"], f"{what}: `model`")
    net = net_name(content["model_name"], what)
    weights = fit_net(
        net,
        state,
        num_classes=classes,
        mean=conventions.mean,
        std=conventions.std,
        what=what,
    )
    version, items, total = _items(content["bd_test"], classes, what)
    check_extent(len(items), channels, height, width)
    root = clean_data or find_clean_data(dataset, path.parent)
    clean = read_clean(dataset, root, size=(height, width), channels=channels)
    _refuse_other_clean_data(clean, items, total, classes, f"{what}: {root}")
    images = torch.empty(len(items), channels, height, width, dtype=torch.uint8)
    for row, (picture, *_) in enumerate(items):
        images[row] = _pixels(picture, path.parent, (channels, height, width), what)
    attack, true, index = (torch.tensor([item[i] for item in items]) for i in (1, 2, 3))
    triggered = TriggeredData(images, attack, true)
    counterparts, reordered = _counterparts(clean, triggered, index)
    victim = assemble(
        device=device,
        source=f"backdoorbench {version}",
        net=net,
        weights=weights,
        dataset=dataset,
        clean=clean,
        triggered=triggered,
        clean_index=counterparts,
        notes=_notes(attack, true) + ((reordered,) if reordered else ()),
    )
    return replace(victim, notes=victim.notes + compare_with_log(path.parent, victim.scores))


def header(content: Any, what: str) -> tuple[Conventions, str, int]:
    """Constants and name of the data set, and number of classes, of an attack's file."""
    if not is_attack_result(content):
        missing = sorted(KEYS - content.keys()) if isinstance(content, dict) else ["all"]
        raise InteropError(
            f"{what} is not BackdoorBench's attack_result.pt: of its eight keys "
            f"{', '.join(missing)} are missing."
        )
    dataset, classes = content["clean_data"], content["num_classes"]
    if not isinstance(dataset, str) or dataset not in DATASETS:
        raise InteropError(
            f"{what}: `clean_data` is {shown(dataset)}, but must be one of {', '.join(DATASETS)}."
        )
    conventions = DATASETS[dataset]
    if type(classes) is not int or classes != conventions.classes:
        raise InteropError(
            f"{what}: `num_classes` is {shown(classes)}, but {dataset} has {conventions.classes}."
        )
    return conventions, dataset, classes


def net_name(stored: object, what: str) -> str:
    """Our name of the net that BackdoorBench calls so; unknown ones stay as they are."""
    if not isinstance(stored, str):
        raise InteropError(f"{what}: `model_name` must be a string, got {shown(stored)}.")
    if stored.startswith(TORCHVISION):
        raise InteropError(
            f"{what}: `model_name` is {shown(stored)}, which BackdoorBench never writes."
        )
    return BACKDOORBENCH_NETS.get(stored, stored)


def find_clean_data(dataset: str, folder: Path) -> str:
    """`data/DATASET` in `folder` or up to three above it, or our cache; no path of the file is used.

    Raises:
        InteropError: it is in none of them.
    """
    for base in [folder.absolute(), *folder.absolute().parents[:3]]:
        if (base / "data" / dataset).is_dir():
            return str(inside(base / "data" / dataset, base))
    if dataset == "cifar10" and (cached := cache_folder() / "cifar10").is_dir():
        return str(cached)
    raise InteropError(
        f"The clean images of {dataset} are not in data/{dataset} beside or up to three folders above "
        f"{folder}; give their folder with --clean-data, or imagefolder:PATH."
    )


def _image_size(value: object, conventions: Conventions, what: str) -> tuple[int, int, int]:
    size = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(size) != 3 or any(type(n) is not int for n in size) or size[2] != len(conventions.mean):
        raise InteropError(
            f"{what}: `img_size` must be (height, width, {len(conventions.mean)}), got "
            f"({', '.join(shown(n) for n in size[:4])})."
        )
    check_extent(1, size[2], size[0], size[1])
    return size[0], size[1], size[2]


def _items(stored: Any, classes: int, what: str) -> tuple[str, list[Item], int | None]:
    """Version, the triggered test images in the file's order, and how many clean ones there must be."""
    keys = set(stored) if isinstance(stored, dict) else set()
    try:
        if keys >= {"bd_data_container", "original_index_array", "poison_indicator"}:
            version, (items, total) = "v2", _items_v2(stored)
        elif keys >= {"x", "y", "original_index", "original_targets"}:
            version, (items, total) = "v1", (_items_v1(stored), None)
        else:
            raise InteropError("`bd_test` must be the state of a test set, version 2 or 1")
        for _, attack, true, index in items:
            if not (_is_label(attack, classes) and _is_label(true, classes)):
                raise InteropError(
                    f"the labels of image {index} are {shown(attack)} and {shown(true)}, but must "
                    f"be 0 to {classes - 1}"
                )
    except InteropError as error:
        raise InteropError(f"{what}: {error}; get another copy of it.") from None
    return version, items, total


def _items_v2(stored: dict[str, Any]) -> tuple[list[Item], int]:
    container = stored["bd_data_container"]
    entries = container.get("data_dict") if isinstance(container, dict) else None
    if not isinstance(entries, dict):
        raise InteropError("`bd_data_container` must hold `data_dict`")
    order = as_integers(stored["original_index_array"], "`original_index_array`")
    flags = as_integers(stored["poison_indicator"], "`poison_indicator`")
    items: list[Item] = []
    for index in order:
        if not 0 <= index < len(flags) or flags[index] != 1 or index not in entries:
            raise InteropError(
                f"test image {index} is used, but is not among the stored ones that "
                "`poison_indicator` marks"
            )
        entry = entries[index]
        if isinstance(entry, dict) and entry.keys() >= {"path", "other_info"}:
            picture, labels = entry["path"], entry["other_info"]
        elif isinstance(entry, tuple) and len(entry) == 3:  # BackdoorBench can keep pictures in memory
            picture, labels = entry[0], entry[1:]
        else:
            picture, labels = None, None
        if not isinstance(labels, (list, tuple)) or len(labels) != 2:
            raise InteropError(f"test image {index} must be stored with its path and two labels")
        items.append((picture, _plain(labels[0]), _plain(labels[1]), index))
    return items, len(flags)


def _items_v1(stored: dict[str, Any]) -> list[Item]:
    pictures = stored["x"]
    columns = [
        as_integers(stored[key], f"`{key}`") for key in ("y", "original_targets", "original_index")
    ]
    if not isinstance(pictures, list) or any(len(column) != len(pictures) for column in columns):
        raise InteropError("`x`, `y`, `original_index` and `original_targets` must be equally long")
    return [(picture, *row) for picture, *row in zip(pictures, *columns, strict=True)]


def _plain(label: Any) -> Any:
    """A label of one attack or another may be a tensor of no dimension; the number in it."""
    whole = isinstance(label, Tensor) and label.ndim == 0 and label.dtype == torch.int64
    return label.item() if whole else label


def _is_label(value: object, classes: int) -> bool:
    return type(value) is int and 0 <= value < classes


def _refuse_other_clean_data(
    clean: ImageData, items: list[Item], total: int | None, classes: int, what: str
) -> None:
    """Another data set would give scores that mean nothing."""
    if clean.num_classes != classes or total not in (None, len(clean)):
        raise InteropError(
            f"{what} holds {len(clean)} clean test images of {clean.num_classes} classes, but the "
            f"file was made with {total or 'some'} of {classes}; give the right ones with "
            "--clean-data."
        )
    if (last := max(index for *_, index in items)) >= len(clean) or min(i for *_, i in items) < 0:
        raise InteropError(
            f"{what} holds {len(clean)} clean test images, but the file counts up to image {last}; "
            "give the right ones with --clean-data."
        )
    true = torch.tensor([label for _, _, label, _ in items])
    stored, there = (torch.bincount(labels, minlength=classes) for labels in (true, clean.labels))
    if (stored > there).any():
        label = int((stored > there).nonzero()[0])
        raise InteropError(
            f"{what} is another data set: it has {int(there[label])} images of class {label}, but the "
            f"file {int(stored[label])} triggered ones; give the right one with --clean-data."
        )


def _counterparts(clean: ImageData, triggered: TriggeredData, index: Tensor) -> tuple[Tensor, str]:
    """The clean image of every triggered one, and a note if positions do not tell.

    Scores do not depend on the order of the clean images, so that the same set in another order, such
    as a folder's, will do: then the most alike image of the true class is taken.
    """
    if torch.equal(clean.labels[index], triggered.true_labels):
        return index, ""
    alike = torch.empty_like(index)
    for label in triggered.true_labels.unique():
        rows = (triggered.true_labels == label).nonzero().flatten()
        choice = (clean.labels == label).nonzero().flatten()
        candidates = clean.images[choice].flatten(1).float()
        for part in rows.split(256):  # bounded memory
            distance = torch.cdist(triggered.images[part].flatten(1).float(), candidates)
            alike[part] = choice[distance.argmin(1)]
    return alike, (
        "The clean data is in another order than the file's; the clean counterparts of the "
        "triggered images were found by likeness, for the changed pixels alone."
    )


def _pixels(picture: object, folder: Path, shape: tuple[int, int, int], what: str) -> Tensor:
    channels, height, width = shape
    if isinstance(picture, StoredPicture):
        if tuple(picture.pixels.shape) != shape:
            raise InteropError(
                f"{what} holds a picture of {tuple(picture.pixels.shape)}, but declares {shape}."
            )
        return picture.pixels
    return read_png(reroot(picture, folder), channels=channels, height=height, width=width)


def _notes(attack: Tensor, true: Tensor) -> tuple[str, ...]:
    """What the counted images have that ours never would."""
    if same := int((attack == true).sum()):
        return (
            f"{same} of {len(true)} stored images have the attack's label as their true one; they "
            "count, as in BackdoorBench.",
        )
    return ()
