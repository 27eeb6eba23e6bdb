"""Whether a suspect knows its own clean pictures: one that does not was described wrongly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bimask.errors import SettingError
from bimask.inspection.suspect import CleanImages
from bimask.nets.answers import logits_of

ASKED = 256  # pictures at most, evenly spread over all
FEWEST = 10  # of fewer, nothing is said


def require_knowing(model: nn.Module, clean: CleanImages, classes: Sequence[str]) -> None:
    """Refuse a model that gives pictures of several classes one and the same class.

    Without its normalisation a net answers so, and a defence would keep those answers.

    Args:
        model: (N, C, H, W) in [0, 1] -> (N, K) logits.
        clean: with labels; without them nothing is asked.
        classes: K names.

    Raises:
        SettingError: all answers are one class, and the pictures' folders are several.
    """
    if clean.labels is None or len(clean.images) < FEWEST or len(clean.labels.unique()) < 2:
        return
    some = torch.linspace(0, len(clean.images) - 1, min(len(clean.images), ASKED)).round().long()
    device = next(model.parameters()).device
    answers = logits_of(model, clean.subset(some).floats().to(device)).argmax(1).unique()
    if len(answers) > 1:
        return
    raise SettingError(
        f"The model gives all {len(some)} clean pictures that it was asked the class "
        f"{classes[int(answers)]!r}, but they are of {len(clean.labels[some].unique())} classes; give "
        "the --mean and --std of its training, or look at --net and --image-size."
    )
