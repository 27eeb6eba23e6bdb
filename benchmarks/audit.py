"""How well `bimask audit` tells backdoored digits models from clean ones, and by how much to trust it.

    python -m benchmarks.audit prices [PART]   # of every model of the zoo: 10 s each on one thread
    python -m benchmarks.audit fit             # on "calibration": bimask/audit_calibration.json
    python -m benchmarks.audit measure         # on "measurement": results/audit/measurement.json

What is measured is decided before: the kinds of evidence are chosen on the part "calibration" by
leaving out one model at a time, and the part "measurement" is looked at once. Clean images: 30 of
`val`, which no model was trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from benchmarks.report import RESULTS
from benchmarks.zoo import FOLDER, Member, Part, members
from bimask.audit import CALIBRATION, FLAGGED, Floats, advantage, prices_of
from bimask.data import load_data
from study.provenance import commit, versions

KEPT = RESULTS / "audit" / "measurement.json"
IMAGES_PER_CLASS = 3
KINDS = ("patch", "pattern", "warp", "tone", "latent")  # by leave-one-out on "calibration"
APART = "sig"  # reported beside the five others: see benchmarks/README.md
REGULARISATION = 1.0  # C of both regressions
FOLDS = 5


@dataclass(frozen=True)
class Priced:
    """One model with what its classes cost."""

    name: str
    attack: str | None
    target: int | None
    prices: dict[str, Floats]

    @property
    def backdoored(self) -> bool:
        return self.target is not None

    def rows(self, kinds: tuple[str, ...] = KINDS) -> Floats:
        """(K, kinds): the evidence of every class."""
        return np.stack([advantage(self.prices[kind]) for kind in kinds], 1)

    def is_target(self) -> Floats:
        """(K,) of 0 and 1."""
        classes = np.arange(len(next(iter(self.prices.values()))))
        return (classes == (-1 if self.target is None else self.target)).astype(float)


@dataclass(frozen=True)
class Fitted:
    """Both regressions: of a class being the target, and of a model being backdoored."""

    coefficients: Floats
    intercept: float
    slope: float
    offset: float

    def scores(self, model: Priced, kinds: tuple[str, ...] = KINDS) -> Floats:
        return model.rows(kinds) @ self.coefficients + self.intercept

    def probability(self, model: Priced, kinds: tuple[str, ...] = KINDS) -> float:
        score = self.scores(model, kinds).max()
        return float(1 / (1 + np.exp(-(self.slope * score + self.offset))))


def fit_classes(models: list[Priced], kinds: tuple[str, ...]) -> tuple[Floats, float]:
    """The regression of a class being the target."""
    rows = np.concatenate([model.rows(kinds) for model in models])
    wanted = np.concatenate([model.is_target() for model in models])
    regression = LogisticRegression(C=REGULARISATION, max_iter=1000).fit(rows, wanted)
    return regression.coef_[0], float(regression.intercept_[0])


def fit(models: list[Priced], kinds: tuple[str, ...] = KINDS) -> Fitted:
    """The sigmoid is fitted on scores of models that the class regression did not see (Platt 1999)."""
    held_out, truth = [], []
    for fold in range(FOLDS):
        weights, intercept = fit_classes([m for i, m in enumerate(models) if i % FOLDS != fold], kinds)
        for model in models[fold::FOLDS]:
            held_out.append((model.rows(kinds) @ weights + intercept).max())
            truth.append(model.backdoored)
    sigmoid = LogisticRegression(C=REGULARISATION).fit(np.array(held_out)[:, None], truth)
    weights, intercept = fit_classes(models, kinds)
    return Fitted(weights, intercept, float(sigmoid.coef_[0, 0]), float(sigmoid.intercept_[0]))


def left_out(models: list[Priced], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Figures where each model is judged by a fit on all others."""
    fits = [fit(models[:i] + models[i + 1 :], kinds) for i in range(len(models))]
    return figures(models, fits, kinds)


