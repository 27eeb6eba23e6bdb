"""`defences: all`: which defences can work on the nets of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bimask.errors import BimaskError
from study.pipeline.prepare import untrained
from study.spec.config import StudyConfig, StudyError
from study.spec.defences import ALL, left
from study.spec.suspect import NAME


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
    known = config.task.defences
    refused = refused_by(config, known)
    names = [name for name in known if name not in refused]
    reasons = [f"`defences: all` leaves out {name}. {reason}" for name, reason in refused.items()]
    if not names:
        raise StudyError("\n".join(["No defence is left for this study.", *reasons]))
    for reason in reasons:
        say(reason)
    return type(config).model_validate(left(config.model_dump(), names))


def refused_by(config: StudyConfig, names: Iterable[str]) -> dict[str, str]:
    """Defence -> for which net of a study it can do nothing, and why; none that refuses no net."""
    refused: dict[str, str] = {}
    names = list(names)
    for who, net, images in untrained(config):
        for name in names:
            if name not in refused:
                try:
                    config.task.defences[name].check(net, images)
                except BimaskError as error:
                    refused[name] = str(error) if who == NAME else f"The victim {who}: {error}"
    return refused
