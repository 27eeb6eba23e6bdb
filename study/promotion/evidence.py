"""What is known of a trial on `test`, and what a study's gates say of it.

Evidence is scores on `test` of purifications with several seeds, as a study's confirmation leaves
them (`study.trial.suite`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bimask.files.bounded import read_json
from bimask.tasks import CLASSIFICATION, Task
from study.spec.config import StudyError
from study.spec.gates import Gates
from study.spec.objectives import number, spread
from study.store.schema import Role, StudySummary, VictimBefore, VictimScores, VictimSpreads

CONFIRMED = "confirmed"  # folder of the evidence of trials that were not the study's choice
LIMITS: tuple[tuple[str, Role, Literal["accuracy_drop", "attack_success"]], ...] = (
    ("accuracy_drop", "tuning", "accuracy_drop"),
    ("attack_success", "tuning", "attack_success"),
    ("held_out_attack_success", "held_out", "attack_success"),
    ("control_accuracy_drop", "control", "accuracy_drop"),
)


@dataclass(frozen=True)
class TestEvidence:
    """What is known of one trial on `test`.

    Attributes:
        victims: name -> `role`, `digest`, `n_failed`, and `attack_success` and `accuracy_drop`, each
            with `mean`, `std` and `n`.
        commit: of the sources that measured it; None where the study itself did.
    """

    __test__ = False  # no test of pytest's, whatever it is called

    trial: int
    victims: Mapping[str, VictimSpreads]
    commit: str | None = None

    def role(self, role: Role) -> list[VictimSpreads]:
        """The victims of a role that have scores."""
        return [v for v in self.victims.values() if v["role"] == role and "attack_success" in v]

    def worst(self, role: Role, score: Literal["accuracy_drop", "attack_success"]) -> float | None:
        """The largest mean over seeds among a role's victims; None where there are none."""
        return max((victim[score]["mean"] for victim in self.role(role)), default=None)

    @property
    def victims_digest(self) -> str:
        """Sixteen hex digits of which victims, in which roles, this was measured on."""
        pairs = sorted([v["digest"], v["role"]] for v in self.victims.values())
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]

    def rank(self) -> tuple[float, float]:
        """What candidates are compared by, lower is better: the mean ASR over all victims with a
        backdoor, then the mean accuracy drop over all victims."""
        attacked = [v["attack_success"]["mean"] for v in [*self.role("tuning"), *self.role("held_out")]]
        drops = [v["accuracy_drop"]["mean"] for v in self.victims.values() if "accuracy_drop" in v]
        return sum(attacked) / len(attacked), sum(drops) / len(drops)


@dataclass(frozen=True)
class Verdict:
    """One gate: what was measured, what is asked for, whether it holds, and if not, what to do."""

    gate: str
    value: str
    limit: str
    passed: bool
    remark: str = ""


def evidence_of(
    folder: Path, summary: StudySummary, trial: int, task: Task = CLASSIFICATION
) -> TestEvidence | None:
    """The evidence in a study's folder: of the chosen trial in its summary, of others where
    `--confirm` wrote it, of the chosen trial without either its one run on `test`; None if there is
    nothing but `val`."""
    chosen = summary["chosen"]
    if chosen is not None and chosen["number"] != trial:
        chosen = None
    confirmed = folder / CONFIRMED / f"{trial:03d}.json"
    if confirmed.is_file():
        try:
            content = read_json(confirmed)
            return TestEvidence(trial, content["victims"], content["commit"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{confirmed} cannot be read ({type(error).__name__}: {error}); measure it anew with "
                f"`python -m study.promote {folder.name} --trial {trial} --confirm`."
            ) from error
    suite = summary.get("suite", {})
    if chosen is not None and "chosen" in suite:
        return TestEvidence(trial, suite["chosen"]["victims"])
    if chosen is not None:
        known = {
            name: _once(task, summary["victims"][name], scores)
            for name, scores in chosen["victims"].items()
        }
        return TestEvidence(trial, known)
    return None


def _once(task: Task, before: VictimBefore, scores: VictimScores) -> VictimSpreads:
    """A tuning victim that was scored once on `test`."""
    drop = number(before["test"], task.quality) - number(scores, task.quality)
    return {
        "role": "tuning",
        "digest": before["digest"],
        "n_failed": 0,
        "attack_success": spread([scores["attack_success"]]),
        "accuracy_drop": spread([drop]),
    }


def judge(gates: Gates, evidence: TestEvidence | None, command: str) -> list[Verdict]:
    """Every gate that is there, in the order of `Gates`.

    Args:
        command: what the user types to gather the evidence of this trial.
    """
    if evidence is None:
        return [Verdict("split", "val", "test", False, f"it has scores on val alone; {command}")]
    verdicts = []
    for gate, role, score in LIMITS:
        if (limit := getattr(gates, gate)) is not None:
            missing = f"no {role} victim was measured: add `{_KEYS[role]}` to the study and run it"
            verdicts.append(_at_most(gate, evidence.worst(role, score), limit, missing))
    if gates.spread is not None:
        attacked = [*evidence.role("tuning"), *evidence.role("held_out")]
        several = [v["attack_success"]["std"] for v in attacked if v["attack_success"]["n"] > 1]
        verdicts.append(_at_most("spread", max(several, default=None), gates.spread, command))
    verdicts.append(_seeds(gates, evidence, command))
    return verdicts


_KEYS: dict[Role, str] = {"tuning": "victims", "held_out": "held_out", "control": "controls"}


def _at_most(gate: str, value: float | None, limit: float, missing: str) -> Verdict:
    if value is None:
        return Verdict(gate, "none", f"<= {limit:g}", False, missing)
    return Verdict(gate, f"{value:.4f}", f"<= {limit:g}", value <= limit + 1e-12)


def _seeds(gates: Gates, evidence: TestEvidence, command: str) -> Verdict:
    fewest = min(
        v["attack_success"]["n"] if "attack_success" in v else 0 for v in evidence.victims.values()
    )
    failed = sum(v["n_failed"] for v in evidence.victims.values())
    remark = "" if fewest >= gates.seeds else f"{fewest} run(s) a victim are too few: {command}"
    if failed:
        remark = f"{failed} purification(s) failed; see confirm.jsonl"
    return Verdict("seeds", str(fewest), f">= {gates.seeds}", not remark, remark)
