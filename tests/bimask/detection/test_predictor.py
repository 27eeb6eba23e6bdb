"""Pictures of every form and size get the detector's objects; anything else gets one sentence."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bimask.cleaned.classifier import Classifier
from bimask.detection import Detector, load_cleaned
from bimask.detection.nets.small_fcos import small_fcos
from bimask.detection.predictor import DetectionPredictor
from bimask.errors import DataError, VictimError
from bimask.tasks import load_predictor

SIDE, NAMES = 40, ("cat", "dog", "cow")


def png(pixels, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def detector():
    """With weights that find something everywhere, under all names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = small_fcos(3, width=32, image_size=32)
        torch.nn.init.normal_(net.head.classification_head.cls_logits.weight, std=2)
    return Detector(net, [2, 0, 1]).eval()


@pytest.fixture(scope="module")
def ask(detector):
    return DetectionPredictor(detector, NAMES, SIDE)


def test_it_says_what_the_detector_finds_by_the_names_of_the_classes(ask, detector):
    image = pixels(32, 32)
    with torch.no_grad():
        (found,) = detector([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    (answer,) = ask([image])
    assert list(answer) == ["boxes", "labels", "scores"]
    assert len(set(answer["labels"])) > 1
    assert answer["labels"] == [NAMES[label] for label in found["labels"]]
    torch.testing.assert_close(torch.tensor(answer["boxes"]), found["boxes"])
    assert answer["scores"] == found["scores"].tolist() == sorted(answer["scores"], reverse=True)
    assert json.loads(json.dumps(answer)) == answer


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: x.tolist(), lambda x: x.astype(np.float32) / 255, png]
)
def test_every_form_of_a_picture_gets_the_same_answer(ask, form):
    image = pixels(30, 38)
    assert ask([form(image)]) == ask([image])


def test_pictures_of_several_sizes_do_not_depend_on_their_neighbours(ask):
    images = [pixels(32, 32), pixels(20, 40, 1), pixels(40, 13, 2)]
    together = ask(images)
    assert together == [ask([image])[0] for image in images]
    for image, answer in zip(images, together, strict=True):
        height, width = image.shape[:2]
        boxes = torch.tensor(answer["boxes"]).view(-1, 4)
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all(), "in the picture's own pixels"


def test_a_picture_without_objects_gets_empty_lists(detector):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blind = DetectionPredictor(Detector(small_fcos(3, width=32), range(3)), NAMES, SIDE)
    assert blind([pixels(8, 8)]) == [{"boxes": [], "labels": [], "scores": []}]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (pixels(41, 40), r"\(40, 40, 3\) or less in height and width, got \(41, 40, 3\)"),
        (pixels(40, 41).tolist(), "or less"),
        (png(pixels(41, 4)), "40x40 pixels or less, got 4x41"),
        (np.zeros((0, 5, 3), np.uint8), "or less"),
        ([], "or less"),
        ([[0.5] * 4] * 4, "or less"),
        ([[[0] * 4] * 4] * 4, "or less"),
        (np.zeros((4, 4, 1), np.uint8), "or less"),
        (np.full((4, 4, 3), 1.5), r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"\[0, 1\]"),
        ("no base64!", "no base64"),
        (png(pixels(4, 4), "BMP"), "no PNG"),
        (None, "nested lists"),
    ],
)
def test_anything_else_gets_a_sentence(ask, image, says):
    with pytest.raises(DataError, match=f"Image 1 .*{says}"):
        ask([pixels(4, 4), image])


@pytest.mark.parametrize("images", [None, {"a": 1}, [], [0] * 1025])
def test_what_is_no_list_of_images_gets_a_sentence(ask, images):
    with pytest.raises(DataError, match="list of images|1 to 1024"):
        ask(images)


def test_a_grey_picture_in_a_file_is_one_of_three_equal_colours(ask):
    grey = pixels(32, 32)[..., 0]
    assert ask([png(grey)]) == ask([np.stack([grey] * 3, 2)])


def test_a_huge_picture_is_refused_by_its_header(ask):
    bomb = bytearray(base64.b64decode(png(pixels(4, 4))))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    with pytest.raises(DataError, match="no PNG"):
        ask([base64.b64encode(bytes(bomb)).decode()])


def test_a_line_that_the_net_shrinks_to_nothing_gets_a_sentence(ask):
    with pytest.raises(DataError, match="fails on image 1 of 40x1 pixels"):
        ask([pixels(4, 4), pixels(1, 40)])
    assert ask([pixels(4, 4)])


def test_the_folder_says_what_answers(cleaned, tmp_path):
    with pytest.raises(VictimError, match="--trust-code"):
        load_predictor(cleaned[1])
    found = load_predictor(cleaned[1], own_code=True)
    assert isinstance(found, DetectionPredictor)
    assert found.classes == load_cleaned(cleaned[1], own_code=True).classes
    assert found.shape == (3, 48, 48), "as large as the largest picture that it was shown"
    assert not isinstance(found, Classifier)
    with pytest.raises(VictimError, match="no folder of a cleaned model"):
        load_predictor(tmp_path)
