"""Pictures of strangers: no program is started, no bomb decoded, no walk without an end."""

import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from bimask.data import load_data, pictures_digest
from bimask.data.pictures import picture_size, read_picture
from bimask.errors import DataError, InteropError
from bimask.files.pictures import FORMATS, class_pictures, opened_picture
from bimask.inspection.suspect import read_clean
from bimask.interop.datasets import read_clean as read_clean_of
from study.spec.suspect import SuspectSpec

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A `gs` that leaves a file where it was run."""
    tools, mark = tmp_path / "tools", tmp_path / "ran"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def folder(tmp_path, *names, size=8):
    for name in names:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), len(name), np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ppm"])
def test_an_eps_starts_no_program_whatever_its_name(tmp_path, ghostscript, name):
    home = folder(tmp_path, "x/1.png", "x/2.png", "y/1.png", "y/2.png")
    (home / "x" / name).write_bytes(EPS)
    for read in (
        lambda: read_picture(home / "x" / name, 3),
        lambda: picture_size(home / "x" / name),
        lambda: read_clean(home),
        lambda: load_data(f"imagefolder:{home}"),
        lambda: read_clean_of("cifar10", f"imagefolder:{home}", size=(8, 8), channels=3),
    ):
        with pytest.raises((DataError, InteropError), match="none of PNG, JPEG"):
            read()
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", ["DDS", "EPS", "ICO", "PCX", "SGI", "TGA"])
def test_a_format_that_is_not_listed_is_never_opened(tmp_path, kind):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(DataError, match="none of PNG"):
        read_picture(tmp_path / "a.png", 3)


@pytest.mark.parametrize(
    ("mode", "name"), [("1", "a.png"), ("1", "a.tif"), ("L", "a.png"), ("P", "a.gif"), ("1", "a.ppm")]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, mode, name):
    options = {"compression": "group4"} if name == "a.tif" else {}
    Image.new(mode, (13_000, 13_000)).save(tmp_path / name, **options)
    tracemalloc.start()
    with pytest.raises(DataError, match="13000x13000 pixels, but at most 33554432 are read"):
        read_picture(tmp_path / name, 3, 8)
    with pytest.raises(DataError, match="13000x13000 pixels"):
        picture_size(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_without_an_image_size_a_picture_is_as_large_as_an_input_at_most(tmp_path):
    Image.new("1", (5_000, 5_000)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="5000x5000 pixels, but models take sides of at most 1024"):
        read_picture(tmp_path / "a.png", 3)
    assert read_picture(tmp_path / "a.png", 3, 8).shape == (3, 8, 8)
    for name in ("x/1.png", "y/1.png"):
        folder(tmp_path, name)
        Image.new("1", (5_000, 5_000)).save(tmp_path / "pictures" / name)
    with pytest.raises(DataError, match="5000x5000 pixels, but models"):
        load_data(f"imagefolder:{tmp_path / 'pictures'}")


def test_frames_are_not_counted(tmp_path):
    """Of 100,000 frames the second one decides."""
    Image.new("P", (4, 4)).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", (4, 5))]
    )
    content = (tmp_path / "a.gif").read_bytes()
    frame = content[content.index(b"\x2c") : -1]
    (tmp_path / "a.png").write_bytes(content[:-1] + frame * 100_000 + b"\x3b")
    with pytest.raises(DataError, match="several frames"):
        read_picture(tmp_path / "a.png", 3)


@pytest.mark.parametrize("place", ["x/1.png", "x/deep/1.png"])
def test_a_pipe_among_pictures_is_refused(tmp_path, place):
    home = folder(tmp_path, "x/0.png", "y/0.png")
    (home / place).parent.mkdir(exist_ok=True)
    os.mkfifo(home / place)
    with pytest.raises(DataError, match="not a regular file"):
        read_picture(home / place, 3)
    with pytest.raises(DataError, match="not a regular file"):
        pictures_digest(home)
    with pytest.raises(DataError, match="not a regular file"):
        load_data(f"imagefolder:{home}", image_size=8)
    (tmp_path / "w").write_bytes(b"weights")
    with pytest.raises(ValueError, match="not a file"):
        SuspectSpec(model=str(tmp_path / "w"), net="small_resnet", clean=str(home))


def test_links_back_end(tmp_path):
    home = folder(tmp_path, "x/1.png", "x/in/2.png", "y/1.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "3.png")
    for at in ("x", "x/in", "y"):
        (home / at / "back").symlink_to(home)
        (home / at / "self").symlink_to(home / at)
        (home / at / "more").symlink_to(elsewhere)
    classes, samples = class_pictures(home)
    assert classes == ("x", "y")
    found = [(os.path.relpath(file, home), label) for file, label in samples]
    of_y = [("y/1.png", 1), ("y/more/3.png", 1)]
    assert found == [("x/1.png", 0), ("x/in/2.png", 0), ("x/more/3.png", 0), *of_y]
    assert len(pictures_digest(home)) == 64


def test_a_text_chunk_cannot_unfold(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_text("a", "x" * 80_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=about)
    with pytest.raises(DataError, match="Cannot read the picture"):
        read_picture(tmp_path / "a.png", 3)


def test_the_formats_of_old_are_read(tmp_path):
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for kind, name in zip(FORMATS, "abcdefg", strict=True):
        picture.save(tmp_path / name, format=kind)
        with opened_picture(tmp_path / name) as opened:
            assert opened.format == kind
        assert read_picture(tmp_path / name, 3).shape == (3, 8, 8)


def saved(kind, size=(8, 8), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, 90).save(file, kind, **options)
    return file.getvalue()


def many_scans(side, count):
    content = saved("JPEG", (side, side), progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def chunks(kind, count):
    content = saved("PNG")
    at = content.index(b"IDAT") - 4
    chunk = struct.pack(">I4sI", 0, kind, zlib.crc32(kind))
    return content[:at] + chunk * count + content[at:]


def tiff(offsets, order="<"):
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, offsets, 8 + 2 + 12 * 7 + 4), (279, 4, 1, 64)]
    rows = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + rows + bytes(4) + bytes(4 * offsets) + bytes(64)


def rle(side, codes):
    about = (40, side, side, 1, 8, 1, len(codes), 0, 0, 256, 0)
    head = struct.pack("<2sIHHI", b"BM", 1078 + len(codes), 0, 0, 1078)
    return head + struct.pack("<IiiHHIIiiII", *about) + bytes(1024) + codes


SLOW = {
    "scans": (lambda: many_scans(2000, 1000), "in 1010 scans, but at most 536 are read"),
    "segments": (
        lambda: b"\xff\xd8" + b"\xff\xfe\x00\x02" * 150_000 + saved("JPEG")[2:],
        "more than 100000 segments",
    ),
    "filling": (lambda: b"\xff\xd8" + b"\xff" * 150_000 + saved("JPEG")[2:], "than 100000 segments"),
    "chunks": (lambda: chunks(b"abCd", 150_000), "more than 100000 chunks"),
    "empty data": (lambda: chunks(b"IDAT", 150_000), "more than 100000 chunks"),
    "a comment": (lambda: b"P6\n#" + b"a" * 9000 + b"\n8 8\n255\n" + bytes(192), "first 4096 bytes"),
    "words": (lambda: b"P3\n800 800\n255\n" + b"1 " * 3 * 640_000, "in its slow form"),
    "runs": (lambda: rle(800, b"\x01\x02" * 640_000 + b"\0\x01"), "in its slow form"),
    "ends of lines": (lambda: rle(8, bytes(2) * 3_000_000), "in its slow form"),
    "strips": (lambda: tiff(150_000), "more than 100000 strips or tiles"),
    "strips, big first": (lambda: tiff(150_000, ">"), "more than 100000 strips or tiles"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_what_would_take_minutes_is_refused_by_its_structure(tmp_path, kind):
    make, words = SLOW[kind]
    (tmp_path / "a.png").write_bytes(make())
    with pytest.raises(DataError, match=words):
        read_picture(tmp_path / "a.png", 3, 8)


def test_sound_pictures_of_these_kinds_are_read(tmp_path):
    sound = [many_scans(64, 3), chunks(b"abCd", 100), tiff(1), saved("JPEG")]
    sound += [b"P3\n# a\n#b\n8 8\n# c\n255\n" + b"1 " * 192, rle(8, b"\x08\x02\0\0" * 8 + b"\0\x01")]
    sound += [saved("TIFF", compression=one) for one in ("jpeg", "tiff_lzw", None)]
    for content in sound:
        (tmp_path / "a.png").write_bytes(content)
        assert read_picture(tmp_path / "a.png", 3, 8).shape == (3, 8, 8)
