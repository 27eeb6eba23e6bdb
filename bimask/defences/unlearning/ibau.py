"""I-BAU: unlearn the one perturbation that misleads most images, by implicit hypergradients.

Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit Hypergradient",
ICLR 2022 (arXiv 2110.03735). A backdoor is a perturbation d in common that changes the answer to any
image. Removing it is a minimax problem, and d depends on the weights w:

    inner   d(w) = argmin G(d, w),  G = -CE(f_w(x + d), argmax f_w(x)) + c ||d||_2^2
    outer   min_w L(d(w), w),       L = CE of a batch in which a share of the images carries d

At the minimum of G, d is a fixed point of P(d, w) = d - h grad_d G. The gradient of the outer problem
is therefore, with J and M the derivatives of P by d and by w,

    grad_w L + M^T (I - J^T)^-1 grad_d L

whose inverse is summed up by K steps v <- J^T v + grad_d L from v = 0. They converge to it where G is
convex near d and h is small. A round searches d by one pass of SGD from 0, and then takes one step of
Adam for every batch.

Use it where images are few and the trigger is the same on all of them; it is known to be weaker on
triggers that differ from image to image.
It costs about K + 5 passes a batch and only a few rounds.
It needs labels, and a net that has second derivatives.

The published program patches int(0.01 n) of n images, which is none in a batch below a hundred, and is
then plain fine-tuning; here one image at least carries d. G is the same in d's search and in its
derivatives (published: there, true labels of the first batch). Batch norms answer with their running
statistics, else d on one image would change the answers to the others, and each search would move them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, batches, inside, logits_of, steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.sgd import BatchSize, Flip, Shift, weights_of
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.nets.admission import admit


class IbauConfig(DefenceConfig):
    """The settings of I-BAU, as its authors published them."""

    lr: Annotated[float, Field(gt=0, description="of Adam"), Search(1e-5, 1e-2, log=True)] = 1e-4
    epochs: Annotated[
        int,
        Field(ge=1, description="rounds: in each, every image is seen once by either problem"),
        Search(1, 50, log=True),
    ] = 5
    batch_size: BatchSize = 256
    inner_lr: Annotated[
        float,
        Field(gt=0, description="of SGD, by which d is searched"),
        Search(0.1, 10_000.0, log=True),
    ] = 10.0
    penalty: float = Field(0.001, ge=0, description="c, of the squared L2 norm of d")
    budget: float = Field(
        10.0,
        gt=0,
        description="largest L2 norm of d behind its search, of pixels in [0, 1]",
    )
    fixed_point_steps: Annotated[int, Field(ge=1, description="K"), Search(1, 10)] = 5
    fixed_point_lr: float = Field(0.1, gt=0, description="h, the step of the map P")
    patched_share: Annotated[
        float, Field(gt=0, le=1, description="of a batch that carries d; one image at least"),
        Search(0.01, 0.5, log=True),
    ] = 0.01  # fmt: skip
    shift: Shift = 0
    flip: Flip = False

    def steps(self, images: int) -> int:
        """Batches of the outer problem over all rounds."""
        return self.epochs * steps_an_epoch(images, self.batch_size)


class Ibau(SimpleDefence[IbauConfig]):
    """Adversarial unlearning by implicit hypergradients."""

    name = "ibau"
    config = IbauConfig
    needs_labels = True

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: IbauConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[IbauConfig]:
        """Train all weights. Rounds are what a run goes on from."""
        net = admit(model, clean.images).model.requires_grad_(True)
        weights = weights_of(net)
        optimiser = torch.optim.Adam(weights, config.lr)
        with (
            Loop(
                self,
                model,
                config,
                {"net": net, "moments": optimiser},
                lambda: (net.state_dict(), {}),
                generator=generator,
                device=clean.images.device,
                keeper=keeper,
            ) as loop,
            sdpa_kernel(SDPBackend.MATH),  # the others have no second derivative
        ):
            for _ in loop.epochs(config.epochs):

                def seen(dtype: torch.dtype = weights[0].dtype) -> Any:
                    return batches(
                        clean,
                        config.batch_size,
                        generator,
                        shift=config.shift,
                        flip=config.flip,
                        dtype=dtype,
                    )

                found = searched(net, seen(), config, loop)
                for images, labels in seen():
                    carried = carriers(len(images), config.patched_share, generator).to(images)
                    answers = own_answers(net, images)

                    def inner(d: Tensor, x: Tensor = images, own: Tensor = answers) -> Tensor:
                        return inner_objective(net, x, own, d, config.penalty)

                    def outer(
                        d: Tensor, x: Tensor = images, y: Tensor = labels, on: Tensor = carried
                    ) -> Tensor:
                        return F.cross_entropy(logits_of(net, inside(x + on * d)), y)

                    loss, slopes = hypergradient(
                        inner, outer, found, weights, config.fixed_point_steps, config.fixed_point_lr
                    )
                    for weight, slope in zip(weights, slopes, strict=True):
                        weight.grad = slope
                    optimiser.step()
                    # a product with J or M is a pass back through a pass back
                    loop.passes.add(forward=3, backward=2 + 2 * config.fixed_point_steps)
                    if loop.step({"cross_entropy": loss}, on_step):
                        return loop.result()
            return loop.result()


def searched(net: nn.Module, seen: Any, config: IbauConfig, loop: Loop[IbauConfig]) -> Tensor:
    """d (1, C, H, W): one pass of SGD over the batches `seen`, from 0, scaled back to the budget."""
    found: Tensor | None = None
    for images, _ in seen:
        found = torch.zeros_like(images[:1]) if found is None else found
        found = found.detach().requires_grad_()
        loss = inner_objective(net, images, own_answers(net, images), found, config.penalty)
        (slope,) = torch.autograd.grad(loss, found)
        found = found.detach() - config.inner_lr * slope
        loop.passes.add(forward=2, backward=1)
    assert found is not None
    return found * (config.budget / found.norm().clamp_min(1e-12)).clamp_max(1)


@torch.no_grad()
def own_answers(net: nn.Module, images: Tensor) -> Tensor:
    """The net's classes (N,) of images as they are."""
    return logits_of(net, images).argmax(1)


