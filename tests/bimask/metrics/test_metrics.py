import math

import pytest
import torch
from torch import nn

from bimask.attacks import BadNets, TriggeredData
from bimask.data import ImageData
from bimask.errors import DataError, NonFiniteError
from bimask.metrics import CleanSet, EvalSets, Scores, evaluate, predict
from bimask.nets import SmallResNet


class Lookup(nn.Module):
    """Answers from a table: the first pixel is the row, the last one tells of a trigger."""

    def __init__(self, clean, triggered):
        super().__init__()
        self.tables = torch.tensor([clean, triggered])
        self.inner = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1))  # modules with a mode

    def forward(self, images):
        rows = (images[:, 0, 0, 0] * 255).round().long()
        trigger = (images[:, 0, -1, -1] > 0.5).long()
        return nn.functional.one_hot(self.tables[trigger, rows], 3).float()


LABELS = [0, 0, 0, 1, 1, 1, 2, 2]
CLEAN = [0, 0, 1, 1, 1, 1, 2, 0]  # 6 of 8 right
TRIGGERED = [0, 0, 0, 0, 0, 1, 0, 1]  # rows 3 to 7 count: 3 attacked, 1 recovered, 1 neither
MOVED_ON = [1, 1, 0, 2, 1, 1, 0, 1]  # 4 of 8 are y + 1, 3 are y


def eight_images(labels=LABELS):
    images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(8)
    return ImageData(images, torch.tensor(labels), ("a", "b", "c"))


def scores(accuracy, success, recovery):
    return Scores(accuracy, success, recovery, 100, 90, "test")


def test_counted_by_hand():
    sets = EvalSets.of(BadNets(size=1), eight_images(), "val")
    got = evaluate(Lookup(CLEAN, TRIGGERED), sets)
    assert got == Scores(6 / 8, 3 / 5, 1 / 5, n_clean=8, n_triggered=5, split="val")
    assert got.misdirected == pytest.approx(1 / 5)


def test_the_target_class_is_left_out_whatever_it_answers():
    sets = EvalSets.of(BadNets(size=1), eight_images(), "test")
    other = [2, 1, 2, *TRIGGERED[3:]]
    assert evaluate(Lookup(CLEAN, other), sets) == evaluate(Lookup(CLEAN, TRIGGERED), sets)
    target_two = EvalSets.of(BadNets(size=1, target=2), eight_images(), "test")
    assert evaluate(Lookup(CLEAN, TRIGGERED), target_two).n_triggered == 6


def test_some_of_the_images_are_spaced_evenly():
    sets = EvalSets.of(BadNets(size=1), eight_images(), "val")
    some = sets.at_most(3)  # of eight and of the five that do not have the target's class
    assert some.clean.images[:, 0, 0, 0].tolist() == [0, 4, 7]
    assert some.triggered.images[:, 0, 0, 0].tolist() == [3, 5, 7]
    assert some.triggered.true_labels.tolist() == [1, 1, 2]
    assert evaluate(Lookup(CLEAN, TRIGGERED), some).attack_success == pytest.approx(1 / 3)
    assert evaluate(Lookup(CLEAN, TRIGGERED), sets.at_most(8)) == evaluate(
        Lookup(CLEAN, TRIGGERED), sets
    )
    clean = CleanSet(eight_images(), "val").at_most(3)
    assert evaluate(Lookup(CLEAN, TRIGGERED), clean).n_clean == 3


def test_all_to_all_counts_every_image():
    sets = EvalSets.of(BadNets(size=1, label_rule="all_to_all"), eight_images(), "test")
    got = evaluate(Lookup(CLEAN, MOVED_ON), sets)
    assert got == Scores(6 / 8, 4 / 8, 3 / 8, n_clean=8, n_triggered=8, split="test")


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    sets = EvalSets.of(BadNets(size=1), eight_images(), "test")
    model = Lookup(CLEAN, TRIGGERED)
    assert evaluate(model, sets, batch_size=batch_size) == evaluate(model, sets)


def test_ratios_by_hand():
    before, after = scores(0.8, 0.9, 0.1), scores(0.6, 0.2, 0.5)
    assert after.arr(before) == pytest.approx(1 - 0.6 / 0.8)
    assert after.rdr(before) == pytest.approx(1 - 0.5 / 0.8)
    assert after.der(before) == pytest.approx((0.7 - 0.2 + 1) / 2)
    assert after.rir(before) == pytest.approx((0.4 - 0.2 + 1) / 2)


def test_no_change_is_neutral():
    same = scores(0.8, 0.9, 0.1)
    assert same.arr(same) == 0
    assert same.der(same) == same.rir(same) == 0.5


def test_only_falls_of_accuracy_and_gains_of_defence_count():
    before, after = scores(0.8, 0.2, 0.6), scores(0.9, 0.7, 0.3)
    assert after.der(before) == after.rir(before) == 0.5
    assert after.arr(before) < 0
    assert scores(0.8, 0.0, 0.9).rdr(before) < 0


