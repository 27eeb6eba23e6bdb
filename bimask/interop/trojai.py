"""TrojAI's models: whole pickled modules, opened only in a process that is thrown away.

Format: `models/id-XXXXXXXX/` with model.pt, config.json or reduced-config.json, clean-example-data/ and
(in the mitigation round) poisoned-example-data/ of pictures with a JSON each.

A pickled module names its classes, so that the allow-list of `safe.py` cannot serve. `trojai_worker.py`
allows layer classes of torch, torchvision and timm and nothing else, under `weights_only`, in a process
of its own with an empty environment, an empty working folder, and limits on memory, time and the size
of files. Its one result is a safetensors file, which is then read as any stranger's.

What this protects from: code that the pickle names (nothing is called but the constructors and
`__setstate__` of those classes), a crash or exhausted memory of this process, and a look at its
environment variables. What it does not: a flaw in torch's unpickler or in one of those classes would
run with the rights of the user, with the user's files and network. Against that, run the import in a
container that has neither. It needs Linux or macOS; only Linux limits the memory.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from bimask.attacks import TriggeredData
from bimask.data import ImageData
from bimask.errors import InteropError
from bimask.files.atomic import atomic_write
from bimask.files.bounded import read_json
from bimask.files.pictures import opened_picture
from bimask.files.png import MAX_PICTURES, check_extent, inside
from bimask.files.safe import MAX_FILE_BYTES
from bimask.files.stand_ins import printable, shown
from bimask.files.tensors import load_tensors, require_header
from bimask.nets.fitting import TORCHVISION, fit_net
from bimask.victims.imported import ImportedVictim, assemble

WORKER = Path(__file__).with_name("trojai_worker.py")
MODEL, CONFIGS = "model.pt", ("reduced-config.json", "config.json")
CLEAN, POISONED = "clean-example-data", "poisoned-example-data"
MAX_JSON_BYTES = 2**20
SECONDS = 600  # of waiting for the process, which limits its own processor time, too
NOTE = "The scores are of TrojAI's few example images, clean and poisoned, not of a test set."


def is_trojai(path: Path) -> bool:
    """A model.pt with one of TrojAI's configurations beside it."""
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name != MODEL:
        return False
    names = (*CONFIGS, "ground_truth.csv", CLEAN)
    return (folder / MODEL).is_file() and any((folder / name).exists() for name in names)


def model_file(path: Path) -> Path:
    """The pickled module of a folder."""
    return path / MODEL if path.is_dir() else path


