import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.clipping.activations import metered, places_in
from bimask.defences.clipping.schedule import DOWN, CostSchedule
from bimask.defences.clipping.unit import Unit, UnitConfig
from bimask.errors import ModelError
from bimask.masking.inserted import ActivationBound
from bimask.nets.residual import PreActResNet18, SmallResNet


class Shared(nn.Module):
    """One ReLU module, called three times: behind a norm, behind a sum, and at the end of a block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block = Block(self.relu)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.block(self.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = relu

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some(count=24, classes=3, side=8):
    return CleanData(
        torch.rand(count, 1, side, side, generator=seeded()), torch.arange(count) % classes
    )


def ran(net, clean, **settings):
    config = UnitConfig.profile("scaled", **settings)
    (result,) = Unit().run(net, clean, [config], generators=[seeded()])
    return result


def test_every_call_of_a_shared_activation_has_its_own_place():
    torch.manual_seed(0)
    found = [(p.module, p.before) for p in places_in(Shared().eval(), some().images)]
    assert found == [("norm", True), ("block.bn1", True), ("block", False)]


def test_places_of_nets_with_norms_before_and_behind():
    found = [p.module for p in places_in(SmallResNet(1, 10, width=2).eval(), some().images)]
    assert found == ["stem.2", *(f"blocks.{i}{at}" for i in range(3) for at in (".bn1", ""))]
    net = PreActResNet18(1, 10, width=2).eval()
    found = [p.module for p in places_in(net, torch.rand(1, 1, 16, 16))]
    norms = [f"layer{i}.{j}.bn{k}" for i in range(1, 5) for j in range(2) for k in (1, 2)]
    assert found == [*norms, "layer4.1"], "the last sum is pooled without a ReLU"


@pytest.mark.parametrize("granularity", ["channel", "position"])
def test_bounds_begin_at_mean_and_deviations_whatever_the_batches(granularity):
    torch.manual_seed(0)
    net, images = Shared().eval(), some(20).images
    with torch.no_grad():
        stored = F.relu(net.norm(net.conv(images))).numpy()
    over = (0, 2, 3) if granularity == "channel" else 0
    for size in (512, 3):
        meters = metered(net, places_in(net, images), images, granularity, size)
        mean, std = meters[0][1].statistics()
        np.testing.assert_allclose(mean.squeeze(), stored.mean(over), atol=1e-5)
        np.testing.assert_allclose(std.squeeze(), stored.std(over, ddof=1), atol=1e-5)


def test_the_schedule_is_that_of_a_hand_worked_table():
    """First 1, patience 5; 40 accuracies against a threshold of 0.9, and c behind each step."""
    d = DOWN
    table = [
        (0.95, [1, 1, 1, 1, 2]),  # five good steps double it
        (0.95, [2, 2, 2, 2, 4]),
        (0.80, [4, 4, 4, 4, 4 / d]),  # five bad ones
        (0.80, [4 / d] * 4 + [4 / d**2]),  # 0.5, below the first
        (0.95, [0.5] * 4 + [1]),  # back at the first, and the run of good steps begins anew
        (0.95, [1, 1, 1, 2, 2]),  # the fifth good step itself counted as one
        (0.80, [2] * 4 + [2 / d]),
        (0.90, [2 / d] * 4 + [1]),  # on the threshold is good
    ]
    schedule, row = CostSchedule(1.0, 5), 0
    for accuracy, costs in table:
        for cost in costs:
            schedule.step(accuracy >= 0.9)
            assert schedule.cost == pytest.approx(cost), f"step {row}"
            row += 1
    assert row == 40


def test_a_bad_step_breaks_a_run_of_good_ones():
    schedule = CostSchedule(1.0, 3)
    for good in (True, True, False, True, True, False, False):
        schedule.step(good)
    assert schedule.cost == 1.0
    taken = schedule.state()
    schedule.step(False)
    assert schedule.cost == pytest.approx(1 / DOWN)
    again = CostSchedule(1.0, 3)
    again.put(taken)
    again.step(False)
    assert (again.cost, again.up, again.down) == (schedule.cost, schedule.up, schedule.down)


def test_cutting_off_before_a_relu_is_cutting_off_behind_it():
    values = torch.randn(5, 3, 4, 4, generator=seeded())
    bound = torch.rand(3, 1, 1, generator=seeded(1))
    assert torch.equal(torch.minimum(F.relu(values), bound), F.relu(torch.minimum(values, bound)))


class Planted(nn.Module):
    """Classes by brightness of the halves, and a channel that a bright corner drives a hundredfold
    towards class 0."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
            self.conv.weight[0, 0, :4, :] = 1 / 32
            self.conv.weight[1, 0, 4:, :] = 1 / 32
            self.conv.weight[2, 0, 0, 0] = 100.0
            self.conv.weight[2, 0, 0, 1] = -100.0
            self.fc.weight.copy_(torch.tensor([[9.0, 0.0, 1.0], [0.0, 9.0, 0.0]]))
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).flatten(1))


def planted(count=40):
    images = torch.rand(count, 1, 8, 8, generator=seeded()) * 0.2
    labels = torch.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        image[0, 4 * label : 4 * label + 4] += 0.5
    images[:, 0, 0, :2] = images[:, 0, 0, :1]  # clean corners are even
    return CleanData(images, labels)


