import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model
from torchvision.transforms import Resize

from bimask.errors import InteropError, SettingError
from bimask.interop import load_imported, read_checkpoint, save_imported
from bimask.interop.datasets import DATASETS, read_clean
from bimask.metrics import evaluate
from bimask.nets.fitting import BACKDOORBENCH_NETS, fit_net


def numbers(scores):
    return (scores.clean_accuracy, scores.attack_success, scores.recovery)


def read(bb, **options):
    return read_checkpoint(bb.file, clean_data=bb.clean, **options)


def entries(bb):
    return bb.content["bd_test"]["bd_data_container"]["data_dict"]


# --- reading ---


def test_the_planted_answers_are_not_trivial(backdoorbench):
    accuracy, success, recovery = backdoorbench.scores
    assert (accuracy, success, recovery) == pytest.approx((27 / 30, 23 / 27, 3 / 27))


def test_scores_are_those_of_backdoorbench(backdoorbench):
    victim = read(backdoorbench)
    assert numbers(victim.scores) == pytest.approx(backdoorbench.scores, abs=1e-9)
    assert (victim.scores.n_clean, victim.scores.n_triggered) == (30, 27)
    assert victim.scores == evaluate(victim.model, victim.sets)
    assert victim.source == "backdoorbench v2"
    assert not victim.model.training


def test_weights_and_images_are_those_of_the_files(backdoorbench, world):
    victim = read(backdoorbench)
    state = victim.model.net.state_dict()
    assert state.keys() == backdoorbench.content["model"].keys()
    assert all(torch.equal(state[name], value) for name, value in world.net.state_dict().items())
    wanted = np.stack([picture for picture, *_ in backdoorbench.stored]).transpose(0, 3, 1, 2)
    assert np.array_equal(victim.sets.triggered.images.numpy(), wanted)
    assert victim.sets.triggered.attack_labels.tolist() == [0] * 27
    assert victim.sets.triggered.true_labels.tolist() == world.labels[3:]
    clean = np.stack(world.pictures).transpose(0, 3, 1, 2)
    assert np.array_equal(victim.sets.clean.images.numpy(), clean)


def test_the_changed_pixel_rate_is_that_of_the_square(backdoorbench):
    victim = read(backdoorbench)
    assert victim.changed_pixel_rate == victim.changed_visibly == 36 / 32**2


def test_a_grey_level_lost_in_saving_is_told_apart(backdoorbench):
    for index, stored in entries(backdoorbench).items():
        path = backdoorbench.folder / stored["path"].removeprefix("./record/badnet/")
        pixels = np.array(Image.open(path))
        pixels[0, :8] += 1
        Image.fromarray(pixels).save(path)
        assert index > 2
    victim = read(backdoorbench)
    assert victim.changed_pixel_rate == pytest.approx(44 / 32**2)
    assert victim.changed_visibly == pytest.approx(36 / 32**2)


@pytest.mark.parametrize("stored", ["/home/x/record/a/", "../record_cifar10/a/", ".\\record\\a\\", ""])
def test_stored_paths_are_taken_below_the_folder_of_the_file(backdoorbench, stored):
    """A parent folder may be called like the parts, too."""
    moved = backdoorbench.folder.parent.parent / "bd_test_dataset" / "record"
    shutil.move(backdoorbench.folder, moved)
    for entry in entries(backdoorbench).values():
        tail = entry["path"].removeprefix("./record/badnet/")
        entry["path"] = stored + (tail.replace("/", "\\") if "\\" in stored else tail)
    torch.save(backdoorbench.content, moved / "attack_result.pt")
    victim = read_checkpoint(moved, clean_data=backdoorbench.clean)
    assert numbers(victim.scores) == pytest.approx(backdoorbench.scores, abs=1e-9)


def prefixed(bb):
    bb.content["model"] = {f"module.{name}": value for name, value in bb.content["model"].items()}


def int_keys(bb):
    bb.content["bd_test"]["bd_data_container"]["data_dict"] = {
        int(index): entry | {"other_info": [int(label) for label in entry["other_info"]]}
        for index, entry in entries(bb).items()
    }


def tensor_labels(bb):
    for entry in entries(bb).values():
        entry["other_info"] = [torch.tensor(int(label)) for label in entry["other_info"]]


def lists(bb):
    for key in ("original_index_array", "poison_indicator"):
        bb.content["bd_test"][key] = bb.content["bd_test"][key].tolist()


def extras(bb):
    bb.content |= {
        "inv_model": {"a": torch.zeros(3)},
        "note": "x",
        "args": {"lr": 0.1, "none": np.arange(0)},
    }


