"""Trials that an actor runs at once end as they end alone, with real Ray, Optuna, MLflow and SQLite."""

import io
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import mlflow
import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import study as study_package
from bimask.defences.ims.purify import purify
from bimask.errors import NonFiniteError
from bimask.inspection.risk import RiskProbe
from bimask.inspection.trigger_pool import TriggerPool
from bimask.progress import Console
from bimask.victims import obtain_victim
from study import search
from study.analysis.blind import probe_images
from study.pipeline.prepare import prepare_cases
from study.spec.config import StudyConfig, StudyError
from study.spec.directions import OBJECTIVES
from study.store import records
from study.tracking.mlflow_runs import Tracker, tracking_uri
from study.tracking.recorder import Recorder
from study.trial.cases import Case
from study.trial.run import run_trials

pytestmark = pytest.mark.ray

STUDY = {
    "name": "groups",
    "trials": 7,
    "concurrency": 1,
    "paper_defaults": False,
    "sampler": "random",
    "clean_images_per_class": 3,
    "report_every": 2,
    "victims": [
        {
            "dataset": "digits",
            "image_size": 12,
            "net": "small_resnet",
            "width": 4,
            "attack": {"name": "badnets"},
            "epochs": 6,
            "min_clean_accuracy": 0.0,
            "min_attack_success": 0.0,
        }
    ],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "fixed": {
        "inner_optimizer": "sign",
        "step_size": None,
        "patience": None,
        "batch_size": 16,  # of 30 images, so that the seed decides which
        "initialise_rounds": 2,
        "minimise_rounds": 2,
        "select_rounds": 2,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 3},
        "budget": {"kind": "categorical", "choices": [0.3, 1e38]},  # the second overflows
    },
    "start": [{"budget": 0.3, "mask_lr": 0.02 * i, "inner_steps": 1 + i % 3} for i in range(1, 8)],
}
GOOD, BAD = STUDY["start"][0], {**STUDY["start"][1], "budget": 1e38}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, with_victim):
    return with_victim(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def case(outputs):
    config = StudyConfig.model_validate(STUDY)
    victim = obtain_victim(config.victims[0], outputs / "victims")
    return Case.of("digits-badnets", victim, config)


@pytest.fixture(scope="module")
def searched(outputs, case):
    """Run a study's search; the process of trial `dying` ends itself."""

    def search_of(name, *, dying=None, **changes):
        def mortal(group, *, study, cases):
            import os

            from study.search import trainable

            if any(member["number"] == dying for member in group["members"]):
                os._exit(1)
            trainable(group, study=study, cases=cases)

        config = StudyConfig.model_validate({**STUDY, "name": name, **changes})
        folder = outputs / name
        folder.mkdir()
        tracker = Tracker(tracking_uri(outputs), outputs / "mlartifacts")
        tracker.start_study(name, {}, {})
        recorder = Recorder(config, folder, tracker, {}, lambda *_: None)
        concurrency = search.check_resources(config)
        search.run_search(
            config, [case], recorder, folder=folder, concurrency=concurrency, function=mortal
        )
        tracker.end_study(metrics={}, artifacts=[])
        runs = tracker.client.search_runs(
            [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.parent_id}'"
        )
        asked = optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'optuna.db'}").trials
        rows = [json.loads(line) for line in (folder / records.TRIALS).read_text().splitlines()]
        return SimpleNamespace(
            folder=folder,
            rows={row["number"]: row for row in rows},
            asked={trial.number: trial for trial in asked},
            runs={int(child.data.tags["trial"]): child for child in runs},
        )

    search.start_ray("local")
    yield search_of
    search.stop_ray()


@pytest.fixture(scope="module")
def grouped(searched):
    return searched("three", trials_per_actor=3)


@pytest.fixture(scope="module")
def failing(searched):
    """Groups 0-2, of which 2 overflows; 3-5, which die with their process; 6, which overflows."""
    start = [GOOD, GOOD, BAD, GOOD, GOOD, GOOD, BAD]
    return searched("failing", trials_per_actor=3, start=start, dying=4, retries=1)


