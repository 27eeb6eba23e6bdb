"""Models of the user's own: a factory in a file outside the project, weights, an image folder."""

import json
import os
import shutil
import zipfile
from collections import Counter

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from bimask import load_data
from bimask.errors import SettingError, VictimError, VictimRefusedError
from bimask.inspection.suspect import load_suspect
from bimask.metrics import evaluate
from bimask.nets.weights import file_sha256, load_weights, read_weights
from bimask.victims import VictimSpec, load_victim, obtain_victim, train_victim

FACTORY = """
from torch import nn


def make(num_classes, in_channels=3, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, num_classes),
    )


class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3)
        self.same = self.conv

    def forward(self, x):
        return self.same(x).mean((2, 3))


def tied(num_classes):
    return Tied(num_classes)
"""
NO_BOUNDS = {"min_clean_accuracy": 0, "min_attack_success": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder outside the project: pictures of four digits, a factory, a training of it."""
    home = tmp_path_factory.mktemp("home")
    (home / "own.py").write_text(FACTORY)
    digits = load_data("digits", image_size=12)
    for split, most in (("train", 60), ("test", 20)):
        data = getattr(digits, split)
        for label in range(4):
            folder = home / "pictures" / split / f"digit-{label}"
            folder.mkdir(parents=True)
            for row, picture in enumerate(data.images[data.labels == label][:most]):
                Image.fromarray(picture[0].numpy()).save(folder / f"{row}.png")
    return home


def spec_of(home, **changes):
    return VictimSpec(
        **{
            "dataset": f"imagefolder:{home / 'pictures'}",
            "net": f"{home / 'own.py'}:make",
            "epochs": 12,
            "batch_size": 32,
        }
        | changes
    )


@pytest.fixture(scope="module")
def trained(home):
    """A victim whose net is the user's factory, trained here."""
    return train_victim(spec_of(home))


@pytest.fixture(scope="module")
def weights(home, trained):
    path = home / "suspect.safetensors"
    save_file({k: v.contiguous() for k, v in trained.model.net.state_dict().items()}, path)
    return path


@pytest.fixture
def suspect(home, weights):
    return spec_of(home, weights=str(weights))


# --- own nets that are trained here ---


def test_an_own_net_is_trained_as_any_other(trained):
    assert trained.scores["val"].clean_accuracy > 0.8
    assert trained.scores["val"].attack_success > 0.5
    assert trained.classes == ("digit-0", "digit-1", "digit-2", "digit-3")
    assert trained.model.net[0].out_channels == 8


def test_own_nets_take_images_as_they_are_unless_told_otherwise(home, trained):
    assert trained.model.mean.flatten().tolist() == [0, 0, 0]
    assert trained.model.std.flatten().tolist() == [1, 1, 1]
    train = trained.spec.load_data().train
    by_data = spec_of(home, normalise="dataset").fresh_net(train)
    pixels = train.floats().double()
    assert by_data.mean.flatten().tolist() == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-5)
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    by_hand = spec_of(home, normalise=given).fresh_net(train)
    assert by_hand.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    of_nets = spec_of(home, net="small_resnet", width=2)
    assert of_nets.fresh_net(train).mean.flatten().tolist() != [0, 0, 0]
    plain = spec_of(home, net="small_resnet", width=2, normalise="none")
    assert plain.fresh_net(train).mean.flatten().tolist() == [0, 0, 0]


def test_statistics_of_other_channels_are_refused(home, trained):
    spec = spec_of(home, normalise={"mean": [0.5], "std": [0.2]})
    with pytest.raises(SettingError, match="`normalise` needs 3 values"):
        spec.fresh_net(trained.spec.load_data().train)


def test_a_factory_that_takes_a_width_gets_it(home, trained):
    net = spec_of(home, width=3).fresh_net(trained.spec.load_data().train).net
    assert net[0].out_channels == 3