def figures(models: list[Priced], fits: list[Fitted], kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """ROC-AUC, targets among the flagged, error rates, Brier score and reliability."""
    probabilities = np.array([f.probability(m, kinds) for f, m in zip(fits, models, strict=True)])
    guesses = [int(f.scores(m, kinds).argmax()) for f, m in zip(fits, models, strict=True)]
    truth = np.array([model.backdoored for model in models])
    flagged = probabilities >= FLAGGED
    right = [g == m.target for g, m in zip(guesses, models, strict=True)]
    caught = flagged & truth
    return {
        "n": {"clean": int((~truth).sum()), "backdoored": int(truth.sum())},
        "roc_auc": float(roc_auc_score(truth, probabilities)),
        "flagged": {"clean": int((flagged & ~truth).sum()), "backdoored": int(caught.sum())},
        "right_target_of_flagged": int(np.sum(np.array(right) & caught)),
        "right_target_of_backdoored": int(np.sum(np.array(right) & truth)),
        "brier": float(np.mean((probabilities - truth) ** 2)),
        "reliability": reliability(probabilities, truth),
        "models": [
            {"name": m.name, "target": m.target, "suspected": g, "probability": round(float(p), 4)}
            for m, g, p in zip(models, guesses, probabilities, strict=True)
        ],
    }


def reliability(probabilities: Floats, truth: Floats, bins: int = 5) -> list[dict[str, float]]:
    """Mean probability and share of backdoored models, by equal bins of the probability."""
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        {
            "predicted": float(probabilities[places == place].mean()),
            "observed": float(truth[places == place].mean()),
            "n": int((places == place).sum()),
        }
        for place in range(bins)
        if (places == place).any()
    ]


def price(part: Part) -> None:
    """Price every model of a part that is not priced yet."""
    images = load_data("digits").val.clean_subset(IMAGES_PER_CLASS, seed=0).floats()
    for member in members(part):
        kept = _kept(member)
        if kept.is_file():
            continue
        begun = time.process_time()
        prices, _ = prices_of(member.model, images)
        numbers = {kind: values.tolist() for kind, values in prices.items()}
        row = {"name": member.name, "attack": member.attack, "target": member.target, "prices": numbers}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(row) + "\n")
        print(part, member.name, f"{time.process_time() - begun:.1f} s", flush=True)


def priced(part: Part) -> list[Priced]:
    """What `price` kept."""
    found = []
    for path in sorted((FOLDER / "prices" / part).glob("*.json")):
        row = json.loads(path.read_text())
        prices = {kind: np.array(values) for kind, values in row["prices"].items()}
        found.append(Priced(row["name"], row["attack"], row["target"], prices))
    return found


def _kept(member: Member) -> Path:
    return FOLDER / "prices" / member.part / f"{member.name}.json"


def of_five(models: list[Priced]) -> list[Priced]:
    return [model for model in models if model.attack != APART]


def write_calibration() -> None:
    """Coefficients with their provenance, beside the code that reads them."""
    models = of_five(priced("calibration"))
    fitted = fit(models)
    attacks = sorted({m.attack for m in models if m.attack is not None})
    content = {
        "coefficients": dict(zip(KINDS, fitted.coefficients.tolist(), strict=True)),
        "intercept": fitted.intercept,
        "platt": {"slope": fitted.slope, "offset": fitted.offset},
        "fitted_on": {
            "models": f"{len(models)} small_resnet of width 8 to 16 on digits (16x16, 10 classes)",
            "clean": sum(not m.backdoored for m in models),
            "backdoored": sum(m.backdoored for m in models),
            "attacks": attacks,
            "clean_images": 10 * IMAGES_PER_CLASS,
            "by": "scikit-learn LogisticRegression, Platt's sigmoid on scores of models left out",
            "script": "benchmarks/audit.py",
        },
        "left_out": {k: v for k, v in left_out(models, KINDS).items() if k != "models"},
    }
    path = Path("bimask") / CALIBRATION
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(path.read_text())


def measure() -> None:
    """The measurement, on models of no other use."""
    from bimask.audit import calibration

    shipped = calibration()
    fitted = Fitted(
        np.array([shipped["coefficients"][kind] for kind in KINDS]),
        shipped["intercept"],
        shipped["platt"]["slope"],
        shipped["platt"]["offset"],
    )
    everything = priced("measurement")
    content: dict[str, Any] = {"commit": commit(), "versions": versions()}
    for name, models in (("five attacks", of_five(everything)), ("with sig", everything)):
        content[name] = figures(models, [fitted] * len(models))
        by_attack = {}
        for attack in sorted({m.attack for m in models if m.attack is not None}):
            mine = [m for m in models if m.attack in (None, attack)]
            numbers = figures(mine, [fitted] * len(mine))
            by_attack[attack] = {k: v for k, v in numbers.items() if k not in ("models", "reliability")}
        content[name]["by attack"] = by_attack
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps({k: v for k, v in content["five attacks"].items() if k != "models"}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["prices", "fit", "measure"])
    parser.add_argument("part", nargs="?", choices=["calibration", "measurement"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "prices":
        parts: list[Part] = [arguments.part] if arguments.part else ["calibration", "measurement"]
        for part in parts:
            price(part)
    elif arguments.what == "fit":
        write_calibration()
    else:
        measure()


if __name__ == "__main__":
    main()