def resave(source: Path, target: Path) -> tuple[str, int]:
    """Weights of a pickled module as safetensors, by a process that is thrown away.

    Args:
        target: a new file; nothing is there after an error.

    Returns:
        The module's class, such as "torchvision.models.resnet.ResNet", and its last layer's outputs.

    Raises:
        InteropError: hostile, broken, over a limit, or of classes that are not installed.
    """
    if not source.is_file() or source.stat().st_size > MAX_FILE_BYTES:
        raise InteropError(f"{source} is no file of at most {MAX_FILE_BYTES} bytes.")
    with tempfile.TemporaryDirectory(prefix="trojai-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(WORKER), str(source.absolute()), "out.safetensors"],
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InteropError(f"{source} is refused: reading it took over {SECONDS} s.") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
            reason = said[0][:200] if done.returncode == 3 else "the process that read it died of it"
            raise InteropError(
                f"{source} is refused: {printable(reason)}; nothing of it was run but layers."
            )
        written = Path(folder) / "out.safetensors"
        said_of_it = require_header(written)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as part:
            shutil.copyfile(written, part)
    return printable(said_of_it["class"])[:80], int(said_of_it["outputs"])


def read_trojai(
    path: Path,
    *,
    clean_data: str | None = None,
    net: str | None = None,
    device: torch.device | str = "cpu",
) -> ImportedVictim:
    """The model of a folder, scored on its example images.

    Args:
        clean_data: not used: the clean images are in the folder.
        net: as of `fit_net`; None takes the architecture that its configuration names from torchvision.

    Raises:
        InteropError: hostile, broken, without poisoned examples, or of an unknown net.
    """
    folder = (path if path.is_dir() else path.parent).absolute()
    if clean_data is not None:
        raise InteropError("TrojAI's clean images are in its folder; leave --clean-data out.")
    clean_images, clean_labels = _examples(folder / CLEAN, ("label", "clean_label"), folder)
    images, wanted = _examples(folder / POISONED, ("poisoned_label",), folder)
    _, true = _examples(folder / POISONED, ("clean_label",), folder)
    counts = wanted != true
    if not counts.any():
        raise InteropError(f"{folder / POISONED} has no image with two different labels to count.")
    with tempfile.TemporaryDirectory(prefix="trojai-") as temporary:
        weights = Path(temporary) / "weights.safetensors"
        kind, classes = resave(folder / MODEL, weights)
        try:
            state = load_tensors(weights)
        except SafetensorError as error:
            raise InteropError(f"The weights of {folder / MODEL} cannot be read: {error}.") from error
    name = net or TORCHVISION + _architecture(folder)
    labels = torch.cat([clean_labels, wanted, true])
    if labels.min() < 0 or labels.max() >= classes:
        raise InteropError(
            f"{folder} has labels up to {int(labels.max())}, but its model has {classes} outputs."
        )
    fitted = fit_net(
        name, state, num_classes=classes, mean=[0.0] * 3, std=[1.0] * 3, what=str(folder / MODEL)
    )
    return assemble(
        device=device,
        source="trojai",
        net=name,
        weights=fitted,
        dataset="trojai",
        clean=ImageData(clean_images, clean_labels, tuple(str(c) for c in range(classes))),
        triggered=TriggeredData(images[counts], wanted[counts], true[counts]),
        clean_index=None,
        notes=(NOTE, f"The module was a {kind}."),
    )


def _architecture(folder: Path) -> str:
    for name in CONFIGS:
        if (folder / name).is_file():
            content = _json(folder / name, folder)
            found = content.get("model_architecture") if isinstance(content, dict) else None
            if isinstance(found, str):
                return found.rpartition(":")[2]
    raise InteropError(f"{folder} does not say which net its model is; say it with --net.")


def _json(path: Path, folder: Path) -> Any:
    real = inside(path, folder)
    try:
        return read_json(real, MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InteropError(f"{path} cannot be read as JSON ({reason}).") from error


def _examples(path: Path, keys: tuple[str, ...], folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures with the label under the first of `keys` in their JSON: (N, 3, H, W) uint8, (N,)."""
    files = sorted(p for p in inside(path, folder).glob("*") if p.suffix in (".png", ".jpg"))
    if not 1 <= len(files) <= MAX_PICTURES:
        raise InteropError(
            f"{path} holds {len(files)} pictures, but scores need 1 to {MAX_PICTURES}; a model without "
            "poisoned examples cannot be told from a clean one."
        )
    images, labels = [], []
    for file in files:
        try:
            with opened_picture(inside(file, folder), ["PNG", "JPEG"]) as picture:
                check_extent(len(files), 3, picture.height, picture.width)
                images.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
        except (OSError, ValueError, SyntaxError) as error:
            raise InteropError(
                f"{file} cannot be read as a picture ({type(error).__name__})."
            ) from error
        content = _json(file.with_suffix(".json"), folder)
        label = (
            next((content[key] for key in keys if key in content), None)
            if isinstance(content, dict)
            else content
        )
        if type(label) is not int:
            raise InteropError(f"{file.with_suffix('.json')} must hold a label, got {shown(label)}.")
        labels.append(label)
    if len({image.shape for image in images}) > 1:
        raise InteropError(f"The pictures in {path} have several sizes, but a net takes one.")
    return torch.stack(images), torch.tensor(labels)