# --- suspects: given weights ---


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested.pth", "parallel.pt"])
def test_weights_make_a_victim_without_training(home, trained, weights, tmp_path, kind):
    path = tmp_path / f"weights.{kind}"
    state = trained.model.net.state_dict()
    if kind == "safetensors":
        shutil.copy(weights, path)
    elif kind == "nested.pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "parallel.pt":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    epochs = []
    victim = obtain_victim(
        spec_of(home, weights=str(path)), tmp_path / "victims", on_epoch=epochs.append
    )
    assert epochs == []
    assert victim.scores == trained.scores
    images = victim.spec.load_data().test.floats(slice(0, 8))
    torch.testing.assert_close(victim.model(images), trained.model(images))


def test_a_suspect_is_loaded_by_its_digest_also_without_the_weights(suspect, weights, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(weights, copy)
    spec = suspect.model_copy(update={"weights": str(copy)})
    assert spec.digest == suspect.digest
    made = obtain_victim(spec, tmp_path)
    copy.unlink()
    again = obtain_victim(suspect, tmp_path)
    assert again.scores == made.scores
    assert [path.name for path in tmp_path.iterdir()] == [suspect.digest]
    sets = again.eval_sets(again.spec.load_data(), "test")
    assert evaluate(again.model, sets) == made.scores["test"]


def test_the_digest_is_that_of_the_contents(home, suspect, weights, tmp_path):
    elsewhere = tmp_path / "other_name.py"
    shutil.copy(home / "own.py", elsewhere)
    assert spec_of(home, weights=str(weights), net=f"{elsewhere}:make").digest == suspect.digest
    elsewhere.write_text(FACTORY + "\n# changed\n")
    assert spec_of(home, weights=str(weights), net=f"{elsewhere}:make").digest != suspect.digest
    assert spec_of(home).digest != suspect.digest
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    assert spec_of(home, weights=str(other)).digest != suspect.digest


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "212b461b4ebaa456"),
        ({"net": "preactresnet18"}, "6c5abe54f0b5cc01"),
        (
            {"image_size": 12, "width": 8, "epochs": 8, "attack": {"name": "blended"}},
            "51e997f4170bf37e",
        ),
    ],
)
def test_specs_keep_the_digests_that_they_had_before_there_were_suspects(settings, digest):
    spec = VictimSpec(**settings)
    assert spec.digest == digest
    assert not {"weights", "weights_sha256", "net_sha256", "normalise"} & set(spec.model_dump())


def test_the_default_width_is_small_for_our_nets_and_the_published_one_for_others():
    assert VictimSpec().width == VictimSpec(net="preactresnet18").width == 16
    assert VictimSpec(net="preactresnet18", width=None).width is None
    assert VictimSpec(net="vgg19_bn").width is None


