"""A population that was cut short and goes on from its state ends with the bits of one that was not."""

import json

import pytest
import torch
from safetensors import safe_open

from bimask.defences.ims.checkpoint import PopulationState
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.errors import NonFiniteError, SettingError
from bimask.inspection.trigger_pool import TriggerPool

SHORT = {
    "initialise_rounds": 2,
    "minimise_rounds": 3,
    "select_rounds": 2,
    "inner_steps": 2,
    "step_size": None,
    "budget": 0.2,
    "patience": None,
}
# Members that keep all that a member can keep from one round to the next.
MEMBERS = [
    {},
    {"batch_size": 15, "warm_start": 0.5, "keep": "best", "mask_lr": 0.3},
    {"patience": 0, "minimise_rounds": 9, "threshold": 0.5},
    {"inner_optimizer": "sign", "inner_momentum": 0.9, "clip_images": True, "loss_form": "log"},
    {"universal": 0.5, "warm_start": 0.5, "clip_images": True, "shift": 1, "flip": True},
    {
        "class_triggers": 0.5,
        "batch_size": 15,
        "keep": "average",
        "select_rounds": 5,
        "mask_lr_schedule": "cosine",
        "mask_lr": 0.1,
    },
    {"initialise_rounds": 0, "minimise_rounds": 0, "select_rounds": 0},
    {
        "inner_optimizer": "sign",
        "step_size": 1e38,
        "budget": 2e38,
    },  # overflows as soon as it looks for triggers
]
LONGEST = 11  # rounds of the third
WHOLE, POOL = [], []


class CutError(Exception):
    """The process died here, as far as the population knows."""


@pytest.fixture
def make(tiny_net, pictures):
    """A population of all of them; the fourth is told to stop after four rounds."""
    if not POOL:  # one search is enough for all tests
        POOL.append(TriggerPool.search(tiny_net, pictures))

    def population(**engine):
        configs = [PurifyConfig(**{**SHORT, **member, **engine}) for member in MEMBERS]
        return PopulationPurifier(
            tiny_net,
            pictures,
            configs,
            generators=[torch.Generator().manual_seed(row) for row in range(len(configs))],
            pool=POOL[0],
            on_round=lambda member, log, _: member == 3 and log.step == 3,
        )

    return population


def cut_after(population, rounds, path):
    """Run so many rounds, keep the state, die."""
    seen = []

    def between():
        seen.append(None)
        if len(seen) == rounds:
            PopulationState.of(population).save(path)
            raise CutError

    with pytest.raises(CutError):
        population.run(between_rounds=between)


def bits_of(results):
    return [
        str(result)
        if isinstance(result, NonFiniteError)
        else (result.rounds, result.passes, {k: v.tolist() for k, v in result.masks.tensors().items()})
        for result in results
    ]


@pytest.fixture
def whole(make):
    """What the uninterrupted run ends with; one run is enough for all tests."""
    if not WHOLE:
        WHOLE.extend(bits_of(make().run()))
    return WHOLE


def test_the_members_are_as_different_as_they_are_meant_to_be(whole):
    assert "Loss not finite" in whole[7]
    assert len(whole[3][0]) == 4
    assert max(len(bits[0]) for bits in whole[:7]) <= LONGEST


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 6, 8])
def test_cut_anywhere_the_rest_has_the_bits_of_an_uninterrupted_run(make, whole, tmp_path, rounds):
    path = tmp_path / "state.safetensors"
    cut_after(make(), rounds, path)
    population = make()
    PopulationState.load(path).put_into(population)
    assert bits_of(population.run()) == whole


def test_in_bfloat16_and_cut_twice(make, tmp_path):
    engine = {"precision": "bfloat16", "images_per_pass": "device"}
    expected, path = bits_of(make(**engine).run()), tmp_path / "state.safetensors"
    cut_after(make(**engine), 2, path)
    population = make(**engine)
    PopulationState.load(path).put_into(population)
    cut_after(population, 3, path)
    population = make(**engine)
    PopulationState.load(path).put_into(population)
    assert bits_of(population.run()) == expected


def test_a_population_that_was_over_runs_no_round_again(make, whole, tmp_path):
    population, path = make(), tmp_path / "state.safetensors"
    seconds = [getattr(result, "seconds", None) for result in population.run()]
    PopulationState.of(population).save(path)
    again = make()
    PopulationState.load(path).put_into(again)
    results = again.run(between_rounds=lambda: pytest.fail("a round was run"))
    assert bits_of(results) == whole
    assert [getattr(result, "seconds", None) for result in results] == seconds


@pytest.mark.parametrize(
    "name", ["state", "kept", "best_losses", "first", "second", "own", "universal"]
)
def test_without_a_part_of_the_state_the_rest_is_another(make, whole, tmp_path, name):
    """The control: whichever part is lost, it shows after one cut or another."""
    path = tmp_path / "state.safetensors"

    def differs_after(rounds):
        cut_after(make(), rounds, path)
        kept = PopulationState.load(path)
        lost = {**kept.tensors, name: torch.zeros_like(kept.tensors[name])}
        population = make()
        PopulationState(lost, kept.members, kept.seconds).put_into(population)
        return bits_of(population.run()) != whole

    assert any(differs_after(rounds) for rounds in (4, 3, 9, 6, 1, 2, 5))


def test_a_state_is_one_file_of_tensors_and_json(make, tmp_path):
    path = tmp_path / "state.safetensors"
    cut_after(make(), 2, path)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["population"])
    assert about["members"][0]["round"] == 0
    assert about["members"][0]["stages"] == ["minimise", "select"]


@pytest.mark.parametrize("changes", [{"sharpness": 7}, {"select_rounds": 3}])
def test_other_settings_are_refused(tiny_net, pictures, make, tmp_path, changes):
    path = tmp_path / "state.safetensors"
    cut_after(make(), 2, path)
    with pytest.raises(SettingError, match="other settings"):
        PopulationState.load(path).put_into(make(**changes))


def test_other_images_are_refused(tiny_net, pictures):
    config = PurifyConfig(**{**SHORT, "warm_start": 0.5})

    def one(images):
        return PopulationPurifier(tiny_net, images, [config], generators=[torch.Generator()])

    with pytest.raises(SettingError, match="need .*own"):
        PopulationState.of(one(pictures)).put_into(one(pictures[:5]))


def test_draws_from_the_common_generator_cannot_be_kept(tiny_net, pictures):
    population = PopulationPurifier(tiny_net, pictures, [PurifyConfig(**SHORT)])
    with pytest.raises(SettingError, match="no generator of its own"):
        PopulationState.of(population)


@pytest.mark.parametrize("content", [None, b"", b"torn", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_state_is_refused(tmp_path, content):
    path = tmp_path / "state.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match="holds no state of a defence"):
        PopulationState.load(path)
