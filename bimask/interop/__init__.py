"""Other frameworks' files: read safely, turned into victims, and written for BackdoorBench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from bimask.errors import InteropError
from bimask.interop import backdoorbench, defended
from bimask.interop.backdoorbench import read_attack_result
from bimask.interop.backdoorbench_writer import clean_positions, write_attack_result
from bimask.interop.defended import read_defense_result
from bimask.interop.imported import IMAGES, ImportedVictim, load_imported, save_imported
from bimask.interop.safe import load_foreign, shown
from bimask.metrics import Scores
from bimask.nets import Normalised
from bimask.victim import load_victim

READERS: dict[str, Callable[..., ImportedVictim]] = {
    "attack_result.pt": read_attack_result,
    "defense_result.pt": read_defense_result,
}


def find_checkpoint(source: Path) -> Path:
    """The file to read: `source`, or in a folder the one that a format of `READERS` is known by.

    Raises:
        InteropError: nothing there, or nothing known.
    """
    if source.is_dir():
        for name in READERS:
            if (source / name).is_file():
                return source / name
        raise InteropError(f"The folder {source} holds none of {', '.join(READERS)}.")
    if not source.is_file():
        raise InteropError(
            f"There is no file {shown(str(source))}; give one, or a folder that holds one."
        )
    return source


def read_checkpoint(source: Path, *, clean_data: str | None = None) -> ImportedVictim:
    """A victim from a file or folder, whichever format its contents have.

    Args:
        clean_data: as of `read_attack_result`.

    Raises:
        InteropError: hostile, broken, or of no known format.
    """
    path = find_checkpoint(source)
    defended.refuse_other_results(path)
    content = load_foreign(path)
    defended.refuse_other_results(path, content)
    if backdoorbench.is_attack_result(content):
        return backdoorbench.from_content(content, path, clean_data=clean_data)
    if defended.is_defense_result(content):
        return defended.from_content(content, path, clean_data=clean_data)
    keys = (
        ", ".join(shown(key) for key in list(content)[:8]) if isinstance(content, dict) else "no keys"
    )
    raise InteropError(
        f"{path} is no checkpoint that is known here: it holds {keys}, but an attack_result.pt or a "
        "defense_result.pt is expected."
    )


def export_victim(folder: Path, out: Path) -> tuple[str, Scores]:
    """Write a victim's folder, ours or an imported one, as BackdoorBench's `attack_result.pt`.

    Returns:
        BackdoorBench's name of the data set, and the scores on `test` that it will find.

    Raises:
        InteropError: BackdoorBench cannot read such a victim.
        VictimError: the folder is damaged.
    """
    if (folder / IMAGES).exists():
        imported = load_imported(folder)
        net, sets, scores = imported.net, imported.sets, imported.scores
        model: nn.Module = imported.model
        index = imported.clean_index
    else:
        victim = load_victim(folder)
        splits = victim.spec.load_data()
        net, model, scores = victim.spec.net, victim.model, victim.scores["test"]
        sets = victim.eval_sets(splits, "test")
        labels = victim.spec.build_attack().attack_labels(sets.clean.labels, sets.clean.num_classes)
        index = clean_positions(sets, labels)
    if not isinstance(model, Normalised):
        raise InteropError(f"The net of {folder} has no normalisation of its own to compare.")
    return write_attack_result(out, net=net, model=model, sets=sets, clean_index=index), scores


__all__ = [
    "READERS",
    "ImportedVictim",
    "export_victim",
    "find_checkpoint",
    "load_foreign",
    "load_imported",
    "read_attack_result",
    "read_checkpoint",
    "read_defense_result",
    "save_imported",
    "write_attack_result",
]
