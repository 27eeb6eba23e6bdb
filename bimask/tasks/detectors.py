"""Detectors: mAP, attack success and true detections of objects.

Left out, since nobody has written them for detectors: suspects whose trigger nobody knows (`suspect:`
in a study), the audit, searched and synthesised triggers, inverse twins, comparisons of defences,
suites of `study.victims`, and tables of folders of pictures (`study.score`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from bimask.defences.base import CleanData, Defence, DefenceResult
from bimask.errors import DataError
from bimask.tasks.base import Metric, Predictor, Probe, Task

ASKED = 100  # pictures of `val` that a probe is made of


class StrongerPictures(Probe):
    """`bimask.detection.defences.risk`; no defence learns on `val`."""

    def images(self, val: Any, seed: int) -> tuple[list[Any], list[Any]]:
        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(seed))
        chosen = val.subset(order[:ASKED])
        return chosen.floats(), chosen.labels

    def make(self, model: nn.Module, images: Any, *, on_step: Callable[[], None] | None = None) -> Any:
        from bimask.detection.defences.risk import AdversarialRisk

        generator = torch.Generator().manual_seed(0)
        return AdversarialRisk.of(model, CleanData(*images), generator, on_step=on_step)

    def steps(self, classes: int, images: Any) -> int:
        from bimask.detection.defences.risk import AdversarialRisk

        return AdversarialRisk.steps(len(images[0]))

    def ask(self, made: Any, model: nn.Module, twin: nn.Module | None) -> dict[str, float]:
        return {"risk": made(model)}


class Detection(Task):
    """Pictures with objects in boxes."""

    name = "detection"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "map50": Metric("maximize", "mAP@50", "mAP@50", "mean average precision on clean pictures"),
        "map": Metric("maximize", "mAP", "mAP", "the same, mean over IoU 0.50 to 0.95"),
        "attack_success": Metric(
            "minimize",
            "attack success",
            "ASR@50",
            "triggered objects that become what the attacker wants",
            needs_trigger=True,
        ),
        "true_detection": Metric(
            "maximize",
            "true detection",
            "TDR@50",
            "triggered objects that are found as what they are",
            needs_trigger=True,
        ),
    }
    quality = "map50"
    price = "mAP@50"
    recovered = "true_detection"
    objectives = ("map50", "attack_success")
    defence = "soft_branch"
    probe = StrongerPictures()
    answers = "boxes, classes and scores of the objects found"

    @property
    def spec(self) -> type[Any]:
        from bimask.detection.victims import DetectorSpec

        return DetectorSpec

    def check_data(self, spec: Any, splits: Any) -> None:
        for data in (splits.val, splits.test):
            if not len(data):
                raise DataError("Got no pictures to score it on; give more.")
            spec.attack.triggered(data, generator=torch.Generator().manual_seed(0))

    def fresh_net(self, spec: Any, data: Any) -> nn.Module:
        net: nn.Module = spec.net_for(data)
        return net

    def obtain_victim(
        self,
        spec: Any,
        root: Path,
        *,
        device: torch.device | str = "cpu",
        on_epoch: Callable[[Any], None] | None = None,
        on_prepare: Callable[[str, int, int], None] | None = None,
    ) -> Any:
        """No attack on detectors has anything to prepare."""
        from bimask.detection.victims import obtain_victim

        return obtain_victim(spec, root, device=device, on_epoch=on_epoch)

    def open_victim(self, folder: Path) -> Any:
        from bimask.detection.victims import load_victim

        return load_victim(folder, own_code=True)

    def draw_victim(self, path: Path, victim: Any, sets: Any) -> None:
        from bimask.detection.gallery import draw_victim

        draw_victim(path, victim.model, sets, victim.classes)

    def pictures(self, victim: Any, model: nn.Module, sets: Any) -> dict[str, Any]:
        """What is found in clean pictures, and in the same ones with a triggered object."""
        from bimask.detection.gallery import found_in

        return {**found_in(model, sets, victim.classes)}

    def evaluate(self, model: nn.Module, sets: Any) -> Any:
        from bimask.detection import evaluate

        return evaluate(model, sets)

    def save_cleaned(
        self,
        out: Path,
        victim: Any,
        splits: Any,
        result: DefenceResult,
        *,
        clean_images_per_class: int,
        seed: int,
    ) -> None:
        from bimask.detection import evaluate
        from bimask.detection.before_after import look
        from bimask.detection.cleaned import save_cleaned
        from bimask.detection.page import shown_of
        from bimask.detection.purify import defence_of
        from bimask.detection.victims.as_suspect import held_back_of, suspect_of

        suspect, held = (
            suspect_of(victim, splits, clean_images_per_class, seed=seed),
            held_back_of(splits),
        )
        before, after = victim.model, result.model()
        data = {"learned": suspect.clean} | ({"held_back": held} if len(held) else {})
        test = evaluate(after, victim.eval_sets(splits, "test"))
        save_cleaned(
            out,
            suspect,
            defence_of(result.config).name,
            result,
            {name: look(before, after, pictures) for name, pictures in data.items()},
            shown_of(before, after, [*data.values()][-1], {}),
            longest_side=max(part.longest_side for part in (splits.train, splits.val, splits.test)),
            seed=seed,
            reason="the trigger is known, so what it does is measured on test.",
            scores={"before": victim.scores["test"], "after": test},
        )

    def predictor(self, folder: Path, *, own_code: bool = False) -> Predictor:
        from bimask.detection.cleaned import load_cleaned
        from bimask.detection.predictor import DetectionPredictor

        cleaned = load_cleaned(folder, own_code=own_code)
        return DetectionPredictor(cleaned.model, cleaned.classes, cleaned.longest_side)

    @property
    def defences(self) -> Mapping[str, Defence[Any]]:
        from bimask.detection.defences import DEFENCES

        return DEFENCES
