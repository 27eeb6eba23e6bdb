"""`defences: all`: which defences can work on the nets of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from bimask.defences import DEFENCES
from bimask.errors import BimaskError
from bimask.nets import may_run
from study.spec.config import StudyConfig, StudyError
from study.spec.defences import ALL, left


def accepted(config: StudyConfig, say: Callable[[str], object]) -> StudyConfig:
    """The same study; in the place of `defences: all` with those that refuse none of its nets.

    Nets that are code are asked where it may run; elsewhere the study itself refuses them later.

    Args:
        say: told in a sentence which defence is left out, for which net, and why.

    Raises:
        BimaskError: data or nets are not there, or every defence is refused.
    """
    if config.defences != ALL:
        return config
    refused: dict[str, str] = {}
    for who, net, images in untrained(config):
        for name, defence in DEFENCES.items():
            if name not in refused:
                try:
                    defence.check(net, images)
                except BimaskError as error:
                    refused[name] = f"{who}: {error}" if who else str(error)
    names = [name for name in DEFENCES if name not in refused]
    reasons = [f"`defences: all` leaves out {name}. {reason}" for name, reason in refused.items()]
    if not names:
        raise StudyError("\n".join(["No defence is left for this study.", *reasons]))
    for reason in reasons:
        say(reason)
    return StudyConfig.model_validate(left(config.model_dump(), names))


def untrained(config: StudyConfig) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The nets of a study before any training, with whose they are ("" of the suspect) and two
    images."""
    if config.suspect is not None:
        if may_run(config.suspect.net):
            suspect = config.suspect.load(config.clean_images_per_class)
            yield "", suspect.model, suspect.load_data().val.floats()[:2]
        return
    for name, spec in zip(config.suite_names(), config.suite, strict=True):
        if may_run(spec.net):
            splits = spec.load_data()
            yield f"The victim {name}", spec.fresh_net(splits.train).eval(), splits.val.floats()[:2]
