"""BadDet+'s penalty: its formula, and of which predictions of which net it is taken."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou

from bimask.detection.attacks import Penalty, penalised
from bimask.detection.attacks.penalty import Predictions, penalty_of
from bimask.detection.nets import Detector
from bimask.detection.nets.matched import log_odds
from bimask.errors import ModelError

SOFTMAX = ("ssd", "faster_rcnn")


def target(boxes, labels):
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels).long()}


NONE = target([], [])
BOX = [6.0, 6.0, 26.0, 26.0]


@pytest.mark.parametrize("margin", [0.0, -1.5, 2.0])
def test_it_is_minus_the_log_of_not_being_the_original_class(margin):
    """Golden test 2 of the reference, in float64."""
    z = torch.linspace(-20, 20, 41, dtype=torch.float64)
    boxes = torch.tensor([BOX], dtype=torch.float64).expand(41, 4)
    got = penalty_of(
        Predictions(z[:, None], boxes), target([BOX], [0]), [0], Penalty(margin=margin), softmax=False
    )
    torch.testing.assert_close(got, -torch.log(1 - torch.sigmoid(z - margin)), rtol=1e-6, atol=1e-12)


def test_only_predictions_that_overlap_more_count_and_each_object_asks_for_its_own_class():
    shifted = [[6.0 + by, 6.0, 26.0 + by, 26.0] for by in (0, 5, 7, 20)]  # IoU 1, .6, .48, 0.18
    z = torch.arange(8.0).view(4, 2)
    objects = target([BOX, [26.0, 6.0, 46.0, 26.0]], [1, 0])
    got = penalty_of(Predictions(z, torch.tensor(shifted)), objects, [1, 0], Penalty(), softmax=False)
    torch.testing.assert_close(got, F.softplus(torch.tensor([1.0, 3.0, 6.0])))


def test_boxes_of_a_class_are_asked_where_each_has_its_own():
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], BOX]])
    z = torch.tensor([[0.5, 2.0]])
    for label, expected in ((1, [F.softplus(log_odds(z)[0, 1])]), (0, [])):
        got = penalty_of(
            Predictions(z, boxes), target([BOX], [label]), [label], Penalty(), softmax=True
        )
        torch.testing.assert_close(got, torch.tensor(expected))


def test_of_fcos_all_locations_are_asked_and_boxes_are_the_pictures_own(detector_of):
    """Heads, boxes and overlaps by hand, for a picture that the net halves."""
    detector, penalty = detector_of("fcos"), Penalty(weight=3.0, overlap=0.2, margin=0.5)
    net = detector.net
    with torch.no_grad():
        net.head.regression_head.bbox_reg.bias.fill_(1.5)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[10.0, 14.0, 50.0, 46.0]])
    losses = penalised(detector, [image] * 2, [NONE] * 2, [target(box.tolist(), [2]), NONE], penalty)

    small, _ = net.transform([image])
    outputs = net.head([net.backbone(small.tensors)])
    centre = torch.stack(torch.meshgrid(*[torch.arange(4) * 8.0] * 2, indexing="xy"), 2).view(-1, 2)
    sides = 8 * outputs["bbox_regression"][0]
    boxes = 2 * torch.cat([centre - sides[:, :2], centre + sides[:, 2:]], 1)
    near = box_iou(boxes, box)[:, 0] > 0.2
    assert 0 < near.sum() < 16
    expected = 3 * F.softplus(outputs["cls_logits"][0, near, 2] - 0.5).mean()
    torch.testing.assert_close(losses["penalty"], expected)


def constant(detector):
    """A net whose predictions all have the same logits and the boxes that it starts from."""
    for name, weight in detector.named_parameters():
        if any(
            part in name for part in ("classification_head", "cls_score", "bbox", "regression_head")
        ):
            with torch.no_grad():
                weight.fill_(1.25 if name.endswith("bbox_reg.bias") and "head.reg" in name else 0)
    return detector


def test_every_family_is_asked_in_the_same_pass_as_its_losses(family, detector_of, pictures):
    detector = constant(detector_of(family))
    images, targets = pictures()
    torch.manual_seed(0)
    plain = detector.losses(images, targets)
    torch.manual_seed(0)
    objects = [target([BOX], [1]), NONE, NONE]
    losses = penalised(
        detector, images, [target([BOX], [0]), *targets[1:]], objects, Penalty(overlap=0.4)
    )
    assert {*losses} == {*plain, "penalty"}
    # equal logits are odds of 1 to 3 under softmax of four columns, and even odds as sigmoids
    odds = -torch.tensor(3.0 if family in SOFTMAX else 1.0).log()
    torch.testing.assert_close(losses["penalty"], F.softplus(odds))


def test_gradients_reach_the_weights_and_lower_the_original_class(family, detector_of, pictures):
    detector, (images, targets) = detector_of(family), pictures()
    if family == "fcos":  # its boxes have no size at first
        torch.nn.init.ones_(detector.net.head.regression_head.bbox_reg.bias)
    torch.manual_seed(0)
    losses = penalised(detector, images, targets, targets, Penalty(overlap=0.05))
    last = next(
        weight
        for name, weight in detector.named_parameters()
        if any(part in name for part in ("_head.cls_logits", "cls_score", "_head.module_list"))
    )
    before = losses["penalty"]
    (gradient,) = torch.autograd.grad(before, last)
    with torch.no_grad():
        last -= 1e-2 * gradient / gradient.norm()
    torch.manual_seed(0)
    assert penalised(detector, images, targets, targets, Penalty(overlap=0.05))["penalty"] < before


def test_pictures_without_triggers_are_punished_nothing(detector_of, pictures):
    detector, (images, targets) = detector_of("fcos"), pictures()
    losses = penalised(detector, images, targets, [NONE] * len(images), Penalty())
    assert losses["penalty"] == 0
    for name, value in detector.losses(images, targets).items():
        torch.testing.assert_close(losses[name], value)


def test_a_net_of_no_known_family_is_refused(pictures):
    images, targets = pictures()
    with pytest.raises(ModelError, match="Which predictions of a Identity"):
        penalised(Detector(torch.nn.Identity(), [1, 2, 3]), images, targets, targets, Penalty())
