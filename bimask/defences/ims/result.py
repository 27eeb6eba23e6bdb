"""What a purification logs round by round, and what it ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from bimask.defences.base import Passes
from bimask.defences.ims.config import PurifyConfig
from bimask.masking.masks import MaskSet, fold

LEAST = 1e-6  # of a factor: what is closer to 1 changes no answer

Stage = Literal["initialise", "minimise", "select"]


@dataclass(frozen=True)
class RoundLog:
    """One round of the outer problem.

    Attributes:
        stage: "initialise", "minimise" or "select".
        round: from 0 within the stage.
        step: from 0 within the run.
        losses: term -> value before the round's update, in the order of the module's formulas.
        loss: their sum, which early stopping watches.
    """

    stage: Stage
    round: int
    step: int
    losses: dict[str, float]
    loss: float


@dataclass(frozen=True)
class PurifyResult:
    """What a purification ends with.

    Attributes:
        masks: the learned masks; `masked_forward(model, masks, x)` is the purified model.
        rounds: one log a round, in order.
        passes: counted passes.
        seconds: wall time, in a population from the start of all to the end of this one.
        config: the settings used.
        findings: one sentence for each thing that was done about the model before the first round, see
            `bimask.nets.admission`.
    """

    masks: MaskSet
    rounds: list[RoundLog]
    passes: Passes
    seconds: float
    config: PurifyConfig
    _model: nn.Module = field(repr=False)
    findings: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether any mask does anything: a factor other than 1, on either side."""
        sides = (self.masks.keep(), self.masks.keep(inverse=True))
        return any(bool((factor - 1).abs().max() > LEAST) for factor in sides)

    @property
    def history(self) -> list[RoundLog]:
        """The rounds."""
        return self.rounds

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Masks and selections by site."""
        return self.masks.tensors()

    @property
    def numbers(self) -> dict[str, float]:
        """`pruned_share`: of the channels, how many keep less than half of their output."""
        return {"pruned_share": (self.masks.keep() < 0.5).float().mean().item()}

    def model(self, *, inverse: bool = False) -> nn.Module:
        """The purified model (or its inverse twin): a plain copy with the masks folded in."""
        return fold(self._model, self.masks, inverse=inverse)
