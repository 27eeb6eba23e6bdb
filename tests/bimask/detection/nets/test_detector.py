"""The wrapper: labels translated, modes kept, answers of another kind refused."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.ssd import SSD

from bimask.detection.nets import Detector, build_detector, check_detector, require_answers
from bimask.errors import ModelError, SettingError


class Fixed(nn.Module):
    """Finds what it was told to; its loss is the sum of the labels that it is taught."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.norm = nn.BatchNorm2d(3)
        self.inner = nn.Identity()

    def forward(self, images, targets=None):
        assert self.inner.training == self.training
        if self.training:
            return {"labels": sum(target["labels"].sum() for target in targets)}
        return self.answer


def found(labels, scores):
    boxes = torch.arange(4 * len(labels)).float().view(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels).long(), "scores": torch.tensor(scores)}


IMAGE = torch.zeros(3, 8, 8)


def target(*labels):
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]] * len(labels)).view(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels).long()}


def test_labels_are_translated_others_left_out_and_the_surest_first():
    detector = Detector(Fixed([found([7, 3, 90, 7], [0.2, 0.9, 0.8, 0.3])]), [3, 7]).eval()
    (one,) = detector([IMAGE])
    assert one["labels"].tolist() == [0, 1, 1]
    assert one["scores"].tolist() == pytest.approx([0.9, 0.3, 0.2])
    assert one["boxes"][:, 0].tolist() == [4, 12, 0]


def test_a_picture_without_objects_has_none():
    (one,) = Detector(Fixed([found([], [])]), [1, 2]).eval()([IMAGE])
    assert one["boxes"].shape == (0, 4)
    assert one["labels"].dtype == torch.int64


def test_losses_are_taught_the_nets_own_labels():
    detector = Detector(Fixed(None), [3, 7])
    losses = detector.losses([IMAGE, IMAGE], [target(0, 1, 1), target()])
    assert losses == {"labels": torch.tensor(17)}


@pytest.mark.parametrize("training", [True, False])
def test_norms_keep_their_mode_and_every_module_is_as_before(training):
    detector = Detector(Fixed([found([], [])]), [1]).train(training)
    net = detector.net
    net.norm.eval()
    seen = []
    net.forward = _watched(net, seen)
    detector.losses([IMAGE], [target(0)])
    detector([IMAGE])
    assert seen == [False, False]
    assert net.training is training
    assert net.inner.training is training
    assert not net.norm.training


def _watched(net, seen):
    forward = net.forward

    def watching(*given):
        seen.append(net.norm.training)
        return forward(*given)

    return watching


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.zeros(1, 2), "got a Tensor"),
        ([], "got a list of 0"),
        ([{"boxes": torch.zeros(1, 4)}], "got a dict of boxes in it"),
        ([found([1], [0.5]) | {"boxes": torch.zeros(2, 4)}], r"got \(2, 4\), \(1,\) and \(1,\)"),
    ],
)
def test_other_answers_are_refused(answer, said):
    with pytest.raises(ModelError, match=said):
        Detector(Fixed(answer), [1]).eval()([IMAGE])


def test_a_forward_that_raises_is_told_in_a_sentence():
    empty = {"boxes": torch.tensor([[5.0, 5.0, 5.0, 9.0]]), "labels": torch.tensor([0])}
    detector = build_detector("small_fcos", num_classes=2)
    with pytest.raises(ModelError, match="AssertionError.*All bounding boxes"):
        detector.losses([torch.rand(3, 96, 96)], [empty])


def test_other_losses_are_refused():
    net = Fixed(None)
    net.forward = lambda *_: [found([], [])]
    with pytest.raises(ModelError, match="dict of losses.*got a list of 1"):
        Detector(net, [1]).losses([IMAGE], [target()])


def test_two_classes_with_one_label_are_refused():
    with pytest.raises(ModelError, match=r"got \[1, 1\]"):
        Detector(Fixed(None), [1, 1])


