"""A small detector of each of torchvision's families, for pictures of 32 pixels and three classes; and
a user's own, in files."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from bimask.detection.nets.detector import Detector
from bimask.detection.nets.small_fcos import small_fcos

SIDE, CLASSES = 32, 3
ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("own_detector", ROOT / "tests" / "own_detector.py")
own_detector = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)  # tests import it
SPEC.loader.exec_module(own_detector)


class Backbone(nn.Sequential):
    """To a quarter of the size."""

    out_channels = 16

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
        )


class Levels(nn.Module):
    """To a quarter and an eighth of the size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Backbone(), nn.Conv2d(16, 16, 3, 2, 1)

    def forward(self, images):
        first = self.first(images)
        return OrderedDict(a=first, b=self.second(first))


def retinanet():
    anchors = AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),))
    net = RetinaNet(Backbone(), CLASSES, min_size=SIDE, max_size=SIDE, anchor_generator=anchors)
    return Detector(net, range(CLASSES))


def ssd():
    boxes = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.4, 0.8])
    levels = Levels()
    levels.out_channels = [16, 16]
    return Detector(SSD(levels, boxes, (SIDE, SIDE), CLASSES + 1), range(1, CLASSES + 1))


def faster_rcnn():
    net = FasterRCNN(
        Backbone(),
        min_size=SIDE,
        max_size=SIDE,
        rpn_anchor_generator=AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(16 * 9, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES + 1),
        box_batch_size_per_image=16,
        rpn_pre_nms_top_n_train=60,
    )
    return Detector(net, [2, 1, 3])  # a net may count as it likes


def fcos():
    return Detector(small_fcos(CLASSES, width=32, image_size=SIDE), range(CLASSES))


FAMILIES = {"fcos": fcos, "retinanet": retinanet, "ssd": ssd, "faster_rcnn": faster_rcnn}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(name="detector_of")
def _detector_of():
    return detector_of


@pytest.fixture(name="pictures")
def _pictures():
    return pictures


def detector_of(family, seed=0):
    """In eval mode, with weights by the seed and logits that differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        detector = FAMILIES[family]()
        with torch.no_grad():
            for name, weight in detector.named_parameters():
                if "cls_logits" in name and name.endswith("weight"):
                    weight.normal_(std=0.3)
    return detector.eval()


def pictures(count=3, seed=1):
    """Pictures of 32 pixels, the last without an object, the others with one to three."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, SIDE, SIDE, generator=generator) for _ in range(count)]
    targets = []
    for row in range(count):
        objects = 0 if row == count - 1 else 1 + row % 3
        corner = 1 + 14 * torch.rand(objects, 2, generator=generator)
        boxes = torch.cat([corner, corner + 8 + 7 * torch.rand(objects, 2, generator=generator)], 1)
        labels = torch.randint(CLASSES, (objects,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels})
    return images, targets


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A user's folder: mine.py, suspect.pth, annotations.json, pictures/, settings.yaml."""
    home = tmp_path_factory.mktemp("own")
    own_detector.make_detector(home)
    return home


@pytest.fixture(scope="session")
def cleaned(trained):
    """What the command printed, in a process of its own, and the folder that it left."""
    out = trained / "cleaned"
    done = subprocess.run(
        [sys.executable, "-m", "bimask", *own_detector.words(trained, out=out)],
        cwd=trained,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.fixture
def home(trained, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(trained, tmp_path / "home", ignore=shutil.ignore_patterns("cleaned", "out"))
    return tmp_path / "home"
