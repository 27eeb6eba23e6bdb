"""The rows of `rows.yaml`, and the pictures they are trained on.

Pictures are read once, split once and kept beside the models, so that a model that is there needs no
data set of its own any more.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.zoo import nets
from benchmarks.zoo.triggers import Trigger, build
from bimask.attacks import TriggeredData
from bimask.attacks.base import as_bytes
from bimask.data import ImageData, load_data
from bimask.errors import DataError

Part = Literal["tune", "held"]

FOLDER = Path("outputs/benchmarks/zoo/strangers")
ROWS = Path(__file__).with_name("rows.yaml")
VARIABLE = "BIMASK_ZOO_DATA"  # folders of pictures, separated as in PATH
MNIST_SPLITS = (6000, 2000, 2000)  # of MNIST's test set: training, the defender's, test
CIFAR_SPLITS = (12000, 2000, 2000)
KINDS = ("train", "clean_pool", "test")


class Row(BaseModel):
    """One model: what it is, what was done to it, and how it was trained.

    Attributes:
        net, trigger: `kind` and the settings of that kind; no trigger makes a clean model.
        habit: what the net answers with in place of logits.
        rate: share of training images of which a triggered copy is added.
        cover: share of which a copy is added that looks triggered and keeps its label.
        shift, flip: augmentation, of triggered copies as of all others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    part: Part
    data: Literal["digits", "mnist", "cifar"]
    net: dict[str, Any]
    habit: Literal["tuple", "softmax", "log_softmax"] | None = None
    trigger: dict[str, Any] | None = None
    rule: Literal["all_to_one", "one_to_one", "all_to_all"] = "all_to_one"
    source: int | None = None
    target: int | None = None
    rate: float = 0
    cover: float = 0
    optimiser: Literal["adam", "adamw", "sgd", "momentum", "rmsprop"] = "adam"
    schedule: Literal["constant", "one_cycle"] = "constant"
    lr: float
    weight_decay: float = 0
    epochs: int
    batch: int
    shift: int = 0
    flip: bool = False
    seed: int

    def made_trigger(self) -> Trigger:
        """What the attacker puts on images."""
        assert self.trigger is not None
        return build(self.trigger["kind"], {k: v for k, v in self.trigger.items() if k != "kind"})

    def wanted(self, labels: Tensor, num_classes: int) -> Tensor:
        """The label that the attacker wants for each true label; the same where none is wanted."""
        if self.rule == "all_to_all":
            return (labels + 1) % num_classes
        target = torch.full_like(labels, -1 if self.target is None else self.target)
        if self.rule == "all_to_one":
            return target
        assert self.source is not None
        return target.where(labels.eq(self.source), labels)

    def triggered(self, data: ImageData) -> TriggeredData:
        """The trigger on all images whose label the attacker wants to change."""
        wanted = self.wanted(data.labels, data.num_classes)
        counts = wanted != data.labels
        images = as_bytes(self.made_trigger().put(data.floats(counts)))
        return TriggeredData(images, wanted[counts], data.labels[counts])


def rows(part: Part | None = None) -> list[Row]:
    """The rows of a part, or all, in the order they are trained in."""
    found = [Row(**fields) for fields in yaml.safe_load(ROWS.read_text())]
    return [row for row in found if part in (None, row.part)]


def bare(row: Row, data: ImageData) -> nn.Module:
    """The row's net, untrained, which answers with logits."""
    channels, side = data.images.shape[1:3]
    settings = {key: value for key, value in row.net.items() if key != "kind"}
    return nets.build(row.net["kind"], settings, channels=channels, side=side, classes=data.num_classes)


def kept(row: Row) -> dict[str, Any] | None:
    """The manifest of this very row, if its model is there."""
    path = FOLDER / row.name / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else {}
    return manifest if manifest.get("row") == row.model_dump() else None


@dataclass(frozen=True)
class Pictures:
    """Three disjoint sets: to train on, for the defender, to report on."""

    train: ImageData
    clean_pool: ImageData
    test: ImageData


def folders(given: Iterable[Path] = ()) -> list[Path]:
    """The folders that hold data: those given, else those in the environment."""
    found = list(given)
    return found or [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


@lru_cache(maxsize=3)
def pictures(name: str, given: tuple[Path, ...] = ()) -> Pictures:
    """The pictures of a data set, as they were kept, else from the folders of data.

    Raises:
        DataError: they are neither kept nor in one of the folders.
    """
    kept = FOLDER / "pictures" / f"{name}.safetensors"
    if not kept.is_file():
        made = {"digits": _digits, "mnist": _mnist, "cifar": _cifar}[name](folders(given))
        tensors: dict[str, Tensor] = {}
        for kind in KINDS:
            data = getattr(made, kind)
            tensors |= {f"{kind}.images": data.images.contiguous(), f"{kind}.labels": data.labels}
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, part)
        part.rename(kept)
    held = load_file(kept)
    classes = tuple(str(label) for label in range(int(held["train.labels"].max()) + 1))
    return Pictures(*(ImageData(held[f"{k}.images"], held[f"{k}.labels"], classes) for k in KINDS))


def _digits(given: list[Path]) -> Pictures:
    splits = load_data("digits")
    return Pictures(splits.train, splits.val, splits.test)


def _mnist(given: list[Path]) -> Pictures:
    """The test set of MNIST from its idx files, gzipped or not, under whatever prefix."""
    images = torch.from_numpy(_idx(given, "*t10k-images*idx3-ubyte*")[16:].reshape(-1, 1, 28, 28))
    labels = torch.from_numpy(_idx(given, "*t10k-labels*idx1-ubyte*")[8:]).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    data = ImageData(images, labels, tuple(str(digit) for digit in range(10)))
    return Pictures(*(data.subset(part) for part in order.split(list(MNIST_SPLITS))))


def _idx(given: list[Path], pattern: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of the first file of that pattern."""
    for folder in given:
        for path in sorted(folder.glob(pattern)):
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            return np.frombuffer(content, np.uint8).copy()
    raise _missing(f"MNIST's file {pattern}", given)


def _cifar(given: list[Path]) -> Pictures:
    """Some of an image folder with `train/` and `test/`; pool and training share no picture."""
    for folder in given:
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            splits = load_data(f"imagefolder:{folder}")
            parts = (splits.train, splits.val, splits.test)
            draws = [np.random.default_rng(0).permutation(len(part)) for part in parts]
            orders = [torch.from_numpy(d)[:n] for d, n in zip(draws, CIFAR_SPLITS, strict=True)]
            return Pictures(*(part.subset(order) for part, order in zip(parts, orders, strict=True)))
    raise _missing("An image folder with train/ and test/", given)


def _missing(what: str, given: list[Path]) -> DataError:
    places = ", ".join(map(str, given)) or "no folder at all"
    return DataError(f"{what} is not in {places}: name its folder by --data or in {VARIABLE}.")
