"""`python -m study.score models:/NAME@champion FOLDER --out FILE.csv`: a folder, classified."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from bimask.cleaned.classifier import Classifier
from bimask.commands import TrustCode, refusals
from bimask.errors import DataError
from bimask.files.atomic import atomic_write
from bimask.inspection.suspect import PICTURES, read_picture
from bimask.progress import Console, ToldProgress
from study.promotion.registry import load_classifier
from study.tracking.mlflow_runs import tracking_uri

BATCH = 256  # pictures at once


def score_folder(
    model: Classifier, folder: Path, console: Console, *, resize: bool = False
) -> pd.DataFrame:
    """Every picture below `folder`: file, class, probability, and for one without an answer, why.

    Args:
        model: of `study.promotion.registry.load_classifier`.
        resize: bring pictures to the model's size instead of refusing other sizes.

    Raises:
        DataError: no picture.
    """
    channels, height, width = model.shape
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not files:
        raise DataError(f"There are no pictures ({', '.join(PICTURES)}) below {folder}.")
    rows: list[dict[str, object]] = []
    with ToldProgress(console) as progress:
        task = progress.add_task("pictures", total=len(files))
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            rows += _answers(model, part, channels, (height, width), resize)
            progress.update(task, advance=len(part))
    frame = pd.DataFrame(rows, columns=["file", "class", "probability", "error"])
    frame["file"] = [str(Path(name).relative_to(folder)) for name in frame["file"]]
    return frame


def _answers(
    model: Classifier, files: list[Path], channels: int, size: tuple[int, int], resize: bool
) -> list[dict[str, object]]:
    rows: dict[Path, dict[str, object]] = {}
    images = {}
    for path in files:
        try:
            image = read_picture(path, channels, size if resize else None)
            if image.shape[1:] != size:
                height, width = image.shape[1:]
                takes = f"{size[1]}x{size[0]}"
                raise DataError(f"{width}x{height} pixels, the model takes {takes}; --resize")
            images[path] = image.permute(1, 2, 0).numpy()
        except DataError as error:
            rows[path] = {"file": str(path), "error": str(error)}
    answers = model(list(images.values())) if images else []
    for path, answer in zip(images, answers, strict=True):
        named = answer["class"]
        rows[path] = {"file": str(path), "class": named, "probability": answer["probabilities"][named]}
    return [rows[path] for path in files]


def main(
    model: Annotated[str, typer.Argument(help="models:/NAME@champion or models:/NAME/VERSION")],
    folder: Annotated[Path, typer.Argument(help="Pictures, at any depth.")],
    out: Annotated[Path, typer.Option(help="CSV: file, class, probability, error.")],
    resize: Annotated[bool, typer.Option("--resize", help="Bring pictures to size.")] = False,
    outputs: Annotated[Path, typer.Option(help="Where MLflow's SQLite file is.")] = Path("outputs"),
    trust_code: TrustCode = False,
) -> None:
    """Classify every picture of a folder with a registered model."""
    with refusals():
        if out.exists():
            raise DataError(f"{out} exists; give a new file with --out.")
        loaded = load_classifier(model, tracking_uri(outputs), own_code=trust_code)
        frame = score_folder(loaded, folder, Console(), resize=resize)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as part:
            frame.to_csv(part, index=False)
    failed = int(frame["error"].notna().sum())
    Console().tell(f"{len(frame) - failed} pictures answered, {failed} not: {out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