def test_a_suspect_with_another_trigger_is_refused_with_its_numbers(home, weights, tmp_path):
    spec = spec_of(home, weights=str(weights), attack={"name": "badnets", "target": 1})
    with pytest.raises(
        VictimRefusedError, match=r"ASR 0\.\d+ on val.*give the trigger of these weights"
    ):
        obtain_victim(spec, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_trigger_that_is_made_in_training_is_not_known_for_given_weights(home, weights):
    spec = spec_of(home, weights=str(weights), attack={"name": "wanet"})
    with pytest.raises(SettingError, match="'wanet' is made while a victim is"):
        train_victim(spec)


def test_weights_for_normalised_images_are_told_apart(home, weights):
    spec = spec_of(home, weights=str(weights), normalise={"mean": [9.0] * 3, "std": [0.1] * 3})
    with pytest.raises(VictimRefusedError, match=r"normalise|trigger"):
        train_victim(spec)


def test_tied_weights_can_be_saved(home, tmp_path):
    spec = spec_of(home, net=f"{home / 'own.py'}:tied", epochs=1, **NO_BOUNDS)
    victim = obtain_victim(spec, tmp_path)
    assert torch.equal(victim.model.net.conv.weight, victim.model.net.same.weight)


# --- whose code is run ---


def test_own_code_is_run_only_when_allowed(suspect, tmp_path):
    obtain_victim(suspect, tmp_path)
    with pytest.raises(VictimError, match=r"built by the code .*own\.py:make.*--trust-code"):
        load_victim(tmp_path / suspect.digest)
    assert load_victim(tmp_path / suspect.digest, own_code=True).spec == suspect


def test_a_foreign_manifest_imports_nothing(suspect, tmp_path):
    folder = tmp_path / suspect.digest
    obtain_victim(suspect, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "evil.py").write_text("import pathlib\npathlib.Path('RUN').touch()\n")
    for net in (f"{folder / 'evil.py'}:make", "evil_package.sub:make"):
        manifest["spec"] |= {"net": net, "net_sha256": None}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(VictimError, match="may do anything"):
            load_victim(folder)


def test_changed_code_is_refused(home, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(FACTORY)
    spec = spec_of(home, net=f"{file}:make", epochs=1, **NO_BOUNDS)
    obtain_victim(spec, tmp_path / "victims")
    file.write_text(FACTORY.replace("ReLU", "SiLU"))
    with pytest.raises(VictimError, match="changed since the victim was made"):
        load_victim(tmp_path / "victims" / spec.digest, own_code=True)


# --- files that are of no use ---


def test_missing_files_are_named_when_the_spec_is_read(home):
    for changes in ({"weights": "no/such.pt"}, {"net": "no/such.py:make"}):
        with pytest.raises(ValidationError, match=r"no/such\.p"):
            spec_of(home, **changes)


def test_weights_that_changed_are_refused(home, weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    shutil.copy(weights, path)
    spec = spec_of(home, weights=str(path))
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(VictimError, match="the file changed"):
        train_victim(spec)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "0.weight"}, r"do not fit.*Missing.*0\.weight"),
        (lambda s: s | {"9.weight": torch.zeros(1)}, r"do not fit.*Unexpected.*9\.weight"),
        (lambda s: s | {"0.weight": torch.zeros(2, 3, 3, 3)}, "do not fit.*size mismatch"),
    ],
)
def test_weights_of_another_net_are_refused(trained, tmp_path, content, words):
    path = tmp_path / "weights.safetensors"
    state = {key: value.contiguous() for key, value in trained.model.net.state_dict().items()}
    save_file(content(state), path)
    with pytest.raises(VictimError, match=words) as caught:
        load_weights(trained.spec.fresh_net(trained.spec.load_data().train).net, path)
    assert "\n" not in str(caught.value)


