"""What holds of every defence in the registry."""

from contextlib import suppress
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from bimask.defences import DEFENCES, defence_named, settings_from
from bimask.defences.base import CleanData
from bimask.defences.purify import defence_of, defend, purify
from bimask.defences.simple import SimpleDefence
from bimask.defences.state import DefenceState
from bimask.errors import NonFiniteError, SettingError

LENGTHS = ("epochs", "rounds", "steps", "iterations")  # the last word of what makes a run long
SMALL = {"width": 4, "min_success": 0.0, "anomaly": 0.0}  # what is no length, by its name
EAGER = {"u": 1.0, "threshold": 1.0}  # of a setting that would spare so small a net: one that does not
BREAKING = {"budget": 1e38, "lr": 1e30}  # what makes a loss infinite; of a defence without losses none
EACH = pytest.mark.parametrize("name", DEFENCES)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(F.max_pool2d(x, 2))))
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.conv2.weight[3] *= 12  # a channel that stands out
        for norm in (net.bn1, net.bn2):
            norm.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture
def clean():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(19, 1, 8, 8, generator=generator)
    return CleanData(images, torch.arange(19) % 3)


def short(defence, length=2, **changes):
    """Settings under which a run on these images takes a moment, by what the defence says of its own.

    Whole numbers whose name ends in what they count, one of `LENGTHS`, are `length`, and batches are
    small. A setting that may be null is: nothing ends a run before its last step. A learning rate is
    the highest that is searched, so that few steps do something.
    """
    settings = {}
    for name, info in defence.config.model_fields.items():
        last = name.rsplit("_", 1)[-1]
        if type(None) in get_args(info.annotation):
            settings[name] = None
        elif info.annotation is int and last in LENGTHS:
            settings[name] = length
        elif name.endswith("batch_size"):
            settings[name] = 8
        elif last == "lr" and name in defence.config.searched():
            settings[name] = defence.config.searched()[name][0].high
    changes = {name: value for name, value in changes.items() if name in defence.config.model_fields}
    small = {name: value for name, value in SMALL.items() if name in defence.config.model_fields}
    return defence.config(**settings | small | changes)


def another(defence, length=1):
    """Another such configuration."""
    rates = {
        name: (range_.low + range_.high) / 2
        for name, (range_, _) in defence.config.searched().items()
        if name.endswith("lr")
    }
    return short(defence, length, **rates | EAGER)


def seen_by(defence, clean):
    return CleanData(clean.images, clean.labels if defence.needs_labels else None)


def run(defence, net, clean, configs, **options):
    generators = [torch.Generator().manual_seed(5) for _ in configs]
    return defence.run(net, seen_by(defence, clean), configs, generators=generators, **options)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@EACH
