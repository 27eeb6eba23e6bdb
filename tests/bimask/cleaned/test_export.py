"""Files for other runtimes: the same answers, for any number of images, and no pickle."""

import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bimask import MaskSet, fold
from bimask.__main__ import app
from bimask.cleaned.export import EXPORTED, export_onnx, export_program, require_equal
from bimask.errors import ExportError, SettingError
from bimask.nets import build_net


def folded(net, width):
    """A folded model with statistics and weights of a history."""
    torch.manual_seed(0)
    model = build_net(
        net, in_channels=3, num_classes=5, width=width, image_size=16, mean=[0.4] * 3, std=[0.3] * 3
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    masks = MaskSet.for_model(model.eval())
    with torch.no_grad():
        masks.mask.uniform_(0, 1)
        masks.selection.uniform_(0, 1)
    return fold(model, masks)


NETS = [
    pytest.param(("small_resnet", 8), id="conv"),
    pytest.param(("vit_tiny", 16), id="gates", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=NETS)
def model(request):
    return folded(*request.param)


@pytest.fixture
def images():
    return torch.rand(1000, 3, 16, 16, generator=torch.Generator().manual_seed(0))


ANSWER = {
    ".pt2": "import torch; f = torch.export.load(PATH).module(); g = lambda x: f(x)",
    ".onnx": "import torch, onnxruntime; s = onnxruntime.InferenceSession(PATH, "
    "providers=['CPUExecutionProvider']); "
    "g = lambda x: torch.from_numpy(s.run(None, {'images': x.numpy()})[0])",
}


@pytest.mark.parametrize(("suffix", "export"), [(".pt2", export_program), (".onnx", export_onnx)])
def test_a_process_without_bimask_gets_the_same_answers(model, images, tmp_path, suffix, export):
    path = tmp_path / f"model{suffix}"
    assert export(model, images, path) <= EXPORTED
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    code = (
        f"PATH = {str(path)!r}; {ANSWER[suffix]}\n"
        "import sys\n"
        "from safetensors.torch import load_file, save_file\n"
        f"x = torch.rand(1000, 3, 16, 16, generator=torch.Generator().manual_seed(0))\n"
        "y = {str(n): g(x[:n]).detach() for n in (1, 7, 1000)}\n"
        f"save_file(y, {str(tmp_path / 'answers.safetensors')!r})\n"
        "assert 'bimask' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    with torch.no_grad():
        expected = model(images)
    for name, got in load_file(tmp_path / "answers.safetensors").items():
        torch.testing.assert_close(got, expected[: int(name)], atol=1e-4, rtol=1e-4)


def test_a_program_holds_no_pickle(tmp_path):
    model = folded("small_resnet", 4)
    export_program(model, torch.rand(3, 3, 16, 16), tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert len(parts) > 10
    sample = [content for name, content in parts.items() if "sample_inputs" in name]
    assert sample == [b""]
    assert not any(name.endswith((".pkl", ".pickle")) for name in parts)
    assert not any(content.startswith(b"PK") for content in parts.values()), "a torch.save inside"


class ByValue(nn.Module):
    """Which layers it runs depends on the images, which no graph can say."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, images):
        flat = images.flatten(1)
        return self.linear(flat) if flat.sum().item() > 0 else self.linear(-flat)


def test_a_model_that_cannot_be_exported_leaves_nothing(tmp_path):
    with pytest.raises(ExportError, match="cannot be written"):
        export_program(ByValue(), torch.rand(3, 1, 2, 2), tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("got", "allowed"),
    [
        ([1.0, 2.0], True),
        ([1.0 + 1.8e-4, 2.0], True),
        ([1.0 + 2.2e-4, 2.0], False),
        ([1.0, 2.0 + 1.8e-4], True),
        ([1.0, 2.0 + 2.2e-4], False),
        ([float("nan"), 2.0], False),
    ],
)
def test_the_bound_is_a_share_of_the_rows_largest_logit(got, allowed):
    expected = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    got = torch.tensor([got], dtype=torch.float64)
    if allowed:
        assert require_equal(got, expected, 1e-4, "It") == (got - expected).abs().max()
    else:
        with pytest.raises(ExportError, match="otherwise"):
            require_equal(got, expected, 1e-4, "It")


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"\.onnx"):
        export_onnx(ByValue(), torch.rand(3, 1, 2, 2), tmp_path / "a.pb")
    done = CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path / "a.pb")])
    assert isinstance(done.exception, SettingError)