def half(bb):
    bb.content["bd_test"]["poison_indicator"] = bb.content["bd_test"]["poison_indicator"].astype(">f4")


def in_memory(bb):
    container = bb.content["bd_test"]["bd_data_container"]
    container["save_folder_path"] = None
    container["data_dict"] = {
        index: (Image.fromarray(picture), attack, true)
        for index, (picture, attack, true) in zip(entries(bb), bb.stored, strict=True)
    }
    shutil.rmtree(bb.folder / "bd_test_dataset")


def version_1(bb):
    bb.content["bd_test"] = {
        "x": [Image.fromarray(picture) for picture, *_ in bb.stored],
        "y": [attack for _, attack, _ in bb.stored],
        "original_index": np.array(list(entries(bb))),
        "original_targets": [true for *_, true in bb.stored],
    }
    bb.content["bd_train"] = {
        "x": [Image.new("RGB", (32, 32))],
        "y": [0],
        "original_index": np.arange(1),
    }
    shutil.rmtree(bb.folder / "bd_test_dataset")


FORMS = [prefixed, int_keys, tensor_labels, lists, extras, half, in_memory, version_1]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_the_file_gives_the_same(backdoorbench, form):
    usual = read(backdoorbench)
    form(backdoorbench)
    backdoorbench.save()
    victim = read(backdoorbench)
    assert victim.scores == usual.scores
    assert torch.equal(victim.sets.triggered.images, usual.sets.triggered.images)
    assert torch.equal(victim.clean_index, usual.clean_index)
    assert victim.source == ("backdoorbench v1" if form is version_1 else "backdoorbench v2")


