"""Choosing without the attack: what probes are made of, and how the blind choice compares.

A probe of a victim is made of clean images of `val`, up to `PER_CLASS` of a class: none that a defence
learns on, which are of the training split, and none of `test`. It sees neither trigger nor target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from scipy.stats import spearmanr

from bimask.data import ImageData
from study.spec.suspect import Subject

PER_CLASS = 16
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
    val = victim.load_data().val
    smallest = int(torch.bincount(val.labels, minlength=val.num_classes).min())
    return val.clean_subset(min(PER_CLASS, max(1, smallest)), seed=seed)


def compare(
    complete: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, int | None],
    measured: Callable[[int], dict[str, Any]],
) -> dict[str, Any]:
    """Blind choice beside the oracle's.

    Args:
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
    result: dict[str, Any] = {"oracle": oracle, "blind": blind, "regret": None}
    result["spearman"] = rank_correlation(complete)
    if oracle is not None and blind is not None:
        result["regret"] = {
            split: blind[split]["attack_success"] - oracle[split]["attack_success"]
            for split in ("val", "test")
        }
    return result


def rank_correlation(trials: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Spearman's rho of risk and attack success; None for fewer than three trials or no variation."""
    both = [trial for trial in trials if {"risk", "attack_success"} <= set(trial)]
    pairs = [(trial["risk"], trial["attack_success"]) for trial in both]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return None
    found = spearmanr(pairs)
    return {"rho": float(found.statistic), "p": float(found.pvalue), "n": len(pairs)}


def blind_metrics(selection: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow's parent run is told of `compare`'s result."""
    metrics = {}
    if selection["spearman"] is not None:
        metrics["blind/spearman"] = selection["spearman"]["rho"]
    for split, value in (selection["regret"] or {}).items():
        metrics[f"blind/regret_{split}"] = value
    return metrics
