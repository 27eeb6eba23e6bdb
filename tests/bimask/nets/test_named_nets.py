"""Nets by the name of a library's model or of the user's own factory."""

import importlib.util
import pickle
import sys

import cloudpickle
import pytest
import torch
from torch import nn

from bimask.errors import SettingError
from bimask.nets import build_net, check_net, is_own
from bimask.nets.named import source_of

OWN = """
from dataclasses import dataclass
from torch import nn


@dataclass
class Plan:
    channels: "int"


class Own(nn.Module):
    def __init__(self, plan, channels, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, plan.channels, 3, padding=1)
        self.linear = nn.Linear(plan.channels, classes)

    def forward(self, x):
        return self.linear(self.conv(x).relu().mean((2, 3)))


def make(num_classes, in_channels=1):
    return Own(Plan(6), in_channels, num_classes)


def grey(num_classes):
    return Own(Plan(4), 1, num_classes)


def wide(num_classes, in_channels, width=3, image_size=None):
    assert image_size == 8
    return Own(Plan(width), in_channels, num_classes)


def any_keyword(**settings):
    assert set(settings) == {"num_classes"}
    return Own(Plan(4), 1, **{"classes": settings["num_classes"]})


def ten_classes():
    return Own(Plan(4), 1, 10)


def features(num_classes):
    return nn.Conv2d(1, num_classes, 3)


def no_net(num_classes):
    return "a net"


def two_answers(num_classes):
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    return Two()


def failing(num_classes):
    raise RuntimeError("no GPU here")


def needy(num_classes, depth):
    return Own(Plan(depth), 1, num_classes)


def training_only(num_classes):
    return grey(num_classes).eval()


number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("outside") / "own.py"
    path.write_text(OWN)
    return path


def build(name, channels=1, classes=4, size=8, width=None):
    return build_net(
        name,
        in_channels=channels,
        num_classes=classes,
        image_size=size,
        width=width,
        mean=[0.0] * channels,
        std=[1.0] * channels,
    )


# --- torchvision and timm ---


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvisions_models_take_any_channels_and_classes(name, channels):
    model = build(f"torchvision:{name}", channels=channels, classes=7, size=32).eval()
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)


def test_only_the_first_convolution_changes_for_grey_images():
    grey, colour = (build("torchvision:resnet18", channels=c, size=32) for c in (1, 3))
    shapes = {key: value.shape for key, value in colour.net.state_dict().items()}
    changed = {key for key, value in grey.net.state_dict().items() if value.shape != shapes[key]}
    assert changed == {"conv1.weight"}
    assert grey.net.conv1.stride == colour.net.conv1.stride == (2, 2)


def test_torchvisions_transformers_take_the_size_of_the_images():
    model = build("torchvision:vit_b_32", channels=3, size=64).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize("name", ["googlenet"])
def test_models_with_a_second_answer_give_one(name):
    model = build(f"torchvision:{name}", channels=3, size=64).train()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize("name", ["torchvision:resnet999", "torchvision:fasterrcnn_resnet50_fpn"])
def test_torchvision_lacks_a_model(name):
    with pytest.raises(SettingError, match=r"torchvision has no classification model .*resnet50"):
        check_net(name)


def test_images_too_small_for_a_model_are_refused():
    with pytest.raises(SettingError, match=r"'torchvision:alexnet' cannot take images \(3, 8, 8\)"):
        build("torchvision:alexnet", channels=3)


def test_librarys_models_have_no_width():
    with pytest.raises(SettingError, match="'torchvision:resnet18' has no `width`.*width=16"):
        build("torchvision:resnet18", width=16)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is there")
def test_without_timm_the_extra_is_named():
    check_net("timm:resnet18")
    with pytest.raises(
        SettingError, match=r"needs timm, which is not installed; pip install 'bimask\["
    ):
        build("timm:resnet18")


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("vit_tiny_patch16_224", 32)])
def test_timms_models_take_channels_classes_and_size(name, size):
    pytest.importorskip("timm")
    model = build(f"timm:{name}", channels=1, classes=7, size=size).eval()
    assert model(torch.rand(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet999", "hf-hub:timm/resnet18.a1_in1k"])
def test_timm_downloads_nothing(name):
    pytest.importorskip("timm")
    with pytest.raises(SettingError, match="timm has no model"):
        build(f"timm:{name}", size=32)


# --- own factories ---


@pytest.mark.parametrize(
    ("factory", "channels", "width", "size"),
    [
        ("make", 3, None, 8),
        ("make", 1, None, 11),
        ("grey", 1, None, 8),
        ("wide", 2, 5, 8),
        ("any_keyword", 1, None, 8),
    ],
)
def test_an_own_factory_gets_what_it_takes(file, factory, channels, width, size):
    model = build(f"{file}:{factory}", channels=channels, width=width, size=size)
    assert type(model.net).__name__ == "Own"
    assert model(torch.rand(3, channels, size, size)).shape == (3, 4)
    if width is not None:
        assert model.net.conv.out_channels == width


def test_a_factory_without_classes_must_make_as_many(file):
    build(f"{file}:ten_classes", classes=10)
    with pytest.raises(SettingError, match=r"logits \(1, 4\), but got \(1, 10\)"):
        build(f"{file}:ten_classes")


def test_a_module_is_imported_by_its_name(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    model = build("own:make", channels=3)
    assert model(torch.rand(3, 3, 8, 8)).shape == (3, 4)
    assert source_of("own:make") == file
    assert build("torchvision.models:resnet18", channels=3, size=32).net.fc.out_features == 4


def test_the_mode_of_a_net_is_left_to_its_factory(file):
    assert build(f"{file}:make").net.training
    assert not build(f"{file}:training_only").net.training


def test_the_same_seed_gives_the_same_own_net(file):
    one, two = (torch.manual_seed(1) and build(f"{file}:make") for _ in range(2))
    assert torch.equal(one.net.conv.weight, two.net.conv.weight)


def test_a_net_from_a_file_travels_by_value(file):
    """To Ray's processes, which cannot import the file."""
    model = build(f"{file}:make")
    assert type(model.net).__module__ not in sys.modules
    other = pickle.loads(cloudpickle.dumps(model))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(other(images), model(images))


