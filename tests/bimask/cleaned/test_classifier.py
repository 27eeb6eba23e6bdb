"""Images of every form get the model's answers; anything else gets one sentence."""

import base64
import io
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bimask.cleaned.classifier import MOST_IMAGES, Classifier
from bimask.errors import DataError


def png(pixels, mode=None, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 3)).eval()


@pytest.fixture
def ask(net):
    return Classifier(net, "abc", (3, 4, 4))


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)


@pytest.fixture
def expected(net, image):
    with torch.no_grad():
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        return net(x).softmax(1)[0]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.tolist(),
        lambda x: (x / 255).tolist(),
        lambda x: (x / 255).astype(np.float32),
        lambda x: x.astype(np.int64),
        png,
        lambda x: "\n".join(png(x)[i : i + 20] for i in range(0, len(png(x)), 20)),
    ],
)
def test_every_form_of_an_image_gets_the_same_answer(ask, image, expected, form):
    (answer,) = ask([form(image)])
    got = torch.tensor([answer["probabilities"][name] for name in "abc"])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert answer["class"] == "abc"[int(expected.argmax())]


def test_grey_images_may_leave_the_channel_out():
    ask = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), "ab", (1, 4, 4))
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    flat, deep, encoded = ask([pixels, pixels[..., None], png(pixels)])
    assert flat == deep == encoded


def test_an_image_does_not_depend_on_its_neighbours(ask, image):
    alone = ask([image])[0]["probabilities"]
    among = ask([255 - image, image, png(image)])
    for answer in among[1:]:
        assert answer["probabilities"] == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (None, "list of images"),
        ({"a": 1}, "list of images"),
        ([], "1 to"),
        ([0] * (MOST_IMAGES + 1), "1 to"),
        ([None], "nested lists"),
        ([3], "nested lists"),
        ([{}], "nested lists"),
        ([[1, 2]], "shape"),
        ([[[[0] * 3] * 4] * 5], "shape"),
        ([[[[0] * 4] * 4] * 3], "shape"),
        ([[[0, 1], [2]]], "unequal"),
        ([[[["a"] * 3] * 4] * 4], "numbers, got str"),
        ([[[[0, "a", None]] * 4] * 4], "numbers, got NoneType, int, str"),
        ([[[[0, True, 1]] * 4] * 4], "numbers, got bool, int"),
        ([[[[True] * 3] * 4] * 4], "numbers"),
        ([[[[None] * 3] * 4] * 4], "numbers"),
        ([[[[10**30] * 3] * 4] * 4], "numbers"),
        ([[[[256] * 3] * 4] * 4], "0 to 255"),
        ([[[[-1] * 3] * 4] * 4], "0 to 255"),
        ([[[[1.5] * 3] * 4] * 4], r"\[0, 1\]"),
        ([[[[float("nan")] * 3] * 4] * 4], r"\[0, 1\]"),
        ([[[[float("inf")] * 3] * 4] * 4], r"\[0, 1\]"),
        (["no base64!"], "no base64"),
        (["ü"], "no base64"),
        ([""], "no PNG"),
        (["aGVsbG8="], "no PNG"),
        ([png(np.zeros((4, 5, 3), np.uint8))], "4x4"),
        ([png(np.zeros((4, 4, 3), np.uint8), format="BMP")], "no PNG"),
        ([png(np.zeros((4, 4, 3), np.uint8))[:60] + "AAAA"], "no PNG"),
    ],
)
def test_anything_else_gets_a_sentence(ask, images, says):
    with pytest.raises(DataError, match=says):
        ask(images)


def test_the_first_bad_image_is_named(ask, image):
    with pytest.raises(DataError, match="Image 1 "):
        ask([image, image[:2]])


def test_a_huge_picture_is_refused_by_its_header(ask):
    """A bomb: a few bytes that would be 10^10 pixels."""
    bomb = bytearray(base64.b64decode(png(np.zeros((4, 4), np.uint8))))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    with pytest.raises(DataError):
        ask([base64.b64encode(bytes(bomb)).decode()])


def test_text_among_numbers_takes_no_memory(ask):
    """numpy would make 2000 items as long as the longest of them."""
    image = ["x" * 100_000, *[""] * 2000]
    tracemalloc.start()
    with pytest.raises(DataError, match="numbers, got str"):
        ask([image])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    "image", ["secret" * 9, [["secret"] * 4] * 4, [[[7531] * 3] * 4] * 4, {"secret": 1}]
)
def test_a_sentence_quotes_nothing(ask, image):
    with pytest.raises(DataError) as caught:
        ask([image])
    assert "secret" not in str(caught.value)
    assert "7531" not in str(caught.value)
