import os
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from bimask.data import ImageData, augment, cache_folder, load_data, pictures_digest
from bimask.errors import DataError


def small_set(counts=(5, 3, 9)):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return ImageData(images.contiguous(), labels, ("one", "two", "three")[: len(counts)])


def write_pictures(root, classes=("cat", "dog"), count=10, size=(8, 8), suffix="bmp"):
    """Pictures of one colour each; the red channel says which picture it is."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            red = 20 * i + label
            Image.new("RGB", size, (red, 100 * label, 7)).save(root / name / f"{i:02}.{suffix}")


def reds(data):
    return data.images[:, 0, 0, 0].tolist()


def rows(data):
    return {tuple(image.flatten().tolist()) for image in data.images}


# --- ImageData ---


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2).long()),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long()),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long()),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2, 1).long()),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels):
    with pytest.raises(DataError):
        ImageData(images, labels, ("a",))


def test_floats_are_bytes_over_255():
    data = ImageData(torch.tensor([0, 51, 255]).byte().view(3, 1, 1, 1), torch.zeros(3).long(), ("a",))
    assert data.floats().flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert data.floats(torch.tensor([2])).tolist() == [[[[1.0]]]]


def test_subsets_keep_order_and_classes():
    data = small_set()
    part = data.subset(torch.tensor([7, 0]))
    assert part.images[:, 0, 0, 0].tolist() == [7, 0]
    assert part.labels.tolist() == [1, 0]
    assert part.classes == data.classes
    assert len(data.subset(data.labels == 1)) == 3


def test_clean_subset_is_balanced_and_ordered_by_class():
    subset = small_set().clean_subset(3, seed=0)
    assert subset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(reds(subset))) == 9


def test_clean_subset_is_drawn_by_its_seed_alone():
    data = small_set((40, 40, 40))
    torch.manual_seed(1)
    one = data.clean_subset(5, seed=0)
    torch.manual_seed(2)
    same, other = data.clean_subset(5, seed=0), data.clean_subset(5, seed=1)
    assert reds(one) == reds(same) != reds(other)
    smaller = data.clean_subset(2, seed=0)
    assert set(reds(smaller)) < set(reds(one))


def test_a_class_that_is_too_small_is_named():
    assert len(small_set().clean_subset(3, seed=0)) == 9
    with pytest.raises(DataError, match="class 'two' has 3"):
        small_set().clean_subset(4, seed=0)


def test_an_absent_class_is_named():
    data = small_set()
    with pytest.raises(DataError, match="class 'three' has 0"):
        data.subset(data.labels < 2).clean_subset(1, seed=0)


@pytest.mark.parametrize("count", [0, -1])
def test_no_samples_per_class_are_refused(count):
    with pytest.raises(DataError, match="samples_per_class >= 1"):
        small_set().clean_subset(count, seed=0)


# --- digits ---


def test_digits_have_fixed_disjoint_splits_of_known_size():
    splits, again = load_data("digits"), load_data("digits")
    parts = (splits.train, splits.val, splits.test)
    assert [len(part) for part in parts] == [897, 450, 450]
    assert all(part.images.shape[1:] == (1, 16, 16) for part in parts)
    assert all(part.classes == tuple("0123456789") for part in parts)
    assert torch.equal(splits.train.images, again.train.images)
    assert torch.equal(splits.test.labels, again.test.labels)
    together = [image for part in parts for image in rows(part)]
    assert len(together) == len(set(together)) == 1797  # scikit-learn's digits are all different


def test_digits_keep_the_shares_of_the_classes():
    splits = load_data("digits", image_size=8)
    for part in (splits.train, splits.val, splits.test):
        shares = torch.bincount(part.labels) / len(part)
        assert (shares - 0.1).abs().max() < 0.006


def test_digits_of_size_8_are_scikit_learns_own():
    from sklearn.datasets import load_digits

    splits = load_data("digits", image_size=8)
    images = torch.cat([splits.train.images, splits.val.images, splits.test.images])
    raw = torch.from_numpy(load_digits().images)
    mine = (images[:, 0].double() * 16 / 255).round()
    assert sorted(mine.flatten(1).tolist()) == sorted(raw.flatten(1).tolist())
    assert images.min() == 0
    assert images.max() == 255


@pytest.mark.parametrize("size", [5, 12, 16, 28])
def test_digits_of_any_size_stay_where_they_are(size):
    small = load_data("digits", image_size=8).val.floats().mean(0)[0]
    other = load_data("digits", image_size=size).val.floats().mean(0)[0]
    assert other.shape == (size, size)
    assert other.mean().item() == pytest.approx(small.mean().item(), rel=0.05)
    left, right = other[:, : size // 2].mean(), other[:, -(size // 2) :].mean()
    assert (left > right) == (small[:, :4].mean() > small[:, 4:].mean())


# --- image folders ---


def test_a_folder_with_train_and_test(tmp_path):
    write_pictures(tmp_path / "train", count=10)
    write_pictures(tmp_path / "test", count=3)
    splits = load_data(f"imagefolder:{tmp_path}")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [18, 2, 6]
    assert splits.train.classes == ("cat", "dog")
    assert splits.test.images.shape == (6, 3, 8, 8)
    assert reds(splits.test) == [0, 20, 40, 1, 21, 41]
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.test.images[3, :, 0, 0].tolist() == [1, 100, 7]
    assert sorted(reds(splits.train) + reds(splits.val)) == sorted(
        20 * i + label for i in range(10) for label in (0, 1)
    )


def test_a_single_folder_is_split_in_three(tmp_path):
    write_pictures(tmp_path, count=10)
    splits = load_data(f"imagefolder:{tmp_path}")
    parts = (splits.train, splits.val, splits.test)
    assert [len(part) for part in parts] == [14, 3, 3]
    together = [red for part in parts for red in reds(part)]
    assert len(together) == len(set(together)) == 20
    for part in parts:
        assert [red % 20 for red in reds(part)] == part.labels.tolist()
    assert reds(load_data(f"imagefolder:{tmp_path}").test) == reds(splits.test)


def test_decoded_pictures_come_from_the_cache_the_second_time(tmp_path):
    write_pictures(tmp_path, count=10)
    first = load_data(f"imagefolder:{tmp_path}")
    files = sorted(tmp_path.rglob("*.bmp"))
    for file in files:  # another picture of the same size in bytes, which claims the same age
        status = file.stat()
        Image.new("RGB", (8, 8), (255, 255, 255)).save(file)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reds(load_data(f"imagefolder:{tmp_path}").train) == reds(first.train)
    os.utime(files[0], ns=(0, 0))
    assert set(reds(load_data(f"imagefolder:{tmp_path}").train)) == {255}


def test_the_digest_of_a_folder_is_that_of_its_pictures(tmp_path):
    for split in ("train", "test"):
        write_pictures(tmp_path / "pets" / split, count=3)
    first = pictures_digest(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("no picture")
    moved = (tmp_path / "pets").rename(tmp_path / "moved")
    assert pictures_digest(moved) == first
    (file, *others) = sorted((moved / "train" / "cat").glob("*.bmp"))
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    assert pictures_digest(moved) != first
    file.write_bytes(held)
    assert pictures_digest(moved) == first
    file.rename(moved / "train" / "dog" / "z.bmp")  # another class
    assert pictures_digest(moved) != first
    with pytest.raises(DataError, match="no folder"):
        pictures_digest(tmp_path / "pets")
    others[0].unlink()
    others[0].symlink_to(tmp_path / "nowhere.bmp")
    with pytest.raises(DataError, match="Cannot read the picture"):
        pictures_digest(moved)


def test_a_cache_file_cut_short_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMASK_CACHE", str(tmp_path / "cache"))
    write_pictures(tmp_path / "pets", count=10)
    first = load_data(f"imagefolder:{tmp_path / 'pets'}")
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(load_data(f"imagefolder:{tmp_path / 'pets'}").train.images, first.train.images)
    assert cached.read_bytes() == whole
    assert [file.name for file in cached.parent.iterdir()] == [cached.name]


def test_each_size_has_its_own_cache(tmp_path):
    write_pictures(tmp_path)
    for size in (4, 6, 4):
        images = load_data(f"imagefolder:{tmp_path}", image_size=size).train.images
        assert images.shape[1:] == (3, size, size)


@pytest.mark.parametrize("image_size", [None, 8])
def test_a_corrupt_picture_is_named(tmp_path, image_size):
    write_pictures(tmp_path, count=10, suffix="png")
    (tmp_path / "dog" / "03.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"dog/03\.png"):
        load_data(f"imagefolder:{tmp_path}", image_size=image_size)


def test_a_picture_cut_short_is_named(tmp_path):
    write_pictures(tmp_path, count=10, suffix="png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = tmp_path / "dog" / "03.png"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:-60])  # the header is whole
    with pytest.raises(DataError, match=r"dog/03\.png"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("other", [(9, 9), (8, 9)])
def test_pictures_of_mixed_sizes_need_an_image_size(tmp_path, other):
    write_pictures(tmp_path)
    Image.new("RGB", other).save(tmp_path / "cat" / "odd.bmp")
    with pytest.raises(DataError, match="have 2 sizes.*`image_size`"):
        load_data(f"imagefolder:{tmp_path}")
    splits = load_data(f"imagefolder:{tmp_path}", image_size=5)
    assert splits.train.images.shape[1:] == (3, 5, 5)


def test_oblong_pictures_need_an_image_size(tmp_path):
    write_pictures(tmp_path, size=(8, 6))
    with pytest.raises(DataError, match="8x6.*`image_size`"):
        load_data(f"imagefolder:{tmp_path}")


def test_grey_pictures_become_rgb(tmp_path):
    write_pictures(tmp_path)
    Image.new("L", (8, 8), 222).save(tmp_path / "cat" / "grey.bmp")
    splits = load_data(f"imagefolder:{tmp_path}")
    images = torch.cat([splits.train.images, splits.val.images, splits.test.images])
    assert [222, 222, 222] in images[:, :, 0, 0].tolist()


def test_train_and_test_of_different_classes_are_refused(tmp_path):
    write_pictures(tmp_path / "train", classes=("cat", "dog"))
    write_pictures(tmp_path / "test", classes=("cat", "cow"))
    with pytest.raises(DataError, match=r"\['cow', 'dog'\]"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_missing_folder_and_one_without_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        load_data(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="no pictures"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pictures_for_three_splits_are_refused(tmp_path, count):
    write_pictures(tmp_path, classes=("cat",), count=count)
    with pytest.raises(DataError):
        load_data(f"imagefolder:{tmp_path}")


# --- names and downloads ---


def test_an_unknown_dataset_is_refused_with_the_known_ones():
    with pytest.raises(
        DataError, match="'mnist'.*cifar10, digits, gtsrb, tiny-imagenet and imagefolder"
    ):
        load_data("mnist")


@pytest.mark.parametrize("name", ["cifar10", "gtsrb", "tiny-imagenet"])
def test_offline_the_folder_to_fill_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("BIMASK_CACHE", str(tmp_path))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody answers there
    # the opener that urllib makes once remembers its proxies
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        load_data(name)
    assert str(tmp_path / name) in str(caught.value)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMASK_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BIMASK_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "bimask")


# --- augmentation ---


def test_nothing_asked_is_nothing_changed():
    images = torch.rand(5, 2, 6, 6)
    assert torch.equal(augment(images), images)


def test_shifted_images_are_shifted_with_their_edges_repeated():
    images = torch.rand(40, 3, 7, 7)
    got = augment(images, shift=2, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, [2] * 4, mode="replicate")
    offsets = set()
    for image, whole in zip(got, padded, strict=True):
        matches = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(image, whole[:, top : top + 7, left : left + 7])
        ]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert len(offsets) > 10


def test_about_half_of_the_images_are_flipped():
    images = torch.rand(200, 1, 4, 4)
    got = augment(images, flip=True, generator=torch.Generator().manual_seed(0))
    flipped = (got == images.flip(3)).flatten(1).all(1)
    kept = (got == images).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 70 < flipped.sum() < 130


def test_augmentation_comes_from_its_generator_alone():
    images, state = torch.rand(8, 1, 5, 5), torch.random.get_rng_state()
    first, again = (
        augment(images, shift=1, flip=True, generator=torch.Generator().manual_seed(7)) for _ in "ab"
    )
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
