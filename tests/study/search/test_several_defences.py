"""A search over several defences: what is proposed, what a group of them ends with, and a whole
study."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from rich.console import Console

import study as study_package
from bimask.cleaned.folder import load_cleaned
from bimask.defences import DEFENCES, settings_from
from bimask.defences.finetuning.ft_sam import FtSamConfig
from bimask.errors import NonFiniteError
from bimask.files.tensors import load_tensors
from bimask.inspection.trigger_pool import TriggerPool
from bimask.victims import load_victim, obtain_victim
from study.pipeline.prepare import prepare_cases
from study.pipeline.run import run_study
from study.promote import promote
from study.promotion.registry import Registry, fetch_config, load_classifier
from study.search.pareto_search import ParetoSearch, first_points
from study.search.warm_start import read_earlier
from study.spec.config import PAPER, StudyConfig
from study.store import records
from study.store.schema import SCHEMA
from study.tracking.mlflow_runs import tracking_uri
from study.trial.cases import Case
from study.trial.limits import LEAST
from study.trial.rules import TrialRules
from study.trial.run import run_trials
from study.trial.state import TrialObserver, TrialState

VICTIM = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "attack": {"name": "badnets"},
    "epochs": 6,
    "min_clean_accuracy": 0.0,
    "min_attack_success": 0.0,
}
FLOAT = {"kind": "float", "low": 1, "high": 5}
STUDY = {
    "name": "several",
    "trials": 10,
    "defences": ["ims", "clp", "ft_sam"],
    "clean_images_per_class": 3,
    "report_every": 2,
    "victims": [VICTIM],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 0.5},
    "fixed": {
        "ims": {
            "inner_optimizer": "sign",
            "step_size": None,
            "patience": None,
            "initialise_rounds": 2,
            "minimise_rounds": 2,
            "select_rounds": 2,
        },
        "ft_sam": {"epochs": 2},
    },
    "space": {
        "ims": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
        "ft_sam": {"lr": {"kind": "float", "low": 0.001, "high": 0.1, "log": True}},
    },
}


def study_of(**changes):
    return StudyConfig.model_validate(STUDY | changes)


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    config = StudyConfig.model_validate(STUDY)
    return obtain_victim(config.victims[0], tmp_path_factory.mktemp("victims"))


def record(member, *, seconds=1.0, status="COMPLETE", **values):
    scores = {"clean_accuracy": 0.9, "attack_success": 0.1} | values
    return {
        "schema": SCHEMA,
        **member,
        "status": status,
        "reason": None,
        "ended": 0.0,
        **scores,
        "scores": {"digits-badnets": scores | {"accuracy_drop": 0.05}},
        "seconds": seconds,
        "rounds": 1,
        "passes": {"forward": 1, "backward": 1},
        "provenance": {"study": "", "victims": {}, "seed": 0, "commit": "", "versions": {}},
    }


def test_every_defences_published_defaults_come_first_then_one_point_of_each():
    members = first_points(study_of(), 10)
    names = ["ims", "clp", "ft_sam"]
    assert [one["preset"] for one in members] == [PAPER] * 3 + [None] * 7
    assert [one["parameters"]["defence"] for one in members[:6]] == names * 2
    assert members[1]["parameters"] == {"defence": "clp", "clp.u": 3.0}
    assert members[5]["parameters"] == {"defence": "ft_sam", "ft_sam.lr": 0.01}
    for one in members:
        study_of().defence_config(one["parameters"])  # does not raise


def test_a_study_of_one_begins_as_it_did():
    config = StudyConfig.model_validate(
        {**STUDY, "defence": "clp", "defences": None, "fixed": {}, "space": {}}
        | {"trials": 2}
        | {"space": {"u": {"kind": "float", "low": 1, "high": 5}}}
    )
    first, second = first_points(config, 2)
    assert first == {"number": 0, "preset": PAPER, "parameters": {"u": 3.0}}
    assert list(second["parameters"]) == ["u"]


def test_optuna_learns_under_which_defence_the_trials_are_good(tmp_path):
    config = study_of(trials=40, paper_defaults=False, sampler="tpe")
    searcher = ParetoSearch(config, f"sqlite:///{tmp_path / 'optuna.db'}")
    drawn, told = [], []
    for number in range(30):
        (member,) = searcher.suggest(str(number))["members"]
        good = member["parameters"]["defence"] == "ft_sam"
        drawn.append(member["parameters"]["defence"])
        scores = (0.9, 0.1) if good else (0.5, 0.9)
        told.append(record(member, clean_accuracy=scores[0], attack_success=scores[1]))
        searcher.tell(told[-1])
    assert drawn[:3] == ["ims", "clp", "ft_sam"]
    assert drawn[15:].count("ft_sam") > 9
    # a new process goes on with the same storage and records
    again = ParetoSearch(config, f"sqlite:///{tmp_path / 'optuna.db'}", records=told)
    known = {trial.number: trial.params for trial in again.study.trials}
    assert known[0]["defence"] == "ims"
    assert set(known[2]) == {"defence", "ft_sam.lr"}
    assert again.suggest("30")["members"][0]["number"] == 30


def test_what_one_defence_took_limits_no_other():
    searcher = ParetoSearch(study_of(paper_defaults=False, trials=30), None)
    for number in range(30):
        (member,) = searcher.suggest(str(number))["members"]
        if member["parameters"]["defence"] == "clp":
            searcher.tell(record(member, seconds=0.01))

    def of(name):
        return {"number": 99, "preset": None, "parameters": {"defence": name}}

    assert searcher._limit([of("clp")]) == LEAST
    assert searcher._limit([of("ims")]) > LEAST, "nobody knows yet what it takes"
    assert searcher._limit([of("clp"), of("clp")]) == 2 * LEAST


@pytest.mark.parametrize("sampler", ["auto", "tpe", "random"])
def test_these_samplers_cope(sampler):
    made = ParetoSearch(study_of(sampler=sampler), None).study.sampler
    if sampler == "random":
        assert isinstance(made, optuna.samplers.RandomSampler)
        return
    assert isinstance(made, optuna.samplers.TPESampler)
    assert made._group, "settings of a defence are learned together"
    alone = {"defences": None, "defence": "clp", "fixed": {}, "space": {"u": FLOAT}, "sampler": "tpe"}
    own = ParetoSearch(StudyConfig.model_validate(STUDY | alone), None).study.sampler
    assert not own._group, "a study of one is searched as it was"


def test_a_group_of_several_defences_ends_as_its_trials_alone(victim):
    config = study_of()
    case = Case.of("digits-badnets", victim, config)
    parameters = [
        {"defence": "ims", "ims.mask_lr": 0.1},
        {"defence": "ft_sam", "ft_sam.lr": 0.01},
        {"defence": "ims", "ims.mask_lr": 0.05},
        {"defence": "clp", "clp.u": 2.0},
    ]
    settings = [config.defence_config(one) for one in parameters]
    told = []
    group = run_trials(
        settings, [case], seed=0, on_report=lambda at, *_: told.append(at), report_every=2
    )
    for one, result in zip(settings, group, strict=True):
        (alone,) = run_trials([one], [case], seed=0)
        assert not isinstance(result, NonFiniteError)
        mine, other = result.cases["digits-badnets"], alone.cases["digits-badnets"]
        assert type(mine.result.config) is type(one)
        assert mine.scores == other.scores
        assert all(torch.equal(mine.tensors[key], other.tensors[key]) for key in other.tensors)
    assert set(told) == {0, 1, 2}


@pytest.mark.parametrize(
    ("defences", "fixed", "made"),
    [
        (["ims", "clp"], {"ims": {"class_triggers": 0.5}}, {"ims"}),
        (["ims", "clp"], {}, set()),
        (["ft_sam", "clp"], {}, set()),
    ],
)
def test_triggers_are_searched_only_where_a_trial_may_learn_on_them(victim, defences, fixed, made):
    config = study_of(defences=defences, fixed=fixed, space={name: {} for name in defences})
    (case,) = prepare_cases(config, {"digits-badnets": victim}, Console(quiet=True))
    assert set(case.prepared) == made
    assert all(isinstance(one, TriggerPool) for one in case.prepared.values())


def folder_of(tmp_path, name, content, rows):
    folder = tmp_path / name
    folder.mkdir()
    config = StudyConfig.model_validate(STUDY | content | {"name": name})
    (folder / records.STUDY).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    (folder / records.TRIALS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_defences_own_study_and_one_of_several_know_the_same(tmp_path):
    own = {"defence": "clp", "defences": None, "fixed": {}}
    own["space"] = {"u": {"kind": "float", "low": 0, "high": 10}}
    alone = folder_of(
        tmp_path, "alone", own, [record({"number": 1, "preset": None, "parameters": {"u": 2.5}})]
    )
    several = study_of(warm_start_from=[alone])
    (known,) = read_earlier(several).observed
    assert known.parameters == {"defence": "clp", "clp.u": 2.5}
    of_both = [
        record({"number": 1, "preset": None, "parameters": {"defence": "clp", "clp.u": 2.5}}),
        record({"number": 2, "preset": None, "parameters": {"defence": "ft_sam", "ft_sam.lr": 0.01}}),
    ]
    both = folder_of(tmp_path, "both", {}, of_both)
    (back,) = read_earlier(
        StudyConfig.model_validate(STUDY | own | {"warm_start_from": [both]})
    ).observed
    assert back.parameters == {"u": 2.5}
    # ft_sam was run with other fixed settings: its points are worth a try, its numbers do not count
    changed = study_of(warm_start_from=[both], fixed=STUDY["fixed"] | {"ft_sam": {"epochs": 3}})
    earlier = read_earlier(changed)
    assert [one.parameters["defence"] for one in earlier.observed] == ["clp"]
    assert earlier.points == [{"defence": "ft_sam", "ft_sam.lr": 0.01}]
    assert ParetoSearch(changed, None, earlier=earlier).study.trials


@pytest.fixture
def _clean_tree(monkeypatch):
    """The sources count as committed, whatever the state of those that are tested."""
    for place in ("study.promotion.candidate", "study.tracking.recorder", "study.pipeline.run"):
        monkeypatch.setattr(f"{place}.commit", lambda: "0123456789ab")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("_clean_tree")
def test_a_study_over_three_defences_from_start_to_promotion(tmp_path, with_store, capsys):
    """Launch, resume, records, Optuna, MLflow, page; then purify, promote, and what is served."""
    outputs = with_store(tmp_path / "outputs")
    content = STUDY | {
        "name": "three",
        "trials": 9,
        "paper_defaults": False,
        "trials_per_actor": 3,
        "victims": [VICTIM, VICTIM | {"attack": {"name": "blended", "alpha": 0.3}}],
        "objectives": ["clean_accuracy", "attack_success", "pruned_share"],
        "reference_point": STUDY["reference_point"] | {"pruned_share": 1.0},
        "constraints": {"max_pruned_share": 0.9},
        "early_stopping": {"dominated": True, "halving": {"grace": 2}},
        "confirm": {"seeds": 2},
        "gates": {"accuracy_drop": 1.0, "attack_success": 1.0, "seeds": 2},
    }
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert run_study(tmp_path / "three.yaml", {}, outputs=outputs, address="local")
    assert "its settings" in capsys.readouterr().out
    folder = outputs / "three"
    trials = records.read_trials(folder)
    assert len(trials) == 9
    names = {trial["number"]: trial["parameters"]["defence"] for trial in trials}
    assert [names[n] for n in range(3)] == ["ims", "clp", "ft_sam"], "each has been tried"
    summary, best = records.read_summary(folder), yaml.safe_load((folder / "best.yaml").read_text())
    chosen = summary["chosen"]["number"]
    assert best["defence"] == names[chosen]
    assert type(settings_from(folder / "best.yaml")) is DEFENCES[names[chosen]].config
    for trial in trials:
        if trial["status"] != "COMPLETE":
            continue
        stem = DEFENCES[names[trial["number"]]].stem
        kept = folder / "trials" / f"{trial['number']:03d}"
        assert len(list(kept.glob(f"*.{stem}.safetensors"))) == 2
        assert 0 <= trial["pruned_share"] <= 1
        assert yaml.safe_load((kept / "purify.yaml").read_text())["defence"] == names[trial["number"]]
        for place in trial.get("rungs", {}):
            assert place.startswith(f"{names[trial['number']]}/")
    asked = optuna.load_study(study_name="three", storage=f"sqlite:///{folder / 'optuna.db'}").trials
    assert {trial.number: trial.params["defence"] for trial in asked} == names
    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id], "tags.defence = 'clp'")
    assert {int(one.data.tags["trial"]) for one in runs} == {
        n for n, name in names.items() if name == "clp"
    }
    assert all(one.data.params["defence"] == "clp" and "clp.u" in one.data.params for one in runs)
    frame = study_package.load("three", outputs)
    assert set(frame["parameters.defence"]) == {"ims", "clp", "ft_sam"}
    page = (folder / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["defences"] == ["ims", "clp", "ft_sam"]
    assert {trial["number"]: trial["defence"] for trial in data["trials"]} == names
    assert (folder / "front.png").is_file()
    assert run_study(None, {}, outputs=outputs, address="local", resume="three")
    assert "is finished" in capsys.readouterr().out
    # what takes a study's choice takes this one as any other
    victim = outputs / "victims" / summary["victims"]["digits-badnets"]["digest"]
    words = ["--config", str(folder / "best.yaml"), "--victim", str(victim)]
    purified = [sys.executable, "-m", "study.purify", *words, "--out", str(tmp_path / "cleaned")]
    ended = subprocess.run(purified, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert names[chosen] in (tmp_path / "cleaned" / "manifest.json").read_text()
    console = Console(quiet=True)
    assert promote("three", None, True, False, False, None, None, outputs, console)
    uri = tracking_uri(outputs)
    (version,) = Registry(uri, "three").versions()
    reference = f"models:/three/{version.number}"
    assert settings_from(fetch_config(reference, uri, tmp_path / "config")) == settings_from(
        folder / "best.yaml"
    )
    defence, settings = DEFENCES[names[chosen]], settings_from(folder / "best.yaml")
    kept = folder / "trials" / f"{chosen:03d}" / f"digits-badnets.{defence.stem}.safetensors"
    own = defence.restore(load_victim(victim).model, load_tensors(kept), settings)
    image = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        served = load_classifier(reference, uri).model(image)
        assert torch.allclose(served, own(image), atol=1e-4)
    assert load_cleaned(tmp_path / "cleaned").model is not None


def test_a_table_of_trials_has_the_defence_as_a_column(tmp_path):
    rows = [
        record({"number": 0, "preset": None, "parameters": {"defence": "clp", "clp.u": 2.5}}),
        record({"number": 1, "preset": None, "parameters": {"defence": "ft_sam", "ft_sam.lr": 0.01}}),
    ]
    folder = folder_of(tmp_path, "both", {}, rows)
    frame = study_package.load("both", Path(folder).parent)
    assert list(frame["parameters.defence"]) == ["clp", "ft_sam"]
    assert pd.isna(frame.loc[0, "parameters.ft_sam.lr"])


def test_a_trial_far_too_slow_for_its_limit_ends_early_and_others_do_not(victim):
    config = study_of(trial_timeout=20.0)
    case = Case.of("digits-badnets", victim, config)
    quick, endless = config.defence_config({"defence": "clp"}), FtSamConfig(epochs=10**6)
    (first, last) = run_trials([quick, endless], [case], seed=0, rules=TrialRules.of(config))
    assert first.stopped is None
    assert "`trial_timeout` allows 20 s" in last.stopped
    assert not last.cases
    assert last.seconds < 20


def test_what_comes_before_the_first_step_is_none_of_its_pace(victim, monkeypatch):
    config = study_of(trial_timeout=20.0)
    case, now = Case.of("digits-badnets", victim, config), iter([10.0, 10.1, 10.2])
    settings = FtSamConfig(epochs=30)
    monkeypatch.setattr(TrialObserver, "seconds_each", property(lambda _: next(now)))
    watch = TrialObserver(
        case, victim.model, [TrialState(0, settings)], TrialRules.of(config), 10, None, [1]
    )
    assert not any(watch(0, SimpleNamespace(step=step), None) for step in range(3))
