import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.detection.nets.detector import Detector
from bimask.detection.nets.matched import ask, classification_loss, log_odds, matched
from bimask.errors import ModelError


def labels_of(detector, answers, targets):
    """The net's own label of each row, 0 where there is no object."""
    found = torch.zeros_like(answers.object)
    for row in range(len(found)):
        if answers.object[row] >= 0:
            label = targets[answers.picture[row]]["labels"][answers.object[row]]
            found[row] = detector.label_ids[label]
    return found


def focal(logits, wanted):
    """Lin et al. 2017, equation 5, alpha 1/4 and gamma 2."""
    p = torch.sigmoid(logits)
    right = torch.where(wanted > 0, p, 1 - p)
    alpha = torch.where(wanted > 0, 0.25, 0.75)
    return (-alpha * (1 - right) ** 2 * right.log()).sum()


def recomputed(family, answers, labels, pictures):
    """The classification loss of a whole batch, from the rows that were listened to."""
    rows, mine = answers.logits.double(), answers.object >= 0
    if family == "faster_rcnn":
        return F.cross_entropy(rows, labels)
    if family == "ssd":
        loss, total = F.cross_entropy(rows, labels, reduction="none"), 0.0
        for row in range(pictures):
            here = answers.picture == row
            hardest = loss[here & ~mine].sort(descending=True).values
            total += loss[here & mine].sum() + hardest[: 3 * int((here & mine).sum())].sum()
        return total / mine.sum()
    wanted = F.one_hot(labels, rows.shape[1]) * mine[:, None]
    if family == "fcos":
        return focal(rows, wanted) / mine.sum()
    parts = []
    for row in range(pictures):
        here = (answers.picture == row) & (answers.object != -2)  # -2: neither object nor background
        parts.append(focal(rows[here], wanted[here]) / max(1, int((here & mine).sum())))
    return sum(parts) / pictures


def test_the_nets_own_loss_follows_from_what_was_listened_to(family, detector_of, pictures):
    detector, (images, targets) = detector_of(family), pictures()
    answers = ask(detector, images, targets)
    labels = labels_of(detector, answers, targets)
    own = next(
        answers.losses[name] for name in ("classification", "loss_classifier") if name in answers.losses
    )
    torch.testing.assert_close(
        recomputed(family, answers, labels, len(images)).float(), own, atol=1e-5, rtol=1e-5
    )
    assert (answers.object >= 0).any()
    assert (answers.object < 0).any()


def test_matched_predictions_are_rows_of_the_objects_in_the_classes_own_order(
    family, detector_of, pictures
):
    detector, (images, targets) = detector_of(family), pictures()
    torch.manual_seed(3)
    answers = ask(detector, images, targets)
    torch.manual_seed(3)
    found = matched(detector, images, targets)
    rows = (answers.object >= 0).nonzero().flatten()
    assert len(found.logits) == len(rows)
    assert found.logits.shape[1] == 3
    for mine, row in enumerate(rows):
        picture, place = answers.picture[row], answers.object[row]
        assert (found.picture[mine], found.object[mine]) == (picture, place)
        assert found.labels[mine] == targets[picture]["labels"][place]
        own = answers.logits[row]
        p = own.softmax(0) if answers.softmax else own.sigmoid()
        torch.testing.assert_close(found.logits[mine].sigmoid(), p[list(detector.label_ids)])
    there = {(row, place) for row, one in enumerate(targets) for place in range(len(one["labels"]))}
    seen = set(zip(found.picture.tolist(), found.object.tolist(), strict=True))
    # the places of FCOS that are near an object may all fall to a smaller one
    assert seen < there if family == "fcos" else seen == there
    one_hot = F.one_hot(labels_of(detector, answers, targets)[rows], answers.logits.shape[1])
    brute = (
        F.cross_entropy(answers.logits[rows], one_hot.argmax(1))
        if answers.softmax
        else focal(answers.logits[rows], one_hot) / len(rows)
    )
    torch.testing.assert_close(found.loss, brute)


def test_gradients_reach_the_pictures_with_an_object_and_no_method_stays_exchanged(
    family, detector_of, pictures
):
    detector, (images, targets) = detector_of(family), pictures()
    before = {name: set(vars(module)) for name, module in detector.named_modules()}
    moved = [image.clone().requires_grad_() for image in images]
    found = matched(detector, moved, targets)
    slopes = torch.autograd.grad(found.logits.sum() + found.loss, moved)
    assert [bool(slope.any()) for slope in slopes] == [True, True, False]
    assert {name: set(vars(module)) for name, module in detector.named_modules()} == before
    assert not detector.training


def test_pictures_without_objects_have_no_matched_predictions(family, detector_of, pictures):
    detector, (images, targets) = detector_of(family), pictures()
    found = matched(detector, images[-1:], targets[-1:])
    assert found.logits.shape == (0, 3)
    assert found.loss == 0
    assert found.losses


def test_of_fcos_it_is_the_places_near_the_centre_of_the_smallest_box(detector_of):
    detector = detector_of("fcos")
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [8.0, 8.0, 24.0, 24.0], [1.0, 17.0, 9.0, 31.0]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 1, 2])}
    answers = ask(detector, [torch.rand(3, 32, 32)], [target])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for place in range(16):  # 4 x 4 places, one each 8 pixels, from 0 on
        x, y = 8.0 * (place % 4), 8.0 * (place // 4)
        near = []
        for row, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            inside = x0 < x < x1 and y0 < y < y1
            if inside and abs(x - (x0 + x1) / 2) < 12 and abs(y - (y0 + y1) / 2) < 12:
                near.append((float(area[row]), row))
        assert answers.object[place] == (min(near)[1] if near else -1)
    assert {1, 2} <= set(answers.object.tolist())


def test_log_odds_are_exact_where_a_class_is_all_but_sure():
    logits = torch.tensor([[50.0, -30.0, 0.0], [0.1, 0.2, 0.3], [2.0, 2.0, 2.0]], requires_grad=True)
    p = logits.detach().double().softmax(1)
    rest = torch.stack([p.sum(1) - p[:, c] for c in range(3)], 1)
    expected = p.log() - rest.log()
    expected[0, 0] = 50 - torch.tensor([0.0, -30.0]).double().logsumexp(0)
    found = log_odds(logits)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_a_loss_is_the_sum_over_rows_and_zero_of_none():
    for softmax in (True, False):
        assert classification_loss(torch.zeros(0, 3), torch.zeros(0).long(), softmax=softmax) == 0


class Stranger(nn.Module):
    def forward(self, images, targets=None):
        return {"loss": images[0].sum()}


def test_another_family_is_refused_and_so_is_a_head_with_losses_of_its_own(detector_of, pictures):
    images, targets = pictures()
    with pytest.raises(ModelError, match="a Stranger stand for which object is not known"):
        matched(Detector(Stranger(), [0, 1, 2]), images, targets)
    odd = detector_of("fcos")
    odd.net.compute_loss = lambda *_: {"loss": torch.zeros(())}
    with pytest.raises(ModelError, match="with their own losses"):
        matched(odd, images, targets)
