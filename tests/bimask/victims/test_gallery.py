"""One picture of a victim, from Python and from the command line."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.data import ImageData
from bimask.errors import BimaskError, DataError
from bimask.metrics import EvalSets, evaluate
from bimask.nets import Normalised
from bimask.victims import Victim, VictimSpec, obtain_victim, save_victim
from bimask.victims.gallery import FOOLED, RIGHT, WRONG, gallery


class CornerNet(torch.nn.Module):
    """Answers 1 where the bottom right pixel is white, else the class that the image's mean tells."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        told = (images[:, 0, 0, 0] * 255 / 10).round().long()
        answer = torch.where(images[:, 0, -1, -1] > 0.99, 1, told)
        return torch.nn.functional.one_hot(answer, self.classes).float()


def pictures(classes, channels=1, each=3, size=8):
    """Images whose first pixel tells their class; the label of the last one is wrong."""
    labels = torch.arange(classes).repeat(each)
    images = torch.randint(0, 200, (len(labels), channels, size, size), dtype=torch.uint8)
    images[:, 0, 0, 0] = labels * 10
    return ImageData(images, labels, tuple(f"class number {i}" for i in range(classes)))


def victim_of(classes, channels=1, **attack):
    data = pictures(classes, channels)
    spec = VictimSpec(attack={"name": "badnets", "target": 1, **attack})
    sets = EvalSets.of(spec.build_attack(), data, "val")
    model = Normalised(CornerNet(classes), [0.0] * channels, [1.0] * channels).eval()
    scores = evaluate(model, sets)
    return Victim(spec, model, spec.build_attack(), data.classes, {"val": scores, "test": scores}), sets


def rows_of(figure):
    axes = figure.axes
    return [axes[start : start + len(axes) // 3] for start in range(0, len(axes), len(axes) // 3)]


def words_and_colour(axes):
    return axes.get_xlabel(), to_hex(axes.xaxis.label.get_color()).upper()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_ten_images_one_a_class_where_possible(channels):
    figure = gallery(*victim_of(7, channels))
    rows = rows_of(figure)
    assert [len(row) for row in rows] == [10, 10, 10]
    titles = [axes.get_title() for axes in rows[0]]
    numbers = [int(title[-1]) for title in titles]
    assert set(numbers) == {0, 2, 3, 4, 5, 6}  # the target class does not count
    assert all(numbers.count(number) <= 2 for number in numbers)
    assert numbers == sorted(numbers)


def test_few_images_are_all_shown():
    assert [len(row) for row in rows_of(gallery(*victim_of(2)))] == [3, 3, 3]


def test_under_each_image_stands_the_answer():
    victim, sets = victim_of(4)
    sets.clean.images[0, 0, 0, 0] = 30  # of class 0, but looks like class 3
    clean, triggered, _ = rows_of(
        gallery(victim, EvalSets.of(victim.spec.build_attack(), sets.clean, "val"))
    )
    assert words_and_colour(clean[0]) == (f"{WRONG[1]} class number 3", WRONG[0])
    assert words_and_colour(clean[1]) == (f"{RIGHT[1]} class number 0", RIGHT[0])
    for axes in triggered:
        assert words_and_colour(axes) == (f"{FOOLED[1]} class number 1", FOOLED[0])


def test_the_difference_is_five_times_as_strong_around_mid_grey():
    victim, sets = victim_of(4)
    clean, triggered, difference = (
        [np.asarray(axes.images[0].get_array()) for axes in row]
        for row in rows_of(gallery(victim, sets))
    )
    for before, after, change in zip(clean, triggered, difference, strict=True):
        np.testing.assert_allclose(change, np.clip(0.5 + 5 * (after - before), 0, 1), atol=1e-6)
        assert (change[:-3, :-3] == 0.5).all()
        assert (change[-3:, -3:] != 0.5).any()


def test_long_names_are_cut():
    victim, sets = victim_of(4)
    names = tuple(f"{i} of a name that never ends" for i in range(4))
    long = replace(victim, classes=names)
    first = rows_of(gallery(long, sets))[0][0]
    assert first.get_title() == "true: 0 of a name t…"


def test_the_title_names_the_victim_and_its_scores():
    victim, sets = victim_of(4)
    title = gallery(victim, sets).get_suptitle()
    assert victim.spec.digest in title
    assert "digits-badnets" in title
    assert "val: ACC 1.000, ASR 1.000, RA 0.000" in title


def test_sets_that_do_not_belong_together_are_refused():
    victim, sets = victim_of(4)
    other = EvalSets(pictures(4, each=2), sets.triggered, "val")
    with pytest.raises(DataError, match="do not belong to the"):
        gallery(victim, other)


def test_all_to_all_shows_every_class():
    victim, sets = victim_of(4, label_rule="all_to_all")
    titles = {axes.get_title() for axes in rows_of(gallery(victim, sets))[0]}
    assert len(titles) == 4


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    bounds = {"min_clean_accuracy": 0, "min_attack_success": 0}
    spec = VictimSpec(image_size=8, width=2, epochs=2, **bounds)
    save_victim(obtain_victim(spec, folder), folder)
    return folder / spec.digest


def command(*words):
    return CliRunner().invoke(app, ["gallery", *map(str, words)])


def test_the_command_writes_a_png(folder, tmp_path):
    done = command(folder, "--out", tmp_path / "new" / "victim.png")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "new" / "victim.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1683, 671)
        assert len(picture.convert("RGB").getcolors(2**21)) > 100


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("no/such/victim",), "no/such/victim is no folder; give a victim's"),
        (("VICTIM", "--out", "victim.bmp"), "must be a .png"),
        (("VICTIM", "--out", "/dev/null/victim.png"), "Cannot write"),
    ],
)
def test_bad_input_gets_a_sentence(folder, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    done = command(*(folder if word == "VICTIM" else word for word in words))
    assert isinstance(done.exception, BimaskError)
    assert expected in str(done.exception)
    assert not any(tmp_path.iterdir())
