"""A victim as BackdoorBench's `attack_result.pt` (version 2), with its pictures in folders.

What its loader needs of a file: the eight keys; a state dict in its own net's names; pictures as PNG
at the size of its images; and paths that it can cut, its own folder's and the stored ones at their
first "record", the clean data's at its first "data". `backdoorbench_convert.py` makes the weights fit.

The file is the one pickle that this project writes, since the format is one: plain tensors, dicts,
lists, strings and numbers, so that `torch.load(weights_only=True)`, the default of torch >= 2.6, reads
it. Its own writer has numpy arrays in two places, which that refuses; lists serve its loader as well,
but a test set made of them cannot be cut into subsets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bimask.errors import InteropError
from bimask.files.atomic import atomic_directory, refuse_existing
from bimask.interop.backdoorbench import ATTACK_FILE
from bimask.interop.backdoorbench_convert import convert
from bimask.metrics import EvalSets
from bimask.nets import Normalised


def clean_positions(sets: EvalSets, wanted: Tensor) -> Tensor:
    """Positions of the clean images that were triggered: those whose label is not the `wanted` one.

    Args:
        sets: as of `EvalSets.of`, which keeps their order.
        wanted: (N,) the label that the attack gives each clean image.

    Raises:
        InteropError: the triggered images are not of these.
    """
    positions = (sets.clean.labels != wanted).nonzero().flatten()
    if not torch.equal(sets.clean.labels[positions], sets.triggered.true_labels):
        raise InteropError("The triggered images are not those of the clean ones with another label.")
    return positions


def write_attack_result(
    out: Path,
    *,
    net: str,
    model: Normalised,
    sets: EvalSets,
    clean_index: Tensor,
    dataset: str,
) -> tuple[str, ...]:
    """Write `out/attack_result.pt` and `out/bd_test_dataset/`, whole or not at all.

    The poisoned training set is not written: `bd_train` is None, as LIRA's is.

    Args:
        out: a new folder, with "record" in its path; one that is moved keeps what follows that word.
        net: name of the net, as of `build_net`.
        sets: clean and triggered test images.
        clean_index: (M,) the clean counterpart of every triggered image.
        dataset: BackdoorBench's name of the data set.

    Returns:
        What had to be done to the weights, a sentence each.

    Raises:
        InteropError: a model or path that BackdoorBench cannot read.
        SettingError: `out` exists, or nothing can be written beside it.
    """
    own_path = out.absolute().as_posix()
    if (cut := own_path.find("record")) < 0:
        raise InteropError(
            f"BackdoorBench finds pictures by the word record in their path, but {own_path} has "
            "none; write to record/NAME."
        )
    refuse_existing(out)
    if len(set(clean_index.tolist())) != len(clean_index):
        raise InteropError(
            "Two triggered images are of the same clean one, but BackdoorBench stores one."
        )
    name, state, notes = convert(net, model, dataset, sets)
    channels, height, width = sets.clean.images.shape[1:]
    stored = f"./{own_path[cut:]}/bd_test_dataset"
    with atomic_directory(out) as part:
        entries = _write_pictures(part, stored, sets, clean_index)
        flags = torch.zeros(len(sets.clean))
        flags[clean_index] = 1
        content = {
            "model_name": name,
            "num_classes": sets.clean.num_classes,
            "model": state,
            "data_path": f"./data/{dataset}",
            "img_size": (int(height), int(width), int(channels)),
            "clean_data": dataset,
            "bd_train": None,
            "bd_test": {
                "bd_data_container": {
                    "save_folder_path": stored,
                    "data_dict": entries,
                    "save_file_format": ".png",
                },
                "getitem_all": True,
                "getitem_all_switch": False,
                "original_index_array": clean_index.tolist(),
                "poison_indicator": flags.tolist(),
                "save_folder_path": stored,
            },
        }
        torch.save(content, part / ATTACK_FILE)  # the format is a pickle; ours holds nothing but data
    return notes


def _write_pictures(
    folder: Path, stored: str, sets: EvalSets, clean_index: Tensor
) -> dict[int, dict[str, Any]]:
    """Every triggered image as PNG below `folder`; position -> path and labels, as in the file."""
    entries: dict[int, dict[str, Any]] = {}
    triggered = sets.triggered
    for row, index in enumerate(clean_index.tolist()):
        attack, true = int(triggered.attack_labels[row]), int(triggered.true_labels[row])
        path = f"{true}/{index}.png"
        target = folder / "bd_test_dataset" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = triggered.images[row].cpu().permute(1, 2, 0).numpy()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(target)
        entries[index] = {"path": f"{stored}/{path}", "other_info": [attack, true]}
    return entries
