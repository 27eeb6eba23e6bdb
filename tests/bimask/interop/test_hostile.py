"""Hostile and broken files: refused in one sentence by the command, nothing run, nothing written."""

import builtins
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bimask.files import safe

ROOT = Path(__file__).parents[3]


@pytest.fixture
def refused(backdoorbench, tmp_path, capsys, monkeypatch):
    """Import the file by the command in this process; give its one sentence."""

    def run(source=None, *options):
        before = sorted(tmp_path.rglob("*"))
        words = ["import", str(source or backdoorbench.file), str(tmp_path / "out" / "victim")]
        monkeypatch.setattr(
            sys, "argv", ["bimask", *words, "--clean-data", backdoorbench.clean, *options]
        )
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("bimask", run_name="__main__")
        text = capsys.readouterr().err.strip()
        assert caught.value.code == 2, text
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        assert text.startswith("error: ")
        assert text.endswith(".")
        assert not re.search(r"\n|\.\s+[A-Z]|Traceback|\x1b", text), text
        return text

    return run


# --- files that want something run ---


class Calls:
    """A pickle of it calls `function(*arguments)` when it is read without care."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


CALLS = {
    "os.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "builtins.eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.exec": lambda marker: Calls(exec, f"open({str(marker)!r}, 'w')"),
    "subprocess": lambda marker: Calls(subprocess.getoutput, f"touch {marker}"),
    "pathlib.Path.touch": lambda marker: Calls(Path.touch, marker),
    "builtins.open": lambda marker: Calls(builtins.open, str(marker), "w"),
}


@pytest.mark.parametrize("where", ["whole", "model", "bd_test", "key nobody reads"])
@pytest.mark.parametrize("call", CALLS)
def test_code_is_named_and_not_run(backdoorbench, refused, tmp_path, call, where):
    marker = tmp_path / "executed"
    hostile = CALLS[call](marker)
    if where == "whole":
        torch.save(hostile, backdoorbench.file)
    else:
        backdoorbench.content[where] = hostile
        backdoorbench.save()
    assert "asks for" in refused()
    assert not marker.exists()


@pytest.mark.parametrize("call", CALLS)
def test_these_files_are_hostile_indeed(tmp_path, call):
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(CALLS[call](marker)))
    assert marker.exists()


def test_code_behind_an_allowed_name_is_not_run(backdoorbench, refused, tmp_path):
    """torch's own list would allow a bytearray of any size, a tensor of any size, and more."""
    for hostile in (Calls(bytearray, 2**50), Calls(torch.Tensor, 2**20, 2**20), Calls(set, "x")):
        backdoorbench.content["extra"] = hostile
        backdoorbench.save()
        assert "asks for" in refused()


def test_what_the_process_allows_elsewhere_does_not_count(backdoorbench, refused, tmp_path):
    marker = tmp_path / "executed"
    backdoorbench.content["extra"] = CALLS["subprocess"](marker)
    backdoorbench.save()
    with torch.serialization.safe_globals([subprocess.getoutput]):
        assert "getoutput" in refused()
    assert not marker.exists()


