"""What we write is read by BackdoorBench's loader: by an oracle that follows its steps."""

import copy
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from bimask.attacks import BadNets
from bimask.data import ImageData
from bimask.errors import InteropError, SettingError
from bimask.interop import load_foreign, read_checkpoint, save_imported
from bimask.interop.backdoorbench_convert import _renormalised, convert
from bimask.interop.backdoorbench_writer import clean_positions, write_attack_result
from bimask.interop.datasets import DATASETS
from bimask.metrics import EvalSets, evaluate, predict
from bimask.nets import Normalised, PreActResNet18
from bimask.victims import VictimSpec, obtain_victim

CIFAR10 = DATASETS["cifar10"]


def backdoorbench_scores(file, clean):
    """ACC, ASR and RA by the steps that BackdoorBench's loader and evaluation take.

    Its own load, with the safe default of today's torch; the net by name, strictly; pictures where its
    own path, cut at the first "record", and the stored path's rest lead; its transforms.

    Args:
        clean: pairs of a PIL picture and a label, as torchvision's CIFAR10 gives them.
    """
    content = torch.load(file)
    assert {"model_name", "num_classes", "model", "data_path"} <= content.keys()
    assert {"img_size", "clean_data", "bd_train", "bd_test"} <= content.keys()
    assert content["model_name"] == "preactresnet18"
    assert (content["clean_data"], "data" in content["data_path"]) == ("cifar10", True)
    net = PreActResNet18(3, content["num_classes"]).eval()
    assert list(net.state_dict()) == list(content["model"])
    net.load_state_dict(content["model"])
    height, width, _ = content["img_size"]
    transform = Compose([Resize((height, width)), ToTensor(), Normalize(CIFAR10.mean, CIFAR10.std)])
    state = content["bd_test"]
    assert not state["getitem_all_switch"]
    own = str(file.absolute())
    pictures, attack, original = [], [], []
    for position in range(len(state["original_index_array"])):
        index = state["original_index_array"][position]
        if state["poison_indicator"][index] == 0:
            picture, label = clean[index]
            pictures.append(picture), attack.append(label), original.append(label)
            continue
        entry = state["bd_data_container"]["data_dict"][index]
        path = own[: own.index("record")] + entry["path"][entry["path"].index("record") :]
        pictures.append(Image.open(path))
        attack.append(entry["other_info"][0])
        original.append(entry["other_info"][1])

    @torch.no_grad()
    def answers(pictures):
        return torch.cat([net(transform(picture)[None]).argmax(1) for picture in pictures])

    under_attack = answers(pictures)
    right = answers([picture for picture, _ in clean]) == torch.tensor([label for _, label in clean])
    shares = [right, under_attack == torch.tensor(attack), under_attack == torch.tensor(original)]
    return tuple(share.double().mean().item() for share in shares)


def numbers(scores):
    return (scores.clean_accuracy, scores.attack_success, scores.recovery)


@pytest.fixture(scope="module")
def victim(world):
    """A net of the published width behind CIFAR-10's normalisation; 30 images, 27 with a trigger."""
    model = Normalised(world.net_of(64), list(CIFAR10.mean), list(CIFAR10.std)).eval()
    images = torch.from_numpy(np.stack(world.pictures)).permute(0, 3, 1, 2)
    data = ImageData(images.contiguous(), torch.tensor(world.labels), tuple("0123456789"))
    attack = BadNets(size=6)
    sets = EvalSets.of(attack, data, "test")
    index = clean_positions(sets, attack.attack_labels(data.labels, 10))
    pictures = [Image.fromarray(picture) for picture in world.pictures]
    return model, sets, index, list(zip(pictures, world.labels, strict=True))


def write(victim, out, **changes):
    model, sets, index, _ = victim
    return write_attack_result(
        out,
        **{
            "net": "preactresnet18",
            "model": model,
            "sets": sets,
            "clean_index": index,
            "dataset": "cifar10",
        }
        | changes,
    )


@pytest.mark.parametrize("where", ["record/mine", "records of mine/record/deep/er"])
def test_its_loader_finds_the_same_numbers(victim, tmp_path, where):
    assert write(victim, tmp_path / where) == ()
    ours = numbers(evaluate(victim[0], victim[1]))
    assert backdoorbench_scores(tmp_path / where / "attack_result.pt", victim[3]) == pytest.approx(
        ours, abs=1e-9
    )
    assert ours == pytest.approx((27 / 30, 23 / 27, 3 / 27))


