import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData, Passes
from bimask.defences.pruning.layers import (
    NormMasks,
    admitted,
    ask,
    outliers,
    pairs,
    prune_below,
    share_of,
    without,
)
from bimask.nets.residual import PreActResNet18


def test_norms_behind_sums_have_no_convolution_of_their_own():
    """In a pre-activation net, the second norm of a block alone stands right behind a convolution; the
    first gets a sum, but for that of the stem."""
    net = PreActResNet18(3, 10, width=4).eval()
    found = pairs(net, torch.rand(1, 3, 16, 16))
    expected = {f"layer{i}.{j}.bn2": f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)}
    assert found == expected | {"layer1.0.bn1": "conv1"}


def test_modules_are_listed_in_the_order_in_which_they_are_called():
    """In a pre-activation block the shortcut is made last and called first."""
    net, names = admitted(PreActResNet18(3, 10, width=4), torch.rand(2, 3, 16, 16), (nn.Conv2d,))
    at = [names.index(f"layer2.0.{name}") for name in ("shortcut.0", "conv1", "conv2")]
    assert at == sorted(at)
    assert names[0] == "conv1"
    assert list(dict(net.named_modules())).index("layer2.0.shortcut.0") > list(
        dict(net.named_modules())
    ).index("layer2.0.conv2")


def test_one_channel_alone_stands_out_of_nothing():
    assert outliers(torch.tensor([5.0]), 0.0).tolist() == [False]
    assert outliers(torch.tensor([1.0, 1, 1, 1, 6]), 1.7).tolist() == [False] * 4 + [True]


def reader():
    """Images (N, 4, 1, 1) -> their four channels as logits, by way of a batch norm."""
    net = nn.Sequential(nn.BatchNorm2d(4, eps=0.0), nn.Flatten())
    return net.eval()


def masks_of(net, values):
    masks = NormMasks(net, ["0"])
    with torch.no_grad():
        masks.values[0].copy_(torch.tensor(values))
    return masks


def test_masks_scale_and_noise_is_added_to_them():
    net = reader()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2.0, -3.0, 1.0]))
        net[0].bias.fill_(0.5)
    masks = masks_of(net, [1.0, 0.5, 0.0, 1.0])
    images = torch.ones(1, 4, 1, 1)
    assert ask(net, masks.scaled(net), images).tolist() == [[1.5, 1.5, 0.5, 1.5]]
    noise = [torch.tensor([0.0, 0.5, 1.0, -1.0])]
    assert ask(net, masks.scaled(net, noise), images).tolist() == [[1.5, 2.5, -2.5, 0.5]]
    assert net(images).tolist() == [[1.5, 2.5, -2.5, 1.5]], "the net's own are left"


@pytest.mark.parametrize(
    ("max_drop", "highest", "pruned"),
    [
        (0.0, 0.9, [0]),  # the channel at 0.3 costs a quarter, and ends it
        (0.3, 0.9, [0, 1]),
        (0.3, 0.2, [0]),
        (0.5, 0.9, [0, 1, 2]),
        (None, 0.9, [0, 1, 2]),
        (None, 0.05, []),
    ],
)
def test_thresholds_rise_until_one_costs_too_much(max_drop, highest, pruned):
    """Channel 0 is needed by no image; 1 and 2 by one of four each. The one at 0.95 is above all."""
    net = reader()
    masks = masks_of(net, [0.1, 0.3, 0.6, 0.95])
    images = torch.eye(4)[[1, 2, 3, 3]].view(4, 4, 1, 1)
    labels = torch.tensor([1, 2, 3, 3])
    passes = Passes()
    net.train()
    clean = CleanData(images, labels)
    out = prune_below(
        net, masks, clean, highest=highest, max_drop=max_drop, passes=passes, learned=clean
    )
    assert out["0"].nonzero().flatten().tolist() == pruned
    assert share_of(out) == len(pruned) / 4
    assert net.training
    assert (passes.forward == 0) == (max_drop is None)
    tensors = without(net, out, "weight")
    assert tensors.keys() == {"0.weight"}
    assert tensors["0.weight"].tolist() == [float(c not in pruned) for c in range(4)]


def test_images_held_back_that_are_lucky_do_not_decide_alone():
    """Held back are images of channel 3 alone, which no threshold costs."""
    net = reader()
    masks = masks_of(net, [0.1, 0.3, 0.6, 0.95])
    lucky = CleanData(torch.eye(4)[[3, 3]].view(2, 4, 1, 1), torch.tensor([3, 3]))
    seen = CleanData(torch.eye(4)[[1, 2, 3, 3]].view(4, 4, 1, 1), torch.tensor([1, 2, 3, 3]))
    out = prune_below(net, masks, lucky, highest=0.9, max_drop=0.1, passes=Passes(), learned=seen)
    assert out["0"].nonzero().flatten().tolist() == [0]
