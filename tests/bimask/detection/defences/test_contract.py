"""What holds of every defence of detectors."""

import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.state import DefenceState
from bimask.detection.defences import DEFENCES
from bimask.detection.defences.repair import Kept
from bimask.errors import ModelError, NonFiniteError, SettingError

EACH = pytest.mark.parametrize("name", DEFENCES)
SMALL = {"epochs": 2, "batch_size": 3, "attack_steps": 2, "budget": 1.0, "lr": 0.02}
SMALL |= {"initialise_rounds": 1, "minimise_rounds": 2, "select_rounds": 3, "inner_steps": 2}
SMALL |= {"selection_weight": 0.1, "mask_lr": 0.2}
BREAKING = {"lr": 1e30, "detection_weight": float("inf")}


def short(defence, **changes):
    fields = defence.config.model_fields
    return defence.config(**{k: v for k, v in (SMALL | changes).items() if k in fields})


def run(defence, detector, clean, configs, **options):
    generators = [torch.Generator().manual_seed(5) for _ in configs]
    return defence.run(detector, clean, configs, generators=generators, **options)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def detector(detector_of):
    return detector_of("fcos")


@pytest.fixture
def clean(pictures):
    images, targets = pictures(6)
    return CleanData(images, targets)


@EACH
def test_the_suspect_is_left_as_it_is_and_something_is_done(name, detector, clean):
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    (result,) = run(DEFENCES[name], detector, clean, [short(DEFENCES[name])])
    assert_same(dict(detector.state_dict()), before)
    assert not detector.training
    assert all(p.requires_grad for p in detector.parameters())
    assert all(p.grad is None for p in detector.parameters())
    assert result.changed
    assert set(result.numbers) == set(DEFENCES[name].numbers)
    assert all(0 <= value <= 1 for value in result.numbers.values())


@EACH
def test_statistics_of_norms_are_frozen(name, detector, clean):
    (result,) = run(DEFENCES[name], detector, clean, [short(DEFENCES[name])])
    own = detector.state_dict()
    kept = [key for key in own if "running" in key or "tracked" in key]
    assert kept
    after = result.model().state_dict()
    assert after.keys() == own.keys(), "what is stored is a plain detector's"
    assert all(torch.equal(after[key], own[key]) for key in kept)


@EACH
def test_the_same_generator_gives_the_same_bits_whatever_torchs_own_seed(name, detector, clean):
    torch.manual_seed(1)
    (one,) = run(DEFENCES[name], detector, clean, [short(DEFENCES[name])])
    torch.manual_seed(2)
    (again,) = run(DEFENCES[name], detector, clean, [short(DEFENCES[name])])
    assert_same(one.tensors, again.tensors)
    assert [log.losses for log in one.history] == [log.losses for log in again.history]
    assert all(math.isfinite(log.loss) for log in one.history)


@EACH
def test_a_run_that_was_cut_short_goes_on_with_the_same_bits(name, detector, clean, tmp_path):
    defence, path = DEFENCES[name], tmp_path / "state.safetensors"
    configs = [short(defence, epochs=3, select_rounds=6)]
    (whole,) = run(defence, detector, clean, configs)

    class Cut(Exception):
        pass

    def keep_and_stop(take):
        take().save(path)
        raise Cut

    with pytest.raises(Cut):
        run(defence, detector, clean, configs, between_steps=keep_and_stop)
    heard = []
    (again,) = run(
        defence,
        detector,
        clean,
        configs,
        state=DefenceState.load(path),
        on_step=lambda _member, log, _current: heard.append(log.step),
    )
    assert_same(whole.tensors, again.tensors)
    assert whole.numbers == again.numbers
    assert [log.loss for log in whole.history] == [log.loss for log in again.history]
    assert 0 < len(heard) < len(whole.history)


@EACH
def test_what_is_restored_answers_as_the_result_and_steps_are_counted(name, detector, clean):
    defence, heard = DEFENCES[name], []
    config = short(defence)
    (result,) = run(
        defence,
        detector,
        clean,
        [config],
        on_step=lambda _member, log, current: heard.append((log.step, current().model())) and False,
    )
    assert len(heard) == len(result.history) == config.steps(6)
    restored = defence.restore(detector, result.tensors, config)
    with torch.no_grad():
        for one, other in zip(restored(clean.images), result.model()(clean.images), strict=True):
            assert_same(one, other)
    (ended,) = run(defence, detector, clean, [config], on_step=lambda *_: True)
    assert len(ended.history) == 1


@EACH
def test_every_family_can_be_repaired(name, family, detector_of, clean):
    (result,) = run(DEFENCES[name], detector_of(family), clean, [short(DEFENCES[name], epochs=1)])
    assert result.changed


@EACH
def test_a_loss_that_is_not_finite_is_told(name, detector, clean):
    fields = DEFENCES[name].config.model_fields
    config = short(DEFENCES[name])
    config = config.model_copy(update={k: v for k, v in BREAKING.items() if k in fields})
    (result,) = run(DEFENCES[name], detector, clean, [config])
    assert isinstance(result, NonFiniteError)