class Calls:
    """A pickle of it calls `function(*arguments)` when it is read without care."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE = Calls(open, "RUN", "w")
STATE = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * 50_000_000)


def flipped(path):
    """One bit of a weight."""
    torch.save(STATE, path)
    data = bytearray(path.read_bytes())
    data[data.index(STATE["0.weight"].numpy().tobytes()) + 2] ^= 64
    path.write_bytes(data)


def huge(path):
    """A tensor of a petabyte that the file has four bytes of."""
    torch.save({"0.weight": torch.zeros(1).expand(2**48)}, path)


def before_zip(content):
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("w.onnx", lambda p: p.write_bytes(b"x"), "nor safetensors, nor a pickle; get another copy"),
        ("w.safetensors", lambda p: p.write_bytes(b"not tensors"), "no whole file of torch.save"),
        ("w.safetensors", lambda p: p.write_bytes(b"\2" + b"\0" * 7 + b"{x"), "as plain tensors"),
        ("w.safetensors", lambda p: save_file({}, p), "hold nothing"),
        ("w.pt", lambda p: p.write_bytes(b"not a pickle"), "no whole file of torch.save"),
        ("w.pt", lambda p: p.write_bytes(b""), "no whole file of torch.save"),
        ("w.pt", lambda p: p.write_bytes(b"PK\3\4 and no more"), "not a whole file of torch.save"),
        ("w.pt", lambda p: torch.save(HOSTILE, p), r"asks for '\w+\.open' .* `net.state_dict\(\)`"),
        ("w.pt", lambda p: torch.save({"model": STATE, "optimizer": HOSTILE}, p), "asks for"),
        ("w.pt", before_zip(HOSTILE), "asks for"),
        ("w.pt", before_zip({"model": STATE, "x": Calls(bytearray, 2**50)}), "asks for .*bytearray"),
        ("w.pt", lambda p: torch.save({"x": Calls(bytearray, 2**33)}, p), "asks for .*bytearray"),
        ("w.pt", lambda p: torch.save({"x": Calls(torch.Tensor, 2**20, 2**20)}, p), "torch.Tensor"),
        ("w.pt", lambda p: torch.save({"x": torch.ones(2).to("meta")}, p), "asks for .*meta_tensor"),
        ("w.pt", lambda p: torch.save({"x": torch.ones(2).to_sparse()}, p), "asks for .*sparse"),
        ("w.pt", lambda p: torch.save(torch.nn.Linear(1, 1), p), "asks for .*Linear"),
        ("w.pt", compressed, "would become 50000000"),
        ("w.pt", flipped, "damaged"),
        ("w.pt", huge, r"real tensors, but hold '0.weight': torch.float32 \(281474976710656,\)"),
        ("w.pt", lambda p: torch.save({7: torch.zeros(1)}, p), "hold 7: torch.float32"),
        (
            "w.safetensors",
            lambda p: save_file({"x": torch.ones(2, dtype=torch.complex64)}, p),
            "complex",
        ),
        ("w.pt", os.mkfifo, "no file of weights"),
        ("w.pt", lambda p: torch.save([torch.zeros(1)], p), "hold list"),
        ("w.pt", lambda p: torch.save({"lr": 0.1}, p), "hold 'lr': float"),
        ("w.pt", lambda p: None, "no file of weights"),
    ],
)
def test_a_file_without_a_state_dict_gets_one_sentence(tmp_path, monkeypatch, name, write, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(VictimError, match=words) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "RUN").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_keeps_beside_weights_is_read(tmp_path, zipped):
    weight = torch.nn.Parameter(torch.zeros(2))
    descent = torch.optim.Adam([weight])
    weight.sum().backward()
    descent.step()
    beside = {"milestones": Counter({3: 1}), "shape": torch.Size([3]), "type": torch.float32}
    beside |= {"device": torch.device("cpu"), "seen": {1, 2}}
    content = {"epoch": 3, "state_dict": STATE, "optimizer": descent.state_dict(), **beside}
    torch.save(content, tmp_path / "last.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "last.pth")
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("value", [torch.nan, -1.0])
def test_weights_that_answer_with_no_numbers_are_refused(home, weights, tmp_path, value):
    state = load_file(weights)
    name = next(name for name in state if name.endswith("running_var"))
    save_file(state | {name: torch.full_like(state[name], value)}, tmp_path / "w.safetensors")
    with pytest.raises(VictimError, match="NaN or infinite; get another copy"):
        load_suspect(tmp_path / "w.safetensors", f"{home / 'own.py'}:make", home / "pictures" / "test")


def test_names_that_steer_a_terminal_are_shown_harmless(trained, tmp_path):
    state = {key: value.contiguous() for key, value in trained.model.net.state_dict().items()}
    save_file(state | {"a\n\x1b[31mb": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(VictimError, match=r"do not fit.*a \?\[31mb") as caught:
        load_weights(
            trained.spec.fresh_net(trained.spec.load_data().train).net, tmp_path / "w.safetensors"
        )
    assert "\x1b" not in str(caught.value)


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf")
    os.mkfifo(tmp_path / "pipe")  # would be waited for without end
    for name in ("b", "pipe", "."):
        with pytest.raises(VictimError, match="Cannot read"):
            file_sha256(tmp_path / name)