@pytest.mark.parametrize("granularity", ["channel", "position"])
def test_a_planted_channel_is_cut_off_and_clean_logits_stay(granularity):
    clean, net = planted(), Planted().eval()
    triggered = clean.images[1::2].clone()
    triggered[:, 0, 0, 0], triggered[:, 0, 0, 1] = 1.0, 0.0
    assert (net(clean.images).argmax(1) == clean.labels).all()
    assert (net(triggered).argmax(1) == 0).all()
    result = ran(net, clean, iterations=1, granularity=granularity, bound_lr=1e-4)
    model = result.model()
    assert (model(triggered).argmax(1) == 1).all()
    torch.testing.assert_close(model(clean.images), net(clean.images), atol=1e-6, rtol=0)
    assert result.numbers["within_budget"] == 1
    assert result.numbers["accuracy_before"] == result.numbers["accuracy_after"] == 1


def test_bounds_come_down_as_far_as_the_budget_lets_them():
    clean, net = planted(), Planted().eval()
    sizes = []
    for drop in (0.0, 0.5):
        result = ran(net, clean, iterations=150, bound_lr=0.1, cost=0.01, accuracy_drop=drop)
        assert result.numbers["accuracy_after"] >= 1 - drop
        sizes.append(result.tensors["relu.bound"].mean().item())
    start = ran(net, clean, iterations=1).tensors["relu.bound"].mean().item()
    assert sizes[1] < sizes[0] < start


def test_the_published_order_keeps_the_bounds_of_before_the_step():
    """One step of Adam moves a bound by its rate; the published code keeps what it was."""
    clean, net = planted(), Planted().eval()
    settings = {"parametrisation": "absolute", "bound_lr": 0.01, "granularity": "position"}
    kept = ran(net, clean, iterations=1, faithful=True, **settings).tensors["relu.bound"]
    ours = ran(net, clean, iterations=1, **settings).tensors["relu.bound"]
    torch.testing.assert_close(kept - ours, torch.full_like(kept, 0.01), atol=1e-4, rtol=0)


@pytest.mark.parametrize("faithful", [False, True])
def test_where_no_step_is_within_the_budget_it_warns(faithful):
    """Bounds at the mean cost accuracy that may not be lost."""
    clean, net = planted(), Planted().eval()
    settings = {"deviations": 0.0, "accuracy_drop": 0.0, "bound_lr": 0.01, "faithful": faithful}
    with torch.no_grad():
        net.fc.bias[0] = 2.1  # only a channel above its mean outweighs it
    clean = CleanData(clean.images, net(clean.images).argmax(1))
    with pytest.warns(UserWarning, match="No bounds kept the accuracy"):
        result = ran(net, clean, iterations=3, **settings)
    assert result.numbers["within_budget"] == 0
    begun = ran_quietly(net, clean, iterations=1, **settings | {"bound_lr": 1e-9})
    same = torch.allclose(result.tensors["relu.bound"], begun.tensors["relu.bound"], atol=1e-6)
    assert same != faithful, "ours are those of the beginning, the published ones the last"


def ran_quietly(net, clean, **settings):
    with pytest.warns(UserWarning, match="No bounds"):
        return ran(net, clean, **settings)


def test_the_suspects_tensors_are_in_the_result_bit_by_bit():
    torch.manual_seed(0)
    net = SmallResNet(1, 3, width=2).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = ran(net, some(), iterations=3).model()
    own = {key.replace(".block.", "."): value for key, value in model.state_dict().items()}
    own = {key.removeprefix("block."): value for key, value in own.items()}
    assert all(torch.equal(own[key], value) for key, value in before.items())
    assert own.keys() - before.keys() == {key for key in own if key.endswith(".bound")}


def test_bounds_by_channel_take_images_of_another_size_and_bounds_by_position_refuse_them():
    torch.manual_seed(0)
    net = SmallResNet(1, 3, width=2).eval()
    larger = torch.rand(2, 1, 16, 16)
    assert ran(net, some(), iterations=1).model()(larger).shape == (2, 3)
    model = ran(net, some(), iterations=1, granularity="position").model()
    with pytest.raises(ModelError, match="maps of 2 x 8 x 8.*give 2 x 16 x 16.*granularity: channel"):
        model(larger)


def test_the_answers_of_the_suspect_may_stand_for_labels():
    clean, net = planted(), Planted().eval()
    wrong = CleanData(clean.images, 1 - clean.labels)
    one = ran(net, clean, iterations=3, targets="answers")
    other = ran(net, wrong, iterations=3, targets="answers")
    assert torch.equal(one.tensors["relu.bound"], other.tensors["relu.bound"])


def test_the_defaults_are_the_published_settings():
    config = UnitConfig()
    assert (config.deviations, config.bound_lr, config.iterations) == (4, 1e-3, 300)
    assert (config.granularity, config.parametrisation) == ("position", "absolute")
    assert UnitConfig.profile("faithful").faithful
    assert UnitConfig.profile("scaled", bound_lr=0.005, iterations=50).warnings()
    assert not UnitConfig.profile("scaled").warnings() + config.warnings()


def test_a_net_without_activations_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    with pytest.raises(ModelError, match="take another defence"):
        Unit().check(net, some().images)


def test_a_transformer_whose_layers_are_fused_has_places_that_are_called():
    """In eval mode torch's encoder layer reads the weights of its parts and calls none of them."""
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(F.relu(self.layer(x.flatten(1, 2)).mean(1)))

    model = Tokens().eval()
    assert [place.module for place in places_in(model, some().images)] == ["layer.dropout"]
    bounded = ran(model, some(), iterations=1).model()
    bounded.layer.dropout.bound.fill_(-50.0)
    with torch.no_grad():
        assert not torch.equal(bounded(some().images), model(some().images))


def test_a_bound_is_the_module_it_stands_around_in_all_else():
    linear = nn.Linear(3, 2)
    around = ActivationBound(linear, torch.zeros(2))
    assert around.weight is linear.weight
    assert around(torch.rand(4, 3)).max() <= 0
    with pytest.raises(AttributeError):
        around.nothing  # noqa: B018