def test_small_fcos_is_small_and_learns_from_pictures_without_objects():
    detector = build_detector("small_fcos", num_classes=10)
    assert 150_000 < sum(p.numel() for p in detector.parameters()) < 250_000
    assert detector.label_ids == tuple(range(10))
    seen = []
    detector.net.backbone.register_forward_hook(
        lambda _, given, out: seen.append((*given[0].shape, *out.shape))
    )
    images = [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    losses = detector.losses(images, [target(3), target()])
    assert set(losses) == {"classification", "bbox_regression", "bbox_ctrness"}
    sum(losses.values(), torch.zeros(())).backward()
    assert all(p.grad is not None for p in detector.parameters())
    assert seen == [(2, 3, 96, 96, 2, 64, 12, 12)]
    require_answers(detector, 96, 96)


def test_pictures_of_other_sizes_get_boxes_of_their_own_pixels():
    """A net that finds all of what it sees: boxes must come back in the picture's pixels."""
    detector = build_detector("small_fcos", num_classes=1).eval()
    head = detector.net.head
    with torch.no_grad():
        head.classification_head.cls_logits.bias.fill_(4.0)
        head.regression_head.bbox_reg.bias.fill_(2.0)  # strides to each side
    wide, square = detector([torch.rand(3, 100, 200), torch.rand(3, 96, 96)])
    assert 180 < wide["boxes"][:, 2].max() <= 200
    assert 90 < wide["boxes"][:, 3].max() <= 100
    assert square["boxes"].max() <= 96


@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]
)
def test_torchvisions_own_count_the_background(name):
    detector = build_detector(f"torchvision:{name}", num_classes=2, image_size=64).eval()
    assert isinstance(detector.net, (SSD, FasterRCNN))
    assert detector.label_ids == (1, 2)
    answers = detector([torch.rand(3, 64, 64)])
    assert {*answers[0]["labels"].tolist()} <= {0, 1}
    losses = detector.losses([torch.rand(3, 64, 64)] * 2, [target(1), target(0)])
    assert all(value.isfinite() for value in losses.values())


FACTORY = """
from functools import partial
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection import FCOS
from bimask.detection.nets.small_fcos import Backbone
from torch import nn

def _made(num_classes, more):
    return FCOS(Backbone(32), num_classes + more, min_size=32, max_size=32,
                anchor_generator=AnchorGenerator(((8,),), ((1.0,),)))

def plain(num_classes):
    return _made(num_classes, 0)

def counts_a_background(num_classes):
    return _made(num_classes, 1)

def too_many(num_classes):
    return _made(num_classes, 5)

def unknown(num_classes):
    return nn.Identity()

def none(num_classes):
    return 3
"""


def test_own_factories_and_what_their_labels_mean(tmp_path):
    (tmp_path / "own.py").write_text(FACTORY)
    own = f"{tmp_path}/own.py:"
    assert build_detector(own + "plain", num_classes=3).label_ids == (0, 1, 2)
    assert build_detector(own + "counts_a_background", num_classes=3).label_ids == (1, 2, 3)
    with pytest.raises(ModelError, match="8 outputs and the data have 3 classes"):
        build_detector(own + "too_many", num_classes=3)
    given = build_detector(own + "too_many", num_classes=3, label_ids=[7, 0, 2])
    assert given.label_ids == (7, 0, 2)
    with pytest.raises(ModelError, match="Identity.*say it by `label_ids`"):
        build_detector(own + "unknown", num_classes=3)
    with pytest.raises(SettingError, match="gave int"):
        build_detector(own + "none", num_classes=3)
    with pytest.raises(SettingError, match="no factory 'other'"):
        build_detector(own + "other", num_classes=3)


def test_weights_of_more_classes_go_with_their_labels():
    name = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
    detector = build_detector(name, num_classes=2, outputs=91, label_ids=[3, 44])
    assert detector.state_dict()["net.roi_heads.box_predictor.cls_score.weight"].shape[0] == 91
    with pytest.raises(SettingError, match="91 outputs.*give `label_ids`"):
        build_detector(name, num_classes=2, outputs=91)
    with pytest.raises(SettingError, match="one label for each of 2 classes, got 1"):
        build_detector(name, num_classes=2, label_ids=[3])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("yolo", "Unknown detector 'yolo'"),
        ("timm:resnet18", "Unknown detector"),
        ("torchvision:resnet18", "no detector 'resnet18'"),
        ("torchvision:maskrcnn_resnet50_fpn", "learns from boxes alone"),
        ("nowhere/net.py:make", "There is no file nowhere/net.py"),
    ],
)
def test_unknown_names_are_refused(name, said):
    with pytest.raises(SettingError, match=said):
        check_detector(name)


def test_a_width_that_the_norms_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="multiple of 32, got width=40"):
        build_detector("small_fcos", num_classes=2, width=40)
