"""report.html of a cleaned model: one file, pictures inside, nothing fetched and no script."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor, nn

from bimask.cleaned.before_after import Answers, BeforeAfter
from bimask.files.pages import render_page
from bimask.inspection.suspect import Suspect
from bimask.masking.coverage import Coverage
from bimask.masking.masks import MaskSet
from bimask.nets.answers import logits_of

SHOWN = 12


def render(
    suspect: Suspect,
    purified: nn.Module,
    masks: MaskSet | None,
    looked: BeforeAfter,
    manifest: dict[str, Any],
) -> str:
    """The page as HTML; `manifest` is what is written beside it."""
    reached = None if manifest["coverage"] is None else Coverage(**manifest["coverage"])
    images, perturbed = suspect.clean.floats(), looked.perturbed.cpu()
    shown = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()
    said = zip(
        logits_of(suspect.model, perturbed[shown]).argmax(1).tolist(),
        logits_of(purified, perturbed[shown]).argmax(1).tolist(),
        strict=True,
    )
    delta = looked.perturbation.cpu()
    purify = {f"purify.{name}": value for name, value in manifest["purify"].items()}
    return render_page(
        "bimask.cleaned",
        "report.html",
        title=suspect.spec.net,
        images=len(images),
        manifest=manifest,
        rows=[
            ("suspect", _row(looked.before, suspect.classes)),
            ("purified", _row(looked.after, suspect.classes)),
            *([("inverse twin", _row(looked.twin, suspect.classes))] if looked.twin else []),
        ],
        scores=[
            (name, [_percent(manifest[name][score]) for score in _SCORES])
            for name in ("before", "after")
            if name in manifest
        ],
        budget=looked.budget,
        norm=looked.norm,
        clean=[_picture(image) for image in images[shown]],
        perturbed=[_picture(image) for image in perturbed[shown]],
        answers=[f"{suspect.classes[a]} / {suspect.classes[b]}" for a, b in said],
        perturbation=_picture(delta / (2 * delta.abs().max().clamp_min(1e-12)) + 0.5),
        sites=[
            {
                "name": name,
                "channels": len(keep),
                "low": int((keep < 0.5).sum()),
                "picture": _picture(keep.detach().view(1, 1, -1)),
            }
            for name, keep in (masks.keeps() if masks is not None else {}).items()
        ],
        coverage=reached and str(reached),
        uncovered=reached and reached.warning,
        unmasked=", ".join(reached.unmasked) if reached else "",
        held_back=manifest.get("held_back"),
        facts=[
            ("suspect", suspect.origin),
            *manifest["versions"].items(),
            *purify.items(),
        ],
    )


_SCORES = ("clean_accuracy", "attack_success", "recovery")


def _row(answers: Answers, classes: tuple[str, ...]) -> dict[str, str]:
    return {
        "accuracy": "no labels" if answers.accuracy is None else _percent(answers.accuracy),
        "agreement": _percent(answers.agreement),
        "confidence": _percent(answers.confidence),
        "changed": _percent(answers.changed),
        "favourite": f"{classes[answers.favourite]} ({_percent(answers.favourite_share)})",
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _picture(image: Tensor) -> Markup:
    """(C, H, W) in [0, 1] as the address of a PNG inside the page."""
    pixels: Any = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    pixels = np.repeat(pixels[..., :1], 3, axis=2) if pixels.shape[2] not in (1, 3) else pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
