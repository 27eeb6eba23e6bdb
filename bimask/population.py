"""Many purifications of one victim in one pass: the members differ in their settings only.

The victim is frozen and shared, so members are blocks of one stacked batch (`bimask.frozen`) and rows
of the tensors of masks, perturbations and moments. Members may stand at different rounds and stages,
stop early or fail; none changes the numbers of another: in float32 and bfloat16 a member ends with the
bits of a run alone, in float64 with its numbers but for rounding.

Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Backdoor Mitigation via Invertible Pruning Masks",
NeurIPS 2025 (arXiv 2509.15497). f is the frozen victim, f_a the masked, f_abar the inverse-masked
model, x clean images, d the inner problem's perturbations (`bimask.synthesis`).

    initialise   agree(f_a(x), f(x)) + disagree(f_abar(x), f(x)) + selection cost          (eq. 4)
    minimise     agree(f_a(x), f(x)) + agree(f_a(x+d), f(x)) + agree(f_abar(x+d), f(x+d))
                 + disagree(f_abar(x+d), f(x)) + disagree(f_abar(x), f(x))             (eqs. 6, 7)
    select       the same + selection cost

`clean_weight` multiplies agree(f_a(x), f(x)); it is 1 in the paper.

No label is used anywhere: only images enter.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bimask.blocks import Blocks, slices
from bimask.config import ENGINE, BudgetWarning, PurifyConfig
from bimask.data import augment
from bimask.devices import upload
from bimask.errors import NonFiniteError, SettingError
from bimask.frozen import FrozenNet
from bimask.losses import agree, disagree, selection_cost
from bimask.masks import MaskSet, keep_factor
from bimask.member import Member
from bimask.optim import AdamWState, bias_corrections
from bimask.perturbations import Perturbations, of_images
from bimask.result import PurifyResult, RoundLog
from bimask.synthesis import TriggerSynthesizer

OnRound = Callable[[int, RoundLog, MaskSet], bool | None]


# Masks, their updates and the losses are few numbers. Kernels round the last lanes of a tensor unlike
# the others, so what a member gets would depend on who is beside it; in double precision that is far
# below what single precision sees. Apple's GPUs have no double.
def _fine(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class _Term(NamedTuple):
    """A term of the outer loss: what the blocks from `first` on are compared with, and how."""

    name: str
    first: int
    loss: Callable[..., Tensor]
    target: Tensor
    weight: Tensor | None = None  # (M,); None is 1


class PopulationPurifier:
    """Learn the masks of several configurations on one victim at once.

    Args:
        model: the suspect, (N, C, H, W) in [0, 1] -> (N, K) logits, with a Conv2d or an encoder block.
            It is copied, never edited; batch norm is frozen.
        images: clean images (N, C, H, W), float in [0, 1]. No labels.
        configs: one a member, at least one. They share `precision`, `compile`, `memory_format` and
            `fold_batch_norm`, which decide how the one net is prepared.
        generators: CPU, one a member: draws the batches, and the images whose perturbations go on.
        on_round: called after every round of a member with its number, its log and its masks as they
            are then; a true answer ends the member there.

    Raises:
        SettingError: images of another shape or outside [0, 1]; configurations that do not fit.
        MaskMismatchError: the model has nothing to mask.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        configs: Sequence[PurifyConfig],
        *,
        generators: Sequence[torch.Generator | None] | None = None,
        on_round: OnRound | None = None,
    ) -> None:
        self.started = time.perf_counter()
        _check_images(images)
        generators = [None] * len(configs) if generators is None else generators
        engine = _common_engine(configs)
        if len(generators) != len(configs):
            raise SettingError(
                f"{len(configs)} members need as many generators, got {len(generators)}."
            )
        for config in configs:
            if (problem := config.unreachable_budget()) is not None:
                warnings.warn(problem, BudgetWarning, stacklevel=3)
        self.model, self.on_round = model, on_round
        self.blank = MaskSet.for_model(model)
        like = self.blank.mask
        self.fine = _fine(images.device)
        self.images = images.to(like).contiguous(memory_format=torch.channels_last)
        net = FrozenNet(
            model,
            self.blank,
            sample=self.images[:8],
            dtype=torch.bfloat16 if engine.precision == "bfloat16" else None,
            channels_last=engine.memory_format == "channels_last",
            fold_batch_norm=engine.fold_batch_norm,
            compile=engine.compile,
        )
        self.blocks = Blocks(
            net,
            self.images.device,
            size=engine.images_per_pass,
            threads=1 if engine.compile else min(torch.get_num_threads(), len(configs)),
            fine=self.fine,
        )
        self.members = [
            Member(row, config, generator)
            for row, (config, generator) in enumerate(zip(configs, generators, strict=True))
        ]
        self.sharpness = self._column(lambda m: m.config.sharpness, self.members)
        self.weight_decay = self._column(lambda m: m.config.weight_decay, self.members)

        def initial(value: Callable[[Member], float]) -> Tensor:
            return self._column(value, self.members).expand(-1, len(like)).clone()

        # masks and selections of all members side by side: one update moves both
        self.state = torch.cat(
            [initial(lambda m: m.config.initial_mask), initial(lambda m: m.config.initial_selection)],
            dim=1,
        )
        self.kept = self.state.clone()  # what a stage hands on, where that is not its last masks
        self.best_losses = self.state.new_full((len(configs),), math.inf)
        self.adamw = AdamWState(self.state)
        self.perturbations = Perturbations(configs, self.images)
        largest = max(member.config.batch_size for member in self.members)
        with torch.no_grad():
            self.clean_logits = torch.cat(
                [
                    self.blocks.answer(piece[None])[0]
                    for part in self.images.split(largest)
                    for piece in part.split(self.blocks.images_per_pass(len(part)))
                ]
            )
        for member in self.members:  # what each would need alone
            member.passes.add(forward=-(-len(images) // member.config.batch_size), backward=0)

    def run(
        self, *, between_rounds: Callable[[], object] | None = None
    ) -> list[PurifyResult | NonFiniteError]:
        """Run all members to their ends: one result each, or the error that ended it alone.

        Args:
            between_rounds: called whenever every running member has one more round behind it, which is
                when a `bimask.checkpoint.PopulationState` can be taken.
        """
        for member in self.members:
            if not member.stages and member.result is None:
                self.finish(member)
        with self.blocks.shared_out():
            while running := [member for member in self.members if member.result is None]:
                for group in _alike(running, len(self.images)):
                    self._round(group)
                if between_rounds is not None:
                    between_rounds()
        return [member.result for member in self.members if member.result is not None]

    def _round(self, group: list[Member]) -> None:
        """One round of members that are alike."""
        rows = self._rows(group)
        state = self.state[rows]
        channels = state.shape[1] // 2
        variables = state.detach().requires_grad_()
        a, s = variables.split(channels, dim=1)
        sharpness = self.sharpness[rows]
        hard = group[0].config.straight_through
        keep = keep_factor(a, s, sharpness, straight_through=hard)
        inverse = keep_factor(a, s, sharpness, inverse=True, straight_through=hard)
        weight = self._column(lambda m: m.selection_weight, group).squeeze(1).float()  # as published
        cost = weight * selection_cost(s.split(list(self.blank.sites.values()), dim=1))

        factors = torch.stack([keep, inverse])
        terms, gradient = self._terms(group, factors.detach())
        terms["selection_cost"] = cost.detach()
        (slope,) = torch.autograd.grad([factors, cost], variables, [gradient, torch.ones_like(cost)])
        losses = torch.stack(list(terms.values()))
        self._keep_best(group, rows, state, losses.sum(0))
        decay = self.weight_decay[rows]
        first, second = zip(*(bias_corrections(m.round + 1) for m in group), strict=True)
        self.adamw.step_(
            state,
            slope,
            lr=self._column(lambda m: m.lr, group),
            weight_decay=decay,
            corrections=(
                upload(first, self.state).view(-1, 1),
                upload(second, self.state).view(-1, 1),
            ),
            rows=rows,
        )
        self.state[rows] = state.clamp_(0, 1)
        self._keep_average(group, rows, state)
        # the round's only read-back
        for member, values in zip(group, losses.T.tolist(), strict=True):
            self._log(member, dict(zip(terms, values, strict=True)))

    def _terms(self, group: list[Member], factors: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the outer loss, (M,) each, and the gradient of their sum by `factors`.

        Args:
            factors: (2, M, C), keep and inverse.
        """
        batches = self._draw(group)
        x = self._batch(self.images, group, batches)
        clean = self._batch(self.clean_logits, group, batches)
        if group[0].config.augments:
            x, clean = self._augmented(group, x)
        keep, inverse = factors
        m = len(group)
        weight = self._column(lambda member: member.config.clean_weight, group).squeeze(1)
        if group[0].inner_steps == 0:
            for member in group:
                member.passes.add(forward=2, backward=2)
            return self._outer(
                [(x, keep), (x, inverse)],
                [
                    _Term("clean_agree", 0, agree, clean, weight),
                    _Term("inverse_clean_disagree", m, disagree, clean),
                ],
                group,
            )
        triggered, triggered_logits = self._triggered(group, batches, x, clean, inverse)
        for member in group:
            steps, reused = member.inner_steps, member.config.reuse_last_pass
            member.passes.add(forward=2 * steps + (4 if reused else 5), backward=2 * steps + 4)
        return self._outer(
            [(x, keep), (triggered, keep), (triggered, inverse), (x, inverse)],
            [
                _Term("clean_agree", 0, agree, clean, weight),
                _Term("triggered_agree", m, agree, clean),
                _Term("inverse_triggered_agree", 2 * m, agree, triggered_logits),
                _Term("inverse_triggered_disagree", 2 * m, disagree, clean),
                _Term("inverse_clean_disagree", 3 * m, disagree, clean),
            ],
            group,
        )

    def _outer(
        self, sources: list[tuple[Tensor, Tensor]], terms: list[_Term], group: list[Member]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Every source's images under its factors, in passes of bounded size.

        Args:
            sources: images (M, N, C, H, W) and factors (M, C), M blocks each.
            terms: their `first` counts blocks over all sources.
        """
        m, n = len(group), sources[0][0].shape[1]
        images = torch.cat([source for source, _ in sources])
        factors = torch.cat([factor for _, factor in sources])
        form = group[0].config.loss_form
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
        batches: list[Tensor] | None,
        x: Tensor,
        clean: Tensor,
        inverse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Images with fresh triggers, (M, N, C, H, W), and the victim's logits of them, (M, N, K)."""
        n = len(x[0])
        start = self.perturbations.start(group, batches, x)
        deltas, found, answered = torch.empty_like(x), torch.empty_like(x), torch.empty_like(clean)
        reuse = group[0].config.reuse_last_pass

        def synthesize_for(part: slice) -> None:
            settings = [member.config for member in group[part]]
            steps = [member.inner_steps for member in group[part]]
            first = settings[0]
            shared = None if start.shared is None else start.shared[part]
            synthesize = TriggerSynthesizer(
                steps=steps,
                step_size=of_images(
                    [c.step_sizes(k) for c, k in zip(settings, steps, strict=True)], shared, x
                ),
                budget=of_images([c.budgets for c in settings], shared, x),
                norm=first.norm,
                optimizer=first.inner_optimizer,
                momentum=first.inner_momentum,
                weight_decay=[c.inner_weight_decay for c in settings],
                clip_images=first.clip_images,
                form=first.loss_form,
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
            if reuse:
                answered[part] = triggers.last_logits
            else:
                with torch.no_grad():
                    answered[part] = self.blocks.answer(found[part], None)

        self.blocks.each(synthesize_for, len(group), self.blocks.per_pass(len(group), n))
        self.perturbations.keep(group, batches, start, deltas)
        return found, answered

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
        changed = torch.stack(
            [
                augment(
                    images,
                    shift=member.config.shift,
                    flip=member.config.flip,
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

    def _draw(self, group: list[Member]) -> list[Tensor] | None:
        """A fresh subset for each member, without replacement; None where that is everything."""
        n = len(self.images)
        if group[0].batch_size >= n:
            return None
        return [
            upload(torch.randperm(n, generator=m.generator)[: m.batch_size], self.images) for m in group
        ]

    def _batch(self, values: Tensor, group: list[Member], batches: list[Tensor] | None) -> Tensor:
        """The members' own rows of `values` (n, ...): (M, N, ...)."""
        if batches is None:
            return values.expand(len(group), *values.shape)
        return torch.stack([values[batch] for batch in batches])

    def _rows(self, group: list[Member]) -> Tensor:
        return upload(torch.tensor([member.row for member in group]), self.images)

    def _column(self, value: Callable[[Member], float], members: list[Member]) -> Tensor:
        """A setting of each member as (M, 1), in double."""
        host = torch.tensor([value(member) for member in members], dtype=self.fine)
        return upload(host, self.images).view(-1, 1)

    def _keep_best(self, group: list[Member], rows: Tensor, state: Tensor, losses: Tensor) -> None:
        """Keep the masks of the least loss of the stage, on the device."""
        if any(member.config.keep == "best" for member in group):
            better = (losses < self.best_losses[rows]).view(-1, 1)
            self.kept[rows] = torch.where(better, state, self.kept[rows])
            self.best_losses[rows] = torch.minimum(losses, self.best_losses[rows])

    def _keep_average(self, group: list[Member], rows: Tensor, state: Tensor) -> None:
        """Keep the mean of select's second half (Izmailov et al. 2018, arXiv 1803.05407)."""
        if any(member.averaging for member in group):
            newest = self._column(lambda m: m.averaging, group)
            self.kept[rows] = self.kept[rows].lerp(state, newest)

    def _log(self, member: Member, losses: dict[str, float]) -> None:
        """Log a member's round, and bring it to its next round, stage or end."""
        log = RoundLog(member.stage, member.round, len(member.rounds), losses, sum(losses.values()))
        if not math.isfinite(log.loss):
            member.result = NonFiniteError(
                f"Loss not finite in stage {log.stage!r}, round {log.round}: {log.losses}; lower "
                "`mask_lr` or `step_size`."
            )
            return
        member.rounds.append(log)
        stop = self.on_round is not None and self.on_round(member.row, log, self._masks(member))
        last = member.round + 1 == member.limits[log.stage]
        if member.plateau.reached(log.loss) or last or stop:
            self._end_stage(member)
        else:
            member.round += 1
        if stop or not member.stages:
            self.finish(member)

    def _end_stage(self, member: Member) -> None:
        row = member.row
        if member.config.keep == "best" or member.averaging:
            self.state[row] = self.kept[row]
        self.best_losses[row] = math.inf
        self.adamw.forget(row)
        member.stages.pop(0)
        member.begin_stage()

    def finish(self, member: Member, *, seconds: float | None = None) -> None:
        """End a member with the masks that it has now; `seconds` where they are known from before."""
        masks = self._masks(member).requires_grad_(False)
        seconds = time.perf_counter() - self.started if seconds is None else seconds
        member.result = PurifyResult(
            masks, member.rounds, member.passes, seconds, member.config, self.model
        )

    def _masks(self, member: Member) -> MaskSet:
        """A member's masks as they are now: those it would end with."""
        masks = MaskSet(
            self.blank.sites,
            sharpness=member.config.sharpness,
            straight_through=member.config.straight_through,
        ).to(self.blank.mask)
        averaged = member.stages and member.averaging
        state = (self.kept if averaged else self.state)[member.row]
        with torch.no_grad():
            masks.mask.copy_(state[: len(masks.mask)])
            masks.selection.copy_(state[len(masks.mask) :])
        return masks


def _alike(members: list[Member], images: int) -> Iterator[list[Member]]:
    """Groups that go through a round together, in each the members of more inner steps first."""

    def key(member: Member) -> tuple[str, int]:
        return str(member.likeness(images)), -member.inner_steps

    for _, group in itertools.groupby(sorted(members, key=key), lambda m: key(m)[0]):
        yield list(group)


def _common_engine(configs: Sequence[PurifyConfig]) -> PurifyConfig:
    """The first configuration, if all agree in what prepares the one net.

    Raises:
        SettingError: no configuration, or one that differs, named.
    """
    if not configs:
        raise SettingError("A population needs at least one configuration, got none.")
    for number, config in enumerate(configs):
        for name in ENGINE:
            if getattr(config, name) != getattr(configs[0], name):
                raise SettingError(
                    f"Members share one prepared net, so `{name}` must be the same for all; member 0 "
                    f"has {getattr(configs[0], name)!r}, member {number} {getattr(config, name)!r}."
                )
    return configs[0]


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise SettingError(
            "Clean images must be a float tensor (N, C, H, W) with N >= 1, got "
            f"{tuple(images.shape)} of {images.dtype}."
        )
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise SettingError(
            f"Clean images must lie in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and "
            "leave normalisation to the model."
        )
