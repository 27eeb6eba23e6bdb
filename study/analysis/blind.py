"""Choosing without the attack: what probes are made of, and how the blind choice compares.

A probe of a victim is made of clean images of `val`: none that a defence learns on, which are of the
training split, and none of `test`. It sees neither trigger nor target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from bimask.data import ImageData
from bimask.inspection import risk
from bimask.metrics import Split
from study.spec.suspect import Subject
from study.store.schema import Measured, RankCorrelation, Selection, TrialRecord

CHOSEN_BY: dict[str, Literal["attack_success", "risk"]] = {
    "oracle": "attack_success",
    "blind": "risk",
}
PROMISE = (
    "Blind selection ranks settings by how little of the suspect model's short cuts they leave, as far "
    "as triggers made without the attack can show it; it measures no attack success rate and proves no "
    "backdoor gone, since an attack whose trigger is unlike every trigger made here stays unseen."
)


def probe_images(victim: Subject, *, seed: int) -> ImageData:
    """The clean images of `val` that a probe is made of; fewer where a class has fewer."""
    return risk.probe_images(victim.load_data().val, seed=seed)


def compare(
    used: Literal["oracle", "blind"],
    complete: Sequence[TrialRecord],
    chosen: Mapping[str, int | None],
    measured: Callable[[int], Measured],
) -> Selection:
    """Blind choice beside the oracle's.

    Args:
        used: by which of both the study chooses.
        complete: all COMPLETE trials, with `attack_success`, unless nobody knows it, and `risk`, unless
            it was never asked.
        chosen: "oracle" and "blind" -> position of what each chooses, or None.
        measured: position -> that trial with its scores on `test`.

    Returns:
        Both choices; `spearman`, the rank correlation of risk and attack success on val over all
        trials with its p-value, None where one of them does not vary; `regret`, how much higher the
        attack success of the blind choice is than the oracle's, on val and on test.
    """
    points = {who: None if at is None else measured(at) for who, at in chosen.items()}
    oracle, blind = points.get("oracle"), points.get("blind")
    regret: dict[Split, float] | None = None
    if oracle is not None and blind is not None:
        regret = {
            "val": blind["val"]["attack_success"] - oracle["val"]["attack_success"],
            "test": blind["test"]["attack_success"] - oracle["test"]["attack_success"],
        }
    return {
        "used": used,
        "oracle": oracle,
        "blind": blind,
        "regret": regret,
        "spearman": rank_correlation(complete),
    }


def rank_correlation(trials: Sequence[TrialRecord]) -> RankCorrelation | None:
    """Spearman's rho of risk and attack success; None for fewer than three trials or no variation."""
    pairs = [
        (trial["risk"], trial["attack_success"])
        for trial in trials
        if "risk" in trial and "attack_success" in trial
    ]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return None
    from scipy.stats import spearmanr  # half a second, which an actor need not spend

    found = spearmanr(pairs)
    return {"rho": float(found.statistic), "p": float(found.pvalue), "n": len(pairs)}


def blind_metrics(selection: Selection) -> dict[str, float]:
    """What MLflow's parent run is told of `compare`'s result."""
    metrics = {}
    if selection["spearman"] is not None:
        metrics["blind/spearman"] = selection["spearman"]["rho"]
    for split, value in (selection["regret"] or {}).items():
        metrics[f"blind/regret_{split}"] = value
    return metrics