def test_numpy_before_2_is_read(backdoorbench):
    """The published files spell `numpy.core`; one letter less, so the pickle is patched."""
    import zipfile

    with zipfile.ZipFile(backdoorbench.file) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    assert b"numpy._core.multiarray" in parts[name]
    parts[name] = parts[name].replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile(backdoorbench.file, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    assert numbers(read(backdoorbench).scores) == pytest.approx(backdoorbench.scores)


def test_all_to_all_counts_every_stored_image(backdoorbench, world):
    """Label y becomes y + 1, and the target class is nobody's."""
    container, stored = entries(backdoorbench), []
    for index, (picture, label) in enumerate(zip(world.pictures, world.labels, strict=True)):
        path = f"./record/badnet/bd_test_dataset/{label}/{index}.png"
        target = backdoorbench.folder / path.removeprefix("./record/badnet/")
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(255 - picture).save(target)
        container[index] = {"path": path, "other_info": [(label + 1) % 10, label]}
        stored.append((255 - picture, (label + 1) % 10, label))
    backdoorbench.content["bd_test"]["original_index_array"] = np.arange(30)
    backdoorbench.content["bd_test"]["poison_indicator"] = np.ones(30)
    backdoorbench.save()
    victim = read(backdoorbench)
    assert victim.scores.n_triggered == 30
    assert victim.sets.triggered.attack_labels.tolist() == [(y + 1) % 10 for y in world.labels]


def test_images_that_already_have_the_label_are_counted_and_named(backdoorbench):
    entry = next(iter(entries(backdoorbench).values()))
    entry["other_info"][0] = int(entry["other_info"][1])
    backdoorbench.save()
    victim = read(backdoorbench)
    assert victim.scores.n_triggered == 27
    assert victim.notes[0].startswith("1 of 27 stored images")


@pytest.mark.parametrize(
    ("rows", "noted"),
    [
        (["0.1,0.1,0.1", "0.9,0.85185,0.11111"], False),
        (["0.9,0.85185,0.11111", "nan,0.5,0.5"], False),  # the last that has all three
        (["0.9,0.85185,0.11111", "0.9,0.8517,0.11111"], True),
        ([], False),
        (["0.1,0.1,x"], False),
    ],
)
def test_another_score_in_its_own_log_is_noted(backdoorbench, rows, noted):
    text = "\n".join(["test_acc,test_asr,test_ra", *rows])
    (backdoorbench.folder / "attack_df.csv").write_text(text)
    notes = read(backdoorbench).notes
    assert len(notes) == noted
    assert all("(0.9000, 0.8517, 0.1111) than were found here (0.9000, 0.8519" in n for n in notes)


def test_another_data_set_is_refused(backdoorbench):
    folder = Path(backdoorbench.clean.removeprefix("imagefolder:")) / "test"
    shutil.move(folder / "1" / "003.png", folder / "2" / "003.png")
    with pytest.raises(InteropError, match="2 images of class 1, but the file 3 triggered ones"):
        read(backdoorbench)


def test_clean_data_in_another_order_gives_the_same(backdoorbench, world, monkeypatch):
    """Such as a set that was shuffled when BackdoorBench saw it, and is a folder by class here."""
    usual = read(backdoorbench)
    folder = Path(backdoorbench.clean.removeprefix("imagefolder:")) / "test"
    shutil.rmtree(folder)
    order = np.random.default_rng(0).permutation(30)
    for position, index in enumerate(order):
        path = folder / f"{world.labels[index]}" / f"{position:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(world.pictures[index]).save(path)
    stored = {  # as it would have been written then: position in the shuffled set -> the same pictures
        int(np.flatnonzero(order == index)[0]): entry for index, entry in entries(backdoorbench).items()
    }
    test_set = backdoorbench.content["bd_test"]
    test_set["bd_data_container"]["data_dict"] = stored
    test_set["original_index_array"] = np.array(list(stored))
    test_set["poison_indicator"] = np.isin(np.arange(30), list(stored)).astype(float)
    backdoorbench.save()
    victim = read(backdoorbench)
    assert victim.scores == usual.scores
    assert victim.changed_pixel_rate == usual.changed_pixel_rate
    assert "in another order" in victim.notes[0]


# --- clean data ---


def test_clean_data_is_looked_for_beside_the_file(backdoorbench, monkeypatch):
    with pytest.raises(InteropError, match="data/cifar10 beside .*--clean-data"):
        read_checkpoint(backdoorbench.file)
    data = backdoorbench.folder.parent.parent / "data" / "cifar10"
    data.mkdir(parents=True)
    with pytest.raises(InteropError, match="test images of cifar10 cannot be read"):
        read_checkpoint(backdoorbench.file)


def test_a_link_in_the_place_of_clean_data_is_not_followed_out(backdoorbench, tmp_path):
    (backdoorbench.folder / "data").mkdir()
    (backdoorbench.folder / "data" / "cifar10").symlink_to(tmp_path)
    with pytest.raises(InteropError, match="leads out of"):
        read_checkpoint(backdoorbench.file)


@pytest.fixture
def signs(tmp_path):
    """GTSRB as its official archives have it: two training pictures a class, 50 test pictures."""
    random, root = np.random.default_rng(0), tmp_path / "data" / "gtsrb"
    header = ["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"]
    tables = {root / "Train" / f"{c:05d}" / f"GT-{c:05d}.csv": [c, c] for c in range(43)}
    tables[root / "Test" / "GT-final_test.csv"] = [(7 * i) % 43 for i in range(50)]
    pictures = {}
    for table, labels in tables.items():
        table.parent.mkdir(parents=True)
        rows = []
        for number, label in reversed(list(enumerate(labels))):  # not in the order of the names
            pixels = random.integers(0, 256, (20 + number % 30, 25, 3), np.uint8)
            Image.fromarray(pixels).save(table.parent / f"{number:05d}.ppm")
            rows.append([f"{number:05d}.ppm", 25, 20, 0, 0, 1, 1, label])
            pictures.setdefault(table.parent.name, []).append((pixels, label))
        with open(table, "w", newline="") as file:
            csv.writer(file, delimiter=";").writerows([header, *rows])
    return root, pictures


@pytest.mark.parametrize("train", [False, True])
def test_gtsrb_is_read_in_the_order_of_its_tables(signs, train):
    root, pictures = signs
    data = read_clean("gtsrb", root, size=(32, 32), channels=3, train=train)
    wanted = pictures["Test"] if not train else [p for c in range(43) for p in pictures[f"{c:05d}"]]
    assert data.labels.tolist() == [label for _, label in wanted]
    resize = Resize((32, 32))
    for got, (pixels, _) in zip(data.images, wanted, strict=True):
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.array(resize(Image.fromarray(pixels))))


def test_tiny_imagenet_is_read_in_the_order_of_sorted_folders(tmp_path):
    for number, folder in enumerate(["n02", "n01", "n03"]):
        for picture in range(2):
            path = tmp_path / "val" / folder / f"val_{9 - picture}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (64, 64), 60 * number + picture).save(path)
    data = read_clean("tiny", tmp_path, size=(64, 64), channels=3)
    assert data.classes == ("n01", "n02", "n03")
    assert data.images[:, 0, 0, 0].tolist() == [61, 60, 1, 0, 121, 120]


@pytest.mark.parametrize("name", ["celeba", "imagenet"])
def test_layouts_that_are_not_known_are_asked_for_as_folders(tmp_path, name):
    with pytest.raises(InteropError, match="imagefolder:PATH"):
        read_clean(name, tmp_path, size=(64, 64), channels=3)


def test_conventions_are_whole():
    for conventions in DATASETS.values():
        assert len(conventions.mean) == len(conventions.std) in (1, 3)
        assert min(conventions.std) > 0.2


