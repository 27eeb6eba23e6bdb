"""A detector in doubt and its pictures, read from a user's own files."""

import shutil

import pytest
import torch
from own_detector import FACTORY, module_of, squares, write_coco
from PIL import Image

from bimask.cli.suspects import is_annotated
from bimask.detection import load_suspect
from bimask.detection.before_after import require_knowing
from bimask.detection.nets.detector import Detector
from bimask.detection.objects import DetectionData
from bimask.detection.suspects import hold_back
from bimask.errors import DataError, ModelError, SettingError


def test_what_clean_data_are_of_a_detector(home, tmp_path):
    assert is_annotated(home / "annotations.json")
    assert is_annotated(home / "gone.json")
    assert not is_annotated(home / "pictures")
    assert not is_annotated(home / "gone")
    assert not is_annotated(home / "pictures" / "000.png")
    (home / "pictures" / "notes.xml").touch()
    assert not is_annotated(home / "pictures")
    (home / "pictures" / "000.xml").touch()
    assert is_annotated(home / "pictures")
    (tmp_path / "voc" / "Annotations").mkdir(parents=True)
    assert is_annotated(tmp_path / "voc")


def suspect_of(home, **options):
    return load_suspect(
        home / "suspect.pth", f"{home / 'mine.py'}:make", home / "annotations.json", **options
    )


def test_ids_of_categories_are_labels_where_the_number_of_classes_says_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    torch.save(module_of(tmp_path / "mine.py").make(20).state_dict(), tmp_path / "suspect.pth")
    write_coco(tmp_path, squares(12), ids=(3, 7, 18))
    suspect = suspect_of(tmp_path, outputs=20)
    assert suspect.model.label_ids == (3, 7, 18)
    assert suspect.spec.outputs == 20
    assert "by the ids of their categories: 3 is 'red'" in suspect.notes[-1]
    with pytest.raises(ModelError, match="20 outputs"):
        suspect_of(_with_ids(tmp_path, (3, 7, 99)), outputs=20)
    assert suspect_of(tmp_path, outputs=20, label_ids=(1, 0, 2)).model.label_ids == (1, 0, 2)


def _with_ids(home, ids):
    shutil.rmtree(home / "pictures")
    write_coco(home, squares(12), ids=ids)
    return home


def test_annotations_in_voc_form_are_read(trained, tmp_path):
    data = squares(12)
    (tmp_path / "voc").mkdir()
    for row, (image, target) in enumerate(zip(data.images, data.targets, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "voc" / f"{row}.png")
        objects = "".join(
            f"<object><name>{data.classes[int(label)]}</name><bndbox><xmin>{x0 + 1:.0f}</xmin>"
            f"<ymin>{y0 + 1:.0f}</ymin><xmax>{x1:.0f}</xmax><ymax>{y1:.0f}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), label in zip(target["boxes"].tolist(), target["labels"], strict=True)
        )
        (tmp_path / "voc" / f"{row}.xml").write_text(f"<annotation>{objects}</annotation>")
    net = f"{trained / 'mine.py'}:make"
    suspect = load_suspect(trained / "suspect.pth", net, tmp_path / "voc", label_ids=(2, 1, 0))
    assert suspect.clean.classes == ("blue", "green", "red")
    assert require_knowing(suspect.model, suspect.clean) == ""
    swapped = Detector(suspect.model.net, (1, 2, 0))
    with pytest.raises(SettingError, match="--label-ids 2,1,0"):
        require_knowing(swapped, suspect.clean)


def test_classes_that_are_called_otherwise_are_named(trained):
    suspect = suspect_of(trained)
    reds = [row for row, t in enumerate(suspect.clean.targets) if (t["labels"] == 0).sum() > 0]
    odd = require_knowing(Detector(suspect.model.net, (0, 2, 1)), suspect.clean.subset(reds))
    assert "otherwise: green (label 1), blue (label 2); does" in odd


def test_weights_in_half_precision_are_computed_with_in_single(home):
    state = torch.load(home / "suspect.pth", weights_only=True)["model"]
    half = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    torch.save(half, home / "suspect.pth")
    assert {p.dtype for p in suspect_of(home).model.parameters()} == {torch.float32}


def test_pictures_are_held_back_by_their_pixels(trained):
    data = squares(20)
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    data = DetectionData(data.images, (empty, *data.targets[1:]), data.classes)
    learned, held = hold_back(data, 0.3)
    assert (len(learned), len(held)) == (15, 5)
    assert all(len(target["labels"]) for target in held.targets)
    backwards = data.subset(range(19, -1, -1))
    assert {image.numpy().tobytes() for image in hold_back(backwards, 0.3)[1].images} == {
        image.numpy().tobytes() for image in held.images
    }
    assert len(hold_back(data, 0)[1]) == 0
    with pytest.raises(DataError, match="10 are held back, so 9 are left"):
        hold_back(data, 0.55)
