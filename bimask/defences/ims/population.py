"""Many purifications of one victim in one pass: the members differ in their settings only.

The victim is frozen and shared, so members are blocks of one stacked batch (`bimask.masking.frozen`)
and rows of the tensors of masks, perturbations and moments. Members may stand at different rounds and
stages, stop early or fail; none changes the numbers of another: in float32 and bfloat16 a member ends
with the bits of a run alone, in float64 with its numbers but for rounding.

What a round minimises is in `bimask.defences.ims.objective`, where a member stands in
`bimask.defences.ims.member`.

No label is used anywhere: only images enter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bimask.defences.base import check_images
from bimask.defences.ims.config import ENGINE, BudgetWarning, PurifyConfig
from bimask.defences.ims.losses import selection_cost
from bimask.defences.ims.member import Member, Shared, column
from bimask.defences.ims.objective import Objective
from bimask.defences.ims.optim import AdamWState, bias_corrections
from bimask.defences.ims.perturbations import Perturbations
from bimask.defences.ims.result import PurifyResult, RoundLog
from bimask.devices import fast_bfloat16, upload
from bimask.errors import NonFiniteError, SettingError, warn
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking.batched_forward import BatchedForward
from bimask.masking.discovery import masks_for
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet, keep_factor
from bimask.nets.admission import ASKED, admit

# share of flipped images that are answered alike: on the nets of benchmarks/zoo 0.55 of digits at most,
# and 0.67 to 0.87 of photographs
NATURAL = 0.6
OnRound = Callable[[int, RoundLog, MaskSet], bool | None]


# Masks, their updates and the losses are few numbers. Kernels round the last lanes of a tensor unlike
# the others, so what a member gets would depend on who is beside it; in double precision that is far
# below what single precision sees. Apple's GPUs have no double.
def _fine(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class PopulationPurifier:
    """Learn the masks of several configurations on one victim at once.

    Args:
        model: the suspect, (N, C, H, W) in [0, 1] -> (N, K) logits, or what `bimask.nets.admission`
            makes them of. It is copied, never edited; batch norm is frozen.
        images: clean images (N, C, H, W), float in [0, 1]. No labels.
        configs: one a member, at least one. They share `precision`, `compile`, `memory_format` and
            `fold_batch_norm`, which decide how the one net is prepared.
        generators: CPU, one a member: draws the batches, and the images whose perturbations go on.
        pool: what `TriggerPool.search` finds in model and images, where it is known from before; it is
            searched here if a member has `class_triggers` and None is given.
        on_round: called after every round of a member with its number, its log and its masks as they
            are then; a true answer ends the member there.

    Raises:
        SettingError: images of another shape or outside [0, 1]; configurations that do not fit.
        ModelError: the model cannot be defended as it is.
        MaskMismatchError: the model has nothing to mask.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        configs: Sequence[PurifyConfig],
        *,
        generators: Sequence[torch.Generator | None] | None = None,
        pool: TriggerPool | None = None,
        on_round: OnRound | None = None,
    ) -> None:
        self.started = time.perf_counter()
        check_images(images)
        generators = [None] * len(configs) if generators is None else generators
        engine = _common_engine(configs)
        if len(generators) != len(configs):
            raise SettingError(
                f"{len(configs)} members need as many generators, got {len(generators)}."
            )
        for config in configs:
            if (problem := config.unreachable_budget()) is not None:
                warn(problem, BudgetWarning)
        self.admitted = admit(model, images)
        self.on_round = on_round
        suspect = self.admitted.model.requires_grad_(False)
        self.blank = masks_for(suspect, _sample(suspect, images), engine.sites)
        like = self.blank.mask
        self.fine = torch.empty(0, dtype=_fine(images.device), device=images.device)
        self.images = images.to(like).contiguous(memory_format=torch.channels_last)
        low = engine.precision == "bfloat16" and fast_bfloat16(images.device)
        net = FrozenNet(
            suspect,
            self.blank,
            sample=self.images[:8],
            dtype=torch.bfloat16 if low else None,
            channels_last=engine.memory_format == "channels_last",
            fold_batch_norm=engine.fold_batch_norm,
            compile=engine.compile,
        )
        self.blocks = BatchedForward(
            net,
            self.images.device,
            size=engine.images_per_pass,
            threads=1 if engine.compile else min(torch.get_num_threads(), len(configs)),
            fine=self.fine.dtype,
            sample=self.images[:8],
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
            clean_logits = torch.cat(
                [
                    self.blocks.answer(piece[None])[0]
                    for part in self.images.split(largest)
                    for piece in part.split(self.blocks.images_per_pass(len(part)))
                ]
            )
        self.natural = any("auto" in (config.shift, config.flip) for config in configs) and (
            _flips_are_natural(self.blocks, self.images, clean_logits)
        )
        if pool is None and any(config.class_triggers for config in configs):
            pool = TriggerPool.search(suspect, self.images)
        self.objective = Objective(
            self.blocks, self.images, clean_logits, self.perturbations, pool, natural=self.natural
        )
        for member in self.members:  # what each would need alone
            member.passes.add(forward=-(-len(images) // member.config.batch_size), backward=0)

    def run(
        self, *, between_rounds: Callable[[], object] | None = None
    ) -> list[PurifyResult | NonFiniteError]:
        """Run all members to their ends: one result each, or the error that ended it alone.

        Args:
            between_rounds: called whenever every running member has one more round behind it, which is
                when a `bimask.defences.ims.checkpoint.PopulationState` can be taken.
        """
        for member in self.members:
            if not member.stages and member.result is None:
                self.finish(member)
        with self.blocks.shared_out():
            while running := [member for member in self.members if member.result is None]:
                for shared, group in _alike(running, len(self.images)):
                    self._round(group, shared)
                if between_rounds is not None:
                    between_rounds()
        return [member.result for member in self.members if member.result is not None]

    def _round(self, group: list[Member], shared: Shared) -> None:
        """One round of members that are alike."""
        rows = self._rows(group)
        state = self.state[rows]
        channels = state.shape[1] // 2
        variables = state.detach().requires_grad_()
        a, s = variables.split(channels, dim=1)
        sharpness = self.sharpness[rows]
        hard = shared.straight_through
        keep = keep_factor(a, s, sharpness, straight_through=hard)
        inverse = keep_factor(a, s, sharpness, inverse=True, straight_through=hard)
        weight = self._column(lambda m: m.selection_weight, group).squeeze(1).float()  # as published
        cost = weight * selection_cost(s.split(list(self.blank.sites.values()), dim=1))

        factors = torch.stack([keep, inverse])
        terms, gradient = self.objective(group, shared, factors.detach())
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
        if not all(member.config.learn_selection for member in group):
            learned = self._column(lambda m: m.config.learn_selection, group).bool()
            before = self.state[rows][:, channels:]
            state[:, channels:] = torch.where(learned, state[:, channels:], before)
        self.state[rows] = state.clamp_(0, 1)
        self._keep_average(group, rows, state)
        # the round's only read-back
        for member, values in zip(group, losses.T.tolist(), strict=True):
            self._log(member, dict(zip(terms, values, strict=True)))

    def _rows(self, group: list[Member]) -> Tensor:
        return upload(torch.tensor([member.row for member in group]), self.images)

    def _column(self, value: Callable[[Member], float], members: list[Member]) -> Tensor:
        return column(value, members, self.fine)

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
            masks,
            member.rounds,
            member.passes,
            seconds,
            member.config,
            self.admitted.plain,
            self.admitted.findings,
        )

    def _masks(self, member: Member) -> MaskSet:
        """A member's masks as they are now: those it would end with."""
        masks = MaskSet(
            self.blank.sites,
            gates=self.blank.gates,
            sharpness=member.config.sharpness,
            straight_through=member.config.straight_through,
        ).to(self.blank.mask)
        averaged = member.stages and member.averaging
        state = (self.kept if averaged else self.state)[member.row]
        with torch.no_grad():
            masks.mask.copy_(state[: len(masks.mask)])
            masks.selection.copy_(state[len(masks.mask) :])
        return masks


def _sample(suspect: nn.Module, images: Tensor) -> Tensor:
    """A few images in the dtype of the model."""
    return images[:ASKED].to(next(suspect.parameters()).dtype)


@torch.no_grad()
def _flips_are_natural(blocks: BatchedForward, images: Tensor, clean_logits: Tensor) -> bool:
    """Whether the suspect answers flipped images as it does the others: photographs, not digits."""
    flipped = images.flip(3)
    parts = [
        blocks.answer(part[None])[0] for part in flipped.split(blocks.images_per_pass(len(images)))
    ]
    same = torch.cat(parts).argmax(1) == clean_logits.argmax(1)
    return same.float().mean().item() >= NATURAL


def _alike(members: list[Member], images: int) -> Iterator[tuple[Shared, list[Member]]]:
    """Groups that go through a round together, in each the members of more inner steps first."""
    groups: dict[Shared, list[Member]] = {}
    for member in members:
        groups.setdefault(member.shared(images), []).append(member)
    for shared, group in groups.items():
        yield shared, sorted(group, key=lambda member: -member.inner_steps)


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
