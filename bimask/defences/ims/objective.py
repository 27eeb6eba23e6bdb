"""What the members of a population minimise in a round: the outer loss, on triggers made for it.

Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Backdoor Mitigation via Invertible Pruning Masks",
NeurIPS 2025 (arXiv 2509.15497). f is the frozen victim, f_a the masked, f_abar the inverse-masked
model, x clean images, d the inner problem's perturbations (`bimask.defences.ims.synthesis`).

    initialise   agree(f_a(x), f(x)) + disagree(f_abar(x), f(x)) + selection cost          (eq. 4)
    minimise     agree(f_a(x), f(x)) + agree(f_a(x+d), f(x)) + agree(f_abar(x+d), f(x+d))
                 + disagree(f_abar(x+d), f(x)) + disagree(f_abar(x), f(x))             (eqs. 6, 7)
    select       the same + selection cost

`clean_weight` multiplies agree(f_a(x), f(x)), `inverse_weight` all terms of f_abar, here and in the
inner problem; both are 1 in the paper. The selection cost knows no image
and is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bimask.data import augment
from bimask.defences.ims.member import Member, Shared, column
from bimask.defences.ims.perturbations import Perturbations, of_images
from bimask.defences.ims.synthesis import TriggerSynthesizer
from bimask.devices import upload
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking.batched_forward import BatchedForward, slices
from bimask.metrics.agreement import agree, disagree


class _Term(NamedTuple):
    """A term of the outer loss: what the blocks from `first` on are compared with, and how."""

    name: str
    first: int
    loss: Callable[..., Tensor]
    target: Tensor
    weight: Tensor | None = None  # (M,); None is 1


class Objective:
    """The terms of the outer loss of members that are alike, and their gradient by the masks.

    Args:
        blocks: what answers images under masks.
        images: (n, C, H, W), those of all members.
        clean_logits: the victim's of these, (n, K).
        perturbations: where those of a round start and end.
        pool: what `class_triggers` are drawn from; None where no member has any.
        natural: whether the suspect answers flipped images as it does the others.
    """

    def __init__(
        self,
        blocks: BatchedForward,
        images: Tensor,
        clean_logits: Tensor,
        perturbations: Perturbations,
        pool: TriggerPool | None,
        *,
        natural: bool = False,
    ) -> None:
        self.blocks, self.images, self.clean_logits = blocks, images, clean_logits
        self.perturbations, self.pool, self.natural = perturbations, pool, natural

    def __call__(
        self, group: list[Member], shared: Shared, factors: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms, (M,) each, and the gradient of their sum by `factors`.

        Args:
            group: M members, which agree in `shared`.
            factors: (2, M, C), keep and inverse.
        """
        batches = self._draw(group, shared)
        x = self._batch(self.images, group, batches)
        clean = self._batch(self.clean_logits, group, batches)
        if shared.augments:
            x, clean = self._augmented(group, x)
        keep, inverse = factors
        m = len(group)
        weight = column(lambda member: member.config.clean_weight, group, factors).squeeze(1)
        of_inverse = column(lambda member: member.config.inverse_weight, group, factors).squeeze(1)
        if not shared.triggered:
            for member in group:
                member.passes.add(forward=2, backward=2)
            return self._outer(
                [(x, keep), (x, inverse)],
                [
                    _Term("clean_agree", 0, agree, clean, weight),
                    _Term("inverse_clean_disagree", m, disagree, clean, of_inverse),
                ],
                shared,
            )
        triggered, triggered_logits = self._triggered(group, shared, batches, x, clean, inverse)
        for member in group:
            steps, reused = member.inner_steps, member.reuses_last_pass
            member.passes.add(forward=2 * steps + (4 if reused else 5), backward=2 * steps + 4)
        return self._outer(
            [(x, keep), (triggered, keep), (triggered, inverse), (x, inverse)],
            [
                _Term("clean_agree", 0, agree, clean, weight),
                _Term("triggered_agree", m, agree, clean),
                _Term("inverse_triggered_agree", 2 * m, agree, triggered_logits, of_inverse),
                _Term("inverse_triggered_disagree", 2 * m, disagree, clean, of_inverse),
                _Term("inverse_clean_disagree", 3 * m, disagree, clean, of_inverse),
            ],
            shared,
        )

    def _outer(
        self, sources: list[tuple[Tensor, Tensor]], terms: list[_Term], shared: Shared
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Every source's images under its factors, in passes of bounded size.

        Args:
            sources: images (M, N, C, H, W) and factors (M, C), M blocks each.
            terms: their `first` counts blocks over all sources.
        """
        m, n = len(sources[0][0]), sources[0][0].shape[1]
        images = torch.cat([source for source, _ in sources])
        factors = torch.cat([factor for _, factor in sources])
        form = shared.loss_form
        values = {term.name: factors.new_zeros(m) for term in terms}
        gradient = torch.zeros_like(factors)

        def one_pass(span: slice) -> None:
            low, high = span.start, span.stop
            factor = factors[span].requires_grad_()
            for part in slices(n, self.blocks.images_per_pass(n)):  # one for all images, as a rule
                logits = self.blocks.answer(images[span, part], factor)
                losses = []
                for term in terms:
                    start, stop = max(term.first, low), min(term.first + m, high)
                    if start < stop:
                        mine = slice(start - term.first, stop - term.first)
                        got, wanted = logits[start - low : stop - low], term.target[mine, part]
                        share = (part.stop - part.start) / n
                        loss = term.loss(got, wanted, form=form) * share
                        if term.weight is not None:
                            loss = loss * term.weight[mine]
                        values[term.name][mine] += loss.detach()
                        losses.append(loss)
                gradient[span] += torch.autograd.grad(torch.cat(losses).sum(), factor)[0]

        self.blocks.each(one_pass, len(images), self.blocks.per_pass(m, n))
        keep, inverse = gradient.view(len(sources), m, -1).split(len(sources) // 2)
        return values, torch.stack([keep.sum(0), inverse.sum(0)])

    def _triggered(
        self,
        group: list[Member],
        common: Shared,
        batches: list[Tensor] | None,
        x: Tensor,
        clean: Tensor,
        inverse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Images with fresh triggers, (M, N, C, H, W), and the victim's logits of them, (M, N, K)."""
        n = len(x[0])
        start = self.perturbations.start(group, batches, x)
        deltas, found, answered = torch.empty_like(x), torch.empty_like(x), torch.empty_like(clean)
        replaced = self._class_triggers(group, common, x)
        reuse = common.reuses_last_pass

        def synthesize_for(part: slice) -> None:
            settings = [member.config for member in group[part]]
            steps = [member.inner_steps for member in group[part]]
            shared = None if start.shared is None else start.shared[part]
            synthesize = TriggerSynthesizer(
                steps=steps,
                step_size=of_images(
                    [c.step_sizes(k) for c, k in zip(settings, steps, strict=True)], shared, x
                ),
                budget=of_images([c.budgets for c in settings], shared, x),
                norm=common.norm,
                optimizer=common.inner_optimizer,
                momentum=common.inner_momentum,
                weight_decay=[c.inner_weight_decay for c in settings],
                clip_images=common.clip_images,
                form=common.loss_form,
                inverse_weight=[c.inverse_weight for c in settings],
            )
            triggers = synthesize(
                self._both(inverse[part]),
                x[part],
                clean[part],
                start=None if start.delta is None else start.delta[part],
                shared=shared,
            )
            deltas[part] = triggers.delta
            delta = triggers.last if reuse else triggers.delta
            found[part] = synthesize.perturb(x[part], delta, shared)
            for row, (chosen, triggered) in enumerate(replaced[part], part.start):
                found[row, chosen] = triggered
            if reuse:
                answered[part] = triggers.last_logits
            else:
                with torch.no_grad():
                    answered[part] = self.blocks.answer(found[part], None)

        self.blocks.each(synthesize_for, len(group), self.blocks.per_pass(len(group), n))
        self.perturbations.keep(group, batches, start, deltas)
        return found, answered

    def _class_triggers(
        self, group: list[Member], common: Shared, x: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each member images drawn anew, (J,), and they with triggers of the pool, (J, C, H, W)."""
        if self.pool is None or not common.class_triggers:
            return []
        drawn = []
        for member, images in zip(group, x, strict=True):
            count = round(member.config.class_triggers * len(images))
            chosen = upload(torch.randperm(len(images), generator=member.generator)[:count], x)
            drawn.append((chosen, self.pool.on(images[chosen], member.generator).to(x)))
        return drawn

    def _both(self, inverse: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What the inner problem asks: the victim's and the inverse-masked logits of images."""

        def answers(images: Tensor) -> tuple[Tensor, Tensor]:
            m, n = images.shape[:2]
            factors = torch.cat([torch.ones_like(inverse[:m]), inverse[:m]])
            stacked = torch.cat([images, images])
            logits = torch.cat(
                [
                    self.blocks.answer(stacked[part], factors[part])
                    for part in slices(2 * m, self.blocks.per_pass(m, n))
                ]
            )
            return logits[:m], logits[m:]

        return answers

    def _augmented(self, group: list[Member], x: Tensor) -> tuple[Tensor, Tensor]:
        """The images changed, each member's by its own generator, and the victim's logits of them."""
        side, natural = min(x.shape[-2:]), self.natural
        changed = torch.stack(
            [
                augment(
                    images,
                    shift=member.config.shift_of(side, natural=natural),
                    flip=member.config.flips(natural=natural),
                    generator=member.generator,
                )
                for member, images in zip(group, x, strict=True)
            ]
        )
        for member in group:
            member.passes.add(forward=1, backward=0)

        @torch.no_grad()
        def answered(part: slice) -> Tensor:
            return self.blocks.answer(changed[part], None)

        most = self.blocks.per_pass(len(group), x.shape[1])
        return changed, torch.cat(self.blocks.each(answered, len(group), most))

    def _draw(self, group: list[Member], common: Shared) -> list[Tensor] | None:
        """A fresh subset for each member, without replacement; None where that is everything."""
        n = len(self.images)
        if common.batch_size >= n:
            return None
        return [
            upload(torch.randperm(n, generator=m.generator)[: common.batch_size], self.images)
            for m in group
        ]

    def _batch(self, values: Tensor, group: list[Member], batches: list[Tensor] | None) -> Tensor:
        """The members' own rows of `values` (n, ...): (M, N, ...)."""
        if batches is None:
            return values.expand(len(group), *values.shape)
        return torch.stack([values[batch] for batch in batches])
