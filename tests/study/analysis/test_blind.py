"""Choosing without the attack."""

import json

import pytest
import yaml

from bimask.victims import VictimSpec, train_victim
from study.analysis.blind import compare, probe_images, rank_correlation
from study.analysis.pareto import choose
from study.pipeline import run
from study.spec.config import StudyError
from study.spec.reading import load_config

BLIND = """
name: b
trials: 4
selection: blind
victims: [{dataset: digits}]
reference_point: {clean_accuracy: 0.5, attack_success: 1.0}
space: {budget: {kind: float, low: 0.1, high: 0.8}}
"""


def trial(number, risk, attack_success, clean_accuracy=0.99):
    return {
        "number": number,
        "risk": risk,
        "attack_success": attack_success,
        "clean_accuracy": clean_accuracy,
    }


def written(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_rank_correlation_by_hand():
    rising = [trial(i, risk, asr) for i, (risk, asr) in enumerate([(0.1, 0.0), (0.2, 0.5), (0.9, 0.6)])]
    assert rank_correlation(rising)["rho"] == pytest.approx(1)
    swapped = [*rising, trial(3, 0.05, 0.9)]
    # ranks of risk 2 3 4 1 and of attack success 1 2 3 4: 1 - 6 (1 + 1 + 1 + 9) / (4 * 15)
    assert rank_correlation(swapped)["rho"] == pytest.approx(1 - 6 * 12 / 60)
    assert rank_correlation(swapped)["n"] == 4


def test_no_correlation_without_variation():
    assert rank_correlation([trial(0, 0.1, 0.5), trial(1, 0.2, 0.6)]) is None
    assert rank_correlation([trial(i, 0.1 * i, 1.0) for i in range(5)]) is None


def test_blind_choice_never_sees_the_attack():
    trials = [trial(0, 0.3, 0.0), trial(1, 0.1, 0.8), trial(2, 0.0, 0.5, clean_accuracy=0.5)]
    assert choose(trials, min_clean_accuracy=0.9, by="risk") == 1
    assert choose(trials, min_clean_accuracy=0.9) == 0


def test_both_choices_and_the_regret():
    trials = [trial(0, 0.3, 0.1), trial(1, 0.1, 0.4), trial(2, 0.2, 0.9)]

    def measured(at):
        asr = trials[at]["attack_success"]
        return {
            "number": at,
            "val": {"attack_success": asr},
            "test": {"attack_success": asr + 0.05 * at},
        }

    found = compare("oracle", trials, {"oracle": 0, "blind": 1}, measured)
    assert (found["oracle"]["number"], found["blind"]["number"]) == (0, 1)
    assert found["regret"]["val"] == pytest.approx(0.3)
    assert found["regret"]["test"] == pytest.approx(0.35)
    nothing = compare("oracle", trials, {"oracle": None, "blind": None}, measured)
    assert nothing["regret"] is None
    assert nothing["spearman"]["n"] == 3


def test_a_blind_study_searches_by_risk(tmp_path):
    config = load_config(written(tmp_path, BLIND))
    assert config.directions == {"clean_accuracy": "maximize", "risk": "minimize"}
    assert config.reference == {"clean_accuracy": 0.5, "risk": 1}


@pytest.mark.parametrize(
    "more",
    ["objectives: [clean_accuracy, attack_success]", "constraints: {min_recovery: 0.5}"],
)
def test_a_blind_study_may_not_use_the_trigger(tmp_path, more):
    with pytest.raises(StudyError, match="needs the true trigger"):
        load_config(written(tmp_path, BLIND + more))


def test_an_oracle_study_keeps_its_objectives_and_digest(tmp_path):
    config = load_config(written(tmp_path, BLIND.replace("selection: blind", "selection: oracle")))
    assert list(config.directions) == ["clean_accuracy", "attack_success"]
    assert "risk" not in config.reference


def test_the_probe_is_of_val_alone():
    victim = train_victim(
        VictimSpec(image_size=12, width=4, epochs=2, min_clean_accuracy=0, min_attack_success=0),
        device="cpu",
    )
    splits = victim.spec.load_data()
    images = probe_images(victim, seed=0).floats()
    rows = {image.numpy().tobytes() for image in splits.val.floats()}
    assert len(images) == 160
    assert all(image.numpy().tobytes() in rows for image in images)


@pytest.mark.slow  # test_suspect_study's search is blind, too; test_report shows both choices
@pytest.mark.ray
def test_a_blind_study_shows_both_choices(tmp_path):
    victim = {"image_size": 12, "width": 4, "epochs": 10}
    sizes = {"initialise_rounds": 2, "minimise_rounds": 2, "select_rounds": 2}
    study = {
        **yaml.safe_load(BLIND),
        "victims": [victim],
        "clean_images_per_class": 3,
        "choose": {"max_accuracy_drop": 0.9},
        "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None, **sizes},
        "paper_defaults": False,
    }
    path = written(tmp_path, yaml.safe_dump(study))
    assert run.run_study(path, {"concurrency": 2}, outputs=tmp_path / "outputs", address="local")
    folder = tmp_path / "outputs" / "b"
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert all(0 <= trial["risk"] <= 1 for trial in trials)
    found = summary["selection"]
    assert found["used"] == "blind"
    assert summary["chosen"]["number"] == found["blind"]["number"]
    assert found["blind"]["risk"] == min(trial["risk"] for trial in trials)
    assert found["oracle"]["val"]["attack_success"] == min(t["attack_success"] for t in trials)
    assert found["regret"]["val"] >= 0
    evidence = trials[0]["scores"]["digits-badnets"]
    assert evidence["risk"] == (evidence["same_answer"] + evidence["carried_over"]) / 2
    assert set(summary["objectives"]) == {"clean_accuracy", "risk"}
