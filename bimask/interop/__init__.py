"""Other frameworks' files: read safely, turned into victims; `export.py` writes for BackdoorBench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bimask.errors import InteropError
from bimask.files.safe import load_foreign
from bimask.files.stand_ins import shown
from bimask.interop import backdoorbench, defended, toolbox, trojai
from bimask.interop.backdoorbench import read_attack_result
from bimask.interop.backdoorbench_writer import write_attack_result
from bimask.interop.defended import read_defense_result
from bimask.victims.imported import ImportedVictim
from bimask.victims.imported_files import load_imported, save_imported


class Format(NamedTuple):
    """How the files of a framework are recognised and read.

    Attributes:
        known: whether a path is of this format; opens nothing.
        file: the checkpoint itself, of a path that is.
        read: the victim in it; takes what `read_checkpoint` does.
    """

    known: Callable[[Path], bool]
    file: Callable[[Path], Path]
    read: Callable[..., ImportedVictim]


def _read_backdoorbench(
    path: Path,
    *,
    clean_data: str | None = None,
    net: str | None = None,
    device: torch.device | str = "cpu",
) -> ImportedVictim:
    """Either of BackdoorBench's files, whatever its name, by the keys it holds."""
    if net is not None:
        raise InteropError("BackdoorBench's files name their net; leave --net out.")
    defended.refuse_other_results(path)
    content = load_foreign(path)
    defended.refuse_other_results(path, content)
    if backdoorbench.is_attack_result(content):
        return backdoorbench.from_content(content, path, clean_data=clean_data, device=device)
    if defended.is_defense_result(content):
        return defended.from_content(content, path, clean_data=clean_data, device=device)
    held = [shown(key) for key in list(content)[:8]] if isinstance(content, dict) else ["no keys"]
    raise InteropError(
        f"{path} is no checkpoint that is known here: it holds {', '.join(held)}, but an "
        "attack_result.pt or a defense_result.pt is expected."
    )


def _file_of_backdoorbench(path: Path) -> Path:
    names = (backdoorbench.ATTACK_FILE, defended.DEFENSE_FILE)
    known = (*names, *defended.NOT_A_MODEL)  # the latter to be told what they are
    files = [path / name for name in known] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    if path.is_dir():
        raise InteropError(
            f"The folder {path} holds no {' or '.join(names)}, nor another format's files."
        )
    raise InteropError(f"There is no file {shown(str(path))}; give one, or a folder that holds one.")


# the first that knows a path; BackdoorBench's takes what is left, by its contents
READERS: dict[str, Format] = {
    "trojai": Format(trojai.is_trojai, trojai.model_file, trojai.read_trojai),
    "backdoor-toolbox": Format(toolbox.is_toolbox, toolbox.model_file, toolbox.read_toolbox),
    "backdoorbench": Format(lambda _: True, _file_of_backdoorbench, _read_backdoorbench),
}


def find_checkpoint(source: Path) -> tuple[str, Path]:
    """The format, a key of `READERS`, and the file to read: `source`, or the one in that folder.

    Raises:
        InteropError: nothing there, or nothing known.
    """
    name = next(name for name, format_ in READERS.items() if format_.known(source))
    return name, READERS[name].file(source)


def read_checkpoint(
    source: Path,
    *,
    clean_data: str | None = None,
    net: str | None = None,
    device: torch.device | str = "cpu",
) -> ImportedVictim:
    """A victim from a file or folder, whichever format it has.

    Args:
        clean_data: folder of the clean data, or `imagefolder:PATH`; None looks where the format has it.
        net: which net it is, where the format does not say; as of `bimask.nets.fitting.fit_net`.
        device: what the scores are measured on; the victim is on the CPU.

    Raises:
        InteropError: hostile, broken, or of no known format.
    """
    name, path = find_checkpoint(source)
    return READERS[name].read(path, clean_data=clean_data, net=net, device=device)


__all__ = [
    "READERS",
    "ImportedVictim",
    "find_checkpoint",
    "load_foreign",
    "load_imported",
    "read_attack_result",
    "read_checkpoint",
    "read_defense_result",
    "save_imported",
    "write_attack_result",
]
