import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import DualGraphModule

from bimask.errors import InteropError
from bimask.interop import load_imported, read_checkpoint, save_imported
from bimask.interop.trojai import resave
from bimask.interop.trojai_worker import Refused, layer_class, names_in

NET = "shufflenet_v2_x0_5"


def example(folder, number, pixels, label):
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / f"{number}.json").write_text(json.dumps(label))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_model(NET, num_classes=4).eval()


@pytest.fixture
def model(tmp_path, net):
    """`id-00000001/` with a pickled module, six clean examples and five poisoned ones."""
    folder = tmp_path / "id-00000001"
    folder.mkdir()
    torch.save(net, folder / "model.pt")
    (folder / "reduced-config.json").write_text(
        json.dumps({"model_architecture": f"classification:{NET}", "source_dataset": "x"})
    )
    random = np.random.default_rng(0)
    for number in range(6):
        example(
            folder / "clean-example-data", number, random.integers(0, 256, (32, 32, 3), np.uint8), 1
        )
        if number:
            labels = {"clean_label": number % 4, "poisoned_label": 1}  # number 1 and 5 have it already
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            example(folder / "poisoned-example-data", number, pixels, labels)
    return folder


def by_hand(net, folder, key):
    """Right answers to the examples, from [0, 1] without normalisation."""
    right = []
    for path in sorted(folder.glob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
        label = json.loads(path.with_suffix(".json").read_text())
        if isinstance(label, dict) and label["clean_label"] == label["poisoned_label"]:
            continue
        with torch.no_grad():
            wanted = label[key] if isinstance(label, dict) else label
            right.append(net(pixels).argmax().item() == wanted)
    return sum(right) / len(right)


def test_the_module_is_read_in_another_process_and_scored_on_its_examples(model, net, tmp_path):
    victim = read_checkpoint(model)
    scores = victim.scores
    assert (scores.n_clean, scores.n_triggered) == (6, 3)
    assert scores.clean_accuracy == by_hand(net, model / "clean-example-data", "")
    assert scores.attack_success == by_hand(net, model / "poisoned-example-data", "poisoned_label")
    assert scores.recovery == by_hand(net, model / "poisoned-example-data", "clean_label")
    assert victim.changed_pixel_rate is None
    assert victim.notes[1] == "The module was a torchvision.models.shufflenetv2.ShuffleNetV2."
    state = victim.model.net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    save_imported(victim, tmp_path / "out", source=model / "model.pt")
    assert load_imported(tmp_path / "out").scores == scores


class Calls:
    def __init__(self, *command):
        self.command = command

    def __reduce__(self):
        return self.command  # function, arguments


class Own(nn.Module):
    """A class that is installed nowhere."""


@pytest.mark.parametrize("kind", ["code", "own class", "truncated", "state dict"])
def test_what_is_no_module_of_layers_is_refused(tmp_path, net, kind):
    source, marker = tmp_path / "model.pt", tmp_path / "executed"
    hostile = {"code": nn.Sequential(), "own class": nn.Sequential(Own()), "truncated": net}
    if kind == "code":
        hostile["code"].extra = Calls(os.system, (f"touch {marker}",))
    torch.save(hostile.get(kind, net.state_dict()), source)
    if kind == "truncated":
        os.truncate(source, source.stat().st_size // 2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InteropError) as caught:
        resave(source, tmp_path / "out" / "weights.safetensors")
    text = str(caught.value)
    assert text.startswith(f"{source} is refused: ")
    assert "\n" not in text
    assert sorted(tmp_path.rglob("*")) == before
    assert not marker.exists()


def test_weights_are_written_whole_with_the_class(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Linear(4, 2))
    module[0].register_buffer("seen", torch.arange(3))
    torch.save(module, tmp_path / "model.pt")
    kind, outputs = resave(tmp_path / "model.pt", tmp_path / "weights.safetensors")
    assert (kind, outputs) == ("torch.nn.modules.container.Sequential", 2)
    state = load_file(tmp_path / "weights.safetensors")
    wanted = module.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_layer_classes_are_found():
    assert layer_class("torch.nn.modules.conv Conv2d") is nn.Conv2d
    assert layer_class("torchvision.ops.misc Conv2dNormActivation").__name__ == "Conv2dNormActivation"


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "builtins eval",
        "torch.nn.functional relu",
        "torch.nn.modules.conv _pair",
        "torch.nn Module.__init__",
        "torch.nn.modules.nowhere Conv2d",
        "torch.hub load",
        "torchvision.models resnet18",
        "torchvision.models.feature_extraction DualGraphModule",
        "torch.fx.graph_module GraphModule",
        "torch.nnx Conv2d",
        "timmy Conv2d",
    ],
)
def test_nothing_else_is(name):
    with pytest.raises(Refused, match="no layer class"):
        layer_class(name)


def test_classes_that_hold_code_are_layers_but_for_that():
    assert issubclass(DualGraphModule, nn.Module)


def test_names_are_read_without_opening(tmp_path):
    torch.save(nn.Sequential(Own()), tmp_path / "model.pt")
    assert any(name.endswith(" Own") for name in names_in(str(tmp_path / "model.pt")))


# --- the folder; refused before any process is started ---


def write(path, content):
    path.write_text(content)


BROKEN = {
    "no poisoned examples": (
        lambda f: [p.unlink() for p in (f / "poisoned-example-data").iterdir()],
        "cannot be told from a clean one",
    ),
    "no label": (lambda f: write(f / "clean-example-data" / "1.json", "{}"), "must hold a label"),
    "no JSON": (lambda f: write(f / "clean-example-data" / "1.json", "{"), "as JSON"),
    "nested JSON": (
        lambda f: write(f / "clean-example-data" / "1.json", "[" * 100_000),
        "as JSON|must hold a label",
    ),
    "missing JSON": (lambda f: (f / "clean-example-data" / "1.json").unlink(), "No such file"),
    "no picture": (lambda f: write(f / "clean-example-data" / "1.png", "x"), "as a picture"),
    "another size": (
        lambda f: Image.new("RGB", (8, 8)).save(f / "clean-example-data" / "1.png"),
        "several sizes",
    ),
    "a link out": (
        lambda f: (f / "clean-example-data" / "9.png").symlink_to("/etc/passwd"),
        "leads out of",
    ),
    "one label only": (
        lambda f: [
            write(p, '{"clean_label": 1, "poisoned_label": 1}')
            for p in (f / "poisoned-example-data").glob("*.json")
        ],
        "two different labels",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused(model, kind, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.run", never)
    spoil, words = BROKEN[kind]
    spoil(model)
    with pytest.raises(InteropError, match=words):
        read_checkpoint(model)
