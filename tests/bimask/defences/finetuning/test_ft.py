import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.finetuning.ft import Ft, FtConfig
from bimask.defences.finetuning.ft_sam import FtSam, FtSamConfig
from bimask.defences.sgd import FineTuningConfig


def run(defence, net, clean, config):
    (result,) = defence.run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    return result


def test_one_step_of_a_linear_net_by_hand():
    """W = 0 and x = 1 of class 0 of two: p = (1/2, 1/2), so the gradient is (-1/2, 1/2)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    nn.init.zeros_(net[1].weight)
    clean = CleanData(torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.long))
    config = FtConfig(lr=0.4, epochs=1, weight_decay=0)
    result = run(Ft(), net.eval(), clean, config)
    assert result.model()[1].weight.flatten().tolist() == pytest.approx([0.2, -0.2])
    assert result.history[0].losses == pytest.approx({"cross_entropy": math.log(2)})


def test_it_is_ft_sam_without_a_perturbation_and_without_smoothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
    clean = CleanData(torch.rand(11, 1, 4, 4), torch.arange(11) % 3)
    plain = run(Ft(), net, clean, FtConfig(epochs=3, batch_size=5, lr=0.05))
    sam = run(
        FtSam(), net, clean, FtSamConfig(epochs=3, batch_size=5, lr=0.05, rho=0, label_smoothing=0)
    )
    for name, value in plain.tensors.items():
        torch.testing.assert_close(value, sam.tensors[name])
    assert plain.passes.forward == plain.passes.backward == len(plain.history) == 6


def test_it_forgets_what_clean_images_contradict_and_keeps_what_they_do_not_show():
    """Pixel 2 is a trigger of class 1. Where clean images have it, too, it is unlearned; where they
    never do, its weight gets no gradient and stays to the bit."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[4.0, -4.0, -9.0], [-4.0, 4.0, 9.0]]))
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(4, 1).view(8, 1, 1, 3)
    labels = torch.arange(8) % 2
    triggered = images.clone()
    triggered[..., 2] = 1
    config = FtConfig(lr=0.5, epochs=60, weight_decay=0)
    for shown, share in ((images, 1.0), (torch.cat([images, triggered]), 0.5)):
        result = run(Ft(), net, CleanData(shown, labels.repeat(len(shown) // 8)), config)
        assert (result.model()(images).argmax(1) == labels).all()
        assert (result.model()(triggered).argmax(1) == 1).float().mean() == share


def test_the_settings_of_ft_sam_are_in_the_order_they_had():
    assert list(FtSamConfig().model_dump().items()) == [
        ("lr", 0.01),
        ("rho", 2.0),
        ("epochs", 100),
        ("batch_size", 256),
        ("momentum", 0.9),
        ("weight_decay", 5e-4),
        ("label_smoothing", 0.1),
        ("shift", 0),
        ("flip", False),
    ]
    shared = FineTuningConfig().model_dump()
    assert shared == {k: v for k, v in FtSamConfig().model_dump().items() if k in shared}


def test_the_cross_entropy_falls():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    clean = CleanData(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)
    result = run(Ft(), net, clean, FtConfig(epochs=5, lr=0.1))
    after = F.cross_entropy(result.model()(clean.images), clean.labels).item()
    assert after < result.history[0].loss
