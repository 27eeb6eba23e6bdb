"""A victim of ours as its defender would have it."""

from __future__ import annotations

from bimask.detection.nets.spec import DetectorNetSpec
from bimask.detection.objects import DetectionData, DetectionSplits
from bimask.detection.suspects import Suspect
from bimask.detection.victims.files import DetectionVictim

HELD_BACK = 40  # pictures of `val`


def suspect_of(
    victim: DetectionVictim, splits: DetectionSplits, clean_images_per_class: int, *, seed: int
) -> Suspect:
    """A victim of ours as its defender would have it: clean pictures of the training split alone."""
    clean = splits.train.clean_subset(clean_images_per_class, seed=seed)
    keys = {"net", "width", "image_size", "outputs", "net_sha256"}
    spec = DetectorNetSpec(**victim.spec.model_dump(include=keys), label_ids=victim.model.label_ids)
    return Suspect(spec, victim.model, clean, None, victim=victim.spec.digest)


def held_back_of(splits: DetectionSplits) -> DetectionData:
    """The pictures with objects of `val` that a repair is looked at with; perhaps none."""
    filled = [row for row, target in enumerate(splits.val.targets) if len(target["labels"])]
    return splits.val.subset(filled[:HELD_BACK])
