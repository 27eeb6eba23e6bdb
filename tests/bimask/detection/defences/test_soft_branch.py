import pytest
import torch
from torch.nn import functional as F

from bimask.detection.defences.base import Pictures
from bimask.detection.defences.soft_branch import (
    SoftBranch,
    SoftBranchConfig,
    blend,
    branch_losses,
    repair_loss,
)
from bimask.detection.nets.matched import Matched, ask, matched


def seen(logits, labels, objects=None):
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    place = torch.tensor(objects or list(range(len(labels))))
    return Matched(logits, torch.tensor(labels), torch.zeros_like(place), place, logits.sum() * 0, {})


LOSSES = torch.tensor([[0.3, 1.1], [2.0, 0.5], [0.7, 0.7]], dtype=torch.float64)


def test_the_soft_minimum_is_the_cheaper_branch_when_cold_and_the_mean_when_hot():
    torch.testing.assert_close(blend(LOSSES, "soft", 1e-3)[:2], LOSSES.amin(1)[:2])
    hot = blend(LOSSES, "soft", 1e6) + 1e6 * torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(hot, LOSSES.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(blend(LOSSES, "hard", 1.0), LOSSES.amin(1))
    torch.testing.assert_close(blend(LOSSES, "misclassification", 1.0), LOSSES[:, 0])
    torch.testing.assert_close(blend(LOSSES, "disappearance", 1.0), LOSSES[:, 1])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_the_gate_is_the_gradient_of_the_soft_minimum_and_sums_to_one(temperature):
    losses = LOSSES.clone().requires_grad_()
    (gate,) = torch.autograd.grad(blend(losses, "soft", temperature).sum(), losses)
    torch.testing.assert_close(gate, F.softmax(-LOSSES / temperature, 1))
    torch.testing.assert_close(gate.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_branch_that_cannot_be_takes_no_part():
    losses = torch.tensor([[torch.inf, 0.4]], requires_grad=True)
    soft = blend(losses, "soft", 1.0)
    assert soft.item() == pytest.approx(0.4)
    (gate,) = torch.autograd.grad(soft.sum(), losses)
    assert gate.tolist() == [[0, 1]]


def test_branch_losses_are_means_over_the_predictions_of_an_object():
    found = seen([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [2.0, 2.5, -4.0]], [0, 0, 1], [0, 0, 1])
    plus = [[F.softplus(value).item() for value in row] for row in found.logits.detach()]
    minus = [[F.softplus(-value).item() for value in row] for row in found.logits.detach()]
    mis = [
        (minus[0][2] + plus[0][0] + minus[1][1] + plus[1][0]) / 2,
        minus[2][0] + plus[2][1],
    ]
    gone = [(sum(plus[0]) + sum(plus[1])) / 6, sum(plus[2]) / 3]
    torch.testing.assert_close(branch_losses(found), torch.tensor([mis, gone], dtype=torch.float64).T)
    expected = sum(
        minus[row][own] + 0.7 * plus[row][other]
        for row, own, other in ((0, 0, 2), (1, 0, 1), (2, 1, 0))
    )
    assert repair_loss(found, 0.7, every=False).item() == pytest.approx(expected / 3)
    expected = sum(
        minus[row][own] + 0.7 * (sum(plus[row]) - plus[row][own])
        for row, own in ((0, 0), (1, 0), (2, 1))
    )
    assert repair_loss(found, 0.7, every=True).item() == pytest.approx(expected / 3)


def test_of_one_class_there_is_disappearance_alone():
    found = seen([[1.0], [2.0]], [0, 0])
    losses = branch_losses(found)
    assert losses[:, 0].isinf().all()
    blend(losses, "soft", 1.0).sum().backward()
    assert found.logits.grad.isfinite().all()
    assert repair_loss(found, 1.0, every=True).item() == pytest.approx(
        (F.softplus(torch.tensor(-1.0)) + F.softplus(torch.tensor(-2.0))).item() / 2
    )


def test_predictions_that_stand_for_no_object_get_no_gradient_of_the_repair(
    family, detector_of, pictures
):
    detector, (images, targets) = detector_of(family), pictures()
    torch.manual_seed(0)
    answers = ask(detector, images, targets)
    answers.logits.retain_grad()
    mine = answers.object >= 0
    torch.manual_seed(0)
    rows = answers.logits  # what `matched` reads, of a pass with the same samples
    again = matched(detector, images, targets)
    torch.testing.assert_close(again.logits.shape[0], int(mine.sum()))
    config = SoftBranchConfig()
    terms = {}

    class Listening(SoftBranch):
        def terms(self, detector, batch, config):
            found = super().terms(detector, batch, config)
            terms.update(found)
            return found

    heads = []
    handle = _head(detector).register_forward_hook(lambda _m, _i, out: heads.append(_logits(out)))
    torch.manual_seed(0)
    Listening().terms(detector, Pictures(images, targets), config)
    handle.remove()
    (logits,) = heads
    (slope,) = torch.autograd.grad(terms["matched"], logits)
    slope = slope.flatten(0, -2)
    assert slope.shape == rows.shape
    assert not slope[~mine].any()
    assert slope[mine].any(1).all()


def _head(detector):
    net = detector.net
    return net.roi_heads.box_predictor if hasattr(net, "roi_heads") else net.head


def _logits(out):
    return out["cls_logits"] if isinstance(out, dict) else out[0]


def test_what_is_learned_is_what_the_setting_says(detector_of, pictures):
    detector, (images, targets) = detector_of("fcos"), pictures()
    batch = Pictures(images[:2], targets[:2])
    with torch.no_grad():
        seen = matched(detector, batch.images, batch.labels)
        found = {
            learned: SoftBranch().terms(detector, batch, SoftBranchConfig(learned=learned, gamma=2))
            for learned in ("all", "margin", "own")
        }
    torch.testing.assert_close(found["all"]["matched"], repair_loss(seen, 2, every=True))
    torch.testing.assert_close(found["margin"]["matched"], repair_loss(seen, 2, every=False))
    torch.testing.assert_close(found["own"]["matched"], seen.loss)


def test_a_perturbation_takes_the_branch_that_it_is_told(detector_of, pictures):
    detector, (images, targets) = detector_of("fcos"), pictures()
    batch, defence = Pictures(images[:2], targets[:2]), SoftBranch()
    with torch.no_grad():
        losses = branch_losses(matched(detector, batch.images, batch.labels))
        objectives = {
            gate: defence.objective(detector, batch, SoftBranchConfig(gate=gate, beta=0))(batch.images)
            for gate in ("misclassification", "disappearance", "hard")
        }
        louder = defence.objective(detector, batch, SoftBranchConfig(gate="disappearance", beta=1))(
            batch.images
        )
        loss = matched(detector, batch.images, batch.labels).loss
    torch.testing.assert_close(objectives["misclassification"], losses[:, 0].mean())
    torch.testing.assert_close(objectives["disappearance"], losses[:, 1].mean())
    torch.testing.assert_close(objectives["hard"], losses.amin(1).mean())
    torch.testing.assert_close(louder, losses[:, 1].mean() - loss)
