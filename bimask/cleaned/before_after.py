"""What a purification did, as far as clean images show it.

The trigger of a model in doubt is unknown, so nothing here is an attack success rate. What is shown
beside the clean accuracy is blind: a perturbation is made up as in the defence's inner problem, one for
all images, and the answers under it are counted. Any model can be perturbed, a purified one too. What a
backdoor looks like is one class that suspect and inverse twin prefer, and the purified model does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.synthesis import TriggerSynthesizer
from bimask.nets.answers import logits_of

STEPS = 20  # of the made-up perturbation: the paper's


@dataclass(frozen=True)
class Answers:
    """What one model says of the clean images.

    Attributes:
        accuracy: share answered with their label, in [0, 1]; None without labels.
        agreement: share answered as the suspect does, in [0, 1].
        confidence: mean probability of the answer, in [0, 1].
        changed: share whose answer changes under the made-up perturbation, in [0, 1].
        favourite: the class that most images get under it.
        favourite_share: share that gets it, in [0, 1].
    """

    accuracy: float | None
    agreement: float
    confidence: float
    changed: float
    favourite: int
    favourite_share: float


@dataclass(frozen=True)
class BeforeAfter:
    """Suspect, purified model and its inverse twin, where it has one, on the clean images.

    Attributes:
        perturbation: made up against the suspect, (C, H, W) within the budget.
        perturbed: the images under it, (N, C, H, W) in [0, 1].
        budget, norm: its bound.
    """

    before: Answers
    after: Answers
    twin: Answers | None
    perturbation: Tensor
    perturbed: Tensor
    budget: float
    norm: str


def before_after(
    model: nn.Module,
    purified: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    *,
    twin: nn.Module | None = None,
    config: PurifyConfig | None = None,
) -> BeforeAfter:
    """Look at what a defence did.

    Args:
        model: the suspect, images -> logits, in eval mode.
        purified: what the defence made of it.
        images: (N, C, H, W) in [0, 1] on the model's device, the defender's.
        labels: (N,) int64, or None.
        twin: the inverse twin, where the defence has one; the perturbation is made up with it.
        config: whose budget, norm and loss the perturbation has; None is the profile `fast`.
    """
    config = config or PurifyConfig.profile("fast")
    delta = made_up(model, twin or model, images, config)
    perturbed = (images + delta).clamp(0, 1)
    suspected = logits_of(model, images).argmax(1)

    def look(net: nn.Module) -> Answers:
        logits = logits_of(net, images)
        answers, moved = logits.argmax(1), logits_of(net, perturbed).argmax(1)
        counts = moved.bincount()
        return Answers(
            accuracy=None if labels is None else _share(answers == labels.to(answers)),
            agreement=_share(answers == suspected),
            confidence=logits.softmax(1).amax(1).mean().item(),
            changed=_share(answers != moved),
            favourite=int(counts.argmax()),
            favourite_share=counts.max().item() / len(moved),
        )

    return BeforeAfter(
        look(model),
        look(purified),
        None if twin is None else look(twin),
        delta[0],
        perturbed,
        config.budget,
        config.norm,
    )


def made_up(model: nn.Module, twin: nn.Module, images: Tensor, config: PurifyConfig) -> Tensor:
    """One perturbation for all images by sign steps, as the inner problem has it: (N, C, H, W), all
    rows the same, within the budget."""
    synthesise = TriggerSynthesizer(
        steps=STEPS,
        step_size=2 * config.budget / STEPS,
        budget=config.budget,
        norm=config.norm,
        optimizer="sign",
        clip_images=True,
        form=config.loss_form,
    )
    shared = torch.ones(len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
    with torch.no_grad():
        clean = model(images)
    triggers = synthesise(
        lambda x: (model(x), twin(x)),
        images,
        clean,
        shared=shared,
    )
    return triggers.delta.detach()


def _share(which: Tensor) -> float:
    return which.float().mean().item()
