import re
import runpy
import sys

import pytest
import torch

from bimask.errors import InteropError
from bimask.interop import load_imported, read_checkpoint, read_defense_result
from bimask.interop.defended import fold_parts


@pytest.fixture
def defended(backdoorbench, world):
    """`save(name)` writes `defense/NAME/defense_result.pt` with `state`, a repaired victim's.

    The repair: the linear layer no longer calls anything the target class.
    """

    class Defended:
        def __init__(self):
            self.state = {name: value.clone() for name, value in world.net.state_dict().items()}
            self.state["linear.bias"][0] -= 100

        def save(self, name="ft", deep="", **changes):
            folder = backdoorbench.folder / "defense" / name / deep
            folder.mkdir(parents=True, exist_ok=True)
            content = {"model_name": "preactresnet18", "num_classes": 10, "model": self.state}
            torch.save(content | changes, folder / "defense_result.pt")
            return folder / "defense_result.pt"

        def read(self, path):
            return read_checkpoint(path, clean_data=backdoorbench.clean)

    return Defended()


def test_a_defended_model_is_scored_beside_its_victim(defended, backdoorbench):
    result = defended.read(defended.save())
    before = result.before
    got = (before.clean_accuracy, before.attack_success, before.recovery)
    assert got == pytest.approx(backdoorbench.scores)
    assert result.scores.attack_success == 0
    assert result.scores.clean_accuracy < before.clean_accuracy  # the target class is never right
    assert result.source == "backdoorbench defense"
    assert torch.equal(result.model.net.linear.bias, defended.state["linear.bias"])
    result.refuse_if_useless()  # it is the victim that must have learned the attack


def test_it_may_lie_as_deep_as_the_fork_puts_it(defended, backdoorbench):
    path = defended.save("anp", deep="spc_10/3")
    assert defended.read(path.parent).scores.attack_success == 0
    assert read_defense_result(path, clean_data=backdoorbench.clean).scores.attack_success == 0


def test_without_its_victim_it_has_no_images(defended, backdoorbench):
    path = defended.save()
    backdoorbench.file.unlink()
    with pytest.raises(InteropError, match=r"no attack_result.pt is in the five folders above"):
        defended.read(path)


@pytest.mark.parametrize(
    "changes", [{"model_name": "vgg19_bn"}, {"num_classes": 43}, {"num_classes": []}]
)
def test_another_victim_above_it_is_refused(defended, changes):
    with pytest.raises(InteropError, match="put it below its own victim"):
        defended.read(defended.save(**changes))


# --- files that are not a cleaned model ---


def test_the_victim_itself_is_not_a_cleaned_model(defended, world):
    defended.state = {f"module.{name}": value for name, value in world.net.state_dict().items()}
    with pytest.raises(
        InteropError, match="not a cleaned model: its weights are the victim's, as NPD's"
    ):
        defended.read(defended.save("nc"))


def test_the_plug_beside_it_is_named(defended, world):
    defended.state = world.net.state_dict()
    path = defended.save("npd")
    plug = {"target_layer": "layer4", "plug_name": "p", "plug_model": {"0.weight": torch.zeros(1)}}
    torch.save(plug, path.parent / "plug_layer.pt")
    with pytest.raises(InteropError, match="NPD's cure is in plug_layer.pt"):
        defended.read(path)
    with pytest.raises(InteropError, match="not a cleaned model but NPD's plug layer.*'layer4'"):
        defended.read(path.parent / "plug_layer.pt")


@pytest.mark.parametrize("name", ["mask.pkl", "channel_selection.pkl"])
def test_pickled_masks_are_known_by_name_and_not_opened(defended, tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(InteropError, match="not a cleaned model but the pickled .* of the IMS pro"):
            defended.read(source)


def test_the_folder_of_nine_methods_is_named(defended):
    assert "nine methods" in defended.read(defended.save("fst")).notes[0]
    assert defended.read(defended.save("ft")).notes == ()


def test_fine_pruning_is_multiplied_out(defended):
    cleaned = {name: value.clone() for name, value in defended.state.items()}
    mask = torch.ones(64, 1, 1, 1)
    mask[::3] = 0
    name = "layer4.1.conv2.weight"
    mask = mask.expand_as(cleaned[name]).clone()
    cleaned[name] *= mask
    defended.state[name + "_orig"] = defended.state.pop(name)
    defended.state[name + "_mask"] = mask
    result = defended.read(defended.save("fp"))
    state = result.model.net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in cleaned.items())
    assert "fine-pruning" in result.notes[0]


def test_neuron_masks_are_folded_and_their_noise_is_dropped(defended):
    cleaned = {name: value.clone() for name, value in defended.state.items()}
    for name in [name for name in cleaned if name.endswith("bn1.weight")]:
        mask = torch.linspace(0, 1, len(cleaned[name]))
        cleaned[name] *= mask
        part = name.removesuffix("weight")
        defended.state[part + "neuron_mask"] = mask
        defended.state[part + "neuron_noise"] = torch.full_like(mask, torch.nan)
        defended.state[part + "neuron_noise_bias"] = torch.full_like(mask, torch.inf)
    result = defended.read(defended.save("nft"))
    state = result.model.net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in cleaned.items())
    assert "neuron masks" in result.notes[0]


@pytest.mark.parametrize(
    "state",
    [
        {"conv1.weight_mask": torch.ones(3)},
        {"conv1.weight_mask": torch.ones(3), "conv1.weight_orig": torch.ones(4)},
        {"bn1.neuron_mask": torch.ones(3)},
        {"bn1.neuron_mask": torch.ones(3), "bn1.weight": torch.ones(1)},
    ],
)
def test_parts_without_their_other_one_are_refused(state):
    with pytest.raises(InteropError, match="without a .* of its size"):
        fold_parts(state, "x")


def test_nan_in_a_defended_model_is_refused(defended):
    defended.state["linear.bias"] = torch.full((10,), torch.nan)
    with pytest.raises(InteropError, match="NaN or infinite"):
        defended.read(defended.save())


# --- the command ---


def test_the_command_shows_both(defended, backdoorbench, tmp_path, capsys, monkeypatch):
    path, out = defended.save("fst"), tmp_path / "out"
    words = ["import", str(path), str(out), "--clean-data", backdoorbench.clean]
    monkeypatch.setattr(sys, "argv", ["bimask", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("bimask", run_name="__main__")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"victim.*85\.2.*\n.*defended.* 0\.0", shown)
    assert "note: The folder defense/fst" in shown
    loaded = load_imported(out)
    assert loaded.before.attack_success == pytest.approx(23 / 27)
    assert loaded.scores.attack_success == 0
    assert len(loaded.notes) == 1
