"""Classifiers: clean accuracy, attack success and recovery of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bimask.data import ImageData, Splits
from bimask.defences import DEFENCES
from bimask.defences.base import Defence, DefenceResult
from bimask.errors import DataError
from bimask.inspection.risk import RiskProbe, probe_images
from bimask.metrics import CleanScores, Scores, evaluate
from bimask.tasks.base import Metric, Predictor, Probe, Task
from bimask.victims import Victim, VictimSpec, obtain_victim, open_victim

GLANCED = 1000  # images of each kind: an ASR of 0.1 is known to 0.01


class TriggersOfClasses(Probe):
    """`bimask.inspection.risk`."""

    def images(self, val: ImageData, seed: int) -> Tensor:
        return probe_images(val, seed=seed).floats()

    def make(
        self, model: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None
    ) -> RiskProbe:
        return RiskProbe(model, images, on_step=on_step)

    def steps(self, classes: int, images: Tensor) -> int:
        return RiskProbe.steps(classes, len(images))

    def ask(self, made: RiskProbe, model: nn.Module, twin: nn.Module | None) -> dict[str, float]:
        return made(model, twin).numbers()


class Classification(Task):
    """Images with a class each."""

    name = "classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "clean_accuracy": Metric("maximize", "clean accuracy", "ACC", "clean images answered right"),
        "attack_success": Metric(
            "minimize",
            "attack success",
            "ASR",
            "triggered images that get the attacker's class",
            needs_trigger=True,
        ),
        "recovery": Metric(
            "maximize", "recovery", "RA", "triggered images answered right", needs_trigger=True
        ),
    }
    quality = "clean_accuracy"
    price = "accuracy"
    recovered = "recovery"
    objectives = ("clean_accuracy", "attack_success")
    defence = "ims"
    probe = TriggersOfClasses()
    answers = "classes and probabilities"

    @property
    def spec(self) -> type[VictimSpec]:
        return VictimSpec

    def check_data(self, spec: VictimSpec, splits: Splits) -> None:
        attack = spec.build_attack()
        for data in (splits.val, splits.test):
            if not len(data.images):
                raise DataError("Got no images to score it on; give more images, or other shares.")
            if not attack.has_state:  # else the trigger is made with the victim, and refused there
                attack.triggered(data)

    def fresh_net(self, spec: VictimSpec, data: ImageData) -> nn.Module:
        return spec.fresh_net(data)

    def obtain_victim(
        self,
        spec: VictimSpec,
        root: Path,
        *,
        device: torch.device | str = "cpu",
        on_epoch: Callable[[Any], None] | None = None,
        on_prepare: Callable[[str, int, int], None] | None = None,
    ) -> Victim:
        return obtain_victim(spec, root, device=device, on_epoch=on_epoch, on_prepare=on_prepare)

    def open_victim(self, folder: Path) -> Victim:
        return open_victim(folder, own_code=True)

    def draw_victim(self, path: Path, victim: Victim, sets: Any) -> None:
        from bimask.files.drawn import save_figure
        from bimask.victims.gallery import gallery

        try:
            picture = gallery(victim, sets)
        except DataError:
            if victim.stored is None:
                raise
            return  # imported, and nothing says which of its images belong together
        save_figure(picture, path)

    def evaluate(self, model: nn.Module, sets: Any) -> Any:
        return evaluate(model, sets)

    def glance(self, model: nn.Module, sets: Any) -> Any:
        """The same of at most `GLANCED` images of each kind, in bfloat16 where the device is fast in
        it: CIFAR-10's whole `val` takes longer than the ten steps between two looks."""
        return evaluate(model, sets.at_most(GLANCED), precision="bfloat16")

    def derived(self, scores: Scores | CleanScores, before: Any) -> dict[str, float]:
        """ARR, and where the trigger is known RDR, DER and RIR."""
        found = {"arr": scores.arr(before)}
        if isinstance(scores, Scores):
            found |= {"rdr": scores.rdr(before), "der": scores.der(before), "rir": scores.rir(before)}
        return found

    def save_cleaned(
        self,
        out: Path,
        victim: Victim,
        splits: Splits,
        result: DefenceResult,
        *,
        clean_images_per_class: int,
        seed: int,
    ) -> None:
        from bimask.cleaned.before_after import before_after
        from bimask.cleaned.folder import save_cleaned
        from bimask.defences.ims.config import PurifyConfig
        from bimask.defences.purify import defence_of
        from bimask.victims.as_suspect import suspect_of

        suspect = suspect_of(victim, splits, clean_images_per_class, seed=seed)
        purified, config = result.model(), result.config
        looked = before_after(
            victim.model,
            purified,
            suspect.clean.floats(),
            suspect.clean.labels,
            twin=defence_of(config).twin(victim.model, result.tensors, config),
            config=config if isinstance(config, PurifyConfig) else None,
        )
        test = victim.eval_sets(splits, "test")
        scores = {"before": evaluate(victim.model, test), "after": evaluate(purified, test)}
        save_cleaned(out, suspect, result, looked, seed=seed, scores=scores)

    def predictor(self, folder: Path, *, own_code: bool = False) -> Predictor:
        from bimask.cleaned.classifier import Classifier
        from bimask.cleaned.folder import load_cleaned

        cleaned = load_cleaned(folder, own_code=own_code)
        return Classifier(cleaned.model, cleaned.classes, cleaned.shape)

    @property
    def defences(self) -> Mapping[str, Defence[Any]]:
        return DEFENCES
