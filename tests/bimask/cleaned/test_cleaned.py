"""A backdoored model from outside the project: own factory, own pictures, 100 clean ones of them."""

import importlib.util
import json
import re
import shutil

import onnx
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from bimask import (
    MaskSet,
    PurifyConfig,
    VictimSpec,
    evaluate,
    fold,
    load_data,
    masked_forward,
    purify,
    train_victim,
)
from bimask.__main__ import app
from bimask.cleaned.before_after import before_after
from bimask.cleaned.export import export_onnx, export_program
from bimask.cleaned.folder import load_cleaned, save_cleaned
from bimask.defences.clipping.unit import UnitConfig
from bimask.defences.purify import defend
from bimask.errors import BimaskError, DataError, ExportError, SettingError, VictimError
from bimask.inspection.suspect import CleanImages, Suspect, load_suspect, read_clean
from bimask.nets import build_net

FACTORY = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        layers, channels = [], 3
        for width, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images):
        return self.head(self.features(images))

def make(num_classes):
    return Mine(num_classes)
"""


def write_pictures(data, folder, *, most=None):
    for label, name in enumerate(data.classes):
        (folder / name).mkdir(parents=True)
        for row, picture in enumerate(data.images[data.labels == label][:most]):
            Image.fromarray(picture[0].numpy()).save(folder / name / f"{row:04d}.png")


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A folder as a user has it, and the victim behind it, which the user does not know."""
    home = tmp_path_factory.mktemp("own")
    (home / "mine.py").write_text(FACTORY)
    splits = load_data("digits", image_size=16)
    write_pictures(splits.train, home / "all" / "train")
    write_pictures(splits.test, home / "all" / "test")
    write_pictures(splits.train.clean_subset(10, seed=3), home / "clean")
    victim = train_victim(
        VictimSpec(dataset=f"imagefolder:{home / 'all'}", net=f"{home / 'mine.py'}:make", epochs=25)
    )
    save_file(
        {k: v.contiguous() for k, v in victim.model.net.state_dict().items()}, home / "w.safetensors"
    )
    # the profile alone leaves a tenth of the triggers in this net
    settings = PurifyConfig.profile(
        "robust", precision="float32", clean_weight=3, initial_selection=0.9
    )
    (home / "best.yaml").write_text(yaml.safe_dump({"purify": settings.model_dump(), "seed": 0}))
    return home, victim


def command(home, *words, **options):
    given = {"--model": "w.safetensors", "--net": "mine.py:make", "--clean": "clean"}
    given |= {"--config": "best.yaml"} | options
    pairs = [(name, value) for name, value in given.items() if value is not None]
    flat = [str(home / v) if (home / str(v)).exists() else str(v) for pair in pairs for v in pair]
    flat = [f"{home / 'mine.py'}:make" if word == "mine.py:make" else word for word in flat]
    return CliRunner().invoke(app, ["purify", *flat, *words])


@pytest.fixture(scope="session")
def cleaned(own, tmp_path_factory):
    home, _ = own
    out = tmp_path_factory.mktemp("cleaned") / "cleaned"
    done = command(home, "--inverse", **{"--out": out, "--held-back": "0"})
    assert done.exit_code == 0, done.output
    return out, done.output