def test_it_may_be_moved(victim, tmp_path):
    write(victim, tmp_path / "here" / "record" / "mine")
    shutil.move(tmp_path / "here", tmp_path / "there")
    file = tmp_path / "there" / "record" / "mine" / "attack_result.pt"
    assert backdoorbench_scores(file, victim[3]) == pytest.approx(
        numbers(evaluate(victim[0], victim[1]))
    )


def test_the_oracle_sees_a_wrong_picture_and_a_wrong_label(victim, tmp_path):
    out = tmp_path / "record" / "mine"
    write(victim, out)
    usual = backdoorbench_scores(out / "attack_result.pt", victim[3])
    content = torch.load(out / "attack_result.pt")
    for entry in content["bd_test"]["bd_data_container"]["data_dict"].values():
        entry["other_info"].reverse()
    torch.save(content, out / "attack_result.pt")
    accuracy, success, recovery = backdoorbench_scores(out / "attack_result.pt", victim[3])
    assert usual == (accuracy, recovery, success)
    for path in out.rglob("*.png"):
        Image.new("RGB", (32, 32)).save(path)
    assert backdoorbench_scores(out / "attack_result.pt", victim[3])[1:] != (success, recovery)


def test_we_read_what_we_write(victim, tmp_path):
    model, sets, index, clean = victim
    write(victim, tmp_path / "record" / "mine")
    for row, (picture, label) in enumerate(clean):
        path = tmp_path / "clean" / "test" / f"{label}" / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    read = read_checkpoint(tmp_path / "record" / "mine", clean_data=f"imagefolder:{tmp_path / 'clean'}")
    assert read.scores == evaluate(model, sets)
    assert torch.equal(read.sets.triggered.images, sets.triggered.images)
    assert torch.equal(read.clean_index, index)
    state = model.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in read.model.net.state_dict().items())


def test_nothing_but_plain_data_is_in_the_file(victim, tmp_path):
    write(victim, tmp_path / "record" / "mine")
    content = load_foreign(tmp_path / "record" / "mine" / "attack_result.pt")
    kinds = set()

    def walk(value):
        kinds.add(type(value))
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, (dict, list, tuple)):
                walk(part)
            else:
                kinds.add(type(part))

    walk(content)
    assert kinds == {dict, list, tuple, str, int, float, bool, torch.Tensor, type(None)}
    modes = {Image.open(path).mode for path in (tmp_path / "record").rglob("*.png")}
    assert modes == {"RGB"}