def test_the_suspect_is_left_as_it_is(name, net, clean):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    (result,) = run(DEFENCES[name], net, clean, [short(DEFENCES[name])])
    result.model()
    assert_same(dict(net.state_dict()), before)
    assert not net.training
    assert [p.requires_grad for p in net.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@EACH
def test_it_does_something_and_the_same_seed_gives_the_same_bits(name, net, clean):
    defence = DEFENCES[name]
    torch.manual_seed(1)
    (one,) = run(defence, net, clean, [short(defence, **EAGER)])
    torch.manual_seed(2)
    (again,) = run(defence, net, clean, [short(defence, **EAGER)])
    assert one.changed
    assert_same(dict(one.tensors), dict(again.tensors))
    assert [log.loss for log in one.history] == [log.loss for log in again.history]


@EACH
def test_company_changes_nothing(name, net, clean):
    defence = DEFENCES[name]
    configs = [short(defence), another(defence)]
    together = run(defence, net, clean, configs)
    for config, mine in zip(configs, together, strict=True):
        (alone,) = run(defence, net, clean, [config])
        assert_same(dict(mine.tensors), dict(alone.tensors))


@EACH
def test_what_is_restored_answers_as_the_result(name, net, clean):
    defence = DEFENCES[name]
    (result,) = run(defence, net, clean, [short(defence, **EAGER)])
    tensors = {key: value.detach().cpu().clone() for key, value in result.tensors.items()}
    restored = defence.restore(net, tensors, result.config)
    assert not restored.training
    assert torch.equal(restored(clean.images), result.model()(clean.images))
    twin = defence.twin(net, tensors, result.config)
    assert (twin is not None) == defence.has_twin
    assert result.numbers.keys() == set(defence.numbers)
    assert all(0 <= value <= 1 for value in result.numbers.values())


@EACH
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_was_cut_short_goes_on_with_the_same_bits(
    name, at, net, clean, tmp_path, monkeypatch
):
    defence, path = DEFENCES[name], tmp_path / "state.safetensors"
    configs = [short(defence), another(defence, length=3)]
    whole = run(defence, net, clean, configs)

    class Cut(Exception):
        pass

    kept = 0

    def keep_and_stop(take):
        nonlocal kept
        take().save(path)
        kept += 1
        if kept == at:
            raise Cut

    behind = []
    with suppress(Cut):
        run(
            defence,
            net,
            clean,
            configs,
            between_steps=keep_and_stop,
            on_step=lambda member, log, _current: behind.append((member, log.step)),
        )
    state = DefenceState.load(path)
    assert state.seconds > 0
    ran = []

    def count(member, log, _current):
        ran.append((member, log.step))

    again = run(defence, net, clean, configs, state=state, on_step=count)
    steps = [(m, log.step) for m, result in enumerate(whole) for log in result.history]
    assert set(ran) < set(steps) or not behind, "what was behind it is not run again"
    assert steps[len(steps) - len(ran) :] == ran or not isinstance(defence, SimpleDefence)
    for one, other in zip(whole, again, strict=True):
        assert_same(dict(one.tensors), dict(other.tensors))
        assert [log.loss for log in one.history] == [log.loss for log in other.history]
        assert one.numbers == other.numbers
    if isinstance(defence, SimpleDefence):
        if not state.members[0]["ended"]:
            return
        monkeypatch.setattr(type(defence), "defend", None)  # nothing of one that ended is run
        (kept,) = run(defence, net, clean, configs[:1], state=one_of(state))
        assert_same(dict(kept.tensors), dict(whole[0].tensors))
        return
    others = run(defence, net, clean, configs[1:], state=state)
    assert_same(dict(others[0].tensors), dict(whole[1].tensors))


@EACH
def test_steps_are_counted_and_a_true_answer_ends_a_run(name, net, clean):
    defence = DEFENCES[name]
    config, heard = short(defence), []

    def on_step(member, log, current):
        heard.append((member, log.step))
        model = current().model()
        assert model(clean.images).shape == (19, 3)
        return stop

    stop = False
    (result,) = run(defence, net, clean, [config], on_step=on_step)
    assert result.passes.forward <= 500, "what makes it long is none of LENGTHS"
    most = config.steps(len(clean.images)) if heard else 0
    expected = min(most, len(heard)) if defence.ends_early else most
    assert heard == [(0, step) for step in range(expected)]
    assert len(result.history) == expected
    heard.clear()
    stop = True
    (result,) = run(defence, net, clean, [config], on_step=on_step)
    assert len(result.history) == len(heard) <= 1


@EACH
def test_what_is_not_finite_is_an_error_of_that_configuration_alone(name, net, clean):
    defence = DEFENCES[name]
    breaking = {k: v for k, v in BREAKING.items() if k in defence.config.model_fields}
    if not breaking:
        pytest.skip("it has no loss")
    good = short(defence)
    bad = short(defence, length=1).model_copy(update=breaking)
    first, second = run(defence, net, clean, [bad, good])
    assert isinstance(first, NonFiniteError)
    (alone,) = run(defence, net, clean, [good])
    assert_same(dict(second.tensors), dict(alone.tensors))


@EACH
def test_every_setting_is_described_and_what_is_searched_holds_its_bounds(name):
    config = DEFENCES[name].config
    assert config.searched(), "a study without a space has something to search"
    for setting, (range_, _) in config.searched().items():
        assert range_.low < range_.high
        for value in (range_.low, range_.high):
            config(**{setting: value})
    undescribed = [key for key, info in config.model_fields.items() if not info.description]
    assert undescribed == []


@EACH
def test_labels_reach_only_those_that_declare_them(name, net, clean):
    defence = DEFENCES[name]
    config = short(defence, **EAGER)
    assert defence_of(config) is defence
    with torch.no_grad():  # answers of all classes, so that labels tell accuracies apart
        net.fc.weight *= 30
        net.fc.bias -= net(clean.images).mean(0)
    if defence.needs_labels:
        with pytest.raises(SettingError, match="labels"):
            defend(net, clean.images, config)
    wrong = (clean.labels + 1) % 3
    one = purify(net, clean.images, config, labels=clean.labels, generator=seeded())
    other = purify(net, clean.images, config, labels=wrong, generator=seeded())
    same = one.tensors.keys() == other.tensors.keys() and one.numbers == other.numbers
    same &= all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors if same)
    same &= [log.loss for log in one.history] == [log.loss for log in other.history]
    assert same != defence.needs_labels


