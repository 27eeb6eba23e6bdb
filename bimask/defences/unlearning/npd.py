"""Neural polariser: one learned layer in the frozen suspect that lets the trigger's features not pass.

Zhu, Wei, Zha, Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying
Poisoned Features", NeurIPS 2023 (arXiv 2306.16697). A convolution of 1x1 and a batch norm go in front
of a late convolution, and are all that learns. The trigger is unknown, so adversarial images stand for
it: y is the label, T the wrong class that the polarised net g likes most, and

    inner   d = argmin over ||d||_2 <= r of CE(g(x + d), T)      sign steps, each projected to the ball
    outer   l1 CE(g(x), y) + l2 CE(g(x + d), y)
            - l3 log(1 - max over k != y of p_k(x + d)) - l4 log(1 - p_T(x + d))

Use it where the weights of a model must stay as they are, or where images are very few.
It costs about five passes a batch, and the smallest update of all: one layer.
It needs labels, and a convolution that the net calls; `layer` names another one than the last.

The polariser begins as the identity: its norm has the statistics of the clean features as they are, and
gives them back as scale and shift (the published one begins without any, and is warmed up for five
epochs, which are as many steps where images are few). Clean images teach the norm its statistics;
perturbed ones see it as it will answer. The label stands where the published program has the net's own
clean answer. What is saved is one convolution of 1x1 with the norm folded in, a module of its own in
front of the layer. Together with that layer it would be one convolution, but only where the layer pads
nothing: padded zeros come behind the polariser, and folded they would come in front of it, where its
bias makes them something else. Nor can a grouped convolution take up a map over all channels. So it is
folded no further, for all nets alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, cosine, logits_of, set_lr
from bimask.defences.settings import Search
from bimask.defences.sgd import FineTuningConfig, epoch_of
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence
from bimask.defences.unlearning.losses import minus_log_other
from bimask.errors import ModelError, SettingError
from bimask.masking.copies import copied
from bimask.masking.inserted import Polarised, insert, pointwise, put_around
from bimask.nets.admission import admit, unwrapped

OWN = ".polariser."  # between the name of a layer and that of a tensor of its polariser


class NpdConfig(FineTuningConfig):
    """The settings of the neural polariser: published for CIFAR-10. The rate, momentum and decay are of
    its layer alone."""

    layer: str = Field(
        "",
        description="convolution that it stands in front of; empty is the last one called (published: "
        "a name for each architecture, layer4.1.conv1 for PreActResNet18)",
    )
    epochs: Annotated[
        int, Field(ge=1, description="times that every image is seen"), Search(5, 200, log=True)
    ] = 50
    budget: Annotated[
        float,
        Field(gt=0, description="r, the largest L2 norm of a perturbation, of pixels in [0, 1]"),
        Search(1.0, 5.0),
    ] = 3.0
    inner_steps: int = Field(2, ge=1, description="sign steps of a perturbation at most")
    # the published step fills the budget on 32x32 pixels in colour; smaller images need longer ones
    inner_lr: Annotated[
        float,
        Field(gt=0, description="change of a pixel by one sign step"),
        Search(0.05, 0.5, log=True),
    ] = 0.1
    success: float = Field(
        0.6, gt=0, le=1, description="share of a batch at which its perturbations are strong enough"
    )
    clean_weight: float = Field(1.0, ge=0, description="l1, of the cross-entropy of clean images")
    robust_weight: Annotated[
        float,
        Field(ge=0, description="l2, of the cross-entropy of perturbed images"),
        Search(0.1, 2.0, log=True),
    ] = 0.4
    wrong_weight: float = Field(0.4, ge=0, description="l3, of the push from the best wrong class")
    target_weight: float = Field(0.4, ge=0, description="l4, of the push from the perturbation's class")


class Npd(SimpleDefence[NpdConfig]):
    """Neural polariser."""

    name = "npd"
    config = NpdConfig
    needs_labels = True

    def check(self, model: nn.Module, images: Tensor) -> None:
        _called(admit(model, images).model, images)

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: NpdConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[NpdConfig]:
        """Train the polariser; the suspect's own weights and statistics stay. Epochs are what a run
        goes on from.

        Raises:
            ModelError: the net calls no convolution of two dimensions.
            SettingError: none of the name `layer`.
        """
        net = admit(model, clean.images).model.requires_grad_(False)
        layer = layer_in(net, clean.images, config.layer)
        polariser = identity(net, layer, clean.images)
        put_around(net, layer, Polarised(net.get_submodule(layer), polariser))
        optimiser = torch.optim.SGD(
            polariser.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            own = folded(polariser).state_dict()
            return {f"{layer}{OWN}{name}": value for name, value in own.items()}, {}

        with Loop(
            self,
            model,
            config,
            {"polariser": polariser, "moments": optimiser},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for epoch in loop.epochs(config.epochs):
                set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                for images, labels in epoch_of(clean, config, generator, net):
                    polariser.eval()
                    target = best_wrong(logits_of(net, images).detach(), labels)
                    moved, steps = perturbed(net, images, target, config)
                    polariser.train(len(images) > 1)  # of one image a norm may have one number
                    clean_logits = logits_of(net, images)  # first: it moves the statistics of the other
                    polariser.eval()
                    robust = logits_of(net, moved)
                    losses = outer_losses(clean_logits, robust, labels, target, config)
                    optimiser.zero_grad()
                    torch.stack(list(losses.values())).sum().backward()
                    optimiser.step()
                    asked = min(steps + 1, config.inner_steps)  # an early end shows in one more pass
                    loop.passes.add(forward=asked + 3, backward=steps + 2)
                    if loop.step({name: loss.item() for name, loss in losses.items()}, on_step):
                        return loop.result()
            return loop.result()

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor], config: NpdConfig) -> nn.Module:
        """A copy of the model with the polariser in front of its layer."""
        polarised = copied(unwrapped(model)[0])
        layer = next(iter(tensors)).rpartition(OWN)[0]
        insert(polarised, {layer: Polarised.kind}, tensors)
        return polarised.eval()


def _called(net: nn.Module, images: Tensor) -> list[str]:
    """The convolutions that the net calls, in the order of their last calls.

    Raises:
        ModelError: none.
    """
    names: dict[str, None] = {}

    def called(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
            names.pop(name, None)
            names[name] = None

        return hook

    handles = [
        module.register_forward_hook(called(name))
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        net(images[:1].to(next(net.parameters()).dtype))
    for handle in handles:
        handle.remove()
    if not names:
        raise ModelError(
            "The neural polariser stands in front of a convolution, and this model calls none; take "
            "another defence, such as `ft_sam`."
        )
    return list(names)


def layer_in(net: nn.Module, images: Tensor, name: str) -> str:
    """The convolution `name`, or the one that the net calls last.

    Raises:
        ModelError: the net calls none.
        SettingError: none of that name.
    """
    names = _called(net, images)
    if name and name not in names:
        raise SettingError(
            f"The setting `layer` is {name!r}, but the convolutions of this model are "
            f"{', '.join(names)}; name one of them, or leave it empty for the last."
        )
    return name or names[-1]


@torch.no_grad()
def identity(net: nn.Module, layer: str, images: Tensor) -> nn.Sequential:
    """A polariser that changes nothing, neither with the running statistics of its norm nor, on all of
    these images, with theirs.

    Args:
        layer: the convolution in front of which it will stand.
        images: (N, C, H, W), clean.
    """
    convolution = net.get_submodule(layer)
    assert isinstance(convolution, nn.Conv2d)
    channels, like = convolution.in_channels, convolution.weight
    sums = [torch.zeros(channels, dtype=torch.float64) for _ in range(2)]
    count = 0

    def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal count
        values = args[0].transpose(0, 1).flatten(1).cpu().double()
        count += values.shape[1]
        sums[0] += values.sum(1)
        sums[1] += values.square().sum(1)

    handle = convolution.register_forward_pre_hook(look)
    for part in images.split(256):
        net(part.to(like.dtype))
    handle.remove()
    mean = sums[0] / count
    variance = (sums[1] / count - mean.square()).clamp_min(0)
    linear = pointwise(torch.eye(channels).view(channels, channels, 1, 1), None)
    norm = nn.BatchNorm2d(channels)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.bias.copy_(norm.running_mean)
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    return nn.Sequential(linear, norm).to(like).eval()


@torch.no_grad()
def folded(polariser: nn.Sequential) -> nn.Conv2d:
    """The polariser in eval mode as one convolution of 1x1 with a bias."""
    linear, norm = polariser
    assert isinstance(linear, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # in float64 on the CPU, since not every device has it
    weight, bias, mean, variance = (
        value.detach().cpu().double()
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = weight / (variance + norm.eps).sqrt()
    one = pointwise(linear.weight.cpu() * scale.view(-1, 1, 1, 1), bias - mean * scale)
    return one.to(linear.weight)


def best_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """The class (N,) of the largest logit (N, K) that is not the label's."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def perturbed(net: nn.Module, images: Tensor, target: Tensor, config: NpdConfig) -> tuple[Tensor, int]:
    """Images (N, C, H, W) in [0, 1] that the net shall answer with `target` (N,), and how many sign
    steps they took: no more than are needed for the share `success`."""
    moved, taken = images, 0
    for _ in range(config.inner_steps):
        moved = moved.detach().requires_grad_()
        logits = logits_of(net, moved)
        if (logits.argmax(1) == target).float().mean() >= config.success:
            break
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, target), moved)
        change = moved.detach() - config.inner_lr * slope.sign() - images
        moved = (images + projected(change, config.budget)).clamp(0, 1)
        taken += 1
    return moved.detach(), taken


def projected(changes: Tensor, radius: float) -> Tensor:
    """The nearest changes (N, ...) of an L2 norm of at most `radius`."""
    norms = changes.flatten(1).norm(dim=1).clamp_min(1e-12)
    return changes * (radius / norms).clamp_max(1).view(-1, *[1] * (changes.ndim - 1))


def outer_losses(
    clean: Tensor, robust: Tensor, labels: Tensor, target: Tensor, config: NpdConfig
) -> dict[str, Tensor]:
    """The terms that the polariser minimises, each a mean over the batch, with its weight.

    Args:
        clean, robust: logits (N, K) of clean and of perturbed images.
        labels, target: (N,), the true classes and those of the perturbations.
    """
    wrong = minus_log_other(robust, best_wrong(robust.detach(), labels))
    return {
        "cross_entropy": config.clean_weight * F.cross_entropy(clean, labels),
        "robust_cross_entropy": config.robust_weight * F.cross_entropy(robust, labels),
        "wrong": config.wrong_weight * wrong.mean(),
        "target": config.target_weight * minus_log_other(robust, target).mean(),
    }