REFUSED = {
    "net": ({"net": lambda _: "small_resnet"}, "does not know the net 'small_resnet'"),
    "width": (
        {"model": lambda m: Normalised(PreActResNet18(3, 10, width=65), [0.5] * 3, [0.5] * 3)},
        "has a width of 64, but this one of 65",
    ),
    "data set": ({"dataset": lambda _: "digits"}, "no data set 'digits'"),
    "classes": ({"dataset": lambda _: "gtsrb"}, "has 43 classes and 3 channels, but .* 10 and 3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_its_loader_would_get_wrong_is_refused(victim, tmp_path, kind):
    changes, words = REFUSED[kind]
    with pytest.raises(InteropError, match=words):
        write(victim, tmp_path / "record" / "x", **{k: make(victim[0]) for k, make in changes.items()})
    assert not (tmp_path / "record").exists()


def test_a_narrow_net_is_read_as_a_wide_one(victim, world, tmp_path):
    narrow = Normalised(world.net, list(CIFAR10.mean), list(CIFAR10.std)).eval()
    notes = write(victim, tmp_path / "record" / "mine", model=narrow)
    assert notes == ("Its width is 8; the other channels, up to 64, are zero.",)
    found = backdoorbench_scores(tmp_path / "record" / "mine" / "attack_result.pt", victim[3])
    assert found == pytest.approx(numbers(evaluate(narrow, victim[1])), abs=1e-9)
    assert found == pytest.approx((27 / 30, 23 / 27, 3 / 27))


def test_a_wide_net_gives_the_logits_of_the_narrow_one(victim, world):
    narrow = Normalised(world.net, list(CIFAR10.mean), list(CIFAR10.std)).eval()
    _, state, _ = convert("preactresnet18", narrow, "cifar10", victim[1])
    wide = PreActResNet18(3, 10).eval()
    wide.load_state_dict(state)
    images = torch.rand(4, 3, 32, 32).double()
    with torch.no_grad():
        wanted = copy.deepcopy(world.net).double()(images)
        assert torch.allclose(wide.double()(images), wanted, atol=1e-9)


def test_a_normalisation_that_is_a_little_off_is_folded_in(victim, world):
    """Such as the training set's own: exact inside, a little off where zeros are padded."""
    mean, std = [0.4931, 0.4840, 0.4466], [0.2504, 0.2435, 0.2616]
    model = Normalised(world.net_of(64), mean, std).eval()
    _, state, notes = convert("preactresnet18", model, "cifar10", victim[1])
    assert "folded into the weights" in notes[0]
    theirs = PreActResNet18(3, 10).eval()
    theirs.load_state_dict(state)
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(images)
        folded = Normalised(theirs, list(CIFAR10.mean), list(CIFAR10.std))(images)
        unfolded = Normalised(model.net, list(CIFAR10.mean), list(CIFAR10.std))(images)
    assert (folded - wanted).abs().mean() < (unfolded - wanted).abs().mean() / 5


def test_other_scores_behind_the_other_normalisation_are_refused(world, tmp_path):
    """All answers are right here; those to images that are border for the most part rest on padding."""
    net = world.net_of(64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(net.linear.weight)
        images = torch.randint(0, 256, (64, 3, 4, 4)).byte()
    model = Normalised(net, [0.9, 0.1, 0.9], [0.05, 0.05, 0.05]).eval()
    labels = predict(model, images)
    assert len(labels.unique()) > 1
    attack = BadNets(size=1)
    sets = EvalSets.of(attack, ImageData(images, labels, tuple("0123456789")), "test")
    index = clean_positions(sets, attack.attack_labels(labels, 10))
    words = "find ACC 0.* in place of 1.0000 .*normalisation of cifar10"
    with pytest.raises(InteropError, match=words):
        write((model, sets, index, None), tmp_path / "record" / "x")
    assert not (tmp_path / "record").exists()


def test_folding_is_exact_where_nothing_is_padded(victim, world):
    model = Normalised(world.net_of(64).double(), [0.2, 0.3, 0.1], [0.5, 0.2, 0.9]).double().eval()
    state, _ = _renormalised(model.net.state_dict(), model, CIFAR10)
    theirs = PreActResNet18(3, 10).double().eval()
    theirs.load_state_dict(state)
    for net in (theirs, model.net):
        net.conv1.padding = (0, 0)
    images = torch.rand(4, 3, 32, 32).double()
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (CIFAR10.mean, CIFAR10.std))
    with torch.no_grad():
        wanted = model.net((images - model.mean) / model.std)
        assert torch.allclose(theirs((images - mean) / std), wanted, rtol=1e-6, atol=1e-6)


def test_a_certain_word_must_be_in_the_path(victim, tmp_path):
    assert "record" not in str(tmp_path)
    with pytest.raises(InteropError, match="the word record"):
        write(victim, tmp_path / "x")


def test_existing_folders_and_failures_leave_things_as_they_are(victim, tmp_path, monkeypatch):
    out = tmp_path / "record" / "x"
    out.mkdir(parents=True)
    with pytest.raises(SettingError, match="exists"):
        write(victim, out)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        write(victim, tmp_path / "record" / "y")
    assert [path.name for path in out.parent.iterdir()] == ["x"]


# --- the command ---


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bimask", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("bimask", run_name="__main__")
    return caught.value.code


def test_an_imported_victim_is_exported(victim, tmp_path, monkeypatch, capsys):
    from bimask.victims.imported import assemble

    model, sets, index, clean = victim
    imported = assemble(
        source="backdoorbench v2",
        net="preactresnet18",
        weights=(model, 64),
        dataset="cifar10",
        clean=sets.clean,
        triggered=sets.triggered,
        clean_index=index,
    )
    (tmp_path / "source").write_text("x")
    save_imported(imported, tmp_path / "imported", source=tmp_path / "source")
    out = tmp_path / "record" / "mine"
    assert command(monkeypatch, "export-backdoorbench", tmp_path / "imported", out) == 0
    assert f"{100 * imported.scores.attack_success:.1f}" in capsys.readouterr().out
    assert backdoorbench_scores(out / "attack_result.pt", clean) == pytest.approx(
        numbers(imported.scores)
    )


def test_a_victim_that_backdoorbench_cannot_have_is_refused(tmp_path, monkeypatch, capsys):
    hasty = {"image_size": 8, "width": 2, "epochs": 1, "min_clean_accuracy": 0, "min_attack_success": 0}
    spec = VictimSpec(**hasty)
    obtain_victim(spec, tmp_path)
    code = command(
        monkeypatch, "export-backdoorbench", tmp_path / spec.digest, tmp_path / "record" / "x"
    )
    assert code == 2
    assert re.fullmatch(
        r"error: BackdoorBench has no data set 'digits'; .*\.\n", capsys.readouterr().err
    )
    assert not (tmp_path / "record").exists()
