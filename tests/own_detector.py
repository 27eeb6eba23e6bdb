"""A user's own detector, made in seconds: a factory, weights, pictures with boxes in COCO's JSON."""

import importlib.util
import json

import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.detection import DetectionData
from bimask.detection.nets.detector import Detector

SIDE, COUNT = 48, 40
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 40), "blue": (60, 60, 240)}
FACTORY = """
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead


class Backbone(nn.Sequential):
    out_channels = 32

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        )


def make(num_classes):
    return FCOS(
        Backbone(), num_classes, min_size=48, max_size=48,
        anchor_generator=AnchorGenerator(sizes=((4,),), aspect_ratios=((1.0,),)),
        head=FCOSHead(32, num_anchors=1, num_classes=num_classes, num_convs=1),
    )


def wider(num_classes):
    net = make(num_classes)
    net.extra = nn.Linear(2, 2)
    return net


def classifier(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def number(num_classes):
    return num_classes
"""


def squares(count, seed=0):
    """Pictures with one to three coloured squares on grey: (3, H, W) uint8, boxes, labels."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        image = torch.randint(90, 120, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        boxes, labels = [], []
        for column in range(int(torch.randint(1, 4, (), generator=generator))):
            side, x, y = torch.randint(0, 5, (3,), generator=generator).tolist()
            x, y, side = 16 * column + x, 6 * y + 2, side + 9
            side = min(side, 16 * (column + 1) - x)
            label = int(torch.randint(3, (), generator=generator))
            colour = torch.tensor(list(COLOURS.values())[label], dtype=torch.uint8)
            image[:, y : y + side, x : x + side] = colour[:, None, None]
            boxes.append([x, y, x + side, y + side])
            labels.append(label)
        images.append(image)
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
    return DetectionData(tuple(images), tuple(targets), tuple(COLOURS))


def write_coco(folder, data, ids=(1, 2, 3)):
    """annotations.json, and the pictures in pictures/."""
    (folder / "pictures").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [
        {"id": one, "name": name} for one, name in zip(ids, data.classes, strict=True)
    ]
    for row, (image, target) in enumerate(zip(data.images, data.targets, strict=True)):
        name = f"{row:03}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "pictures" / name)
        content["images"].append({"id": row, "file_name": f"pictures/{name}"})
        for (x0, y0, x1, y1), label in zip(target["boxes"].tolist(), target["labels"], strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            content["annotations"].append(
                {"image_id": row, "category_id": ids[int(label)], "bbox": box}
            )
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def module_of(path):
    spec = importlib.util.spec_from_file_location("users_own_detector", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_detector(home):
    """mine.py, suspect.pth, annotations.json, pictures/ and settings.yaml in a folder."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "mine.py").write_text(FACTORY)
    data = squares(COUNT)
    images = data.floats()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = module_of(home / "mine.py").make(3)
        detector = Detector(net, range(3)).train()
        optimiser = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(80):
            rows = torch.randperm(COUNT)[:8].tolist()
            losses = detector.losses([images[r] for r in rows], [data.targets[r] for r in rows])
            optimiser.zero_grad()
            sum(losses.values()).backward()
            optimiser.step()
    torch.save({"model": net.state_dict(), "epoch": 3}, home / "suspect.pth")
    write_coco(home, data)
    settings = {"defence": "soft_branch", "epochs": 1, "attack_steps": 1, "budget": None, "lr": 0.001}
    (home / "settings.yaml").write_text(yaml.safe_dump(settings))


def words(home, **options):
    """The command's, with other options in the place of the usual ones; None leaves one out."""
    usual = {
        "model": home / "suspect.pth",
        "net": f"{home / 'mine.py'}:make",
        "clean": home / "annotations.json",
        "config": home / "settings.yaml",
        "out": home / "out",
    }
    given = {k: v for k, v in (usual | options).items() if v is not None}
    found = ["purify"]
    for name, value in given.items():
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def run(home, **options):
    return CliRunner().invoke(app, words(home, **options))


def edited(home, change):
    """annotations.json, changed in place by a function."""
    path = home / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
