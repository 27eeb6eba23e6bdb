"""Victims, trained here or imported, written as BackdoorBench's files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from bimask.errors import InteropError
from bimask.interop.backdoorbench_writer import clean_positions, write_attack_result
from bimask.metrics import Scores
from bimask.nets import Normalised
from bimask.victims import load_victim
from bimask.victims.imported_files import is_imported, load_imported

OUR_DATASETS = {"cifar10": "cifar10", "gtsrb": "gtsrb", "tiny-imagenet": "tiny"}


def export_victim(
    folder: Path, out: Path, *, dataset: str | None = None
) -> tuple[Scores, tuple[str, ...]]:
    """Write a victim's folder, ours or an imported one, as BackdoorBench's `attack_result.pt`.

    Args:
        dataset: BackdoorBench's name of the data set; None where the victim's own name tells.

    Returns:
        The scores on `test`, which BackdoorBench will find as well, and what had to be done to the
        weights.

    Raises:
        InteropError: BackdoorBench cannot read such a victim.
        VictimError: the folder is damaged.
    """
    model: nn.Module
    if is_imported(folder):
        imported = load_imported(folder)
        if imported.clean_index is None or imported.counterparts is not None:
            raise InteropError(
                f"The triggered images of {folder} are not of its test set, but BackdoorBench's are."
            )
        net, model, sets = imported.net, imported.model, imported.sets
        own, index, scores = imported.dataset, imported.clean_index, imported.scores
    else:
        victim = load_victim(folder)
        net, model, scores = victim.spec.net, victim.model, victim.scores["test"]
        own = OUR_DATASETS.get(victim.spec.dataset, victim.spec.dataset)
        sets = victim.eval_sets(victim.spec.load_data(), "test")
        labels = victim.attack.attack_labels(sets.clean.labels, sets.clean.num_classes)
        index = clean_positions(sets, labels)
    if not isinstance(model, Normalised):
        raise InteropError(f"The net of {folder} has no normalisation to compare.")
    notes = write_attack_result(
        out, net=net, model=model, sets=sets, clean_index=index, dataset=dataset or own
    )
    return scores, notes