def test_perfect_and_worst_defence():
    backdoored = scores(1, 1, 0)
    assert scores(1, 0, 1).der(backdoored) == scores(1, 0, 1).rir(backdoored) == 1
    assert scores(0, 1, 0).der(backdoored) == scores(0, 1, 0).rir(backdoored) == 0


def test_ratios_to_no_accuracy_are_undefined():
    hopeless = scores(0, 0.5, 0.5)
    assert math.isnan(scores(0.5, 0, 0).arr(hopeless))
    assert math.isnan(scores(0.5, 0, 0).rdr(hopeless))


@pytest.mark.parametrize("empty", ["clean", "triggered"])
def test_empty_sets_are_refused(empty):
    full = EvalSets.of(BadNets(size=1), eight_images(), "val")
    clean, triggered = full.clean, full.triggered
    if empty == "clean":
        clean = clean.subset(torch.tensor([], dtype=torch.long))
    else:
        triggered = TriggeredData(
            triggered.images[:0], triggered.attack_labels[:0], triggered.true_labels[:0]
        )
    with pytest.raises(DataError, match="split 'val'"):
        evaluate(Lookup(CLEAN, TRIGGERED), EvalSets(clean, triggered, "val"))


def test_a_set_of_the_target_class_alone_is_refused():
    with pytest.raises(DataError, match="target class"):
        EvalSets.of(BadNets(size=1), eight_images([0] * 8), "test")


class Recorder(Lookup):
    """A `Lookup` that keeps the modes it was called in."""

    def forward(self, images):
        self.called = [module.training for module in self.modules()]
        return super().forward(images)


def test_models_answer_in_eval_mode_and_get_their_modes_back():
    model = Recorder(CLEAN, TRIGGERED).train()
    model.inner[1].eval()  # a frozen batch norm
    modes = [module.training for module in model.modules()]
    predict(model, eight_images().images)
    assert model.called == [False] * len(modes)
    assert [module.training for module in model.modules()] == modes == [True, True, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused_and_modes_come_back(bad):
    model = nn.Sequential(Lookup(CLEAN, TRIGGERED), nn.Linear(3, 3)).train()
    model[1].bias.data[2] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        evaluate(model, EvalSets.of(BadNets(size=1), eight_images(), "test"))
    assert all(module.training for module in model.modules())


def test_scoring_keeps_no_graph_and_changes_no_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answers = predict(model, eight_images().images)
    assert answers.dtype == torch.int64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- evaluation in bfloat16, and in batches that fit ---


class Close(nn.Module):
    """Logits a hundredth apart, which bfloat16 rounds together around 10."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.tensor(10.0))

    def forward(self, images):
        x = images.mean((1, 2, 3))
        return self.base + torch.stack([x / 50, (1 - x) / 50, torch.full_like(x, -1)], dim=1)


def test_answers_in_bfloat16_are_those_in_float32():
    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    model = Close()
    low = model.to(torch.bfloat16)((images.float() / 255).bfloat16()).argmax(1)
    model = Close()
    wanted = predict(model, images)
    assert (low != wanted).sum() > 50  # without the second look
    assert torch.equal(predict(model, images, precision="bfloat16"), wanted)
    assert model.base.dtype == torch.float32


def test_answers_in_bfloat16_of_a_real_net():
    torch.manual_seed(0)
    net = SmallResNet(1, 10, width=4)
    images = torch.randint(0, 256, (700, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(predict(net, images, precision="bfloat16"), predict(net, images))


def test_batches_are_halved_until_they_fit():
    class Small(Close):
        def forward(self, images):
            sizes.append(len(images))
            if len(images) > 3:
                raise torch.OutOfMemoryError("too many")
            return super().forward(images)

    sizes: list[int] = []
    images = torch.randint(0, 256, (10, 1, 2, 2), dtype=torch.uint8)
    assert torch.equal(predict(Small(), images, batch_size=10), predict(Close(), images))
    assert sizes == [10, 5, 3, 3, 3, 1]


def test_one_image_that_does_not_fit_is_the_callers_to_know():
    class Full(nn.Module):
        def forward(self, images):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        predict(Full(), torch.zeros(4, 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_net_that_flattens_by_view_is_asked_in_the_plain_layout(precision, channels):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(channels, 8, 3)
            self.linear = nn.Linear(8 * 36, 5)

        def forward(self, images):
            return self.linear(self.conv(images).relu().view(len(images), -1))

    torch.manual_seed(0)
    net = Viewing()
    images = torch.randint(0, 256, (40, channels, 8, 8), dtype=torch.uint8)
    expected = net(images.float() / 255).argmax(1)
    assert torch.equal(predict(net, images, precision=precision), expected)
