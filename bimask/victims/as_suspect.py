"""A victim of ours as its defender would have it."""

from __future__ import annotations

from bimask.data import Splits
from bimask.inspection.suspect import CleanImages, Suspect
from bimask.nets import Normalised
from bimask.victims.files import Victim


def suspect_of(victim: Victim, splits: Splits, clean_images_per_class: int, *, seed: int) -> Suspect:
    """A victim of ours as its defender would have it: clean images of the training split alone."""
    clean = splits.train.clean_subset(clean_images_per_class, seed=seed)
    assert isinstance(victim.model, Normalised)
    return Suspect(
        victim.spec,
        victim.model,
        CleanImages(clean.images, clean.labels),
        victim.classes,
        weights_sha256=None,
        victim=victim.spec.digest,
        wrapped=True,
    )
