import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData, Passes
from bimask.defences.pruning.fmp import Fmp, FmpConfig, led_astray, ranking
from bimask.errors import ModelError
from bimask.nets.residual import PreActResNet18


def reader():
    """Images (N, 2, 1, 1) -> logits; channel 0 is x1 - x2, channel 1 is -3 x2."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, -3.0]]).view(2, 2, 1, 1))
    return net.eval()


def test_images_are_moved_where_a_map_changes_most_and_stay_images():
    """The noise moved (0.5, 0.5) to (0.6, 0.5) and (0.98, 0.2) to (0.95, 0.3). Channel 0 changed by
    0.1 and -0.13, channel 1 by 0 and -0.3, so that the gradient's signs are (1, -1) and (-1, 1) for
    the one, 0 and (0, 1) for the other."""
    images = torch.tensor([[0.5, 0.5], [0.98, 0.2]]).view(2, 2, 1, 1)
    noisy = torch.tensor([[0.6, 0.5], [0.95, 0.3]]).view(2, 2, 1, 1)
    passes = Passes()
    one, other = led_astray(reader(), "0", images, noisy, 0.1, passes)
    torch.testing.assert_close(one.flatten(1), torch.tensor([[0.7, 0.4], [0.85, 0.4]]))
    torch.testing.assert_close(other.flatten(1), torch.tensor([[0.6, 0.5], [0.95, 0.4]]))
    assert (passes.forward, passes.backward) == (2, 2)
    (far, _) = led_astray(reader(), "0", images, noisy, 0.5, passes)
    assert far.flatten().tolist() == pytest.approx([1.0, 0.0, 0.45, 0.8])


def planted():
    """Images (N, 3, 1, 1) -> 2 classes. Channels 0 and 1 are the classes' own; the third answers a
    bright third pixel steeply; nothing reads the fourth."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(
            torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 9.0], [0.1, 0.1, 0]]).view(4, 3, 1, 1)
        )
        net[3].weight.copy_(torch.tensor([[4.0, -4, 0, 0], [-4, 4.0, 9, 0]]))
        net[3].bias.zero_()
    return net.eval()


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = 0.1 * torch.rand(40, 3, 1, 1, generator=generator)
    images[torch.arange(40), labels] += 0.6
    images[:, 2] = 0.01
    return CleanData(images, labels)


def test_the_channel_that_leads_images_astray_is_first_in_rank():
    clean = data()
    signs = torch.randint(0, 2, clean.images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noisy = (clean.images + 0.04 * signs).clamp(0, 1)
    passes = Passes()
    order = ranking(planted(), "0", clean.images, noisy, clean.labels, 0.04, passes)
    assert order[0] == 2
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert (passes.forward, passes.backward) == (2 + 4, 4)


def test_that_channel_is_pruned_and_stays_so():
    net, clean = planted(), data()
    bright = clean.images[clean.labels == 0].clone()
    bright[:, 2] = 0.9
    config = FmpConfig(share=0.25, eps=0.04, epochs=5)
    (result,) = Fmp().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    model = result.model()
    assert net(bright).argmax(1).tolist() == [1] * 20
    assert model(bright).argmax(1).tolist() == [0] * 20
    assert model[0].weight[2].abs().sum() == 0
    assert not torch.equal(model[3].weight, net[3].weight)
    assert result.numbers == {"pruned_share": 0.25}


def test_each_layer_loses_its_share_and_the_norm_right_behind_it():
    """The shortcut of a block is called first and made last: its channels are its own."""
    torch.manual_seed(0)
    net = PreActResNet18(1, 2, width=4).eval()
    clean = CleanData(torch.rand(6, 1, 8, 8), torch.arange(6) % 2)
    config = FmpConfig(share=0.25, epochs=1, ranking_images=4)
    (result,) = Fmp().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    model = result.model()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            gone = [k for k, filter in enumerate(module.weight) if filter.abs().sum() == 0]
            assert len(gone) == module.out_channels // 4, name
            if name.endswith("conv1") and name != "conv1":
                norm = model.get_submodule(name.replace("conv1", "bn2"))
                assert norm.weight[gone].abs().sum() == 0
    assert result.numbers["pruned_share"] == 0.25


def test_small_layers_are_left_at_the_published_share():
    net, clean = planted(), data()
    (result,) = Fmp().run(
        net, clean, [FmpConfig(epochs=1)], generators=[torch.Generator().manual_seed(0)]
    )
    assert result.numbers == {"pruned_share": 0.0}
    assert result.changed


def test_a_net_without_convolutions_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(ModelError, match="FMP prunes or masks convolutions.*`ims`"):
        Fmp().check(net, torch.rand(4, 1, 4, 4))
