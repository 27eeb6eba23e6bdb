import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bimask.errors import InteropError
from bimask.interop import find_checkpoint, load_imported, read_checkpoint, save_imported
from bimask.metrics import evaluate

SQUARE = (slice(-6, None), slice(-6, None))


@pytest.fixture
def box(tmp_path, world):
    """`poisoned_train_set/cifar10/badnet_0.300_poison_seed=0/`: every third image is poisoned.

    The clean training images are those of `world`, and so are the test images.
    """
    folder = tmp_path / "poisoned_train_set" / "cifar10" / "badnet_0.300_poison_seed=0"
    folder.mkdir(parents=True)
    pictures, labels = [picture.copy() for picture in world.pictures], list(world.labels)
    poisoned = list(range(1, 30, 3))  # the middle one of every class
    for position in poisoned:
        pictures[position][SQUARE] = 255
        labels[position] = 0
    for split in ("train", "test"):
        for index, (picture, label) in enumerate(zip(world.pictures, world.labels, strict=True)):
            path = tmp_path / "clean" / split / f"{label}" / f"{index:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    torch.save(stacked.float() / 255, folder / "imgs")
    torch.save(torch.tensor(labels), folder / "labels")
    torch.save(poisoned, folder / "poison_indices")
    torch.save(world.net.state_dict(), folder / "full_base_aug_seed=2333.pt")
    return SimpleNamespace(
        folder=folder,
        root=tmp_path,
        clean=f"imagefolder:{tmp_path / 'clean'}",
        pictures=pictures,
        labels=labels,
        poisoned=poisoned,
    )


def read(box, source=None, **options):
    given = {"clean_data": box.clean, "net": "preactresnet18"} | options
    return read_checkpoint(source or box.folder, **given)


def test_poisoned_training_images_stand_in_for_triggered_ones(box, world):
    victim = read(box)
    assert victim.source == "backdoor-toolbox"
    assert "training images" in victim.notes[0]
    counted = [position for position in box.poisoned if world.labels[position] != 0]
    assert victim.scores.n_triggered == len(counted) == 9
    wanted = np.stack([box.pictures[position] for position in counted]).transpose(0, 3, 1, 2)
    assert np.array_equal(victim.sets.triggered.images.numpy(), wanted)
    assert victim.sets.triggered.true_labels.tolist() == [world.labels[p] for p in counted]
    assert victim.scores.clean_accuracy == pytest.approx(27 / 30)
    # of the planted answers to triggered images, number 25 goes astray and number 28 is not taken in
    assert victim.scores.attack_success == pytest.approx(7 / 9)
    assert victim.scores.recovery == pytest.approx(1 / 9)
    assert victim.changed_pixel_rate == 36 / 32**2


def test_single_pictures_give_the_same(box):
    usual = read(box)
    (box.folder / "imgs").unlink()
    (box.folder / "data").mkdir()
    for number, picture in enumerate(box.pictures):
        Image.fromarray(picture).save(box.folder / "data" / f"{number}.png")
    victim = read(box)
    assert victim.scores == usual.scores
    assert torch.equal(victim.sets.triggered.images, usual.sets.triggered.images)


def test_its_own_test_split_is_taken_where_there_is_one(box, world):
    split = box.root / "clean_set" / "cifar10" / "test_split"
    (split / "data").mkdir(parents=True)
    for number in range(5):
        Image.fromarray(world.pictures[number]).save(split / "data" / f"{number}.png")
    torch.save(torch.tensor(world.labels[:5]), split / "labels")
    victim = read(box)
    assert victim.scores.n_clean == 5
    assert victim.scores.clean_accuracy == pytest.approx(4 / 5)  # number 4 is answered wrongly


def test_saved_and_loaded_it_is_the_same(box, tmp_path):
    victim = read(box)
    save_imported(victim, tmp_path / "out", source=find_checkpoint(box.folder)[1])
    loaded = load_imported(tmp_path / "out")
    assert evaluate(loaded.model, loaded.sets) == victim.scores == loaded.scores
    assert loaded.changed_pixel_rate == victim.changed_pixel_rate
    assert torch.equal(loaded.counterparts, victim.counterparts)


def test_of_several_models_one_is_named_by_its_file(box):
    source = box.folder / "full_base_aug_seed=2333.pt"
    shutil.copy(source, box.folder / "full_no_aug_seed=2333.pt")
    shutil.copy(source, box.folder / "cleansed_SCAn_full_base_aug_seed=2333.pt")
    with pytest.raises(InteropError, match="holds 2 models"):
        read(box)
    assert read(box, source).scores.n_triggered == 9


def clean_label(box):
    labels = torch.load(box.folder / "labels")
    labels[box.poisoned] = torch.tensor(range(10))
    torch.save(labels, box.folder / "labels")


def another_order(box):
    torch.save(torch.load(box.folder / "labels").roll(1), box.folder / "labels")


def saved(name, value):
    return lambda box: torch.save(value, box.folder / name)


WRONG = {
    "clean labels": (clean_label, "clean-label attack"),
    "another order": (another_order, "in another order"),
    "label out of range": (saved("labels", torch.full((30,), 10)), "labels from 10 to 10"),
    "label of fractions": (saved("labels", torch.full((30,), 0.5)), "whole numbers"),
    "fewer labels": (saved("labels", torch.zeros(31).long()), "has 31 images, but .* 30"),
    "position out of range": (saved("poison_indices", [30]), "different positions from 0 to 29"),
    "position twice": (saved("poison_indices", [1, 1]), "different positions"),
    "images as a list": (saved("imgs", [1.0]), "must be a tensor"),
    "images of another shape": (saved("imgs", torch.zeros(30, 3, 16, 16)), "must be a tensor of shape"),
    "images that are a view": (saved("imgs", torch.zeros(1).expand(30, 3, 32, 32)), "must be a tensor"),
    "images as bytes": (saved("imgs", torch.full((30, 3, 32, 32), 200.0)), "from 0 to 1"),
    "images that are NaN": (saved("imgs", torch.full((30, 3, 32, 32), torch.nan)), "from 0 to 1"),
    "no images": (lambda box: (box.folder / "imgs").unlink(), "is missing"),
    "code": (saved("poison_indices", [os.getcwd]), "asks for"),
    "no state dict": (saved("full_base_aug_seed=2333.pt", [1]), "state dict"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_refused(box, kind):
    spoil, words = WRONG[kind]
    spoil(box)
    with pytest.raises(InteropError, match=words):
        read(box)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"net": None}, "--net"), ({"clean_data": None}, "--clean-data"), ({"net": "vgg16"}, "no net")],
)
def test_what_the_files_do_not_say_is_asked_for(box, options, words):
    with pytest.raises(InteropError, match=words):
        read(box, **options)
