import math
import warnings

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bimask.defences.ims.config import ENGINE, PROFILES, BudgetWarning, PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.errors import SettingError

NO_ROUNDS = {"initialise_rounds": 0, "minimise_rounds": 0, "select_rounds": 0}
OTHER = PurifyConfig(norm="l2", keep="best", step_size=None, patience=None, warm_start=0.5)


def test_the_defaults_are_the_published_settings():
    published = {
        "sites": "published",
        "sharpness": 20,
        "initial_mask": 1,
        "initial_selection": 1,
        "mask_lr": 0.02,
        "mask_lr_schedule": "constant",
        "weight_decay": 0.01,
        "selection_weight": 10,
        "initialise_rounds": 100,
        "minimise_rounds": 200,
        "select_rounds": 200,
        "patience": 25,
        "threshold": 0.98,
        "keep": "last",
        "batch_size": 256,
        "loss_form": "paper",
        "inverse_weight": 1,
        "learn_selection": True,
        "inner_steps": 20,
        "step_size": 0.001,
        "budget": 1,
        "norm": "linf",
        "inner_optimizer": "adamw",
        "inner_weight_decay": 0.01,
        "clip_images": False,
        "warm_start": 0,
        "universal": 0,
        "universal_budget": None,
        "class_triggers": 0,
        "clean_weight": 1,
        "shift": 0,
        "flip": False,
        "mask_estimator": "soft",
        "early_batch_size": None,
        "inner_steps_at_start": None,
        "inner_momentum": 0,
        "reuse_last_pass": False,
        "precision": "float32",
        "memory_format": "channels_last",
        "fold_batch_norm": True,
        "compile": False,
        "images_per_pass": "batch",
    }
    assert PurifyConfig().model_dump() == published


def test_the_published_budget_is_never_reached_and_said_so(tiny_net, pictures):
    with pytest.warns(BudgetWarning, match="budget 1 is never reached: 20 steps of 0.001 end at 0.02"):
        purify(tiny_net, pictures, PurifyConfig(**NO_ROUNDS))


