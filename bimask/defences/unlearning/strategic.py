"""Strategic retraining: neurons that a trigger drives are found, and the net learns to resist it.

Dhonthi, Hahn, Hashemi, "Backdoor Mitigation in Deep Neural Networks via Strategic Retraining", FM
2023 (LNCS 14000, arXiv 2212.07278). In rounds, until no such neuron is left:

    neurons    channels are driven up as in ABS (Liu et al., CCS 2019); one that leads nearly all images
               to the same class is a candidate (`bimask.inspection.neurons`)
    triggers   a small trigger is searched for each candidate (`bimask.inspection.neuron_triggers`); a
               neuron whose trigger leads other clean images there often enough is a Trojan neuron
    classes    those whose images the triggers move most: the fewest that have the share `top_p` of all
               flip rates
    retrain    on clean images of all classes, and on stamped ones of these classes with their true
               labels

Use it to see what the backdoor was: the triggers that were found are in the result, as pictures. It
costs a pass for each value of each channel, and 200 forward and back for the triggers, each round. It
needs labels; what ABS does not find stays in the model, and whole-picture, warped and input-dependent
triggers are beyond it (`kind: pattern` widens it to whole pictures).

A round without a Trojan neuron ends the run. If it is the first, nothing was *found*, and the model
is given back as it was: that does not make it clean, and a warning says so.

Learning rates, epochs, the size of a trigger and the share `top_p` were not published in a form that
we could read, and that the classes are chosen by their share of the flip rates is our reading;
`top_p_rule` has the other. Thresholds of ABS do not carry over between data sets, so `min_success` is
searched. A stamped trigger is moved by up to two pixels, since one place alone is learned by heart;
running statistics stay, since stamped batches would shift them. Of all rounds within the accuracy
budget, the one is kept whose errors under adversarial images are least the suspect's
(`SharedErrors`). `candidates: classes` asks for a patch towards every class in place of the neurons'
(an ablation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.held_out import accuracy
from bimask.defences.loop import Loop, logits_of
from bimask.defences.simple import (
    BEGINNING,
    BESIDE,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.defences.unlearning.strategic_settings import StrategicConfig
from bimask.defences.unlearning.trojan_neurons import Found, mixed, parted, rates_of, search
from bimask.errors import warn
from bimask.inspection.neuron_triggers import Triggers
from bimask.inspection.shared_errors import SharedErrors
from bimask.masking.copies import copied
from bimask.nets.admission import admit

SHOWN = 3  # triggers in pictures
COVER, PAINT, TARGET = f"{BESIDE}cover", f"{BESIDE}paint", f"{BESIDE}target"


class Strategic(SimpleDefence[StrategicConfig]):
    """Strategic retraining."""

    name = "strategic"
    config = StrategicConfig
    needs_labels = True
    ends_early = True
    numbers = ("found", "affected_share", "trigger_success_before", "trigger_success_after")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: StrategicConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[StrategicConfig]:
        """Search and retrain; a search and an epoch are what a run goes on from."""
        net = admit(model, clean.images).model.requires_grad_(True)
        weights = [p for p in net.parameters() if p.is_floating_point()]
        images = clean.images.to(weights[0].dtype)
        parts = parted(CleanData(images, clean.labels), generator)
        with torch.no_grad():
            classes = net(images[:1]).shape[1]
        suspect = copied(net).requires_grad_(False)
        good, best = copied(suspect), copied(suspect)
        most = classes if config.candidates == "classes" else config.top_k
        found = Found(config.kind, most, images.shape[1:], classes).to(images.device)
        found.to(images.dtype)
        found.score = found.score.double()  # as it is compared
        sgd = torch.optim.SGD(
            weights, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        allowed = accuracy(suspect, parts.choose) - config.accuracy_drop - 1e-9
        errors = SharedErrors(suspect, parts.choose.images)

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            first = found.triggers("first")
            tensors = dict(best.state_dict())
            numbers = {"found": 0.0, "affected_share": 0.0}
            numbers |= {"trigger_success_before": 0.0, "trigger_success_after": 0.0}
            if len(first):
                shown = first.of(torch.arange(min(SHOWN, len(first))))
                tensors |= {COVER: shown.cover, PAINT: shown.paint, TARGET: shown.target}
                numbers = {"found": 1.0, "affected_share": float(found.affected.float().mean())}
                for name, one in (("before", suspect), ("after", best)):
                    rates, _ = rates_of(one, first, parts.unseen, classes)
                    numbers[f"trigger_success_{name}"] = float(rates.max())
            return tensors, numbers

        with Loop(
            self,
            model,
            config,
            {"net": net, "good": good, "best": best, "found": found, "moments": sgd},
            ending,
            generator=generator,
            device=images.device,
            keeper=keeper,
        ) as loop:
            for round_ in range(config.rounds):
                for _ in loop.epochs(1):
                    price = search(net.eval(), parts, config, found, generator, loop)
                    if round_ == 0:
                        found.remember()
                    sgd.state.clear()
                    found.kept.fill_(False)
                    if loop.step({"search": price}, on_step):
                        return loop.result()
                if not len(found.triggers("now")):
                    break
                for epoch in loop.epochs(config.epochs):
                    for images, labels in mixed(parts.learn, found, config, generator):
                        loss = F.cross_entropy(logits_of(net, images), labels)
                        sgd.zero_grad()
                        loss.backward()
                        sgd.step()
                        loop.passes.add(forward=1, backward=1)
                        if loop.step({"cross_entropy": loss.item()}, on_step):
                            return loop.result()
                    if accuracy(net, parts.choose) >= allowed:
                        good.load_state_dict(net.state_dict())
                        found.kept.fill_(True)
                    if epoch + 1 == config.epochs and found.kept:
                        net.load_state_dict(good.state_dict())
                        if (score := errors(good)) <= float(found.score):
                            found.score.fill_(score)
                            best.load_state_dict(good.state_dict())
                if not found.kept:
                    break
            _tell(found, config)
            return loop.result()

    def synthesised(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        images: Tensor,
        config: StrategicConfig,
    ) -> dict[str, Tensor]:
        """The triggers that were found in the suspect, the most successful first."""
        if COVER not in tensors:
            return {}
        given = (tensors[name].to(images.device) for name in (COVER, PAINT, TARGET))
        cover, paint, target = given
        triggers = Triggers(config.kind, cover.to(images), paint.to(images), target.long())
        names = [f"trigger {i + 1}, to class {t}" for i, t in enumerate(triggers.target.tolist())]
        return dict(zip(names, triggers.every(images) - images, strict=True))


def _tell(found: Found, config: StrategicConfig) -> None:
    """Warn of what a user would take for a clean model."""
    if not len(found.triggers("first")):
        warn(
            "Strategic retraining found no Trojan neuron, so the model is given back as it was. That "
            "does not make it clean: the search misses many backdoors. Lower `min_success`, try "
            "`kind: pattern` or `candidates: classes`, or take another defence, such as `ims`."
        )
    elif not found.kept and len(found.triggers("now")):
        warn(
            f"No epoch of the last round kept the accuracy on held-out clean images within "
            f"{config.accuracy_drop:g} of the suspect's, and what it learned is not in the result; "
            "lower `lr`, or allow more with `accuracy_drop`."
        )