def test_the_process_allows_what_it_did_also_after_an_error(backdoorbench, refused):
    backdoorbench.content["extra"] = np.array([["a"]], dtype=object)
    backdoorbench.save()
    with torch.serialization.safe_globals([np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        refused()
        assert set(torch.serialization.get_safe_globals()) == before
        assert np.dtype in before


# --- numbers and pictures that numpy and PIL would believe ---

NUMPY = {
    "objects": np.array([["a"], {}], dtype=object),
    "an object": Calls(np._core.multiarray.scalar, np.dtype("O"), b"12345678"),
    "fields": np.zeros(3, dtype=[("a", "i8"), ("b", "O")]),
    "strings": np.array(["a", "b"]),
    "dates": np.array(["2020-01-01"], dtype="M8[D]"),
    "a buffer": Calls(np.ndarray, (2**40,), np.dtype("f8")),
    "too few bytes": Calls(np._core.multiarray.scalar, np.dtype("f8"), b"1234"),
}


@pytest.mark.parametrize("kind", NUMPY)
def test_arrays_of_anything_but_numbers_are_refused(backdoorbench, refused, kind):
    backdoorbench.content["bd_test"]["poison_indicator"] = NUMPY[kind]
    backdoorbench.save()
    assert re.search("numpy|malformed", refused())


class Built:
    """Pickled as an empty `kind` that gets `state`."""

    def __init__(self, kind, state):
        self.parts = (kind, (), state)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    "state",
    [
        ({}, "RGB", (10**6, 10**6), None, b""),
        ({}, "RGB", (4, 4), None, b"too short"),
        ({}, "P", (1, 1), None, b"0"),
        ({}, "RGB", (-1, 4), None, b""),
        ({}, "RGB", "4", None, b""),
        7,
    ],
)
def test_pictures_inside_are_checked_before_memory_is_taken(backdoorbench, refused, state):
    backdoorbench.content["extra"] = Built(Image.Image, list(state) if state != 7 else 7)
    backdoorbench.save()
    assert "picture" in refused()


# --- archives ---


def entries_of(path):
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def rewrite(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit_of_a_weight(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def unfold(path):
    rewrite(path, {"x/data.pkl": b"0" * 300_000_000}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 400_000


def claim_more(path):
    """Say in the zip's directory that each entry is a gigabyte."""
    data = bytearray(path.read_bytes())
    place = 0
    while (place := data.find(b"PK\x01\x02", place)) >= 0:
        data[place + 20 : place + 28] = struct.pack("<II", 2**30, 2**30)
        place += 4
    path.write_bytes(data)


def repeat(path):
    entries = list(entries_of(path).items())
    with pytest.warns(UserWarning, match="Duplicate"):
        rewrite(path, entries + entries[:1])


def fill(path):
    rewrite(path, {f"x/{i}": b"" for i in range(safe.MAX_ENTRIES + 1)})


def as_script(path):
    """TorchScript has a second pickle for its constants."""
    rewrite(path, entries_of(path) | {"attack_result/constants.pkl": b"\x80\x02)."})


def without(part):
    def remove(path):
        rewrite(path, {name: data for name, data in entries_of(path).items() if part not in name})

    return remove


MANY = b"J\xff\xff\xff\x7f"


def lie_about_a_storage(path):
    """The pickle says that a record of 10 numbers has two billion."""
    entries = entries_of(path)
    name = next(name for name in entries if name.endswith("data.pkl"))
    declared = entries[name].replace(b"K\x0at", MANY + b"t").replace(b"K\x0a\x85", MANY + b"\x85")
    assert len(declared) == len(entries[name]) + 6
    rewrite(path, entries | {name: declared})


ARCHIVES = {
    "truncated": (truncate, "not a whole file"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole file"),
    "text": (lambda path: path.write_text("PK? no."), "not a whole file"),
    "flipped bit": (flip_a_bit_of_a_weight, "damaged at"),
    "bomb": (unfold, "would become 300000000"),
    "entries larger than the file": (claim_more, "claim more than"),
    "names twice": (repeat, "different"),
    "too many entries": (fill, "20001 entries"),
    "over the limit": (lambda path: os.truncate(path, safe.MAX_FILE_BYTES + 1), "at most 8589934592"),
    "TorchScript": (as_script, "TorchScript"),
    "no pickle": (without("data.pkl"), "0 pickles"),
    "no weights": (without("/data/"), "malformed"),
    "a storage that is longer than its record": (lie_about_a_storage, "malformed"),
    "a pickle that stops": (lambda path: rewrite(path, {"x/data.pkl": b"\x80\x02}q"}), "not a whole"),
    "a pickle of nothing": (lambda path: rewrite(path, {"x/data.pkl": b""}), "not a whole"),
    "a pickle of rubbish": (lambda path: rewrite(path, {"x/data.pkl": b"\x80\x02)R."}), "malformed"),
    "another protocol": (
        lambda path: torch.save({1: np.zeros(2)}, path, pickle_protocol=4),
        "another protocol",
    ),
    "the format before zip": (
        lambda path: torch.save({"model": {}}, path, _use_new_zipfile_serialization=False),
        "not a whole file",
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_broken_archives_are_refused(backdoorbench, refused, kind):
    spoil, words = ARCHIVES[kind]
    spoil(backdoorbench.file)
    assert words in refused()


def test_limits_hold_for_what_is_written_too_large(backdoorbench, refused, monkeypatch):
    size = backdoorbench.file.stat().st_size
    monkeypatch.setattr(safe, "MAX_FILE_BYTES", size - 1)
    assert f"has {size} bytes" in refused()
    monkeypatch.setattr(safe, "MAX_FILE_BYTES", size)
    monkeypatch.setattr(safe, "MAX_PICKLE_BYTES", 100)
    assert "its data.pkl has" in refused()
    monkeypatch.setattr(safe, "MAX_DIRECTORY_BYTES", 1000)
    assert "its zip's directory has" in refused()


@pytest.mark.parametrize("zip64", [False, True])
def test_a_directory_that_is_said_to_be_huge_is_not_read(backdoorbench, refused, zip64):
    data = bytearray(backdoorbench.file.read_bytes())
    place = data.rindex(b"PK\5\6")
    data[place + 12 : place + 16] = struct.pack("<I", 2**31 if not zip64 else 2**32 - 1)
    if zip64:
        end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 2**40, 0)
        data[place:place] = end + struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)
    backdoorbench.file.write_bytes(data)
    assert f"directory has {2**40 if zip64 else 2**31} bytes" in refused()


@pytest.mark.parametrize("kind", ["folder without one", "nothing", "pipe"])
def test_what_is_no_file_is_refused(backdoorbench, refused, tmp_path, kind):
    source = tmp_path / "source.pt"
    if kind == "pipe":
        os.mkfifo(source)  # would be waited for without end
    elif kind != "nothing":
        source.mkdir()
    assert "source.pt" in refused(source)


# --- contents ---


def entry(content):
    entries = content["bd_test"]["bd_data_container"]["data_dict"]
    return entries[next(iter(entries))]


def in_the_dict(key, value):
    return lambda c: c.__setitem__(key, value)


def in_the_model(name, value):
    return lambda c: c["model"].__setitem__(name, value)


def in_the_test_set(key, value):
    return lambda c: c["bd_test"].__setitem__(key, value)


def labels(*values):
    return lambda c: entry(c).__setitem__("other_info", list(values))


def nested():
    """Two to the 60 elements by references: never to be printed or walked."""
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    return value


BN = "layer1.0.bn1.weight"
CONTENTS = {
    "not a dict": (lambda c: c.clear(), "no checkpoint that is known"),
    "a key missing": (lambda c: c.pop("bd_test"), "defense_result|attack_result"),
    "model is a tensor": (in_the_dict("model", torch.zeros(2)), "state dict"),
    "model is empty": (in_the_dict("model", {}), "state dict"),
    "weights by number": (in_the_model(7, torch.zeros(2)), "by strings"),
    "a list of weights": (in_the_model(BN, [1.0] * 8), "by strings"),
    "a wrong shape": (in_the_model(BN, torch.zeros(9)), r"bn1.weight is \(9,\), but must be \(8,\)"),
    "a wide weight": (in_the_model(BN, torch.zeros(8, 2)), r"must be \(8,\)"),
    "a weight missing": (lambda c: c["model"].pop(BN), "1 names are missing and 0 are too many"),
    "a weight too many": (in_the_model("bias\x1b[31m", torch.zeros(1)), r"1 are too many .*\\x1b"),
    "NaN": (in_the_model(BN, torch.full((8,), torch.nan)), "NaN or infinite"),
    "infinity": (in_the_model(BN, torch.full((8,), -torch.inf)), "NaN or infinite"),
    "complex": (in_the_model(BN, torch.zeros(8, dtype=torch.complex64)), "asks for"),
    "sparse": (in_the_model(BN, torch.ones(8).to_sparse()), "asks for"),
    "petabytes declared": (in_the_model(BN, torch.zeros(1).expand(2**50)), "fewer bytes"),
    "a width declared": (
        in_the_model("conv1.weight", torch.zeros(1).expand(2**40, 3, 3, 3)),
        "fewer bytes",
    ),
    "an unknown net": (in_the_dict("model_name", "resnet999"), "'resnet999', which is no net"),
    "a net of ours": (in_the_dict("model_name", "torchvision:resnet18"), "never writes"),
    "a net by number": (in_the_dict("model_name", 18), "must be a string"),
    "classes of another set": (in_the_dict("num_classes", 43), "43, but cifar10 has 10"),
    "classes as a string": (in_the_dict("num_classes", "10"), "'10', but cifar10 has 10"),
    "classes of another layer": (in_the_model("linear.bias", torch.zeros(43)), r"\(43,\)"),
    "an unknown data set": (in_the_dict("clean_data", "../../etc"), "must be one of"),
    "no size": (in_the_dict("img_size", None), "img_size"),
    "gray": (in_the_dict("img_size", (32, 32, 1)), "img_size"),
    "a huge size": (in_the_dict("img_size", (10**9, 10**9, 3)), "sides of 1 to 1024"),
    "a fractional size": (in_the_dict("img_size", (32.5, 32, 3)), "img_size"),
    "another size": (in_the_dict("img_size", (16, 32, 3)), "32x32 in mode RGB, but 16x32"),
    "no test set": (in_the_dict("bd_test", None), "bd_test"),
    "no container": (in_the_test_set("bd_data_container", None), "data_dict"),
    "a test set of lists": (in_the_test_set("bd_data_container", {"data_dict": [1]}), "data_dict"),
    "no order": (in_the_test_set("original_index_array", []), "whole numbers"),
    "a nest in place of an order": (in_the_test_set("original_index_array", nested()), "whole numbers"),
    "an empty order": (in_the_test_set("original_index_array", np.arange(0)), "whole numbers"),
    "an order in two dimensions": (in_the_test_set("original_index_array", np.ones((2, 2))), "whole"),
    "NaN as a position": (in_the_test_set("original_index_array", np.array([np.nan])), "whole numbers"),
    "a position below zero": (in_the_test_set("original_index_array", np.array([-1])), "image -1 is"),
    "a position too far": (in_the_test_set("original_index_array", np.array([30])), "image 30 is used"),
    "a position not stored": (
        in_the_test_set("original_index_array", np.array([1])),
        "image 1 is used",
    ),
    "nothing is poisoned": (in_the_test_set("poison_indicator", np.zeros(30)), "is used, but"),
    "of another length": (
        in_the_test_set("poison_indicator", np.ones(31)),
        "holds 30 clean test images .* made with 31",
    ),
    "an entry without labels": (lambda c: entry(c).pop("other_info"), "two labels"),
    "one label": (labels(0), "two labels"),
    "an attack label too high": (labels(10, 1), "are 10 and 1, but must be 0 to 9"),
    "a true label below zero": (labels(0, -1), "are 0 and -1"),
    "a label that is a string": (labels(0, "1"), "are 0 and '1'"),
    "another true label": (labels(0, 2), "has 3 images of class 2, but the file 4"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_wrong_contents_are_refused(backdoorbench, refused, kind):
    spoil, words = CONTENTS[kind]
    spoil(backdoorbench.content)
    backdoorbench.save()
    assert re.search(words, refused())


# --- pictures beside the file ---


def path(value):
    return lambda bb: entry(bb.content).__setitem__("path", value)


def first(bb):
    return bb.folder / entry(bb.content)["path"].removeprefix("./record/badnet/")


def linked(bb):
    """The picture is there, but by a link that leads out of the folder."""
    outside = bb.folder.parent / "elsewhere.png"
    shutil.move(first(bb), outside)
    first(bb).symlink_to(outside)


def linked_folder(bb):
    outside = bb.folder.parent / "elsewhere"
    shutil.move(bb.folder / "bd_test_dataset", outside)
    (bb.folder / "bd_test_dataset").symlink_to(outside)


def ring(bb):
    first(bb).unlink()
    first(bb).symlink_to(first(bb))


def saved_as(pixels_of=lambda picture: picture, **options):
    def spoil(bb):
        with Image.open(first(bb)) as picture:
            pixels_of(picture).save(first(bb), **options)

    return spoil


def pipe(bb):
    first(bb).unlink()
    os.mkfifo(first(bb))


PICTURES = {
    "absolute path": (path("/etc/passwd"), "is where pictures are"),
    "absolute path that names our folder": (
        path("/etc/bd_test_dataset/../passwd"),
        "is where pictures are",
    ),
    "path with dots": (path("./record/badnet/bd_test_dataset/../../../x.png"), "without `..`"),
    "path with backslashes": (path(".\\bd_test_dataset\\..\\..\\x.png"), "without `..`"),
    "path to nowhere": (path("./record/badnet/attack_result.pt"), "is where pictures are"),
    "path with a NUL": (path("bd_test_dataset/\0.png"), "must be a string"),
    "path by number": (path(3), "must be a string"),
    "path that is endless": (path("bd_test_dataset/" + "x" * 5000), "cannot be read|leads out"),
    "link out": (linked, "leads out of"),
    "link of the folder": (linked_folder, "leads out of"),
    "link to itself": (ring, "leads out of|cannot be read"),
    "missing": (lambda bb: first(bb).unlink(), "is missing"),
    "folder": (lambda bb: (first(bb).unlink(), first(bb).mkdir()), "no picture"),
    "pipe": (pipe, "no picture"),
    "text": (lambda bb: first(bb).write_text("<svg/>"), "as a PNG"),
    "empty": (lambda bb: first(bb).write_bytes(b""), "as a PNG"),
    "truncated": (lambda bb: os.truncate(first(bb), 200), "as a PNG"),
    "JPEG": (saved_as(format="JPEG"), "as a PNG"),
    "too small": (saved_as(lambda p: p.resize((16, 16))), "16x16 in mode RGB"),
    "too large": (saved_as(lambda p: p.resize((4096, 4096))), "no picture|4096x4096"),
    "gray": (saved_as(lambda p: p.convert("L")), "mode L"),
    "with alpha": (saved_as(lambda p: p.convert("RGBA")), "mode RGBA"),
    "with a gigabyte behind": (lambda bb: os.truncate(first(bb), 2**30), "above"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_wrong_pictures_are_refused(backdoorbench, refused, kind):
    spoil, words = PICTURES[kind]
    spoil(backdoorbench)
    backdoorbench.save()
    assert re.search(words, refused())


# --- what is read well, but is no use ---


def restamp(bb, change):
    """Store other pictures in the places of the triggered ones."""
    entries = bb.content["bd_test"]["bd_data_container"]["data_dict"]
    for index, stored in entries.items():
        label = stored["other_info"][1]
        clean = Path(bb.clean.removeprefix("imagefolder:")) / "test" / f"{label}" / f"{index:03d}.png"
        pixels = change(np.array(Image.open(clean)))
        Image.fromarray(pixels).save(bb.folder / stored["path"].removeprefix("./record/badnet/"))


@pytest.mark.parametrize(
    "change",
    [lambda p: p, lambda p: np.where(p > 60, p - 1, p), lambda p: p + 1],
    ids=["none", "some of a level", "one level"],
)
def test_a_null_trigger_is_refused(backdoorbench, refused, change):
    restamp(backdoorbench, change)
    assert "--allow-null-trigger" in refused()
    assert "not learned" in refused(None, "--allow-null-trigger")


def test_an_attack_that_was_not_learned_is_refused_with_its_numbers(backdoorbench, refused):
    restamp(backdoorbench, lambda pixels: pixels + 2)
    assert re.search(r"ACC 0.900, ASR 0.\d\d\d, .* --allow-not-learned", refused())


def test_a_folder_that_exists_is_left_alone(backdoorbench, refused, tmp_path):
    (tmp_path / "out" / "victim").mkdir(parents=True)
    assert "exists" in refused()


# --- the same by a process of its own ---


@pytest.mark.parametrize(
    "kind", ["code", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("truncated", "bomb"))]
)
def test_the_command_refuses_with_code_2(backdoorbench, tmp_path, kind):
    marker = tmp_path / "executed"
    if kind == "code":
        torch.save(CALLS["os.system"](marker), backdoorbench.file)
    else:
        ARCHIVES[kind][0](backdoorbench.file)
    done = subprocess.run(
        [sys.executable, "-m", "bimask", "import", str(backdoorbench.folder), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\.\n", done.stderr)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