@pytest.mark.parametrize("steps", [1, 3, 7, 20])
def test_the_step_size_null_just_reaches_the_budget(tiny_net, pictures, steps):
    config = PurifyConfig(**NO_ROUNDS, step_size=None, inner_steps=steps, budget=0.3)
    assert config.resolved_step_size == pytest.approx(0.3 / steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        purify(tiny_net, pictures, config)


@pytest.mark.parametrize(
    ("norm", "optimizer", "warned"),
    [("linf", "adamw", True), ("linf", "sign", True), ("l2", "sign", True), ("l2", "adamw", False)],
)
def test_only_bounded_steps_have_an_unreachable_budget(norm, optimizer, warned):
    config = PurifyConfig(norm=norm, inner_optimizer=optimizer, step_size=0.01, budget=1)
    assert (config.unreachable_budget() is not None) == warned


BAD_VALUES = [
    ("sharpness", 0),
    ("initial_mask", 1.1),
    ("initial_selection", -0.1),
    ("mask_lr", 0),
    ("mask_lr", math.nan),
    ("mask_lr_schedule", "linear"),
    ("weight_decay", -1),
    ("selection_weight", math.inf),
    ("initialise_rounds", -1),
    ("minimise_rounds", 1.5),
    ("patience", -1),
    ("threshold", 0),
    ("threshold", 1.1),
    ("keep", "first"),
    ("batch_size", 0),
    ("loss_form", "exact"),
    ("inner_steps", 0),
    ("step_size", 0),
    ("budget", 0),
    ("norm", "l1"),
    ("inner_optimizer", "sgd"),
    ("inner_weight_decay", -0.1),
    ("warm_start", 1.1),
    ("mask_estimator", "hard"),
    ("early_batch_size", 0),
    ("inner_steps_at_start", 0),
    ("inner_momentum", 1),
    ("inner_momentum", -0.1),
    ("precision", "float16"),
    ("memory_format", "channels_first"),
    ("images_per_pass", 0),
    ("images_per_pass", "all"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        PurifyConfig(**{name: value})


@given(
    start=st.integers(1, 40),
    end=st.integers(1, 40),
    progress=st.lists(st.floats(0, 1), min_size=2, max_size=9),
)
def test_inner_steps_go_evenly_from_start_to_end(start, end, progress):
    config = PurifyConfig(inner_steps=end, inner_steps_at_start=start)
    assert (config.inner_steps_at(0), config.inner_steps_at(1)) == (start, end)
    steps = [config.inner_steps_at(share) for share in sorted(progress)]
    assert steps == sorted(steps, reverse=end < start)
    for share, count in zip(sorted(progress), steps, strict=True):
        assert abs(count - (start + share * (end - start))) <= 0.5 + 1e-9


def test_inner_steps_do_not_grow_unless_they_are_told_to():
    assert {PurifyConfig(inner_steps=7).inner_steps_at(share) for share in (0, 0.3, 1)} == {7}


@pytest.mark.parametrize("steps", [1, 4])
def test_the_step_size_null_reaches_the_budget_in_any_number_of_steps(steps):
    config = PurifyConfig(step_size=None, inner_steps=9, budget=0.6)
    assert config.step_sizes(steps) == pytest.approx((0.6 / steps, 0.6 / steps))
    assert PurifyConfig(step_size=0.25).step_sizes(steps) == (0.25, 0.25)


def test_the_perturbation_in_common_has_a_budget_of_its_own_and_steps_to_match():
    config = PurifyConfig(step_size=None, budget=0.6, universal_budget=0.2)
    assert config.budgets == (0.6, 0.2)
    assert config.step_sizes(4) == pytest.approx((0.15, 0.05))
    assert PurifyConfig(budget=0.6).budgets == (0.6, 0.6)


@pytest.mark.parametrize(
    ("budgets", "named"), [((0.3, 0.2), "budget 0.3"), ((0.2, 0.3), "universal_budget 0.3")]
)
def test_the_larger_budget_is_the_one_that_is_never_reached(budgets, named):
    own, common = budgets
    config = PurifyConfig(step_size=0.125, inner_steps=2, budget=own, universal_budget=common)
    assert config.unreachable_budget().startswith(f"The {named} is never reached: 2 steps of 0.125")


# --- profiles ---


def test_the_profile_of_the_paper_is_the_published_settings():
    assert PurifyConfig.profile("paper") == PurifyConfig()


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_can_be_changed_and_are_checked(name):
    profile = PurifyConfig.profile(name)
    changed = PurifyConfig.profile(name, mask_lr=0.5, precision="float32")
    assert changed == profile.model_copy(update={"mask_lr": 0.5, "precision": "float32"})
    with pytest.raises(ValidationError, match="budget"):
        PurifyConfig.profile(name, budget=-1)


def test_the_fast_profile_is_fast_and_reaches_its_budget():
    fast = PurifyConfig.profile("fast")
    assert fast.precision == "bfloat16"
    assert fast.inner_steps < PurifyConfig().inner_steps
    assert fast.unreachable_budget() is None


def test_an_unknown_profile_is_refused_and_the_known_are_named():
    with pytest.raises(SettingError, match="'slow'; known are .*paper.*fast"):
        PurifyConfig.profile("slow")


def test_what_prepares_the_net_are_settings():
    assert set(ENGINE) < set(PurifyConfig.model_fields)


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="learning_rate"):
        PurifyConfig(learning_rate=0.1)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        PurifyConfig().budget = 2


@pytest.mark.parametrize("nested", [False, True])
def test_settings_are_read_from_yaml_nested_and_flat(tmp_path, nested):
    values = OTHER.model_dump()
    content = {"seed": 3, "purify": values} if nested else values
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(content))
    assert PurifyConfig.from_yaml(path) == OTHER


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "setting: value"),
        (b"- 1\n- 2\n", "setting: value"),
        (b"budget: [1,\n", "Cannot read"),
        (b"\xff\xfe\x00\x01", "Cannot read"),
        (b"purify: 3\n", "top level"),
        (b"purify:\n", "top level"),
        (b"budget: -1\nsharpnes: 2\n", "budget: .*-1; sharpnes: "),
        (b"purify: {budget: -1, sharpnes: 2}\n", "budget: .*-1; sharpnes: "),
    ],
    ids=["empty", "list", "broken", "bytes", "number", "null", "two errors", "two nested errors"],
)
def test_yaml_that_is_no_configuration_is_refused_with_all_that_is_wrong(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingError, match=f"(?s){message}") as caught:
        PurifyConfig.from_yaml(path)
    assert str(path) in str(caught.value)


def test_a_missing_configuration_is_refused(tmp_path):
    with pytest.raises(SettingError, match="nowhere.yaml"):
        PurifyConfig.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("shift", "flip", "natural", "expected"),
    [
        ("auto", "auto", True, (3, True)),
        ("auto", "auto", False, (1, False)),
        (2, True, False, (2, True)),
        (0, False, True, (0, False)),
        ("auto", False, True, (3, False)),
    ],
)
def test_augmentation_may_follow_what_the_suspect_bears(shift, flip, natural, expected):
    config = PurifyConfig(shift=shift, flip=flip)
    assert (config.shift_of(32, natural=natural), config.flips(natural=natural)) == expected
    assert config.augments == (expected != (0, False))


def test_a_small_image_is_shifted_by_one_at_least():
    assert PurifyConfig(shift="auto").shift_of(8, natural=True) == 1
