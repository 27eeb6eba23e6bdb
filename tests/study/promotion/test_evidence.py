"""Gates are data: each limit holds or fails by the worst victim, and what was not measured fails."""

import json

import pytest

from study.promotion.evidence import TestEvidence, evidence_of, judge
from study.spec.config import StudyConfig
from study.spec.gates import Gates


def victim(role, attack_success, accuracy_drop, *, n=5, std=0.01, digest="d", n_failed=0):
    return {
        "role": role,
        "digest": digest,
        "n_failed": n_failed,
        "attack_success": {"mean": attack_success, "std": std, "n": n},
        "accuracy_drop": {"mean": accuracy_drop, "std": std, "n": n},
    }


SUITE = {
    "a": victim("tuning", 0.02, 0.010, digest="1"),
    "b": victim("tuning", 0.06, 0.004, digest="2"),
    "c": victim("held_out", 0.20, 0.030, digest="3", std=0.05),
    "d": victim("control", 0.90, 0.015, digest="4"),
}
ALL = {
    "accuracy_drop": 0.01,
    "attack_success": 0.06,
    "held_out_attack_success": 0.2,
    "control_accuracy_drop": 0.015,
    "spread": 0.05,
    "seeds": 5,
}


def failing(gates, evidence):
    return [one.gate for one in judge(Gates(**gates), evidence, "run it") if not one.passed]


def test_limits_that_are_just_met_hold():
    assert failing(ALL, TestEvidence(1, SUITE)) == []


@pytest.mark.parametrize(
    ("gate", "limit"),
    [
        ("accuracy_drop", 0.0099),
        ("attack_success", 0.0599),
        ("held_out_attack_success", 0.1999),
        ("control_accuracy_drop", 0.0149),
        ("spread", 0.0499),
        ("seeds", 6),
    ],
)
def test_each_gate_fails_by_itself(gate, limit):
    assert failing(ALL | {gate: limit}, TestEvidence(1, SUITE)) == [gate]


def test_a_gate_that_is_left_out_is_not_there():
    verdicts = judge(Gates(attack_success=1), TestEvidence(1, SUITE), "run it")
    assert [one.gate for one in verdicts] == ["attack_success", "seeds"]


def test_what_was_not_measured_fails_with_what_to_do():
    alone = TestEvidence(1, {"a": SUITE["a"]})
    assert failing(ALL, alone) == ["held_out_attack_success", "control_accuracy_drop"]
    (held_out,) = [v for v in judge(Gates(**ALL), alone, "run it") if v.gate.startswith("held_out")]
    assert "`held_out`" in held_out.remark


def test_one_seed_is_refused_whatever_the_gates_say():
    single = TestEvidence(1, {"a": victim("tuning", 0, 0, n=1)})
    verdicts = judge(Gates(attack_success=1, seeds=2), single, "run it")
    assert [(v.gate, v.passed) for v in verdicts] == [("attack_success", True), ("seeds", False)]
    assert "run it" in verdicts[-1].remark
    with pytest.raises(ValueError, match="seeds"):
        Gates(seeds=1)


def test_a_failed_purification_fails():
    assert failing(ALL, TestEvidence(1, SUITE | {"a": victim("tuning", 0, 0, n_failed=1)})) == ["seeds"]


def test_scores_on_val_are_no_evidence(tmp_path):
    summary = {"chosen": {"number": 3}, "suite": {"chosen": {"victims": SUITE}}}
    assert evidence_of(tmp_path, summary, 4) is None
    (verdict,) = judge(Gates(), None, "run it")
    assert (verdict.gate, verdict.value, verdict.passed) == ("split", "val", False)


def test_evidence_is_the_suites_or_the_confirmed_trials(tmp_path):
    summary = {"chosen": {"number": 3}, "suite": {"chosen": {"victims": SUITE}}}
    assert evidence_of(tmp_path, summary, 3).victims == SUITE
    (tmp_path / "confirmed").mkdir()
    (tmp_path / "confirmed" / "004.json").write_text(
        json.dumps({"victims": {"a": SUITE["a"]}, "commit": "abc"})
    )
    found = evidence_of(tmp_path, summary, 4)
    assert set(found.victims) == {"a"}
    assert found.commit == "abc"


def test_a_study_without_a_suite_has_one_seed(tmp_path):
    summary = {
        "chosen": {"number": 3, "victims": {"a": {"attack_success": 0.1, "clean_accuracy": 0.9}}},
        "victims": {"a": {"digest": "1", "test": {"clean_accuracy": 0.95}}},
    }
    found = evidence_of(tmp_path, summary, 3)
    assert found.worst("tuning", "accuracy_drop") == pytest.approx(0.05)
    assert failing({"attack_success": 0.1}, found) == ["seeds"]


def test_candidates_are_ranked_by_attack_success_then_by_what_they_cost():
    assert TestEvidence(1, SUITE).rank() == pytest.approx(((0.02 + 0.06 + 0.2) / 3, 0.059 / 4))


def test_other_victims_have_another_digest():
    roles_swapped = SUITE | {"b": victim("held_out", 0, 0, digest="2")}
    assert TestEvidence(1, SUITE).victims_digest != TestEvidence(1, roles_swapped).victims_digest
    renamed = dict(zip("wxyz", SUITE.values(), strict=True))
    assert TestEvidence(1, SUITE).victims_digest == TestEvidence(1, renamed).victims_digest


def test_gates_do_not_change_a_studys_digest():
    study = {
        "name": "a",
        "trials": 1,
        "victims": [{}],
        "reference_point": {"clean_accuracy": 0, "attack_success": 1},
        "space": {"mask_lr": {"kind": "float", "low": 0.1, "high": 0.2}},
    }
    plain = StudyConfig.model_validate(study)
    assert StudyConfig.model_validate(study | {"gates": ALL}).digest == plain.digest
