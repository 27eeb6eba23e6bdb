"""Files of strangers: every maker leaves them in the working directory and gives the words that a user
types there; see test_hostile_variants.py."""

import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

OLD = Path(__file__).parent / "study" / "store" / "schema_1" / "old"
ODD = "\x1b]0;mine\x07\nerror: all is well [bold red]$x_{[/] \u202e"  # title, line, markup, mathematics
HASTY = {"image_size": 8, "width": 2, "epochs": 1, "min_clean_accuracy": 0, "min_attack_success": 0}
SITES = "bimask sites --net small_resnet --width 2"


def pictures(at="pictures", classes=("a", "b"), count=2, make=None):
    for label in classes:
        home = Path(at) / label
        home.mkdir(parents=True, exist_ok=True)
        for row in range(count):
            noise = np.random.default_rng(row).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(home / f"{row}.png")
    if make is not None:
        (Path(at) / "a" / "z.png").write_bytes(make())
    return at


def weights(name="w", **tensors):
    save_file(tensors or {"fc.weight": torch.ones(2, 3)}, name)
    return name


def sites(model, clean=None):
    clean = clean or pictures()
    return [*SITES.split(), "--model", model, "--clean", clean]


def dry(text):
    Path("s.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return "study.launch s.yaml --dry-run"


def study_of(**keys):
    content = {
        "name": "s",
        "trials": 2,
        "clean_images_per_class": 2,
        "paper_defaults": False,
        "victims": [dict(HASTY)],
        "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
        "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
    }
    return yaml.safe_dump(content | keys)


def old(change=lambda folder: None, words="study.report old"):
    """A study's folder that somebody sent."""
    shutil.copytree(OLD, "outputs/old")
    change(Path("outputs/old"))
    return words


def replaced(name, content):
    """Instead of a file of the study: bytes, or what makes something of the path."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_bytes(content)

    return change


def edited(name, change):
    def edit(folder):
        content = yaml.safe_load((folder / name).read_text())
        change(content)
        text = json.dumps(content) if name.endswith("json") else yaml.safe_dump(content)
        (folder / name).write_text(text)

    return edit


def sparse(size):
    def make(path):
        path.touch()
        os.truncate(path, size)

    return make


def zero(path):
    path.symlink_to("/dev/zero")


def ring(path):
    Path(path).symlink_to(path)
    return str(path)


def picture(make):
    """A picture among others."""
    return lambda: sites(weights(), pictures(make=make))


def header(size, **fields):
    """A safetensors file of that header and no tensors."""
    text = json.dumps(fields).encode()
    Path("w").write_bytes((size or len(text)).to_bytes(8, "little") + text)
    return sites("w")


class Hostile:
    def __reduce__(self):
        return open, ("RUN", "w")


def pickled():
    torch.save({"a": Hostile()}, "w")
    return sites("w")


def npz(raw, compressed=True):
    with zipfile.ZipFile("w", "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        file.writestr("a.npy", raw)
    return sites("w")


def bomb_png(width, height):
    about = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", about), (b"IDAT", zlib.compress(bytes(2**16))), (b"IEND", b"")]
    rows = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(rows)


def jpeg(side=8, scans=0, **options):
    file = io.BytesIO()
    Image.new("RGB", (side, side), 90).save(file, "JPEG", **options)
    content = file.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * scans + content[-2:]


def huge_jpeg():
    content = jpeg()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", 65_500, 65_500) + content[at + 4 :]


def webp():
    file = io.BytesIO()
    Image.new("L", (8_192, 4_160)).save(file, "WEBP", lossless=True, method=0)
    return file.getvalue()


def looping_tiff():
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 98), (279, 4, 1, 64)]
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<4sIH", b"II*\0", 8, 7) + rows + struct.pack("<I", 8) + bytes(64)


def wide_tiff():
    return struct.pack("<4sHHQQ", b"II+\0", 8, 0, 16, 2**60) + bytes(64)


def bmp():
    return struct.pack("<2sIHHI", b"BM", 60, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 2**31 - 1, -(2**31), 1, 1, 0, 0, 0, 0, 0, 0
    )


def gif():
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF")
    content = bytearray(file.getvalue())
    content[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(content)


def manifest(trained, **changes):
    shutil.copytree(trained, "victim")
    path = Path("victim/manifest.json")
    about = json.loads(path.read_text())
    for key, value in changes.items():
        about[key] = about[key] | value if isinstance(about[key], dict) else value
    path.write_text(json.dumps(about))
    return "victim"


def failed(reason):
    """The last trial of the study FAILED with that reason."""

    def change(folder):
        lines = (folder / "trials.jsonl").read_text().splitlines()
        row = json.loads(lines[-1]) | {"status": "FAILED", "reason": reason}
        (folder / "trials.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")

    return change


def named_victim(content):
    content["victims"][ODD] = content["victims"].pop("digits-badnets")


def suite(**keys):
    Path("suite.yaml").write_text(yaml.safe_dump({"victims": [{**HASTY, **keys}]}))
    return "suite.yaml"


def listed_studies():
    home = Path("outputs") / ODD.replace("/", "|")
    home.mkdir(parents=True)
    (home / "study.yaml").write_text("a: b")
    return "study.launch --resume nothing"


def odd_picture(name):
    home = pictures()
    place = os.path.join(os.fsencode(home), b"a", os.fsencode(name))
    with open(place, "wb") as file:
        file.write(b"no picture")
    return home


def linked(target):
    home = pictures()
    (Path(home) / "a" / "z.png").symlink_to(target)
    return home


def many_victims(count, at):
    rate = 0.0 if at == 2 else 0.1
    return [{**HASTY, "seed": 1000 * at + row, "poisoning_rate": rate} for row in range(count)]


def settings(text):
    Path("s.yaml").write_text(text)
    return ["bimask", "purify", *sites(weights())[2:], "--config", "s.yaml", "--out", "out"]


def nested_manifest(trained):
    name = manifest(trained)
    Path(name, "manifest.json").write_text('{"a": ' * 60 + "1" + "}" * 60)
    return name


def object_array():
    file = io.BytesIO()
    np.save(file, np.array([Hostile()], dtype=object), allow_pickle=True)
    return file.getvalue()