@EACH
def test_every_setting_is_described_and_what_is_searched_holds_its_bounds(name):
    config = DEFENCES[name].config
    assert config.searched()
    for setting, (range_, _) in config.searched().items():
        for value in (range_.low, range_.high):
            config(**{setting: value})
    assert [key for key, info in config.model_fields.items() if not info.description] == []


@pytest.mark.parametrize(
    "name", [name for name, one in DEFENCES.items() if hasattr(one.config(), "flip")]
)
def test_mirrored_pictures_are_learned_too(name, detector, clean):
    one, other = (
        run(DEFENCES[name], detector, clean, [short(DEFENCES[name], flip=flip)])[0]
        for flip in (False, True)
    )
    assert one.history[-1].loss != other.history[-1].loss


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: CleanData([], []), "got 0 pictures"),
        (lambda c: CleanData(c.images, None), "6 pictures and 0 targets"),
        (lambda c: CleanData(c.images, c.labels[:2]), "6 pictures and 2 targets"),
        (lambda c: CleanData([255 * x for x in c.images], c.labels), r"must lie in \[0, 1\]"),
        (lambda c: CleanData([(9 * x).byte() for x in c.images], c.labels), "float tensors"),
        (lambda c: CleanData(c.images[-1:], c.labels[-1:]), "no object in 1 clean pictures"),
    ],
)
@EACH
def test_clean_pictures_of_another_form_are_refused(name, change, says, detector, clean):
    with pytest.raises(SettingError, match=says):
        run(DEFENCES[name], detector, change(clean), [short(DEFENCES[name])])


@EACH
def test_what_is_no_detector_is_refused(name, clean):
    with pytest.raises(ModelError, match=r"wrap it as `Detector\(net, label_ids\)`"):
        DEFENCES[name].check(nn.Flatten(), clean.images)
    with pytest.raises(ModelError, match="wrap it"):
        run(DEFENCES[name], nn.Flatten(), clean, [short(DEFENCES[name])])


def test_a_budget_that_no_epoch_holds_gives_the_suspect_back_with_a_warning(detector, pictures):
    clean = CleanData(*pictures(8))
    for image, target in zip(clean.images, clean.labels, strict=True):
        image.zero_()
        for (x0, y0, x1, y1), label in zip(
            target["boxes"].long().tolist(), target["labels"], strict=True
        ):
            image[label, y0:y1, x0:x1] = 1
    learned = short(DEFENCES["ft"], epochs=60, lr=0.05, statistics=True)
    (taught,) = run(DEFENCES["ft"], detector, clean, [learned])
    defence, suspect = DEFENCES["soft_branch"], taught.model()
    config = short(defence, epochs=1, budget=0.01, lr=0.5, held_out=0.75)
    with pytest.warns(UserWarning, match=r"cost more than 0.01 of mAP@50 on 6 held-out"):
        (result,) = run(defence, suspect, clean, [config])
    assert not result.changed
    assert result.numbers["held_out_map50"] > 0.01
    assert result.numbers["budget_used"] == 0


def test_of_the_epochs_within_the_budget_the_one_with_the_least_adversarial_loss_is_kept(detector_of):
    kept = Kept(detector_of("fcos"), 0.9)
    epochs = [detector_of("fcos", seed) for seed in range(1, 6)]
    judged = [(0.9, 4.0), (0.7, 1.0), (0.85, 2.0), (0.95, 3.0), (0.9, math.nan)]
    for detector, (map50, worth) in zip(epochs, judged, strict=True):
        kept.judge(detector, map50, worth, 0.9, 0.1)
    assert_same(dict(kept.detector.state_dict()), dict(epochs[2].state_dict()))
    assert kept.numbers(0.9, 0.1) == {"held_out_map50": 0.85, "budget_used": pytest.approx(0.5)}
    kept.judge(epochs[1], 0.0, 9.0, 0.9, None)
    assert_same(dict(kept.detector.state_dict()), dict(epochs[1].state_dict()))


@pytest.mark.parametrize("name", ["soft_branch", "adversarial"])
def test_perturbations_are_made_against_whom_the_setting_says(name, detector, clean):
    defence = DEFENCES[name]
    known = []

    class Listening(type(defence)):
        def objective(self, detector, batch, config):
            known.append(detector.net.head.classification_head.cls_logits.weight.detach().clone())
            return super().objective(detector, batch, config)

    own = detector.net.head.classification_head.cls_logits.weight
    for against in ("suspect", "current"):
        known.clear()
        run(Listening(), detector, clean, [short(defence, against=against)])
        assert torch.equal(known[0], own)
        assert torch.equal(known[-1], own) == (against == "suspect")


def test_a_single_picture_is_learned_on_and_judged_by(detector, clean):
    one = CleanData(clean.images[:1], clean.labels[:1])
    for defence in DEFENCES.values():
        (result,) = run(defence, detector, one, [short(defence)])
        assert result.changed
