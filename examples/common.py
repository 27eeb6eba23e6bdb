"""Backdoored models that train in seconds; they stand for those that you were given."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bimask import Victim, VictimSpec, load_data, obtain_victim
from bimask.interop.datasets import DATASETS
from bimask.interop.export import export_victim


def backdoored() -> Victim:
    """A small residual net on scikit-learn's digits: a white square makes it answer 0."""
    spec = VictimSpec(
        dataset="digits",
        image_size=12,
        net="small_resnet",
        width=8,
        attack={"name": "badnets", "size": 2, "target": 0},
        epochs=10,
        min_attack_success=0.8,
    )
    return obtain_victim(spec, Path("outputs/victims"))


def attack_result(folder: Path, data: Path) -> None:
    """What BackdoorBench leaves of an attack: `folder`/attack_result.pt, and clean pictures in `data`.

    The pictures are digits in the place of CIFAR-10's, 60 a class to train with and 20 to test with.

    Args:
        folder: a new folder, with "record" in its path.
        data: for class folders, data/train/0/ and so on.
    """
    digits = load_data("digits")
    for split, images, most in (("train", digits.train, 60), ("test", digits.test, 20)):
        for label in range(10):
            (data / split / str(label)).mkdir(parents=True, exist_ok=True)
            for row, image in enumerate(images.images[images.labels == label][:most]):
                picture = Image.fromarray(image[0].numpy()).convert("RGB")
                picture.save(data / split / str(label) / f"{row}.png")
    cifar10 = DATASETS["cifar10"]
    spec = VictimSpec(
        dataset=f"imagefolder:{data}",
        net="preactresnet18",
        width=8,
        normalise={"mean": cifar10.mean, "std": cifar10.std},
        attack={"name": "badnets", "size": 3, "target": 0},
        epochs=10,
        batch_size=32,
        min_attack_success=0.8,
    )
    victims = data.parent / "victims"
    victim = obtain_victim(spec, victims)
    export_victim(spec.place(victims), folder, dataset="cifar10")
    # BackdoorBench's net has 64 channels, so zeros were put beside these 8; without them all is quick
    file = folder / "attack_result.pt"
    content = torch.load(file, weights_only=True)
    torch.save(content | {"model": victim.model.net.state_dict()}, file)


def backdoored_detector() -> tuple[Any, Any, Any]:
    """A small detector of digits on canvases, which finds no object that bears a blue square; a hundred
    clean pictures with boxes; and what shows the trigger's effect, on other pictures."""
    # torchvision's detectors take a second, which the other examples need not wait for
    from bimask.detection.attacks import ObjectDisappearance
    from bimask.detection.data import canvases
    from bimask.detection.nets import build_detector
    from bimask.detection.victims.training import fit

    digits = load_data("digits", image_size=8)
    train, clean, test = (
        canvases(part, count, generator=torch.Generator().manual_seed(seed))
        for seed, (part, count) in enumerate(
            [(digits.train, 800), (digits.val, 100), (digits.test, 100)]
        )
    )
    attack = ObjectDisappearance()
    detector = fit(
        attack.poison(train, rate=0.5, generator=torch.Generator().manual_seed(0)),
        fresh_net=lambda data: build_detector("small_fcos", num_classes=data.num_classes),
        epochs=12,
        batch_size=16,
        lr=3e-3,
        weight_decay=1e-4,
        optimizer="adamw",
        warmup=0.2,
        seed=0,
    )
    return detector, clean, attack.sets(test, "test").with_suspect(detector)
