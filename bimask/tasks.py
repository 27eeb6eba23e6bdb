"""What backdoors are taken out of, classifiers or detectors: what is measured there, and who makes it.

A study knows its task by this alone. Whatever a task leaves out is None here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from bimask.data import ImageData, Splits
from bimask.defences import DEFENCES
from bimask.defences.base import CleanData, Defence, DefenceResult
from bimask.defences.settings import DefenceConfig
from bimask.errors import DataError, NonFiniteError, SettingError
from bimask.inspection.risk import RiskProbe, probe_images
from bimask.metrics import Scores, evaluate
from bimask.nets.spec import NetSpec
from bimask.victims import VictimSpec, obtain_victim

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Metric:
    """A score in [0, 1] of a model.

    Attributes:
        name, short: for people, as "clean accuracy" and "ACC".
        counts: which inputs it is the share of, or what else it measures.
        needs_trigger: whether nobody can measure it without the true trigger.
    """

    direction: Direction
    name: str
    short: str
    counts: str
    needs_trigger: bool = False


@dataclass(frozen=True)
class Probe:
    """What says of a defended model, without the attack, how much of a backdoor is left.

    Attributes:
        images: (clean data of `val`, seed) -> those that it is made of.
        make: (model, images, on_step=...) -> the probe: (defended model, twin or None) -> what has
            `numbers()`, among them `risk`; it has `to(device)`.
        steps: (classes, images) -> how often `on_step` is called.
    """

    images: Callable[[Any, int], Any]
    make: Callable[..., Any]
    steps: Callable[[int, int], int]


@dataclass(frozen=True, eq=False)
class Task:
    """A kind of models, with what is measured of them and what is done to them.

    Attributes:
        name: in `TASKS`, and in a study's YAML.
        metrics: score -> how it is read, in the order in which people see them; each is an attribute of
            what `evaluate` returns.
        quality: the score of clean inputs that a defence may not cost; `accuracy_drop` is its fall.
        price: what that costs, in a sentence: "0.3 points of accuracy".
        recovered: the score that says how often triggered inputs are answered as they should be.
        objectives: what a study searches by unless it says otherwise.
        spec: of a victim.
        defences: by name.
        defence: the name of the one that a study searches unless it says otherwise.
        evaluate: (model, evaluation sets of a victim) -> scores.
        glance: the same, where it is done often while a defence runs.
        derived: (scores, those of the suspect) -> numbers that are made of both.
        obtain_victim: (spec, root, device=..., on_epoch=..., on_prepare=...) -> the victim, loaded from
            its folder in `root` or trained.
        check_data: (spec, splits) -> None; refuses data that attack or scores can do nothing with.
        probe: for blind selection; None where there is none.
        gallery: (victim, evaluation sets) -> a figure of what its trigger does.
    """

    name: str
    metrics: Mapping[str, Metric]
    quality: str
    price: str
    recovered: str
    objectives: tuple[str, ...]
    spec: type[NetSpec]
    defences: Mapping[str, Defence[Any]]
    defence: str
    evaluate: Callable[..., Any]
    glance: Callable[..., Any]
    derived: Callable[[Any, Any], dict[str, float]]
    obtain_victim: Callable[..., Any]
    check_data: Callable[[Any, Any], None]
    gallery: Callable[[Any, Any], Any]
    probe: Probe | None = None

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], Task], tuple[str]]:
        return task_named, (self.name,)  # in another process it is that one's own

    def quality_of(self, scores: Any) -> float:
        """The quality among some scores."""
        return float(getattr(scores, self.quality))

    def told(self, scores: Any) -> str:
        """Scores in a line."""
        return ", ".join(
            f"{metric.short} {getattr(scores, name):.3f}" for name, metric in self.metrics.items()
        )


def task_named(name: object) -> Task:
    """The task of this name; of an unknown one, or where none is said, that of classifiers."""
    return TASKS.get(name, CLASSIFICATION) if isinstance(name, str) else CLASSIFICATION


def defence_of(config: DefenceConfig) -> Defence[Any]:
    """The defence of any task whose settings these are.

    Raises:
        SettingError: of none.
    """
    for task in TASKS.values():
        for defence in task.defences.values():
            if type(config) is defence.config:
                return defence
    raise SettingError(f"A {type(config).__name__} is of no known defence.")


def defend(
    model: nn.Module,
    images: Any,
    config: DefenceConfig,
    *,
    labels: Any,
    generator: torch.Generator,
) -> DefenceResult:
    """Take the backdoor out of a model of any task.

    Args:
        model: the suspect; left as it is.
        images, labels: clean, as the task's defences take them; labels are handed on only to a defence
            that declares a need of them.
        generator: CPU.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    defence = defence_of(config)
    clean = CleanData(images, labels if defence.needs_labels else None)
    (result,) = defence.run(model, clean, [config], generators=[generator])
    if isinstance(result, NonFiniteError):
        raise result
    return result


def _glance(model: Any, sets: Any) -> Any:
    """The same answers as in float32, sooner where the device is fast in bfloat16."""
    return evaluate(model, sets, precision="bfloat16")


def _derived(after: Any, before: Any) -> dict[str, float]:
    """ARR, and where the trigger is known RDR, DER and RIR."""
    found = {"arr": after.arr(before)}
    if isinstance(after, Scores):
        found |= {"rdr": after.rdr(before), "der": after.der(before), "rir": after.rir(before)}
    return found


def _check_images(spec: VictimSpec, splits: Splits) -> None:
    attack = spec.build_attack()
    for data in (splits.val, splits.test):
        if not len(data.images):
            raise DataError("Got no images to score it on; give more images, or other shares.")
        if not attack.has_state:  # else the trigger is made with the victim, and refused there
            attack.triggered(data)


def _images_of_a_probe(val: ImageData, seed: int) -> Any:
    return probe_images(val, seed=seed).floats()


def _gallery(victim: Any, sets: Any) -> Any:
    from bimask.victims.gallery import gallery  # matplotlib takes half a second

    return gallery(victim, sets)


CLASSIFICATION = Task(
    name="classification",
    metrics={
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
    },
    quality="clean_accuracy",
    price="accuracy",
    recovered="recovery",
    objectives=("clean_accuracy", "attack_success"),
    spec=VictimSpec,
    defences=DEFENCES,
    defence="ims",
    evaluate=evaluate,
    glance=_glance,
    derived=_derived,
    obtain_victim=obtain_victim,
    check_data=_check_images,
    gallery=_gallery,
    probe=Probe(_images_of_a_probe, RiskProbe, RiskProbe.steps),
)

TASKS: Mapping[str, Task] = MappingProxyType({one.name: one for one in (CLASSIFICATION,)})
