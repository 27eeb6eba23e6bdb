"""The published schedule written the plain way, dead work included: what speed is measured against.

Hooks scale the convolutions, every pass goes through the model by itself, and nothing is remembered:
the inner problem runs in every stage also where nobody uses it, f(x) is computed anew in each of its
steps beside a masked pass whose result is dropped, and five passes a round only feed a log. That is 88
forward and 42 backward passes a round of the first stage, 91 and 44 of the others. The one mercy: no
gradient of the masks is computed inside the inner problem.

Dunnett et al. 2025 (arXiv 2509.15497), equations 4 to 7.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.losses import selection_cost
from bimask.masking.masks import MaskSet
from bimask.metrics.agreement import agree, disagree

OnRound = Callable[[str, int, MaskSet], None]


class Naive:
    """One plain purification; the settings of `PurifyConfig` that the paper has.

    Args:
        model: images in [0, 1] -> logits; copied.
        images: (N, C, H, W) float in [0, 1]; all of them are the batch of every round.
        config: of `inner_optimizer` "adamw" and `norm` "linf", without `patience`.
        fine: masks and losses in double, whatever the passes are in. The published program has them in
            single, where -log(1 - overlap + 1e-8) flattens and its gradient is off
            (`bimask.metrics.agreement`).
    """

    def __init__(
        self, model: nn.Module, images: Tensor, config: PurifyConfig, *, fine: bool = False
    ) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.images, self.config = images, config
        self.masks = MaskSet.for_model(
            self.model,
            sharpness=config.sharpness,
            mask=config.initial_mask,
            selection=config.initial_selection,
        )
        self.dtype = images.dtype
        self.fine = torch.float64 if fine else images.dtype
        self.masks.to(self.fine)
        self.forwards = 0

    def run(self, on_round: OnRound | None = None) -> MaskSet:
        """All three stages."""
        c = self.config
        for stage, rounds in (
            ("initialise", c.initialise_rounds),
            ("minimise", c.minimise_rounds),
            ("select", c.select_rounds),
        ):
            self.begin(stage)
            for number in range(rounds):
                self.round()
                if on_round is not None:
                    on_round(stage, number, self.masks)
        return self.masks

    def begin(self, stage: str) -> None:
        """A stage has an optimiser of its own."""
        self.stage = stage
        self.adamw = torch.optim.AdamW(
            self.masks.parameters(), lr=self.config.mask_lr, weight_decay=self.config.weight_decay
        )

    def round(self) -> None:
        """Triggers, then one step of the masks."""
        x, form = self.images, self.config.loss_form
        triggered = x + self._triggers()
        clean = self._plain(x)
        if self.stage == "initialise":
            loss = agree(self._masked(x), clean, form=form)
            loss = loss + disagree(self._masked(x, inverse=True), clean, form=form)
        else:
            on_triggered = self._plain(triggered)
            inverse_triggered = self._masked(triggered, inverse=True)
            loss = (
                agree(self._masked(x), clean, form=form)
                + agree(self._masked(triggered), clean, form=form)
                + agree(inverse_triggered, on_triggered, form=form)
                + disagree(inverse_triggered, clean, form=form)
                + disagree(self._masked(x, inverse=True), clean, form=form)
            )
        if self.stage != "minimise":
            loss = loss + self.config.selection_weight * selection_cost(self.masks.selections())
        self.adamw.zero_grad()
        loss.backward()
        self.adamw.step()
        self.masks.clamp_()
        self.loss = loss.item()
        with torch.no_grad():  # the published log of a round
            self._masked(x)
            self._masked(x, inverse=True)
            self._plain(triggered)
            self._masked(triggered)
            self._masked(triggered, inverse=True)

    def _triggers(self) -> Tensor:
        """Equation 5."""
        c, x = self.config, self.images
        delta = torch.zeros_like(x).requires_grad_()
        adamw = torch.optim.AdamW([delta], lr=c.resolved_step_size, weight_decay=c.inner_weight_decay)
        for _ in range(c.inner_steps):
            perturbed = x + delta
            clean = self._plain(x)
            logits = self._plain(perturbed)
            self._masked(perturbed, frozen=True)  # never used
            inverse = self._masked(perturbed, inverse=True, frozen=True)
            loss = agree(inverse, logits, form=c.loss_form) + disagree(logits, clean, form=c.loss_form)
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            with torch.no_grad():
                delta.clamp_(-c.budget, c.budget)
        return delta.detach()

    def _plain(self, images: Tensor) -> Tensor:
        self.forwards += 1
        logits: Tensor = self.model(images)
        return logits.to(self.fine)

    def _masked(self, images: Tensor, *, inverse: bool = False, frozen: bool = False) -> Tensor:
        self.forwards += 1
        with self._hooks(inverse, frozen):
            logits: Tensor = self.model(images)
        return logits.to(self.fine)

    @contextmanager
    def _hooks(self, inverse: bool, frozen: bool):  # type: ignore[no-untyped-def]
        factors = self.masks.keeps(inverse=inverse)
        handles = []
        for site, place in self.masks.places_in(self.model).items():
            conv = self.model.get_submodule(place.module)
            factor = (factors[site].detach() if frozen else factors[site]).to(self.dtype)

            def scale(_module, _inputs, out, factor=factor):  # type: ignore[no-untyped-def]
                return out * factor.view(1, -1, 1, 1)

            handles.append(conv.register_forward_hook(scale))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
