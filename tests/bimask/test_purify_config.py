import math
import warnings

import pytest
import yaml
from pydantic import ValidationError

from bimask.config import BudgetWarning, PurifyConfig
from bimask.errors import SettingError
from bimask.purify import purify

NO_ROUNDS = {"initialise_rounds": 0, "minimise_rounds": 0, "select_rounds": 0}
OTHER = PurifyConfig(norm="l2", keep="best", step_size=None, patience=None, warm_start=0.5)


def test_the_defaults_are_the_published_settings():
    published = {
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
        "inner_steps": 20,
        "step_size": 0.001,
        "budget": 1,
        "norm": "linf",
        "inner_optimizer": "adamw",
        "inner_weight_decay": 0.01,
        "clip_images": False,
        "warm_start": 0,
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
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        PurifyConfig(**{name: value})


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