def test_every_member_is_a_trial_of_its_own_everywhere(grouped, outputs):
    assert set(grouped.rows) == set(grouped.asked) == set(grouped.runs) == set(range(7))
    groups = [trial.user_attrs["tune_trial_id"] for _, trial in sorted(grouped.asked.items())]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [3, 3, 1]
    client = mlflow.MlflowClient(tracking_uri(outputs))
    for number, row in grouped.rows.items():
        assert row["status"] == "COMPLETE"
        assert row["rounds"] == 6
        assert grouped.asked[number].state.name == "COMPLETE"
        assert grouped.asked[number].values == [row[name] for name in OBJECTIVES]
        child = grouped.runs[number]
        assert child.info.status == "FINISHED"
        assert child.data.metrics["attack_success"] == row["attack_success"]
        curve = client.get_metric_history(child.info.run_id, "digits-badnets/clean_accuracy")
        assert [metric.step for metric in curve] == [1, 3, 5, 6]
        kept = grouped.folder / "trials" / f"{number:03d}"
        assert {path.name for path in kept.iterdir()} == {
            "purify.yaml",
            *(f"digits-badnets.{kind}" for kind in ("masks.safetensors", "masks.png", "rounds.json")),
        }
        assert {item.path for item in client.list_artifacts(child.info.run_id)} == {
            path.name for path in kept.iterdir()
        }
    assert len(study_package.load("three", outputs)) == 7


def test_seconds_are_an_even_share_of_the_groups(grouped):
    seconds = [grouped.rows[number]["seconds"] for number in range(7)]
    assert len(set(seconds[:3])) == len(set(seconds[3:6])) == 1
    assert len(set(seconds)) == 3


def test_the_numbers_are_those_of_trials_that_run_alone(grouped, case):
    config = StudyConfig.model_validate(STUDY)
    for number, row in grouped.rows.items():
        settings = config.defence_config(row["parameters"])
        (alone,) = run_trials([settings], [case], seed=config.seed)
        for key in ("scores", "rounds", "passes", *OBJECTIVES, "recovery"):
            assert row[key] == alone.outcome()[key], key
        masks = alone.cases["digits-badnets"].tensors
        kept = load_file(grouped.folder / f"trials/{number:03d}/digits-badnets.masks.safetensors")
        assert all(torch.equal(kept[name], masks[name]) for name in masks)
        rounds = grouped.folder / f"trials/{number:03d}/digits-badnets.rounds.json"
        logs = [asdict(log) for log in alone.cases["digits-badnets"].result.history]
        assert json.loads(rounds.read_text()) == json.loads(json.dumps(logs))
        assert row["provenance"]["study"] == config.digest, "the search is the same"
    assert len({row["attack_success"] for row in grouped.rows.values()}) > 1, "all are alike"


def test_a_member_that_overflows_fails_alone_and_a_dying_process_fails_its_group(failing):
    complete = {number for number, row in failing.rows.items() if row["status"] == "COMPLETE"}
    assert set(failing.rows) == set(range(7))
    assert complete == {0, 1}
    for number in range(7):
        good = number in complete
        assert failing.asked[number].state.name == ("COMPLETE" if good else "FAIL")
        assert failing.runs[number].info.status == ("FINISHED" if good else "FAILED")
        assert (failing.folder / "trials" / f"{number:03d}").is_dir() == good
        if not good:
            assert failing.runs[number].data.tags["reason"] == failing.rows[number]["reason"]
    for number in (2, 6):
        assert "NonFiniteError: Loss not finite in stage" in failing.rows[number]["reason"]
    assert len({failing.rows[number]["reason"] for number in (3, 4, 5)}) == 1


def test_rays_files_stay_only_where_an_actor_failed_and_hold_nothing_secret(grouped, failing, outputs):
    assert not (grouped.folder / "ray").exists()
    kept = [path for path in (failing.folder / "ray").rglob("*") if path.is_file()]
    assert any(path.name == "error.txt" for path in kept)
    for path in kept:
        content = path.read_bytes()
        assert b"MlflowClient" not in content
        assert str(outputs / "mlflow.db").encode() not in content


def test_members_that_cannot_share_a_net_run_one_population_after_another(case):
    config = StudyConfig.model_validate(STUDY)
    changes = [{}, {"memory_format": "contiguous"}, {"budget": 1e38}, {"mask_lr": 0.2}]
    configs = [config.defence_config({**GOOD, **change}) for change in changes]
    reports = []
    together = run_trials(
        configs, [case], seed=3, report_every=3, on_report=lambda *report: reports.append(report)
    )
    assert isinstance(together[2], NonFiniteError)
    assert [(member, log.step) for member, _, log, _ in reports] == [
        *((member, step) for step in (2, 5) for member in (0, 3)),
        *((1, step) for step in (2, 5)),
    ]
    for position in (0, 1, 3):
        (alone,) = run_trials([configs[position]], [case], seed=3)
        mine, other = (result.cases["digits-badnets"] for result in (together[position], alone))
        assert mine.scores == other.scores
        assert mine.result.history == other.result.history
        assert torch.equal(mine.result.masks.mask, other.result.masks.mask)
        assert torch.equal(mine.result.masks.selection, other.result.masks.selection)


