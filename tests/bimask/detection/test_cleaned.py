"""The folder of a cleaned detector, which anybody may have written."""

import json
import shutil

import pytest
from own_detector import FACTORY, edited, run
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.cleaned.folder import load_cleaned as load_classifier
from bimask.detection import load_cleaned
from bimask.errors import BimaskError, VictimError


def test_code_of_a_folder_runs_only_where_it_is_trusted(cleaned, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(cleaned[1], folder)
    (folder / "net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{FACTORY}")
    manifest = json.loads((folder / "manifest.json").read_text())
    with pytest.raises(VictimError, match="net.py changed"):
        load_cleaned(folder, own_code=True)
    del manifest["files"]["net.py"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VictimError, match="--trust-code"):
        load_cleaned(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "classification"}, "no folder of a cleaned detector"),
        ({"net": {"width": 4}}, "no folder of a cleaned detector"),
        ({"net": {"net": "small_fcos", "label_ids": [0, 1]}}, "for each of 3 classes, got 2"),
        ({"net": {"net": "small_fcos", "width": "x"}}, "of no use: width"),
        ({"net": {"net": "small_fcos", "label_ids": [0, 1, 2], "width": 8192}}, "they do not fit"),
        ({"net": {"net": "small_fcos", "label_ids": [0, 1, 2]}}, "do not fit"),
        ({"net": {"net": "torchvision:none", "label_ids": [0, 1, 2]}}, "no detector 'none'"),
        ({"classes": []}, "classes"),
        ({"files": {"../mine.py": "0" * 64}}, "Cannot read"),
    ],
)
def test_a_manifest_that_lies_is_refused(cleaned, tmp_path, change, said):
    shutil.copytree(cleaned[1], tmp_path / "theirs")
    path = tmp_path / "theirs" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BimaskError, match=said):
        load_cleaned(tmp_path / "theirs", own_code=True)


def test_a_detector_is_not_taken_for_a_classifier(cleaned, tmp_path):
    with pytest.raises(VictimError, match="holds a cleaned detector"):
        load_classifier(cleaned[1], own_code=True)
    done = CliRunner().invoke(app, ["export", str(cleaned[1]), str(tmp_path / "model.onnx")])
    assert "exports know classifiers alone" in str(done.exception)


def test_names_of_strangers_are_words_on_the_page(home):
    def rename(content):
        content["categories"][0]["name"] = "<script>alert(1)</script>"

    edited(home, rename)
    done = run(home)
    assert done.exit_code == 0, done.output
    page = (home / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
