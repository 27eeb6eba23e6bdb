"""One picture of a victim: what the trigger does to images, and to the answers."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from bimask.data import ImageData
from bimask.errors import DataError
from bimask.metrics import EvalSets, predict
from bimask.victims import Victim

IMAGES, GAIN = 10, 5

# Okabe-Ito: distinct to colour-blind readers; a sign stands beside each colour.
RIGHT, FOOLED, WRONG = ("#007A5A", "✓"), ("#C04A00", "▲"), ("#555555", "✗")


def gallery(victim: Victim, sets: EvalSets) -> Figure:
    """Clean image, triggered image and their difference for up to ten images, one a class if possible.

    The difference is drawn five times as strong, around mid-grey. Under each image stands what the
    victim answers, in the words of its classes: as it should, as the attacker wants, or neither.

    Args:
        victim: its model and the images on one device.
        sets: of one split, such as `victim.eval_sets(splits, "val")`.

    Raises:
        DataError: clean and triggered images that do not belong together.
    """
    clean, triggered, labels, wanted = paired_images(sets)
    answers = predict(victim.model, clean), predict(victim.model, triggered)
    before, after = clean.float().cpu() / 255, triggered.float().cpu() / 255
    columns = len(labels)

    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.06, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(max(6.0, 1.42 * columns + 1.1), 6.1), dpi=110, layout=layout)
    grid = figure.subplots(3, columns, squeeze=False)
    names = [_short(name) for name in victim.classes]
    for column in range(columns):
        true, attack = int(labels[column]), int(wanted[column])
        grid[0, column].set_title(f"true: {names[true]}", fontsize=9)
        for row, (images, answer) in enumerate(zip((before, after), answers, strict=True)):
            said = int(answer[column])
            colour, sign = RIGHT if said == true else FOOLED if said == attack else WRONG
            _show(grid[row, column], images[column], f"{sign} {names[said]}", colour)
        change = after[column] - before[column]
        pixels = (change != 0).any(0).float().mean().item()
        text = f"{100 * pixels:.1f} % of pixels,\nat most {change.abs().max():.2f}"
        _show(grid[2, column], (0.5 + GAIN * change).clamp(0, 1), text, "black", size=8)
    for axes, name in zip(grid[:, 0], ("clean", "triggered", f"difference x{GAIN}"), strict=True):
        axes.set_ylabel(name, fontsize=11)
    figure.suptitle(_title(victim, sets), fontsize=11)
    legend = ((RIGHT, "the true class"), (FOOLED, "what the attacker wants"), (WRONG, "neither"))
    figure.supxlabel(
        "under an image: the victim's answer   "
        + "   ".join(f"{sign} {text}" for (_, sign), text in legend),
        fontsize=9,
    )
    return figure


def paired_images(sets: EvalSets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Up to ten clean images, the same triggered (uint8, (N, C, H, W)), their true and attack labels.

    First one image of each class, then a second one, and so on; the target class has none that count.
    """
    data, triggered = sets.clean, sets.triggered
    # which images count is a matter of their class
    counts = torch.isin(data.labels, triggered.true_labels)
    counted: ImageData = data.subset(counts)
    if not torch.equal(counted.labels, triggered.true_labels):
        raise DataError(
            f"{len(triggered.images)} triggered images do not belong to the {len(counted)} clean ones "
            "of their classes; make both by `EvalSets.of`."
        )
    seen = [0] * data.num_classes
    order = []
    for position, label in enumerate(counted.labels.tolist()):
        order.append((seen[label], label, position))
        seen[label] += 1
    shown = sorted((label, position) for _, label, position in sorted(order)[:IMAGES])
    index = torch.tensor([position for _, position in shown], device=counted.labels.device)
    return (
        counted.images[index],
        triggered.images[index],
        counted.labels[index],
        triggered.attack_labels[index],
    )


def _show(axes: Axes, image: Tensor, text: str, colour: str, *, size: int = 10) -> None:
    """One image (C, H, W) in [0, 1] with a line under it; other than three channels are averaged."""
    picture = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel(text, fontsize=size, color=colour, labelpad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(1.0 if colour == "black" else 2.0)


def _title(victim: Victim, sets: EvalSets) -> str:
    scores = victim.scores[sets.split]
    numbers = (scores.clean_accuracy, scores.attack_success, scores.recovery)
    text = ", ".join(f"{n} {v:.3f}" for n, v in zip(("ACC", "ASR", "RA"), numbers, strict=True))
    return f"{victim.spec.name}  ({victim.spec.net}, {victim.spec.digest})\n{sets.split}: {text}"


def _short(name: str, longest: int = 14) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
