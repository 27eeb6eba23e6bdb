import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.finetuning.nad import (
    Nad,
    NadConfig,
    attention,
    attention_loss,
    features_of,
    stages_of,
)
from bimask.errors import ModelError
from bimask.nets.residual import PreActResNet18, SmallResNet

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def run(net, clean, config):
    (result,) = Nad().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    return result


def test_attention_by_hand():
    """Two channels, a row of two pixels: sums of squares are 3 and 4, their norm is 5."""
    features = torch.tensor([[[[1.0, -2.0]], [[math.sqrt(2), 0.0]]]])
    assert attention(features).flatten().tolist() == pytest.approx([0.6, 0.8])


def test_the_loss_of_attention_by_hand():
    """Maps (0.6, 0.8) and (1, 0): the mean of 0.16 and 0.64. The scale of features is no matter."""
    student = torch.tensor([[[[1.0, -2.0]], [[math.sqrt(2), 0.0]]]])
    teacher = torch.tensor([[[[7.0, 0.0]], [[0.0, 0.0]]]])
    assert attention_loss(student, teacher).item() == pytest.approx(0.4)
    assert attention_loss(3 * student, teacher).item() == pytest.approx(0.4)
    assert attention_loss(student, 5 * student).item() == pytest.approx(0, abs=1e-12)


def test_a_map_of_zeros_has_no_attention_and_a_gradient_that_is_finite():
    features = torch.zeros(1, 2, 2, 2, requires_grad=True)
    attention_loss(features, torch.ones(1, 2, 2, 2)).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("net", "images", "expected"),
    [
        (SmallResNet(1, 3, width=2), torch.rand(1, 1, 16, 16), ["blocks.0", "blocks.1", "blocks.2"]),
        (PreActResNet18(3, 3, width=2), torch.rand(1, 3, 32, 32), ["layer2.1", "layer3.1", "layer4.1"]),
    ],
)
def test_stages_are_those_of_a_residual_net(net, images, expected):
    assert stages_of(net.eval(), images) == expected


class Plain(nn.Module):
    """Layers are called in another order than they stand in."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 3, 3)
        self.first = nn.Conv2d(1, 4, 3)
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        return self.last(self.first(x) + self.bias).mean((2, 3))


def test_a_net_without_sums_has_its_last_convolution():
    assert stages_of(Plain().eval(), IMAGES) == ["last"]
    config = NadConfig(epochs=2, teacher_epochs=1, lr=0.1)
    result = run(Plain().eval(), CleanData(IMAGES, torch.arange(4) % 3), config)
    assert [list(step.losses) for step in result.history] == [
        ["teacher"],
        ["cross_entropy", "attention"],
        ["cross_entropy", "attention"],
    ]
    assert len(result.history) == config.steps(4)
    assert (result.passes.forward, result.passes.backward) == (1 + 2 + 2, 3)


def test_a_net_without_a_convolution_is_refused():
    with pytest.raises(ModelError, match="this model has none; take another defence, such as `ft_sam`"):
        Nad().check(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), IMAGES)


def test_the_first_step_of_the_student_by_hand():
    """Teacher: the suspect after one step of plain fine-tuning; the student is still the suspect."""
    torch.manual_seed(0)
    net, labels = Plain().eval(), torch.arange(4) % 3
    config = NadConfig(epochs=1, teacher_epochs=1, lr=0.3, momentum=0, weight_decay=0, beta=700)
    result = run(net, CleanData(IMAGES, labels), config)
    teacher = Plain()
    teacher.load_state_dict(net.state_dict())
    loss = F.cross_entropy(teacher(IMAGES), labels)
    loss.backward()
    with torch.no_grad():
        for weight in teacher.parameters():
            weight -= 0.3 * weight.grad
    (maps, taught) = (each.last(each.first(IMAGES) + each.bias) for each in (net, teacher))
    apart = 700 * ((attention(maps) - attention(taught)) ** 2).mean()
    assert result.history[0].losses["teacher"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.history[1].losses["cross_entropy"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.history[1].losses["attention"] == pytest.approx(apart.item(), rel=1e-3)


def test_of_three_stages_the_first_has_half_the_weight():
    """The student learns as a net in training mode does, and its teacher stands still."""
    torch.manual_seed(0)
    net, images, labels = (
        SmallResNet(1, 3, width=2).eval(),
        torch.rand(4, 1, 32, 32),
        torch.arange(4) % 3,
    )
    config = NadConfig(epochs=1, teacher_epochs=1, lr=0.3, momentum=0, weight_decay=0, beta=10)
    history = run(net, CleanData(images, labels), config).history
    student, teacher = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    F.cross_entropy(teacher(images), labels).backward()
    with torch.no_grad():
        for weight in teacher.parameters():
            weight -= 0.3 * weight.grad
    stages = stages_of(net, images)
    with features_of(student, stages) as own, features_of(teacher.eval(), stages) as taught:
        student(images), teacher(images)
    apart = [attention_loss(own[stage], taught[stage]).item() for stage in stages]
    expected = 5 * apart[0] + 10 * apart[1] + 10 * apart[2]
    assert history[1].losses["attention"] == pytest.approx(expected, rel=1e-4)


def test_the_student_comes_to_look_where_the_teacher_looks():
    torch.manual_seed(0)
    net = SmallResNet(1, 3, width=4).eval()
    clean = CleanData(torch.rand(12, 1, 16, 16), torch.arange(12) % 3)
    config = NadConfig(epochs=30, teacher_epochs=10, lr=0.05, beta=1000)
    history = run(net, clean, config).history
    apart = [step.losses["attention"] for step in history if "attention" in step.losses]
    assert apart[-1] < apart[0] / 2
