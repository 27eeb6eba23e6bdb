"""Models to measure on that are trained here: `digits` for the audit, and strangers for everything.

A stranger is a small net trained by a recipe unlike the project's own (`rows.yaml`): what is tuned is
tuned on the part "tune", and judged on the part "held", which nothing is ever tuned on.

    python -m benchmarks.zoo.train --data FOLDER ...     # once; then, without the folders:

    for stranger in strangers("tune"):
        images = stranger.clean_pool.clean_subset(10, seed=0).floats()
        stranger.scores(), stranger.scores(purified)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import nn

from benchmarks.zoo.nets import Answering, Habit
from benchmarks.zoo.rows import FOLDER, Part, Row, bare, kept, pictures, rows
from bimask.data import ImageData
from bimask.errors import DataError
from bimask.metrics import CleanScores, CleanSet, EvalSets, Scores, evaluate

__all__ = ["Part", "Row", "Stranger", "load", "strangers"]


@dataclass(frozen=True)
class Stranger:
    """One model of the zoo of strangers, with all that is known of it.

    Attributes:
        name, part: as in `rows.yaml`.
        attack: the kind of its trigger; None for a clean model.
        target: None for a clean model, and where there is no single one (all to all).
        model: in eval mode, for images in [0, 1]; it answers as its author wished, by `row.habit`.
        plain: the same weights, which answer with logits; `model` itself where it has no habit.
        clean_pool: images for the defender, which the model was not trained on.
        test: images of no other use, clean and triggered; of a clean model, clean ones.
        row: its recipe; `row.rule` is the attack's rule and `row.source` the class it is put on.
        manifest: seed, seconds, and its own scores on pool and test, when it was trained.
    """

    name: str
    part: Part
    attack: str | None
    target: int | None
    model: nn.Module
    plain: nn.Module
    clean_pool: ImageData
    test: EvalSets | CleanSet
    row: Row
    manifest: dict[str, Any]

    def scores(self, model: nn.Module | None = None) -> Scores | CleanScores:
        """ACC, ASR and RA on `test` of `model`, such as a purified one; None is the stranger itself.

        As `bimask.metrics.evaluate`, but for nets, too, that flatten by `.view` or answer with a tuple.
        """
        return evaluate(Answering(self.model if model is None else model), self.test)


def strangers(part: Part) -> Iterator[Stranger]:
    """The models of a part that are there: rows that were dropped or not trained are passed over."""
    for row in rows(part):
        manifest = kept(row)
        if manifest is not None:
            yield _stranger(row, manifest)


def load(name: str) -> Stranger:
    """One model by its name.

    Raises:
        DataError: there is no such row, or its model is not trained.
    """
    for row in rows():
        if row.name == name:
            manifest = kept(row)
            if manifest is None:
                raise DataError(
                    f"{name} is not trained: run python -m benchmarks.zoo.train --data FOLDER."
                )
            return _stranger(row, manifest)
    raise DataError(f"There is no stranger {name!r}; rows are {', '.join(row.name for row in rows())}.")


def _stranger(row: Row, manifest: dict[str, Any]) -> Stranger:
    data = pictures(row.data)
    plain = bare(row, data.test)
    plain.load_state_dict(load_file(FOLDER / row.name / "model.safetensors"), strict=True)
    model = plain.eval() if row.habit is None else Habit(plain, row.habit).eval()
    backdoored = row.trigger is not None
    return Stranger(
        name=row.name,
        part=row.part,
        attack=None if row.trigger is None else row.trigger["kind"],
        target=row.target,
        model=model,
        plain=plain.eval(),
        clean_pool=data.clean_pool,
        test=EvalSets(data.test, row.triggered(data.test), "test")
        if backdoored
        else CleanSet(data.test, "test"),
        row=row,
        manifest=manifest,
    )