def test_a_trial_that_failed_on_one_victim_is_spared_the_next(case):
    config = StudyConfig.model_validate(STUDY)
    cases = [case, Case("again", case.victim, case.clean, case.val)]
    seen = []
    results = run_trials(
        [config.defence_config(parameters) for parameters in (BAD, GOOD)],
        cases,
        seed=0,
        report_every=1,
        on_report=lambda member, victim, *_: seen.append((member, victim)),
    )
    assert isinstance(results[0], NonFiniteError)
    assert set(results[1].cases) == {"digits-badnets", "again"}
    assert (0, "again") not in seen
    assert (1, "again") in seen


def test_workers_make_probes_and_triggers_once_and_trials_share_them(case, searched, monkeypatch):
    changed = STUDY | {"fixed": STUDY["fixed"] | {"class_triggers": 0.5}, "repeats": 2}
    config = StudyConfig.model_validate(changed)
    quiet, victims = Console(file=io.StringIO()), {case.name: case.victim}
    runs = prepare_cases(config, victims, quiet, workers=2)
    assert [one.key for one in runs] == ["digits-badnets", "digits-badnets.1"]
    assert not torch.equal(runs[0].clean, runs[1].clean), "each run has clean images of its own"
    assert runs[0].probe is runs[1].probe
    here = RiskProbe(case.victim.model, probe_images(case.victim, seed=config.seed).floats())
    for mine, theirs in zip(here.universal, runs[0].probe.universal, strict=True):
        assert torch.equal(mine.images, theirs.images)
    alone = [
        purify(
            one.victim.model,
            one.clean,
            config.defence_config(GOOD),
            generator=torch.Generator().manual_seed(config.seed + one.repeat),
        ).masks.mask
        for one in runs
    ]

    def refused(*_arguments, **_options):
        raise AssertionError("searched again")

    monkeypatch.setattr(TriggerPool, "search", refused)
    (ended,) = run_trials([config.defence_config(GOOD)], runs, seed=config.seed)
    for one, mask in zip(runs, alone, strict=True):
        assert torch.equal(ended.cases[one.key].result.masks.mask, mask)
    assert prepare_cases(StudyConfig.model_validate(STUDY), victims, quiet)[0].prepared == {}


def test_a_victim_that_a_worker_refuses_is_refused_with_its_sentence(case, searched):
    mute = nn.Sequential(case.victim.model, nn.Threshold(1e9, 0))  # answers all images alike
    victims = {case.name: replace(case.victim, model=mute)}
    config, quiet = StudyConfig.model_validate(STUDY), Console(file=io.StringIO())
    with pytest.raises(StudyError, match="digits-badnets: .*answers all adversarial images as it does"):
        prepare_cases(config, victims, quiet, workers=1, joined=True)


@pytest.mark.slow
def test_a_worker_that_dies_of_a_victim_is_told_of_in_one_sentence(case, searched):
    class Fatal(nn.Module):
        def forward(self, images):
            import os

            os._exit(1)

    victims = {case.name: replace(case.victim, model=Fatal())}
    config, quiet = StudyConfig.model_validate(STUDY), Console(file=io.StringIO())
    with pytest.raises(StudyError, match="No worker ended probing digits-badnets .*launch again"):
        prepare_cases(config, victims, quiet, workers=1, joined=True)


def test_a_trial_of_fewer_runs_has_the_numbers_of_those_alone(case, searched):
    """The published defaults take long and are run once, whatever the others' repeats."""
    config = StudyConfig.model_validate(STUDY | {"repeats": 2})
    cases = [Case.of(case.name, case.victim, config, repeat) for repeat in range(2)]
    good = config.defence_config(GOOD)
    once, twice = run_trials([good, good], cases, seed=config.seed, repeats=[1, 2])
    assert list(once.cases) == ["digits-badnets"]
    assert list(twice.cases) == ["digits-badnets", "digits-badnets.1"]
    (alone,) = run_trials([good], cases[:1], seed=config.seed)
    assert {k: v for k, v in once.values.items() if k != "seconds"} == {
        k: v for k, v in alone.values.items() if k != "seconds"
    }
    assert once.spread == {}
    assert twice.spread["clean_accuracy"]["n"] == 2
    assert config.repeats_of("paper") == 1
    assert config.repeats_of(None) == 2
    asked = StudyConfig.model_validate(STUDY | {"repeats": 2, "paper_repeats": 3})
    assert asked.repeats_of("paper") == 2
    assert asked.digest != config.digest
