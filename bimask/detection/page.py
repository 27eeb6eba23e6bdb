"""report.html of a cleaned detector: one file, pictures inside, nothing fetched and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from markupsafe import Markup
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import StepLog
from bimask.detection.drawn import SIDE, draw_objects, side_by_side
from bimask.detection.metrics.scores import SCORE
from bimask.detection.objects import DetectionData, Found, Target
from bimask.files.pages import render_page

MOST = 6  # pictures of a kind
POINTS = 120  # of the curve of losses
TRIGGERED = ("map50", "map", "attack_success", "true_detection", "disappeared", "misclassified")


@dataclass(frozen=True)
class Seen:
    """A picture with what is in it, and what suspect and repaired detector find there.

    Attributes:
        image: (3, H, W) float in [0, 1].
    """

    image: Tensor
    target: Target
    before: Found
    after: Found


@dataclass(frozen=True)
class Shown:
    """Pictures for the page.

    Attributes:
        classes: names.
        clean: pictures as they are.
        perturbed: by branch, the same pictures perturbed against the suspect.
    """

    classes: tuple[str, ...]
    clean: Sequence[Seen]
    perturbed: Mapping[str, Sequence[Seen]]


def shown_of(
    before: nn.Module,
    after: nn.Module,
    data: DetectionData,
    perturbed: Mapping[str, Sequence[Tensor]],
) -> Shown:
    """What both find in some pictures, those with the most objects first.

    Args:
        before, after: suspect and repaired detector, on the device of the pictures.
        perturbed: by branch, the pictures perturbed against the suspect, in their order.
    """
    order = sorted(range(len(data)), key=lambda row: -len(data.targets[row]["labels"]))[:MOST]
    images, targets = data.floats(), [data.targets[row] for row in order]

    @torch.no_grad()
    def seen(moved: Sequence[Tensor]) -> list[Seen]:
        asked = [moved[row] for row in order]
        return [Seen(*one) for one in zip(asked, targets, before(asked), after(asked), strict=True)]

    return Shown(
        data.classes, seen(images), {branch: seen(moved) for branch, moved in perturbed.items()}
    )


def render(manifest: Mapping[str, Any], shown: Shown, history: Sequence[StepLog]) -> str:
    """The page as HTML; `manifest` is what is written beside it."""
    purify = {f"purify.{name}": value for name, value in manifest["purify"].items()}
    looks = manifest["on_clean_pictures"]
    suspect = manifest["suspect"]
    return render_page(
        "bimask.detection",
        "page.html",
        title=manifest["net"]["net"],
        manifest=manifest,
        rows=[
            (f"{part.replace('_', ' ')}, {name}", looked, looked[name])
            for part, looked in looks.items()
            for name in ("before", "after")
        ],
        classes=[
            (
                name,
                [one[when]["ap50"].get(name) for when in ("before", "after") for one in looks.values()],
            )
            for name in manifest["classes"]
        ],
        scores=[
            (name, [manifest[name][score] for score in TRIGGERED])
            for name in ("before", "after")
            if name in manifest
        ],
        clean=[_drawn(one, shown.classes) for one in shown.clean],
        perturbed={
            branch: [_drawn(one, shown.classes) for one in pictures]
            for branch, pictures in shown.perturbed.items()
        },
        curve=_curve([step.loss for step in history]),
        score=SCORE,
        facts=[
            ("suspect", suspect["victim"] or suspect["weights_sha256"]),
            ("clean pictures", manifest["clean_pictures"]["digest"]),
            *manifest["versions"].items(),
            *purify.items(),
        ],
    )


def _drawn(one: Seen, classes: tuple[str, ...]) -> dict[str, Any]:
    """What is there, before and after, side by side: a PNG inside the page, and words."""
    sides = (one.target, one.before, one.after)
    pictures = [draw_objects(*_shrunk(one.image, side), classes) for side in sides]
    buffer = io.BytesIO()
    side_by_side(pictures).save(buffer, "PNG")
    source = Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    words = [_words(side, classes) for side in sides]
    return {"source": source, "words": dict(zip(("there", "before", "after"), words, strict=True))}


def _shrunk(image: Tensor, objects: Target) -> tuple[Tensor, Target]:
    """A picture as bytes, of `SIDE` pixels at most, and its objects there."""
    image, objects = image.detach().cpu(), objects.copy()
    scale = SIDE / max(image.shape[-2:])
    if scale < 1:
        image = F.interpolate(image[None], scale_factor=scale, mode="area")[0]
        objects["boxes"] = objects["boxes"] * scale
    return (image.clamp(0, 1) * 255).round().byte(), objects


def _words(objects: Target | Found, classes: tuple[str, ...]) -> str:
    """Names of the objects that count as found, or nothing."""
    labels = objects["labels"]
    if "scores" in objects:
        labels = labels[cast(Found, objects)["scores"] >= SCORE]
    return ", ".join(classes[label] for label in labels.tolist()) or "nothing"


def _curve(losses: Sequence[float]) -> str:
    """Points of a line in a box of 100 x 30, means of neighbouring steps; empty for fewer than two."""
    size = -(-len(losses) // POINTS) or 1
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    means = [sum(part) / len(part) for part in parts]
    if len(means) < 2:
        return ""
    low, top = min(0.0, *means), max(0.0, *means)
    places = [30 - 29 * (mean - low) / ((top - low) or 1) for mean in means]
    return " ".join(f"{100 * i / (len(means) - 1):.1f},{y:.1f}" for i, y in enumerate(places))
