import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.pruning.layers import NormMasks
from bimask.defences.pruning.nft import Nft, NftConfig, loss_terms, lowest
from bimask.nets.residual import PreActResNet18


def test_the_lowest_masks_are_those_of_the_schedule():
    """0.8 exp(-0.5 l) for l = 1, 2, 3."""
    assert lowest(3, 0.8, 0.5) == pytest.approx([0.485225, 0.294304, 0.178504], abs=1e-6)


def test_the_loss_is_that_of_the_formula():
    """One norm of scale 2 under masks 0.5 and 1 in eval mode; (0.2, 0.6) and (0.8, 0) mixed by 0.75
    are (0.35, 0.45) and (0.65, 0.15), times (1, 2)."""
    net = nn.Sequential(nn.BatchNorm2d(2, eps=0.0), nn.Flatten()).eval().requires_grad_(False)
    net[0].weight.fill_(2.0)
    masks = NormMasks(net, ["0"])
    with torch.no_grad():
        masks.values[0].copy_(torch.tensor([0.5, 1.0]))
    images = torch.tensor([[0.2, 0.6], [0.8, 0.0]]).view(2, 2, 1, 1)
    terms = loss_terms(
        net, masks, images, torch.tensor([0, 1]), torch.tensor([1, 0]), share=0.75, weight=0.1
    )

    def entropy(logits, label):
        return math.log(sum(map(math.exp, logits))) - logits[label]

    one, other = (0.35, 0.9), (0.65, 0.3)
    own = (entropy(one, 0) + entropy(other, 1)) / 2
    pair = (entropy(one, 1) + entropy(other, 0)) / 2
    assert terms["cross_entropy"].item() == pytest.approx(0.75 * own + 0.25 * pair, rel=1e-5)
    assert terms["masks"].item() == pytest.approx(0.1 * 0.5)


def test_masks_are_folded_and_bounded_by_the_order_of_calls():
    net = PreActResNet18(1, 2, width=4).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    clean = CleanData(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    config = NftConfig(iterations=3, mask_lr=1e4, last_mask_lr=1e4)
    (result,) = Nft().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    after = result.model().state_dict()
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    order = [f"{block}.bn{k}" for block in blocks for k in (1, 2)]
    touched = 0
    for number, (name, low) in enumerate(zip(order, lowest(16, 0.8, 0.5), strict=True)):
        masks = after[f"{name}.weight"] / before[f"{name}.weight"]
        assert masks.min() >= low - 1e-6, number
        assert masks.max() <= 1 + 1e-6
        touched += int((masks - low).abs().min() < 1e-6)
    assert touched > 8, "the rate is large enough to get there"
    changed = {name.rpartition(".")[2] for name in result.tensors}
    assert changed == {"weight", "running_mean", "running_var", "num_batches_tracked"}
    assert all(torch.equal(after[k], before[k]) for k in after if "conv" in k or "linear" in k)


def test_the_rate_and_the_weight_of_the_masks_are_those_of_the_settings():
    """A weight of 1e-3 over 4 images a class, from masks at 1: no term at first."""
    net = PreActResNet18(1, 2, width=4).eval()
    clean = CleanData(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    runs = [
        Nft().run(net, clean, [NftConfig(iterations=2, **given)], generators=[seeded()])[0]
        for given in ({}, {"mask_weight": 2e-3})
    ]
    one, other = (run.history for run in runs)
    assert one[0].losses["masks"] == other[0].losses["masks"] == 0
    assert other[1].losses["masks"] == pytest.approx(2 * one[1].losses["masks"])


def seeded():
    return torch.Generator().manual_seed(0)