def users_net(home, classes=10):
    spec = importlib.util.spec_from_file_location("users_own", home / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Mine(classes).eval()


class InUnits(nn.Module):
    """The user's net takes images in [0, 1] as they are."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)


def test_the_users_own_class_loads_the_file_and_the_backdoor_is_gone(own, cleaned):
    home, victim = own
    net = users_net(home)
    net.load_state_dict(load_file(cleaned[0] / "model.safetensors"), strict=True)
    test = victim.eval_sets(victim.spec.load_data(), "test")
    before, after = victim.scores["test"], evaluate(InUnits(net), test)
    assert before.attack_success > 0.9
    assert after.attack_success < 0.1
    assert before.clean_accuracy - after.clean_accuracy < 0.05


def test_the_cleaned_weights_are_the_masked_suspects(own, cleaned):
    home, victim = own
    config = PurifyConfig.from_yaml(home / "best.yaml")
    masks = MaskSet.from_tensors(
        load_file(cleaned[0] / "masks.safetensors"), sharpness=config.sharpness
    )
    images = victim.spec.load_data().test.floats(slice(0, 200))
    expected = masked_forward(victim.model, masks, images)
    torch.testing.assert_close(
        load_cleaned(cleaned[0], own_code=True).model(images), expected, atol=1e-5, rtol=1e-5
    )
    manifest = json.loads((cleaned[0] / "manifest.json").read_text())
    assert manifest["parity"]["largest_difference"] <= 1e-5
    twin = users_net(home)
    twin.load_state_dict(load_file(cleaned[0] / "inverse.safetensors"), strict=True)
    inverse = masked_forward(victim.model, masks, images, inverse=True)
    torch.testing.assert_close(InUnits(twin)(images), inverse, atol=1e-4, rtol=1e-4)


def test_the_keys_are_those_of_the_suspects_file(own, cleaned):
    assert set(load_file(cleaned[0] / "model.safetensors")) == set(load_file(own[0] / "w.safetensors"))


def test_nothing_is_claimed_of_an_unknown_trigger(cleaned):
    out, printed = cleaned
    page = (out / "report.html").read_text()
    assert "none is\nclaimed" in page
    assert "ASR" not in printed
    assert "ASR" not in page
    assert not {"before", "after"} & json.loads((out / "manifest.json").read_text()).keys()


def test_the_report_fetches_nothing_and_shows_pictures(cleaned):
    page = (cleaned[0] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 20
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page


def test_the_manifest_tells_accuracy_and_blind_evidence(cleaned):
    seen = json.loads((cleaned[0] / "manifest.json").read_text())["on_clean_images"]
    assert seen["before"]["accuracy"] > 0.9
    assert seen["before"]["agreement"] == 1
    assert seen["before"]["favourite_share"] > 0.6
    assert seen["after"]["accuracy"] > 0.9
    assert seen["twin"]["favourite_share"] > 0.6, "the twin keeps a short cut"
    assert seen["twin"]["accuracy"] < 0.5, "and drops the clean task"


def test_an_own_net_is_not_run_unless_trusted(cleaned):
    with pytest.raises(VictimError, match="trust"):
        load_cleaned(cleaned[0])


def test_a_changed_file_is_refused(cleaned, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(cleaned[0], folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(VictimError, match="changed"):
        load_cleaned(folder, own_code=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("net"),
        lambda m: m["net"].update(net="nothing"),
        lambda m: m["net"].update(net_sha256="0" * 64),
        lambda m: m.update(classes=["a"]),
        lambda m: m.update(gates=["features.0"]),
        lambda m: m.update(image=[3, "x"]),
        lambda m: m["files"].update({"../../etc/passwd": "0"}),
    ],
)
def test_an_edited_manifest_is_refused(cleaned, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(cleaned[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BimaskError):
        load_cleaned(folder, own_code=True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"--model": "no.safetensors"}, BimaskError, "no.safetensors"),
        ({"--model": "mine.py"}, BimaskError, "safetensors"),
        ({"--clean": "nowhere"}, DataError, "no folder"),
        ({"--net": "nothing:"}, SettingError, "nothing"),
        ({"--net": None}, SettingError, "--model, --net and --clean"),
        ({"--mean": "0.5"}, SettingError, "give both"),
        ({"--mean": "a,b"}, SettingError, "one a channel"),
        ({"--mean": "0.5", "--std": "0.5"}, SettingError, "3 values"),
        ({"--classes": 7}, VictimError, "do not fit"),
        ({"--config": "models:/a@champion"}, SettingError, "study.purify"),
        ({"--channels": 1}, SettingError, "takes 3; give --channels 3"),
        ({"--image-size": "16x"}, SettingError, "such as 32, or 48x32"),
    ],
)
def test_bad_input_writes_nothing(own, tmp_path, options, error, says):
    out = tmp_path / "out"
    done = command(own[0], **{"--out": out, **options})
    assert isinstance(done.exception, error)
    assert says in " ".join(str(done.exception).split())
    assert list(tmp_path.iterdir()) == []


# --- pictures ---


def test_pictures_without_class_folders_have_no_labels(own, tmp_path):
    source = own[0] / "clean" / "3"
    for path in source.iterdir():
        shutil.copy(path, tmp_path)
    clean, names = read_clean(tmp_path)
    assert clean.labels is None
    assert names is None
    assert clean.images.shape == (10, 3, 16, 16)
    with pytest.raises(SettingError, match="--classes"):
        load_suspect(own[0] / "w.safetensors", f"{own[0] / 'mine.py'}:make", tmp_path)
    suspect = load_suspect(own[0] / "w.safetensors", f"{own[0] / 'mine.py'}:make", tmp_path, classes=10)
    assert len(suspect.classes) == 10


def test_class_folders_are_labels_in_the_order_of_their_names(own):
    clean, names = read_clean(own[0] / "clean", channels=1)
    assert names == tuple("0123456789")
    assert clean.images.shape == (100, 1, 16, 16)
    assert clean.labels.tolist() == [label for label in range(10) for _ in range(10)]


def test_pictures_of_several_sizes_need_one(tmp_path):
    Image.effect_noise((8, 8), 50).save(tmp_path / "a.png")
    Image.effect_noise((8, 9), 50).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="sizes"):
        read_clean(tmp_path)
    assert read_clean(tmp_path, image_size=4)[0].images.shape == (2, 3, 4, 4)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.png"):
        read_clean(tmp_path)


# --- parity, and what cannot be folded ---


def suspect_with(net, images):
    model = build_net(
        net, in_channels=3, num_classes=4, width=8, image_size=16, mean=[0.5] * 3, std=[0.5] * 3
    ).eval()
    from bimask.nets.spec import NetSpec

    return Suspect(NetSpec(net=net, width=8), model, CleanImages(images, None), tuple("abcd"), "0" * 64)


@pytest.fixture
def some_images():
    return torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


def quick(suspect):
    config = PurifyConfig(
        initialise_rounds=1, minimise_rounds=1, select_rounds=1, inner_steps=1, mask_lr=0.3
    )
    images = suspect.clean.floats()
    result = purify(suspect.model, images, config)
    return result, before_after(
        suspect.model, result.model(), images, None, twin=result.model(inverse=True), config=config
    )


def test_a_transformers_gates_are_modules_of_their_own(some_images, tmp_path):
    suspect = suspect_with("vit_tiny", some_images)
    result, looked = quick(suspect)
    manifest = save_cleaned(tmp_path / "out", suspect, result, looked, seed=0)
    assert len(manifest["gates"]) == len(result.masks.sites)
    read = load_cleaned(tmp_path / "out")
    images = suspect.clean.floats()
    torch.testing.assert_close(
        read.model(images), masked_forward(suspect.model, result.masks, images), atol=1e-5, rtol=1e-5
    )
    assert "no labels" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("granularity", ["channel", "position"])
def test_bounds_of_activations_are_saved_listed_loaded_and_exported(some_images, tmp_path, granularity):
    suspect = suspect_with("small_resnet", some_images)
    images = suspect.clean.floats()
    config = UnitConfig(iterations=2, granularity=granularity, deviations=0.5, accuracy_drop=1)
    result = defend(suspect.model, images, config, labels=torch.arange(12) % 4)
    looked = before_after(suspect.model, result.model(), images, None)
    manifest = save_cleaned(tmp_path / "out", suspect, result, looked, seed=0)
    assert len(manifest["inserted"]) == len(result.tensors) == 7
    assert set(manifest["inserted"].values()) == {"bound"}
    assert manifest["gates"] == []
    read = load_cleaned(tmp_path / "out")
    expected = result.model()(images)
    assert torch.equal(read.model(images), expected)
    assert not torch.allclose(expected, suspect.model(images), atol=1e-3)
    if granularity == "position":
        return
    export_onnx(read.model, images, tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Min") == 7
    export_program(read.model, images, tmp_path / "model.pt2")


@pytest.mark.parametrize("inserted", [{"net.linear": "bound"}, {"linear": "magic"}, {"a.b": "bound"}])
def test_a_manifest_that_lists_other_modules_is_refused(some_images, tmp_path, inserted):
    suspect = suspect_with("small_resnet", some_images)
    result, looked = quick(suspect)
    save_cleaned(tmp_path / "out", suspect, result, looked, seed=0)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inserted": inserted}))
    with pytest.raises(VictimError, match="do not fit"):
        load_cleaned(tmp_path / "out")


def test_a_fold_that_answers_otherwise_is_refused_and_leaves_nothing(
    some_images, tmp_path, monkeypatch
):
    suspect = suspect_with("small_resnet", some_images)
    result, looked = quick(suspect)

    def off(model, masks, **options):
        folded = fold(model, masks, **options)
        with torch.no_grad():
            next(m for m in folded.modules() if isinstance(m, nn.Linear)).bias += 1e-3
        return folded

    monkeypatch.setattr("bimask.cleaned.folder.fold", off)
    with pytest.raises(ExportError, match="nothing was written"):
        save_cleaned(tmp_path / "out", suspect, result, looked, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_cleaned_model_is_exported_by_command(own, cleaned, tmp_path):
    out = tmp_path / "model.pt2"
    clean = str(own[0] / "clean")
    done = CliRunner().invoke(
        app, ["export", str(cleaned[0]), str(out), "--images", clean, "--compact", "--trust-code"]
    )
    assert done.exit_code == 0, done.exception
    assert "100 images" in done.output
    assert "0 of 208 channels removed; 0 are exactly zero" in done.output  # the masks are soft
    images = read_clean(own[0] / "clean")[0].floats()
    torch.testing.assert_close(
        torch.export.load(out).module()(images),
        load_cleaned(cleaned[0], own_code=True).model(images),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_model_that_gives_every_picture_one_class_is_refused(own, tmp_path):
    """As a net does whose normalisation was forgotten: a defence would keep those answers."""
    home, _ = own
    weights = load_file(home / "w.safetensors")
    last = [name for name, value in weights.items() if value.shape == (10,)][-1]
    weights[last][3] += 1e4
    save_file(weights, tmp_path / "one.safetensors")
    done = command(home, **{"--model": tmp_path / "one.safetensors", "--out": tmp_path / "out"})
    assert isinstance(done.exception, SettingError)
    assert "100 clean pictures that it was asked the class '3', but they are of 10 classes" in str(
        done.exception
    )
    assert not (tmp_path / "out").exists()
