"""Pictures with boxes, labels and scores, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bimask.detection.metrics.scores import SCORE
from bimask.detection.objects import Found, Target
from bimask.errors import printable

SIDE = 288  # pixels that the longer side of a small picture has at least when it is drawn
MOST = 24  # characters of a class's name
GAP = 6  # pixels between pictures
# of Paul Tol's bright and vibrant schemes, which most eyes tell apart
COLOURS = (
    *("#ee7733", "#33bbee", "#ee3377", "#ccbb44", "#228833"),
    *("#aa3377", "#66ccee", "#cc3311", "#bbbbbb", "#009988"),
)


def draw_objects(
    image: Tensor, objects: Target, classes: Sequence[str], *, least: float = SCORE
) -> Image.Image:
    """A picture in which each object has a box in its class's colour, with its name above.

    Small pictures are enlarged by whole steps, so that their pixels stay squares.

    Args:
        image: (3, H, W) uint8.
        objects: what is there, or what was found; found ones are named with their scores.
        classes: names, which may be a stranger's.
        least: found objects of smaller scores are left out.
    """
    height, width = image.shape[-2:]
    step = max(1, -(-SIDE // max(height, width)))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    picture = picture.resize((width * step, height * step), Image.Resampling.NEAREST)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default()
    scores = cast(Found, objects)["scores"] if "scores" in objects else None
    for row in reversed(range(len(objects["labels"]))):  # the surest last, so on top
        score = None if scores is None else float(scores[row])
        if score is not None and not score >= least:
            continue
        label = int(objects["labels"][row])
        colour = COLOURS[label % len(COLOURS)]
        left, top, right, bottom = (round(step * edge) for edge in objects["boxes"][row].tolist())
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        said = printable(str(classes[label]), MOST) + ("" if score is None else f" {score:.2f}")
        _name(pen, font, said, left, top, colour, picture.size)
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, such as one before and after a repair, with a white gap between them."""
    width = sum(one.width for one in pictures) + GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(one.height for one in pictures)), "white")
    left = 0
    for one in pictures:
        row.paste(one, (left, 0))
        left += one.width + GAP
    return row


def _name(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    said: str,
    left: int,
    top: int,
    colour: str,
    size: tuple[int, int],
) -> None:
    """A name on a plate above its box, or inside where there is no room above."""
    x0, y0, x1, y1 = pen.textbbox((0, 0), said, font=font)
    wide, high = round(x1 - x0) + 4, round(y1 - y0) + 4
    x = max(0, min(left, size[0] - wide))
    y = top - high if top >= high else top
    pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
    pen.text((x + 2 - x0, y + 2 - y0), said, fill="black", font=font)