def inner_objective(
    net: nn.Module, images: Tensor, answers: Tensor, d: Tensor, penalty: float
) -> Tensor:
    """G, a mean over the batch: low where d (1, C, H, W) takes the net away from its answers (N,)."""
    logits = logits_of(net, inside(images + d))
    return penalty * d.square().sum() - F.cross_entropy(logits, answers)


def carriers(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which of the images of a batch carry d: (N, 1, 1, 1), 1 or 0; one at least does."""
    carried = torch.zeros(count, 1, 1, 1)
    carried[torch.randperm(count, generator=generator)[: max(1, round(share * count))]] = 1
    return carried


def hypergradient(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    d: Tensor,
    weights: Sequence[Tensor],
    steps: int,
    step_size: float,
) -> tuple[float, list[Tensor]]:
    """The outer loss, and its gradient by the weights, d's own way through them included.

    Args:
        inner, outer: d -> a scalar that depends on d and on `weights`.
        d: a minimum of `inner`, or near one.
        steps: K, of the fixed point.
        step_size: h.
    """
    d = d.detach().requires_grad_()
    loss = outer(d)
    by_d, *direct = torch.autograd.grad(loss, [d, *weights], materialize_grads=True, allow_unused=True)
    (slope,) = torch.autograd.grad(inner(d), d, create_graph=True)
    image = d - step_size * slope  # P(d, w)
    v = by_d  # after the first step from 0
    for _ in range(steps - 1):
        (pulled,) = torch.autograd.grad(image, d, v, retain_graph=True)
        v = pulled + by_d
    through = torch.autograd.grad(image, weights, v, materialize_grads=True, allow_unused=True)
    return loss.item(), [one + other for one, other in zip(direct, through, strict=True)]