def test_what_is_own():
    assert is_own("a.b:make")
    assert is_own("some/file.py:make")
    assert not any(map(is_own, ["small_resnet", "torchvision:resnet18", "timm:resnet18"]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DIR/missing.py:make", r"no file .*missing\.py"),
        ("DIR/own.py:absent", r"no factory 'absent'.*make, grey"),
        ("DIR/own.py:number", "no factory 'number'"),
        ("DIR/own.py:", "Unknown net"),
        ("DIR/own.py", "Unknown net.*file.py:factory"),
        (":make", "Unknown net"),
        ("some thing:make", "neither package.module:factory nor"),
        ("absent_package.module:make", r"cannot be imported \(ModuleNotFoundError"),
        ("DIR/own.py:no_net", "must be a torch.nn.Module, but its factory gave str"),
        ("DIR/own.py:two_answers", r"logits \(1, 4\): .*tuple"),
        ("DIR/own.py:features", r"logits \(1, 4\): .*\(1, 4, 6, 6\)"),
        ("DIR/own.py:failing", r"num_classes=4 \(RuntimeError: no GPU here\)"),
        ("DIR/own.py:needy", "TypeError.*'depth'"),
        ("DIR/broken.py:make", "cannot be imported.*SyntaxError"),
        ("DIR/needs.py:make", "cannot be imported.*absent_blocks.*PYTHONPATH"),
    ],
)
def test_a_broken_own_net_gets_one_sentence(file, name, words):
    (file.parent / "broken.py").write_text("def make(:\n")
    (file.parent / "needs.py").write_text("import absent_blocks\n")
    with pytest.raises(SettingError, match=words) as caught:
        build(name.replace("DIR", str(file.parent)))
    assert "\n" not in str(caught.value)


def test_a_width_that_is_not_taken_is_refused(file):
    with pytest.raises(SettingError, match="has no `width`, but got width=8"):
        build(f"{file}:make", width=8)


def test_wrong_channels_are_refused(file):
    with pytest.raises(SettingError, match=r"grey' cannot take images \(3, 8, 8\)"):
        build(f"{file}:grey", channels=3)


def test_a_name_is_checked_without_running_code(file):
    bomb = file.parent / "bomb.py"
    bomb.write_text("raise SystemExit('run')\n")
    check_net(f"{bomb}:make")
    check_net("absent_package.module:make")


def test_nets_of_linear_layers_have_nothing_to_mask(tmp_path):
    from bimask.errors import MaskMismatchError
    from bimask.masking.masks import MaskSet

    path = tmp_path / "flat.py"
    path.write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    model = build(f"{path}:make")
    assert isinstance(model.net[1], nn.Linear)
    with pytest.raises(MaskMismatchError, match="no Conv2d"):
        MaskSet.for_model(model)
