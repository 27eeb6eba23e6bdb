"""Annotations of strangers: COCO's JSON and VOC's XML, sound, odd and hostile."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bimask.data.pictures import DataWarning
from bimask.detection.data import files_digest, load_detection
from bimask.detection.data.coco import read_coco
from bimask.detection.data.voc import parsed_xml, read_voc
from bimask.errors import DataError


def picture(path, width=40, height=20, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)


def coco(folder, count=5, **changed):
    """So many pictures with a box each; categories 9 and 2, in this order."""
    for row in range(count):
        picture(folder / f"{row}.png", value=row)
    content = {
        "images": [{"id": 10 + row, "file_name": f"{row}.png"} for row in range(count)],
        "annotations": [
            {"id": row, "image_id": 10 + row, "category_id": 9, "bbox": [2, 3, 10, 8], "iscrowd": 0}
            for row in range(count)
        ],
        "categories": [{"id": 9, "name": "late"}, {"id": 2, "name": "early"}],
    } | changed
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return path


def test_boxes_labels_and_pictures_of_coco(tmp_path):
    splits = load_detection(f"coco:{coco(tmp_path)}")
    parts = splits.train, splits.val, splits.test
    assert [len(part) for part in parts] == [3, 1, 1]
    assert splits.train.classes == ("early", "late")
    for part in parts:
        assert part.images[0].shape == (3, 20, 40)
        assert part.targets[0]["boxes"].tolist() == [[2, 3, 12, 11]]
        assert part.targets[0]["labels"].tolist() == [1]
    assert {int(image[0, 0, 0]) for part in parts for image in part.images} == {0, 1, 2, 3, 4}


def test_splits_depend_on_names_alone(tmp_path):
    path = coco(tmp_path)
    first = load_detection(f"coco:{path}")
    content = json.loads(path.read_text())
    content["images"].reverse()
    path.write_text(json.dumps(content))
    again = load_detection(f"coco:{path}")
    assert first.train.digest == again.train.digest
    assert first.test.digest == again.test.digest


def test_pictures_may_lie_elsewhere(tmp_path):
    path = coco(tmp_path / "pictures")
    moved = path.rename(tmp_path / "set.json")
    assert len(load_detection(f"coco:{moved}", pictures=tmp_path / "pictures").train) == 3
    with pytest.raises(DataError, match="Cannot read the picture"):
        load_detection(f"coco:{moved}")


def test_large_pictures_are_shrunk_with_their_boxes(tmp_path):
    one = load_detection(f"coco:{coco(tmp_path)}", image_size=20).test
    assert one.images[0].shape == (3, 10, 20)
    assert one.targets[0]["boxes"].tolist() == [[1, 1.5, 6, 5.5]]
    one = load_detection(f"coco:{tmp_path}/set.json", image_size=400).test
    assert one.images[0].shape == (3, 20, 40)


def test_crowds_and_empty_boxes_are_left_out_and_told(tmp_path):
    def box(x, y, w, h, crowd=0):
        return {"image_id": 10, "category_id": 2, "bbox": [x, y, w, h], "iscrowd": crowd}

    odd = [box(1, 1, 5, 5, 1), box(1, 1, 0, 5), box(100, 1, 5, 5), box(30, -5, 50, 10)]
    path = coco(tmp_path, annotations=odd)
    with pytest.warns(DataWarning, match="1 crowd regions and 2 boxes without a whole pixel") as told:
        splits = load_detection(f"coco:{path}")
    assert len(told) == 1
    boxes = [
        target["boxes"] for part in (splits.train, splits.val, splits.test) for target in part.targets
    ]
    assert torch.cat(boxes).tolist() == [[30, 0, 40, 5]]  # cut at the edges; others have none
    assert len(boxes) == 5


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"images": []}, "images: list should have at least 1 item"),
        ({"categories": None}, "categories: input should be a valid list"),
        ({"annotations": [{"image_id": 99, "category_id": 2, "bbox": [0, 0, 1, 1]}]}, "of image_id 99"),
        (
            {"annotations": [{"image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1]}]},
            "of category_id 3",
        ),
        ({"annotations": [{"image_id": 10, "category_id": 2, "bbox": [0, 0, 1]}]}, "at least 4 items"),
        (
            {"annotations": [{"image_id": 10, "category_id": 2, "bbox": [0, 0, float("nan"), 1]}]},
            "finite number",
        ),
        ({"categories": [{"id": 1, "name": "a"}] * 2, "annotations": []}, "two categories of one id"),
        ({"images": [{"id": 1, "file_name": "a.png"}] * 2, "annotations": []}, "two images of one id"),
        ({"images": [{"id": 10, "file_name": "../a.png"}], "annotations": []}, "may be outside"),
        ({"images": [{"id": 10, "file_name": "/etc/a.png"}], "annotations": []}, "may be outside"),
        ({"images": [{"id": 10, "file_name": "a\\..\\b.png"}], "annotations": []}, "may be outside"),
    ],
)
def test_odd_annotations_of_coco_are_refused_in_a_sentence(tmp_path, changed, says):
    path = coco(tmp_path, **changed)
    with pytest.raises(DataError, match=says) as refused:
        read_coco(path)
    assert len(refused.value.lines) == 1


def test_what_is_no_json_or_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="Cannot read the annotations"):
        read_coco(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{" * 100_000)
    with pytest.raises(DataError, match="Cannot read the annotations"):
        read_coco(tmp_path / "a.json")
    with pytest.raises(DataError, match="Cannot read the annotations.*regular"):
        read_coco(tmp_path)
    with pytest.raises(DataError, match="has 2 pictures; training, val and test need 3"):
        load_detection(f"coco:{coco(tmp_path, count=2)}")
    with pytest.raises(DataError, match="Unknown dataset 'yolo:x'"):
        load_detection("yolo:x")


def test_a_digest_is_of_contents_not_of_places(tmp_path):
    here = files_digest(f"coco:{coco(tmp_path / 'a')}")
    assert files_digest(f"coco:{coco(tmp_path / 'b')}") == here
    picture(tmp_path / "b" / "0.png", value=99)
    assert files_digest(f"coco:{tmp_path}/b/set.json") != here


OBJECT = """<object><name>{name}</name><difficult>{hard}</difficult>
<bndbox><xmax>12</xmax><xmin>3</xmin><ymin>4</ymin><ymax>11</ymax></bndbox></object>"""


def voc(folder, count=6, name="dog"):
    for row in range(count):
        picture(folder / "JPEGImages" / f"{row}.png", value=row)
        path = folder / "Annotations" / f"{row}.xml"
        path.parent.mkdir(exist_ok=True)
        objects = OBJECT.format(name=name, hard=0) + OBJECT.format(name="cat", hard=int(row == 0))
        path.write_text(f"<annotation><filename>/etc/passwd</filename>{objects}</annotation>")
    return folder


def lists(folder, **splits):
    home = folder / "ImageSets" / "Main"
    home.mkdir(parents=True)
    for name, rows in splits.items():
        (home / f"{name}.txt").write_text("".join(f"{row}  1\n" for row in rows))


def test_boxes_of_voc_count_from_one_and_difficult_ones_are_left_out(tmp_path):
    lists(voc(tmp_path), train=[0, 1, 2], val=[3], test=[4, 5])
    with pytest.warns(DataWarning, match="1 objects marked as difficult"):
        splits = load_detection(f"voc:{tmp_path}")
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.targets[0]["labels"].tolist() == [1]
    assert splits.train.targets[1]["labels"].tolist() == [1, 0]
    assert splits.train.targets[1]["boxes"].tolist() == [[2, 3, 12, 11]] * 2
    parts = splits.train, splits.val, splits.test
    assert [[int(i[0, 0, 0]) for i in part.images] for part in parts] == [[0, 1, 2], [3], [4, 5]]


@pytest.mark.filterwarnings("ignore:.*difficult")
def test_voc_without_a_test_list_reports_on_its_val(tmp_path):
    lists(voc(tmp_path), train=[0, 1, 2, 3], val=[4, 5])
    splits = load_detection(f"voc:{tmp_path}")
    assert {int(i[0, 0, 0]) for i in splits.test.images} == {4, 5}
    assert len(splits.train) + len(splits.val) == 4


@pytest.mark.filterwarnings("ignore:.*difficult")
def test_xml_files_beside_their_pictures_do(tmp_path):
    voc(tmp_path)
    for path in [*(tmp_path / "Annotations").iterdir(), *(tmp_path / "JPEGImages").iterdir()]:
        path.rename(tmp_path / path.name)
    (tmp_path / "Annotations").rmdir()
    assert len(load_detection(f"voc:{tmp_path}").train) == 4


BOMB = """<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]><a>&y;</a>"""
OUTSIDE = """<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>"""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BOMB, "declares its document type"),
        (OUTSIDE, "declares its document type"),
        ("<!DOCTYPE a><a/>", "declares its document type"),
        ("<a>&x;</a>", "no XML"),
        ("<a>" * 50, "nested deeper than 40"),
        ("<a>", "no XML"),
        ("", "no XML"),
        ("<?xml version='1.0' encoding='nonsense'?><a/>", "no XML"),
    ],
)
def test_hostile_xml_is_refused(content, says):
    with pytest.raises(ValueError, match=says):
        parsed_xml(content.encode())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BOMB, "declares its document type"),
        ("<annotation><object><name>a</name></object></annotation>", "a number of `bndbox`"),
        (OBJECT.format(name="", hard=0), "without `name`"),
        (OBJECT.format(name="a", hard=0).replace("11", "inf"), "a number of `bndbox`"),
        (OBJECT.format(name="a", hard=0).replace("11", "many"), "could not convert"),
    ],
)
def test_odd_annotations_of_voc_are_refused(tmp_path, content, says):
    path = voc(tmp_path) / "Annotations" / "3.xml"
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path}.*{says}"):
        read_voc(tmp_path)


def test_what_is_missing_in_voc_is_told(tmp_path):
    with pytest.raises(DataError, match="Cannot read the folder"):
        read_voc(tmp_path / "none")
    with pytest.raises(DataError, match="no XML files"):
        read_voc(tmp_path)
    lists(voc(tmp_path), train=[7])
    with pytest.raises(DataError, match="lists '7'"):
        read_voc(tmp_path)
    (tmp_path / "JPEGImages" / "2.png").unlink()
    with pytest.raises(DataError, match="no picture of .*2.xml"):
        read_voc(tmp_path)
