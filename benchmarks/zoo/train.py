"""Train the strangers that are not there: plain loops, as their authors might have written them.

    python -m benchmarks.zoo.train [--part tune|held] [--data FOLDER ...]

Folders, also from the environment (BIMASK_ZOO_DATA), hold MNIST's test set (idx files) and CIFAR-10 as
an image folder; without them those rows are passed over. A backdoor that was not learned (on images of
the pool) is trained again with the next seed, and its row is dropped after `TRIES`. One line a model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.nets import plain_layout
from benchmarks.zoo.rows import FOLDER, Pictures, Row, bare, kept, pictures, rows
from bimask.attacks.base import as_bytes
from bimask.data import ImageData, augment
from bimask.errors import DataError

TRIES = 4
MIN_SUCCESS = {"all_to_one": 0.9, "one_to_one": 0.9, "all_to_all": 0.8}
MIN_ACCURACY = {"digits": 0.9, "mnist": 0.9, "cifar": 0.55}


def poisoned(row: Row, data: ImageData, seed: int) -> ImageData:
    """The training set with triggered copies and covers added to it."""
    if row.trigger is None:
        return data
    generator = torch.Generator().manual_seed(seed)
    trigger, wanted = row.made_trigger(), row.wanted(data.labels, data.num_classes)
    order = torch.randperm(len(data), generator=generator)
    count, covers = round(row.rate * len(data)), round(row.cover * len(data))
    turned = (wanted != data.labels)[order]
    copied = order[turned][:count]
    # where one class alone is turned, the others are the covers
    beside = order[~turned][:covers] if row.rule == "one_to_one" else order[turned][count:][:covers]
    others = torch.randperm(len(data), generator=generator)[: len(beside)]
    images = [
        data.images,
        as_bytes(trigger.put(data.floats(copied))),
        as_bytes(trigger.cover(data.floats(beside), data.floats(others), generator)),
    ]
    labels = torch.cat([data.labels, wanted[copied], data.labels[beside]])
    return ImageData(torch.cat(images), labels, data.classes)


def fit(row: Row, data: ImageData, seed: int) -> nn.Module:
    """The row's net after its training, in eval mode."""
    torch.manual_seed(seed)
    net = bare(row, data)
    data = poisoned(row, data, seed)
    optimiser = _optimiser(row, net)
    steps = row.epochs * -(-len(data) // row.batch)
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(optimiser, row.lr, total_steps=steps)
        if row.schedule == "one_cycle"
        else None
    )
    for _ in range(row.epochs):
        for index in torch.randperm(len(data)).split(row.batch):
            if len(index) == 1:  # a batch norm cannot learn from one
                continue
            images = plain_layout(augment(data.floats(index), shift=row.shift, flip=row.flip))
            loss = F.cross_entropy(net(images), data.labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if schedule is not None:
                schedule.step()
    return net.eval()


def _optimiser(row: Row, net: nn.Module) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": row.lr, "weight_decay": row.weight_decay}
    if row.optimiser == "adam":
        return torch.optim.Adam(net.parameters(), **settings)
    if row.optimiser == "adamw":
        return torch.optim.AdamW(net.parameters(), **settings)
    if row.optimiser == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), **settings)
    momentum = 0.9 if row.optimiser == "momentum" else 0
    return torch.optim.SGD(net.parameters(), momentum=momentum, **settings)


@torch.no_grad()
def scores(row: Row, net: nn.Module, data: ImageData) -> dict[str, float]:
    """ACC on `data`, ASR and RA on its triggered images."""

    def answers(images: Tensor) -> Tensor:
        return torch.cat(
            [net(plain_layout(part.float() / 255)).argmax(1) for part in images.split(500)]
        )

    found = {"acc": (answers(data.images) == data.labels).float().mean().item()}
    if row.trigger is not None:
        triggered = row.triggered(data)
        under_attack = answers(triggered.images)
        found["asr"] = (under_attack == triggered.attack_labels).float().mean().item()
        found["ra"] = (under_attack == triggered.true_labels).float().mean().item()
    return {key: round(value, 4) for key, value in found.items()}


def problem(row: Row, on_pool: dict[str, float]) -> str | None:
    """Why a model with such scores is of no use, or None."""
    if on_pool["acc"] < MIN_ACCURACY[row.data]:
        return f"accuracy {on_pool['acc']:.3f} below {MIN_ACCURACY[row.data]}"
    if row.trigger is not None and on_pool["asr"] < MIN_SUCCESS[row.rule]:
        return f"attack success {on_pool['asr']:.3f} below {MIN_SUCCESS[row.rule]}"
    return None


def keep(row: Row, net: nn.Module, manifest: dict[str, Any]) -> None:
    """Write weights and manifest of a row, whole or not at all."""
    part = FOLDER / f".{row.name}.{os.getpid()}.part"
    part.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, part / "model.safetensors")
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    place = FOLDER / row.name
    if place.exists():
        shutil.rmtree(place)
    part.rename(place)


def train(row: Row, data: Pictures) -> str:
    """Train a row until its backdoor is learned; what became of it, in one line."""
    begun = time.perf_counter()
    for attempt in range(TRIES):
        seed = row.seed + attempt
        net = fit(row, data.train, seed)
        on_pool = scores(row, net, data.clean_pool)
        reason = problem(row, on_pool)
        seconds = round(time.perf_counter() - begun, 1)
        if reason is None:
            found = {"seed": seed, "seconds": seconds, "pool": on_pool}
            found["test"] = scores(row, net, data.test)
            keep(row, net, {"row": row.model_dump(), **found})
            return line(row, found)
        print(f"{row.name}: seed {seed}: {reason}, {seconds} s", flush=True)
    return f"{row.name}: DROPPED after {TRIES} trainings: {reason}"


def line(row: Row, manifest: dict[str, Any]) -> str:
    figures = "  ".join(f"{key} {value:.3f}" for key, value in manifest["test"].items())
    return f"{row.part}  {row.name}: {figures}  seed {manifest['seed']}  {manifest['seconds']} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=["tune", "held"])
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows(arguments.part):
        manifest = kept(row)
        if manifest is not None:
            print(line(row, manifest), flush=True)
            continue
        try:
            data = pictures(row.data, tuple(arguments.data))
        except DataError as error:
            print(f"{row.name}: passed over: {error}", flush=True)
            continue
        print(train(row, data), flush=True)


if __name__ == "__main__":
    main()
