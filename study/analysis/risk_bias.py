"""Whether `risk` flatters a defence: the attack success that is left where the risk says little is.

`risk` asks a defended model how far it still follows short cuts that were found on the suspect. A
defence that learned on short cuts of the same kinds may resist these and not the attacker's. So over
the trials of many defences on the same victims: what attack success does a risk lead one to expect,
whichever defence it is of, and how far above that is each defence?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from typing_extensions import TypedDict

from study.store.schema import TrialRecord

FEWEST = 3  # trials of a defence that say anything


class RiskBias(TypedDict):
    """Of one defence.

    Attributes:
        n: complete trials with a risk.
        spearman: of risk and attack success over them; null where one does not vary.
        bias: mean attack success above what the same risk comes with over all defences alike; in
            [-1, 1], above 0 where risk flatters.
        mean_risk, mean_success: over the trials.
    """

    n: int
    spearman: float | None
    bias: float
    mean_risk: float
    mean_success: float


def risk_bias(trials: Mapping[str, Sequence[TrialRecord]]) -> dict[str, RiskBias]:
    """The bias of every defence with enough trials, by its name.

    What is expected is a rising function of the risk, fitted by isotonic regression over the trials of
    all defences, in which each defence weighs the same.
    """
    pairs = {
        name: np.array([(t["risk"], t["attack_success"]) for t in mine if _known(t)], dtype=float)
        for name, mine in trials.items()
    }
    pairs = {name: found for name, found in pairs.items() if len(found) >= FEWEST}
    if len(pairs) < 2:
        return {}
    together = np.concatenate(list(pairs.values()))
    weights = np.concatenate([np.full(len(found), 1 / len(found)) for found in pairs.values()])
    expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    expected.fit(together[:, 0], together[:, 1], sample_weight=weights)
    return {
        name: {
            "n": len(found),
            "spearman": _spearman(found),
            "bias": float((found[:, 1] - expected.predict(found[:, 0])).mean()),
            "mean_risk": float(found[:, 0].mean()),
            "mean_success": float(found[:, 1].mean()),
        }
        for name, found in pairs.items()
    }


def _known(trial: TrialRecord) -> bool:
    return trial["status"] == "COMPLETE" and trial.get("risk") is not None


def _spearman(found: np.ndarray) -> float | None:
    if len(np.unique(found[:, 0])) < 2 or len(np.unique(found[:, 1])) < 2:
        return None
    return float(spearmanr(found[:, 0], found[:, 1]).statistic)
