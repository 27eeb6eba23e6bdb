"""Feature shift tuning, and D3: the classifier begins anew, and the features are made to follow it.

FST: Min, Qin, Shen, Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning",
NeurIPS 2023 (arXiv 2310.01875). Plain fine-tuning leaves the features near those that the trigger
drives. So the weights W of the classifier are drawn anew, and all weights learn (equation 2)

    CE(f(x), y) + alpha <W, W0>,    ||W||_F = ||W0||_F after every step,

W0 being the suspect's. D3, Distance-Driven Detoxification (ICCV 2025, arXiv 2411.09585), the setting
`variant: d3`, drives W as far from W0 as the clean images bear:

    (lambda relu(CE - epsilon) - ||W - W0||_F) / (lambda + 1 if lambda > 1),    the same norm,

from weights that are uniform in [-1/2, 1/2] and scaled to it. `profile: d3` has its settings.

Use it where plain fine-tuning leaves the backdoor, with about a hundred images or more. It costs as
much as plain fine-tuning. It needs labels, and a last layer that is linear or a convolution; which
layer that is, a forward pass shows.

Otherwise than in the published code: only the last layer begins anew, of every net; published runs on
nets with several linear layers draw all of those. The first draw is scaled, too, so that it is of the
norm that it has after every step. Of D3's other starts (halfway, -W, noise) none is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, cosine, logits_of, set_lr
from bimask.defences.settings import Search
from bimask.defences.sgd import Epochs, FineTuningConfig, descend, epoch_of, sgd
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.errors import ModelError
from bimask.nets.admission import admit


class FstConfig(FineTuningConfig):
    """The settings of FST, published for CIFAR-10; those of D3 are the profile `d3`."""

    epochs: Epochs = 10
    variant: Literal["fst", "d3"] = Field(
        "fst", description="what the classifier is drawn from and pulled by: FST's or D3's objective"
    )
    alpha: Annotated[
        float,
        Field(
            ge=0,
            description="of FST, weight of <W, W0>: 0.2 for CIFAR-10, 0.1 for GTSRB, 0.001 for 200 "
            "classes",
        ),
        Search(1e-3, 0.5, log=True),
    ] = 0.2
    penalty: Annotated[
        float,
        Field(
            gt=0,
            description="of D3, weight lambda of the cross-entropy: 0.5 in its configuration, 10 in "
            "notes on the paper",
        ),
        Search(0.1, 20, log=True),
    ] = 0.5  # of the two the one that ten digits a class suffice for, against BadNets and Blended
    epsilon: float = Field(
        0.1, ge=0, description="of D3, cross-entropy in nats under which clean images pull no more"
    )
    PROFILES: ClassVar[Mapping[str, Mapping[str, Any]]] = {"d3": {"variant": "d3", "epochs": 100}}


class Fst(SimpleDefence[FstConfig]):
    """Feature shift tuning, and its variant D3."""

    name = "fst"
    config = FstConfig
    needs_labels = True

    def check(self, model: nn.Module, images: Tensor) -> None:
        classifier_of(admit(model, images).model, images)

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: FstConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[FstConfig]:
        """Draw the classifier anew and fine-tune all weights; batch norms learn, too.

        Raises:
            ModelError: the last layer is neither linear nor a convolution.
        """
        net = admit(model, clean.images).model
        layer = net.get_submodule(classifier_of(net, clean.images))
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        before = weight.detach().clone()
        begin_anew(layer, config.variant, generator)
        net.train().requires_grad_(True)
        optimiser = sgd(net, config)
        with Loop(
            self,
            model,
            config,
            {"net": net, "moments": optimiser},
            lambda: (net.state_dict(), {}),
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for epoch in loop.epochs(config.epochs):
                set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                for images, labels in epoch_of(clean, config, generator, net):
                    cross_entropy = F.cross_entropy(logits_of(net, images), labels)
                    terms = objective(cross_entropy, weight, before, config)
                    descend(optimiser, torch.stack(list(terms.values())).sum())
                    project(weight, before.norm())
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({name: term.item() for name, term in terms.items()}, on_step):
                        return loop.result()
            return loop.result()


def objective(
    cross_entropy: Tensor, weight: Tensor, before: Tensor, config: FstConfig
) -> dict[str, Tensor]:
    """The terms of the loss, each with its weight.

    Args:
        cross_entropy: of the batch.
        weight, before: of the classifier, now and in the suspect.
    """
    if config.variant == "fst":
        return {"cross_entropy": cross_entropy, "alignment": config.alpha * (weight * before).sum()}
    scale = config.penalty + 1 if config.penalty > 1 else 1.0
    return {
        "cross_entropy": config.penalty / scale * (cross_entropy - config.epsilon).relu(),
        "distance": -(weight - before).norm() / scale,
    }


@torch.no_grad()
def project(weight: Tensor, norm: Tensor) -> None:
    """Scale a weight to a Frobenius norm, in place."""
    weight.mul_(norm / weight.norm().clamp_min(1e-12))


@torch.no_grad()
def begin_anew(layer: nn.Module, variant: str, generator: torch.Generator) -> None:
    """Draw the weights of a layer anew, of the Frobenius norm that they have; FST also its bias, as new
    layers of PyTorch draw it.

    Args:
        generator: CPU.
    """
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    norm = weight.norm()
    weight.copy_(torch.empty(weight.shape).uniform_(-0.5, 0.5, generator=generator))
    project(weight, norm)
    if variant == "fst" and isinstance(bias, Tensor):
        bound = weight[0].numel() ** -0.5
        bias.copy_(torch.empty(bias.shape).uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def classifier_of(net: nn.Module, images: Tensor) -> str:
    """The name of the layer that makes the logits: of linear layers and convolutions the last that a
    forward pass calls.

    Raises:
        ModelError: there is none, or its weight is computed, as weight norm's is.
    """
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    ]
    try:
        net(images[:1].to(next(net.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    if not called or not isinstance(net.get_submodule(called[-1]).weight, nn.Parameter):
        raise ModelError(
            "FST draws the weights of a last linear layer or convolution anew, and this model has none "
            "of its own; take another defence, such as `ft_sam`."
        )
    return called[-1]
