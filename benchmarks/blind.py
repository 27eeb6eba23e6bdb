"""How far blind selection agrees with the truth: trials of `benchmarks.blind_runs`, asked and ranked.

    python -m benchmarks.blind [ATTACK ...]   # 5 s a victim and a fraction of a second a trial

The formula of `bimask.inspection.risk.risk` was made on the two studies of seed 0 (BadNets, Blended;
settings by TPE). Everything here is of other victims, other targets and random settings; WaNet and
the low-frequency attack were never looked at. Probes are of `val`; the truth is of `test`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks import report
from benchmarks.blind_runs import SEED, TARGETS, judged, victim_of
from benchmarks.pages.blind import KEPT
from bimask.inspection.risk import RiskProbe
from study.analysis.blind import probe_images
from study.analysis.pareto import choose
from study.store.provenance import commit, versions

MAX_DROP = 0.02
SIGNALS = ("risk", "same_answer", "carried_over", "agreement", "inverse_agreement")


def asked(attack: str) -> dict[str, Any]:
    """Every kept trial of a victim with what the probe says of it."""
    victim, _ = victim_of(attack)
    begun = time.process_time()
    probe = RiskProbe(victim.model, probe_images(victim, seed=SEED).floats())
    seconds = {"probe": time.process_time() - begun}
    rows = []
    begun = time.process_time()
    for trial in judged(attack):
        numbers = probe(trial.model(victim), trial.model(victim, inverse=True)).numbers()
        rows.append(
            numbers
            | {"number": trial.number, "clean_accuracy": trial.val["clean_accuracy"]}
            | {split: getattr(trial, split) for split in ("val", "test")}
        )
    seconds["a trial"] = (time.process_time() - begun) / max(1, len(rows))
    return {
        "victim": victim.spec.digest,
        "target": TARGETS[attack],
        "weight_of_target": float(probe.weights[TARGETS[attack]]),
        "asr_before": victim.scores["test"].attack_success,
        "acc_before_val": victim.scores["val"].clean_accuracy,
        "seconds": seconds,
        "trials": rows,
    }


def ranked(found: dict[str, Any]) -> dict[str, Any]:
    """Rank correlations over all trials, and what the blind choice loses."""
    rows = found["trials"]
    truth = [row["test"]["attack_success"] for row in rows]
    result: dict[str, Any] = {
        "n": len(rows),
        "spearman": {
            name: float(spearmanr([row[name] for row in rows], truth).statistic) for name in SIGNALS
        },
    }
    points = [row | {"attack_success": row["val"]["attack_success"]} for row in rows]
    bound = found["acc_before_val"] - MAX_DROP
    blind = choose(points, min_clean_accuracy=bound, by="risk")
    oracle = choose(points, min_clean_accuracy=bound)
    result["accurate_enough"] = sum(p["clean_accuracy"] >= bound for p in points)
    if blind is not None and oracle is not None:
        for split in ("val", "test"):
            asr = {
                n: rows[at][split]["attack_success"] for n, at in (("blind", blind), ("oracle", oracle))
            }
            result[split] = asr | {"regret": asr["blind"] - asr["oracle"]}
    return result


def main() -> None:
    torch.set_num_threads(1)
    content: dict[str, Any] = {"victims": {}}
    if KEPT.is_file():
        content = json.loads(KEPT.read_text())
    content |= {"commit": commit(), "versions": versions()}
    for attack in sys.argv[1:] or TARGETS:
        found = asked(attack)
        content["victims"][attack] = ranked(found) | found
        shown = {k: v for k, v in content["victims"][attack].items() if k != "trials"}
        print(attack, json.dumps(shown, indent=1), flush=True)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(content, indent=1) + "\n")
    report.write()


if __name__ == "__main__":
    main()
