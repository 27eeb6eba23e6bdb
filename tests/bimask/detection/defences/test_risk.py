import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from bimask.defences.base import CleanData
from bimask.detection import Detector
from bimask.detection.defences.perturbed import Ball
from bimask.detection.defences.risk import AdversarialRisk, held_out_risk
from bimask.errors import DataError

CLASSES = 3


class Head(nn.Module):
    """Class k is there where channel k is above a half; every box is of 16 pixels."""

    def forward(self, features):
        colours = features[0].flatten(2).transpose(1, 2)
        boxes = torch.full_like(colours[..., :1], 1.0).expand(-1, -1, 4)  # in anchors, which have 8
        centre = torch.full_like(boxes[..., :1], 9.0)
        return {"cls_logits": 60 * (colours - 0.5), "bbox_regression": boxes, "bbox_ctrness": centre}

    def compute_loss(self, targets, outputs, anchors, places):
        return {"classification": outputs["cls_logits"].sum() * 0}


class Told(nn.Module):
    """Answers pictures in their order with what it is told."""

    def __init__(self, *targets):
        super().__init__()
        self.targets = targets

    def forward(self, images):
        assert len(images) == len(self.targets)
        return [{**one, "scores": torch.ones(len(one["labels"]))} for one in self.targets]


@pytest.fixture
def suspect():
    cells = nn.AvgPool2d(8)
    cells.out_channels = CLASSES
    net = FCOS(
        cells,
        CLASSES,
        min_size=32,
        max_size=32,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        anchor_generator=AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),)),
        head=Head(),
    )
    return Detector(net, range(CLASSES)).eval()


@pytest.fixture
def clean():
    """An object each: the first can be erased, the second relabelled, the third both, and the last is
    not found. A perturbation moves a colour by 0.3 at most."""
    colours = [(0.7, 0.0, 0.0), (0.1, 0.95, 0.3), (0.6, 0.4, 0.0), (0.4, 0.0, 0.0)]
    images, targets = [], []
    for label, colour in zip((0, 1, 0, 0), colours, strict=True):
        image = torch.zeros(3, 32, 32)
        image[:, 8:24, 8:24] = torch.tensor(colour)[:, None, None]
        images.append(image)
        boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0]])
        targets.append({"boxes": boxes, "labels": torch.tensor([label])})
    return CleanData(images, targets)


def seeded():
    return torch.Generator().manual_seed(2)


def test_weak_objects_are_those_found_when_clean_that_a_branch_relabels_or_erases(suspect, clean):
    heard = []
    risk = AdversarialRisk.of(suspect, clean, seeded(), on_step=lambda: heard.append(1))
    relabelled, erased = risk.weak
    assert relabelled.picture.tolist() == [1, 2]
    assert erased.picture.tolist() == [0, 2]
    assert len(heard) == AdversarialRisk.steps(4) == 2
    for weak in risk.weak:
        for image, other in zip(clean.images, weak.images, strict=True):
            assert (image - other).abs().max() <= 0.3 + 1e-6
            assert torch.equal(image[:, :8], other[:, :8]), "only boxes change"


def test_risk_is_the_mean_share_of_them_that_a_repaired_detector_errs_on(suspect, clean):
    truth = clean.labels
    other = [{**one, "labels": (one["labels"] + 1) % CLASSES} for one in truth]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    risk = AdversarialRisk.of(suspect, clean, seeded())
    assert risk(suspect) == 1
    assert risk(Told(*truth)) == 0
    assert risk(Told(*[nothing] * 4)) == 0.5, "all is erased, and nothing relabelled"
    assert risk(Told(*other)) == 1
    assert risk(Told(truth[0], other[1], nothing, other[3])) == 0.5
    assert risk(Told(truth[0], truth[1], nothing, truth[3])) == 0.25


def test_the_function_asks_about_one_and_the_same_generator_finds_the_same(suspect, clean):
    assert held_out_risk(suspect, suspect, clean, seeded()) == 1
    assert held_out_risk(suspect, Told(*clean.labels), clean, seeded()) == 0
    one, again = (AdversarialRisk.of(suspect, clean, seeded()) for _ in range(2))
    for first, second in zip(one.weak, again.weak, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))


def test_a_branch_without_weak_objects_says_nothing_and_none_at_all_is_told(suspect, clean):
    first = CleanData(clean.images[:1], clean.labels[:1])
    risk = AdversarialRisk.of(suspect, first, seeded())
    assert [len(weak) for weak in risk.weak] == [0, 1]
    assert risk(suspect) == 1
    with pytest.raises(DataError, match="No perturbation of 4 clean pictures"):
        AdversarialRisk.of(suspect, clean, seeded(), ball=Ball(1e-3, 1, "boxes"))