def one_of(state):
    """The state of the first configuration alone."""
    tensors = {key: value for key, value in state.tensors.items() if key.startswith("0/")}
    return DefenceState(tensors, state.members[:1], state.seconds)


WRAPPED = {
    "parallel": nn.DataParallel,
    "half": lambda net: net.half(),
    "softmax": lambda net: nn.Sequential(net, nn.Softmax(1)),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
}


@EACH
@pytest.mark.parametrize("how", WRAPPED)
def test_strangers_models_come_out_as_they_went_in(name, how, net, clean, tmp_path):
    defence, model = DEFENCES[name], WRAPPED[how](net).eval()
    given = clean.images.half() if how == "half" else clean.images
    before = model(given)
    (result,) = run(defence, model, clean, [short(defence, **EAGER)])
    after = result.model()
    answers = after(given)
    assert answers.shape == before.shape
    assert answers.dtype == before.dtype
    assert result.changed
    if how == "softmax":
        torch.testing.assert_close(answers.sum(1), torch.ones(19))
    save_file({k: t.detach().cpu().contiguous() for k, t in result.tensors.items()}, tmp_path / "t")


@pytest.mark.parametrize(
    "images",
    [torch.rand(4, 1, 8, 8) * 255, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.rand(0, 1, 8, 8)],
)
@EACH
def test_images_of_another_form_are_refused(name, images, net):
    with pytest.raises(SettingError, match="Clean images must"):
        defend(net, images, short(DEFENCES[name]), labels=torch.zeros(len(images), dtype=torch.long))


@pytest.mark.parametrize(
    "labels", [torch.zeros(3, dtype=torch.long), torch.rand(19), torch.full((19,), -1)]
)
def test_labels_of_another_form_are_refused(labels, net, clean):
    with pytest.raises(SettingError, match="one whole number >= 0 for each of 19 images"):
        defend(net, clean.images, short(DEFENCES["ft_sam"]), labels=labels)


def test_a_flat_file_names_its_defence_too(tmp_path):
    path = tmp_path / "flat.yaml"
    path.write_text("defence: clp\nu: 0.5\nseed: 3\n")
    assert settings_from(path).u == 0.5


@pytest.mark.parametrize("name", ["[a]", "{a: 1}", "3"])
def test_a_defence_that_is_no_name_is_refused(name, tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(f"defence: {name}\n")
    with pytest.raises(SettingError, match="There is no defence"):
        settings_from(path)


def seeded():
    return torch.Generator().manual_seed(3)


@EACH
def test_a_file_of_settings_names_its_defence(name, tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(f"defence: {name}\npurify: {{}}\nseed: 1\n")
    assert type(settings_from(path)) is DEFENCES[name].config


def test_an_unknown_defence_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(SettingError, match="'magic'; known are ims, "):
        defence_named("magic")
    path = tmp_path / "best.yaml"
    path.write_text("defence: magic\n")
    with pytest.raises(SettingError, match="magic"):
        settings_from(path)