# --- nets ---


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "resnet18", "convnext_tiny"])
def test_nets_of_torchvision_answer_as_torchvision_does(name):
    """Also where we have a net of the same name for small images: its strides are others."""
    torch.manual_seed(0)
    net = get_model(name, num_classes=7).eval()
    model, width = fit_net(
        BACKDOORBENCH_NETS[name],
        net.state_dict(),
        num_classes=7,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.4],
        what="x",
    )
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        assert torch.allclose(model(images), net((images - mean) / std), atol=1e-5)
    assert width is None


def test_vision_transformers_enlarge_their_images():
    with torch.device("meta"):
        wanted = get_model("vit_b_16", num_classes=3)
    state = {f"1.{name}": torch.zeros(value.shape) for name, value in wanted.state_dict().items()}
    model, _ = fit_net(
        BACKDOORBENCH_NETS["vit_b_16"], state, num_classes=3, mean=[0.0] * 3, std=[1.0] * 3, what="x"
    )
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32)).tolist() == [[0, 0, 0]]


# --- writing and reading back ---


def test_saved_and_loaded_it_is_the_same(backdoorbench, tmp_path):
    victim = read(backdoorbench)
    save_imported(victim, tmp_path / "out" / "victim", source=backdoorbench.file)
    loaded = load_imported(tmp_path / "out" / "victim")
    for key in ("source", "net", "width", "dataset", "classes", "scores", "before", "notes"):
        assert getattr(loaded, key) == getattr(victim, key)
    before, after = victim.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(loaded.clean_index, victim.clean_index)
    for part in ("clean.images", "clean.labels", "triggered.images", "triggered.attack_labels"):
        kind, name = part.split(".")
        one, other = (getattr(getattr(v.sets, kind), name) for v in (victim, loaded))
        assert torch.equal(one, other)
    assert evaluate(loaded.model, loaded.sets) == victim.scores
    assert loaded.changed_pixel_rate == victim.changed_pixel_rate


@pytest.fixture
def imported(backdoorbench, tmp_path):
    save_imported(read(backdoorbench), tmp_path / "victim", source=backdoorbench.file)
    return tmp_path / "victim"


def test_an_imported_victim_is_three_files_and_no_pickle(imported):
    names = ["images.safetensors", "manifest.json", "weights.safetensors"]
    assert sorted(file.name for file in imported.iterdir()) == names
    manifest = json.loads((imported / "manifest.json").read_text())
    assert manifest["source_file"] == "attack_result.pt"
    assert not re.search(r"/(tmp|home)/", (imported / "manifest.json").read_text())


def test_an_existing_folder_is_not_written_over(backdoorbench, imported):
    with pytest.raises(SettingError, match="exists"):
        save_imported(read(backdoorbench), imported, source=backdoorbench.file)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("weights.safetensors", lambda data: data[:-1] + b"x", "digest of .*weights"),
        ("images.safetensors", lambda data: data[:-1] + b"x", "digest of .*images"),
        ("weights.safetensors", None, "not an imported victim"),
        ("manifest.json", None, "not an imported victim"),
        ("manifest.json", lambda data: data[:50], "not an imported victim"),
        ("manifest.json", lambda data: data.replace(b'"net"', b'"nett"'), "not an imported victim"),
        ("manifest.json", lambda data: data.replace(b"n_clean", b"clean"), "not an imported victim"),
        ("manifest.json", lambda data: data.replace(b"preactres", b"resres"), "no net that is known"),
    ],
)
def test_a_damaged_folder_is_refused(imported, file, change, words):
    if change is None:
        (imported / file).unlink()
    else:
        (imported / file).write_bytes(change((imported / file).read_bytes()))
    with pytest.raises(InteropError, match=words):
        load_imported(imported)


def test_nothing_is_left_when_writing_fails(backdoorbench, tmp_path, monkeypatch):
    victim = read(backdoorbench)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("bimask.victims.imported_files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_imported(victim, tmp_path / "new" / "victim", source=backdoorbench.file)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_prints_the_numbers_and_writes_the_folder(
    backdoorbench, tmp_path, capsys, monkeypatch
):
    import runpy

    out = tmp_path / "new" / "victim"
    words = ["import", str(backdoorbench.folder), str(out), "--clean-data", backdoorbench.clean]
    monkeypatch.setattr(sys, "argv", ["bimask", *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("bimask", run_name="__main__")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"90\.0\D+85\.2\D+11\.1\D+30\D+27", shown)
    assert "changed pixels: 3.52 %" in shown
    assert numbers(load_imported(out).scores) == pytest.approx(backdoorbench.scores)
