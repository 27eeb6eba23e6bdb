"""Requests to a detector, where they differ from those to a classifier: pictures of many sizes, answers
of many lengths."""

import base64
import io
import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from bimask.detection import Detector
from bimask.detection.nets.small_fcos import small_fcos
from bimask.detection.predictor import DetectionPredictor

SIDE = 40
CANARY = "canary7531"


@pytest.fixture(scope="module")
def predictor():
    """It finds something everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = small_fcos(3, width=32, image_size=32)
        torch.nn.init.normal_(net.head.classification_head.cls_logits.weight, std=2)
    return DetectionPredictor(Detector(net, range(3)), ["cat", "dog", "cow"], SIDE)


@pytest.fixture(scope="module")
def served(serving, predictor):
    with serving(predictor) as served:
        yield served


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(height, width, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(pixels(height, width)).convert(mode).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def inputs(*images):
    return json.dumps({"inputs": images}).encode()


def test_objects_are_answered_for_pictures_of_several_sizes(served, predictor):
    images = [pixels(32, 32), pixels(40, 17, 1), pixels(9, 40, 2)]
    status, text = served.ask([images[0].tolist(), (images[1] / 255).tolist(), png(9, 40)])
    assert status == 200, text
    answers = json.loads(text)["predictions"]
    expected = predictor([images[0], images[1] / 255, pixels(9, 40)])
    assert answers == expected
    assert {len(one) for one in answers} == {3}
    assert set(answers[0]["labels"]) <= {"cat", "dog", "cow"}
    assert answers[0]["labels"]


def test_requests_at_once_get_the_answers_that_they_get_alone(served, predictor):
    """A detector is one object for all threads."""
    images = [pixels(8 + 4 * row, 40 - 2 * row, row) for row in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: served.ask([image.tolist()]), images * 2))
    expected = [{"predictions": predictor([image])} for image in images * 2]
    assert [json.loads(text) for _, text in found] == expected


def test_a_body_may_have_what_the_most_of_the_largest_pictures_need(served):
    limits = served.app.limits
    assert limits.values == limits.images * 3 * SIDE * SIDE
    assert served.ask([png(SIDE, SIDE)] * limits.images)[0] == 200
    assert served.ask([[[[0, 0, 0]]]] * limits.images)[0] == 200, "each the smallest that there is"


BAD = {
    "too high": (inputs(pixels(41, 4).tolist()), 400),
    "too wide": (inputs(png(4, 41)), 400),
    "much too large": (inputs(png(600, 600)), 400),
    "no pixel": (inputs([]), 400),
    "no column": (inputs([[]] * 4), 400),
    "no colour": (inputs([[[]] * 4] * 4), 400),
    "grey numbers": (inputs([[7531] * 4] * 4), 400),
    "four channels": (inputs([[[0] * 4] * 4] * 4), 400),
    "a line that becomes nothing": (inputs(png(1, 40)), 400),
    "a good one, then a line": (inputs(png(8, 8), [[[0, 0, 0]]] * 40), 400),
    "a row that is shorter": (inputs([[[0, 0, 0]] * 4, [[0, 0, 0]] * 3]), 400),
    "boxes": (json.dumps({"inputs": [[0]], "boxes": [[0, 0, 7531, 1]]}).encode(), 400),
    "an object of a picture": (json.dumps({"inputs": [{"image": CANARY}]}).encode(), 400),
    "more small pictures than are taken": (inputs(*[[[[0, 0, 0]]]] * 65), 400),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_sentence_and_a_line_of_the_log(served, logged, name):
    body, expected = BAD[name]
    status, text = served.request(body=body)
    assert status == expected, text
    said = json.loads(text)["message"]
    assert said.endswith(".")
    assert len(text) < 400
    assert CANARY not in text
    assert "7531" not in text
    assert "Traceback" not in "".join(logged)
    assert len(logged) == 1, logged


def claiming(side):
    """A picture of 8x8 pixels whose header says another size, with the sum that belongs to it."""
    content = bytearray(base64.b64decode(png(8, 8)))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    ("side", "says"),
    [
        (SIDE, "no PNG that can be read"),  # it has less than it says
        (SIDE + 1, "40x40 pixels or less, got 41x41"),
        (2000, "40x40 pixels or less, got 2000x2000"),
        (6_000, "no PNG that can be read"),
        (100_000, "no PNG that can be read"),
    ],
)
def test_a_picture_that_claims_another_size_is_refused_by_its_header(served, logged, side, says):
    status, text = served.ask([claiming(side)])
    assert status == 400
    assert says in text
    assert len(logged) == 1


def test_pngs_of_other_colours_are_read_as_three(served):
    assert served.ask([claiming(8), *(png(8, 8, mode) for mode in ("L", "RGBA", "P"))])[0] == 200
