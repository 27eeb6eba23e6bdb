import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData, Passes
from bimask.defences.pruning.fine_pruning import (
    Columns,
    FinePruning,
    FinePruningConfig,
    activity,
    prune,
    with_reader,
)
from bimask.errors import ModelError


def net_of(weight):
    """Images (N, F, 1, 1) -> logits, by a linear layer that reads them."""
    weight = torch.tensor(weight)
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    with torch.no_grad():
        net[1].weight.copy_(weight)
    return net.eval()


def test_features_are_ranked_by_their_mean_over_images():
    images = torch.tensor([[0.1, 0.9, 0.4], [0.3, 0.5, 0.1]]).view(2, 3, 1, 1)
    net, passes = net_of([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), Passes()
    found = activity(net, "1", images, 1, passes)
    assert found.tolist() == pytest.approx([0.2, 0.7, 0.25])
    assert found.argsort(stable=True).tolist() == [0, 2, 1]
    assert passes.forward == 2


@pytest.mark.parametrize(
    ("max_drop", "pruned"), [(0.2, [0, 1]), (0.3, [0, 1, 2]), (0.6, [0, 1, 2, 3]), (0.0, [])]
)
def test_pruning_keeps_the_last_net_that_was_good_enough(max_drop, pruned):
    """Features 0 and 1 are read by no image; each other is one of four images' only one."""
    net = net_of(torch.eye(6)[[5, 2, 3, 4]].tolist())
    images = torch.eye(6)[[2, 3, 4, 4]].view(4, 6, 1, 1)
    choose, columns = CleanData(images, torch.tensor([1, 2, 3, 3])), Columns(6, images.device)
    before = net[1].weight.detach().clone()
    config = FinePruningConfig(max_drop=max_drop, prune_step=1 / 6)
    with torch.no_grad():
        net[1].weight[0] = 0.01  # what is read by no column is class 0
    prune(net, net[1].weight, columns, torch.arange(6), choose, config, Passes())
    assert columns.pruned.nonzero().flatten().tolist() == pruned
    kept = [column for column in range(6) if column not in pruned]
    assert net[1].weight[:, pruned].abs().sum() == 0
    assert torch.equal(net[1].weight[1:, kept], before[1:, kept]), "the step too far is taken back"


def test_a_step_prunes_its_share_rounded_up():
    net = net_of([[1.0] * 150, [0.0] * 150])
    choose = CleanData(torch.zeros(2, 150, 1, 1), torch.zeros(2, dtype=torch.long))
    columns, passes = Columns(150, torch.device("cpu")), Passes()
    prune(net, net[1].weight, columns, torch.arange(150), choose, FinePruningConfig(), passes)
    assert columns.pruned.sum() == 149, "one column is left"
    assert passes.forward == 1 + 75


class Vgg(nn.Module):
    """Two linear layers behind the last convolution, and one in a squeeze before it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
        self.squeeze = nn.Linear(4, 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)

    def forward(self, x):
        x = self.conv1(x)
        x = x * self.squeeze(x.mean((2, 3)))[..., None, None].sigmoid()
        return self.head(self.conv2(x).relu().mean((2, 3)))


def test_the_layer_that_reads_the_features_is_found():
    images = torch.rand(3, 1, 8, 8)
    assert with_reader(Vgg(), images)[1] == "head.0"
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    assert with_reader(mlp, images)[1] == "3"
    convolutional = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert with_reader(convolutional, images)[1] == "2"
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 6, groups=2), nn.Flatten())
    with pytest.raises(ModelError, match=r"no plain linear layer or convolution; .* `ft_sam`"):
        FinePruning().check(grouped, images)


def test_a_feature_that_sleeps_on_clean_images_is_pruned_and_stays_so():
    """Four pixels are the features. Clean images light those of their class; the fourth, a backdoor's,
    is dark."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4).view(4, 4, 1, 1))
        net[3].weight.copy_(torch.cat([3 * torch.eye(3), torch.tensor([[0.0], [0.0], [20.0]])], 1))
        net[3].bias.zero_()
    net.eval()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = 0.2 * torch.rand(30, 4, 1, 1, generator=generator)
    images[torch.arange(30), labels] += 0.7
    images[:, 3] *= 0.1
    bright = images.clone()
    bright[:, 3] = 0.9
    config = FinePruningConfig(epochs=5)
    (result,) = FinePruning().run(
        net, CleanData(images, labels), [config], generators=[torch.Generator().manual_seed(0)]
    )
    model = result.model()
    assert (net(bright).argmax(1) == 2).all()
    assert (model(bright).argmax(1) == labels).all()
    assert result.numbers == {"pruned_share": 0.25}
    assert model[3].weight[:, 3].abs().sum() == 0
    assert not torch.equal(model[3].weight[:, :3], net[3].weight[:, :3])
    assert len(result.history) == config.steps(30) == 5
