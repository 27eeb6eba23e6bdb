"""A victim of another framework: its model, its stored triggered images, its scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bimask.attacks import TriggeredData
from bimask.data import ImageData
from bimask.errors import InteropError
from bimask.metrics import EvalSets, Scores, evaluate
from bimask.nets import Normalised

MIN_ATTACK_SUCCESS = 0.5  # as `VictimSpec.min_attack_success`
LOST_GREY_LEVELS = 1  # what saving as PNG can cost a pixel that no trigger touched


@dataclass(frozen=True)
class ImportedVictim:
    """A foreign model with the triggered test images that were stored beside it.

    Attributes:
        source: the format it came from, a key of `READERS`.
        net, width: a name of `NETS` and its width, or `torchvision:NAME` and None.
        model: images in [0, 1] -> logits, in eval mode.
        dataset: the name its framework gives the data.
        sets: all clean test images, and the stored triggered ones; the trigger itself is not stored.
        clean_index: (M,) int64, the clean counterpart of every triggered image; None where nothing says
            which it is.
        scores: of the model, recomputed.
        before: of the backdoored model, where `model` is a defence's result.
        notes: what a reader should know, a sentence each.
        counterparts: (L, C, H, W) uint8, what `clean_index` counts in; None is `sets.clean`.
    """

    source: str
    net: str
    width: int | None
    model: Normalised
    dataset: str
    sets: EvalSets
    clean_index: Tensor | None
    scores: Scores
    before: Scores | None = None
    notes: tuple[str, ...] = ()
    counterparts: Tensor | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of every class."""
        return self.sets.clean.classes

    @property
    def changed_pixel_rate(self) -> float | None:
        """Share of the pixels of all triggered images that differ from the clean image's."""
        return self._changed(more_than=0)

    @property
    def changed_visibly(self) -> float | None:
        """The same, not counting one grey level, which storing as PNG costs many untouched pixels."""
        return self._changed(more_than=LOST_GREY_LEVELS)

    def _changed(self, *, more_than: int) -> float | None:
        if self.clean_index is None:
            return None
        count = pixels = 0
        triggered = self.sets.triggered.images
        counterparts = self.sets.clean.images if self.counterparts is None else self.counterparts
        for rows in torch.arange(len(triggered)).split(1024):  # bounded memory
            clean = counterparts[self.clean_index[rows]]
            difference = (triggered[rows].short() - clean.short()).abs().amax(1)
            count += int((difference > more_than).sum())
            pixels += difference.numel()
        return count / pixels

    def refuse_if_useless(
        self, *, allow_null_trigger: bool = False, allow_not_learned: bool = False
    ) -> None:
        """Refuse a trigger that changes nothing, and a backdoor that is not there.

        Raises:
            InteropError: with the numbers, and the option that accepts them.
        """
        if self.changed_visibly == 0 and not allow_null_trigger:
            raise InteropError(
                f"The trigger is null: no pixel of {self.scores.n_triggered} stored images differs "
                f"from the clean one by more than {LOST_GREY_LEVELS} grey level; make the attack "
                "anew, or pass --allow-null-trigger."
            )
        victim = self.before or self.scores
        if victim.attack_success < MIN_ATTACK_SUCCESS and not allow_not_learned:
            raise InteropError(
                f"The attack was not learned: ACC {victim.clean_accuracy:.3f}, ASR "
                f"{victim.attack_success:.3f}, but ASR >= {MIN_ATTACK_SUCCESS:g} makes a victim; "
                "train it longer, or pass --allow-not-learned."
            )


def score(model: Normalised, sets: EvalSets, device: torch.device | str) -> Scores:
    """`evaluate` on a device; the model is on the CPU before and after."""
    try:
        return evaluate(model.to(device), sets.to(device))
    finally:
        model.cpu()


def assemble(
    *,
    source: str,
    net: str,
    weights: tuple[Normalised, int | None],
    dataset: str,
    clean: ImageData,
    triggered: TriggeredData,
    clean_index: Tensor | None,
    notes: tuple[str, ...] = (),
    counterparts: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> ImportedVictim:
    """Score a model on its clean and stored images and put all together."""
    model, width = weights
    sets = EvalSets(clean, triggered, "test")
    scores = score(model, sets, device)
    return ImportedVictim(
        source,
        net,
        width,
        model,
        dataset,
        sets,
        clean_index,
        scores,
        notes=notes,
        counterparts=counterparts,
    )
