"""A study over a suite with real Ray, Optuna, MLflow and SQLite, on victims that train in seconds."""

import json
from types import SimpleNamespace

import mlflow
import optuna
import pytest
import yaml

from bimask.inspection.trigger_pool import TriggerPool
from bimask.progress import Console
from bimask.victims import VictimSpec, obtain_victim
from study import search
from study.analysis import leave_out
from study.analysis.pareto import ParetoFront, losses
from study.pipeline import run
from study.pipeline.dry_run import dry_run
from study.pipeline.leave_out import run_leave_out
from study.search.pareto_search import ParetoSearch
from study.search.samplers import LONG, MANY, SAMPLERS, STARTUP, first_sampler, sampler_of
from study.search.warm_start import read_earlier
from study.spec.config import StudyConfig, StudyError
from study.trial import suite
from study.trial.checkpoint import Checkpoints
from study.trial.history import StoppingBounds
from study.trial.rules import TrialRules
from study.trial.run import run_trials

VICTIM = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "epochs": 4,
    "min_clean_accuracy": 0.0,
    "min_attack_success": 0.0,
}
SUITE = {
    "name": "suite",
    "trials": 7,
    "concurrency": 1,
    "clean_images_per_class": 3,
    "report_every": 2,
    "victims": [
        {**VICTIM, "width": 8, "attack": {"name": "badnets"}},
        {**VICTIM, "attack": {"name": "blended"}},
    ],
    "held_out": [{**VICTIM, "attack": {"name": "low_frequency"}}],
    "controls": [{**VICTIM, "poisoning_rate": 0}],
    "confirm": {"seeds": 2},
    "objectives": ["clean_accuracy", "attack_success", "pruned_share"],
    "aggregate": "worst",
    "constraints": {"max_accuracy_drop": 0.3},
    "early_stopping": {"dominated": True, "halving": {"shares": [0.5], "grace": 2}},
    "paper_defaults": False,
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0, "pruned_share": 1.0},
    "choose": {"max_accuracy_drop": 0.5},
    "fixed": {
        "inner_optimizer": "sign",
        "step_size": None,
        "patience": None,
        "batch_size": 16,
        "initialise_rounds": 2,
        "minimise_rounds": 2,
        "select_rounds": 4,
        "initial_selection": 0.8,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 2.0, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 3},
    },
    # the third breaks the accuracy, and its kin come after it
    "start": [{"mask_lr": rate, "inner_steps": 1} for rate in (0.02, 0.1, 2.0, 2.0, 2.0)],
}


def config_of(**changes):
    return StudyConfig.model_validate({**SUITE, **changes})


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, with_store):
    return with_store(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def finished(outputs):
    path = outputs / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    assert run.run_study(path, {}, outputs=outputs, address="local")
    folder = outputs / "suite"
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        folder=folder,
        trials={row["number"]: row for row in rows},
        summary=json.loads((folder / "summary.json").read_text()),
        confirmed=[json.loads(line) for line in (folder / "confirm.jsonl").read_text().splitlines()],
        asked={
            trial.number: trial
            for trial in optuna.load_study(
                study_name="suite", storage=f"sqlite:///{folder / 'optuna.db'}"
            ).trials
        },
    )


@pytest.mark.ray
def test_a_stopped_trial_is_pruned_everywhere_and_has_no_objectives(finished, outputs):
    pruned = [row for row in finished.trials.values() if row["status"] == "PRUNED"]
    assert pruned, "two of three equal trials were hopeless from the start"
    assert {row["status"] for row in finished.trials.values()} == {"COMPLETE", "PRUNED"}
    client = mlflow.MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bimask").experiment_id
    runs = {
        r.data.tags["trial"]: r for r in client.search_runs([experiment], "tags.study = 'suite'")
        if "trial" in r.data.tags
    }  # fmt: skip
    for number, row in finished.trials.items():
        assert finished.asked[number].state.name == row["status"]
        mine = runs[str(number)]
        assert mine.data.tags["status"] == row["status"]
        assert mine.info.status == {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}[row["status"]]
    for row in pruned:
        assert "attack_success" not in row
        assert "attack_success" not in runs[str(row["number"])].data.metrics
        assert mine.data.tags.get("reason") is None or row["reason"]
        assert finished.asked[row["number"]].values is None
    assert finished.summary["n_pruned"] == len(pruned)


@pytest.mark.ray
def test_a_trial_meets_the_cheap_victim_first_and_keeps_each_ones_numbers(finished):
    for row in finished.trials.values():
        assert row["rungs"], "every trial was looked at"
        assert next(iter(row["rungs"])) == "digits-blended@0.5", "its net is the narrow one"
        if row["status"] == "COMPLETE":
            assert set(row["scores"]) == {"digits-badnets", "digits-blended"}
            for name, worst in (("attack_success", max), ("clean_accuracy", min)):
                assert row[name] == worst(scores[name] for scores in row["scores"].values())


@pytest.mark.ray
def test_optuna_knows_the_constraints_and_the_front_is_of_feasible_trials(finished):
    complete = [row for row in finished.trials.values() if row["status"] == "COMPLETE"]
    for row in complete:
        held = finished.asked[row["number"]].constraints
        assert held == {"max_accuracy_drop": pytest.approx(row["accuracy_drop"] - 0.3)}
    feasible = [row for row in complete if row["accuracy_drop"] <= 0.3]
    front = ParetoFront.of(feasible, config_of().directions)
    assert {p["number"] for p in finished.summary["front"]} == {
        feasible[i]["number"] for i in front.indices
    }
    assert finished.summary["n_feasible"] == len(feasible)
    assert finished.summary["chosen"]["number"] in {row["number"] for row in feasible}


@pytest.mark.ray
def test_the_choice_is_confirmed_on_every_victim_with_seeds_that_no_trial_had(finished):
    assert len(finished.confirmed) == 4 * 2
    assert {row["seed"] for row in finished.confirmed} == {1, 2}
    assert {row["test"]["split"] for row in finished.confirmed} == {"test"}
    found = finished.summary["suite"]["chosen"]
    assert {name: one["role"] for name, one in found["victims"].items()} == {
        "digits-badnets": "tuning",
        "digits-blended": "tuning",
        "digits-low_frequency": "held_out",
        "digits-clean": "control",
    }
    held_out = [
        row["test"]["attack_success"] for row in finished.confirmed if row["role"] == "held_out"
    ]
    spread = found["roles"]["held_out"]["attack_success"]
    assert spread["mean"] == pytest.approx(sum(held_out) / 2)
    assert (spread["min"], spread["max"], spread["n"]) == (min(held_out), max(held_out), 2)
    for role in ("tuning", "control"):
        assert found["roles"][role]["accuracy_drop"]["n"] == (4 if role == "tuning" else 2)
    # the same job gives the same scores
    row = finished.confirmed[0]
    settings = config_of().defence_config(finished.summary["chosen"]["parameters"])
    job = suite.Job(row["configuration"], settings, row["victim"], row["role"], row["seed"])
    specs = {
        name: spec for name, spec in zip(config_of().suite_names(), config_of().suite, strict=True)
    }
    victim = obtain_victim(specs[job.victim], finished.folder.parent / "victims")
    again = suite.confirm(job, victim, config_of())
    assert again["test"]["attack_success"] == pytest.approx(row["test"]["attack_success"], abs=0.02)


@pytest.mark.ray
def test_an_earlier_study_counts_as_measured_or_as_points_to_try(finished):
    folder, searched = str(finished.folder), [
        row for row in finished.trials.values() if row["status"] == "COMPLETE"
    ]  # fmt: skip
    earlier = read_earlier(config_of(warm_start_from=[folder], aggregate="mean"))
    assert len(earlier.observed) == len(searched)
    assert not earlier.points
    one = next(row for row in searched if row["parameters"] == earlier.observed[0].parameters)
    mean = sum(scores["attack_success"] for scores in one["scores"].values()) / 2
    assert earlier.observed[0].values["attack_success"] == pytest.approx(mean)

    other = config_of(warm_start_from=[folder], victims=[SUITE["victims"][0]])
    earlier = read_earlier(other)
    assert not earlier.observed
    assert earlier.points
    narrow = {**SUITE["space"], "inner_steps": {"kind": "int", "low": 2, "high": 3}}
    inside = read_earlier(config_of(warm_start_from=[folder], space=narrow, start=[]))
    assert all(one.parameters["inner_steps"] >= 2 for one in inside.observed)


@pytest.mark.ray
def test_a_trial_that_was_stopped_stays_so_when_its_study_is_gone_on_with(finished, tmp_path):
    config = config_of()
    specs = zip(config.victim_names(), config.victims, strict=True)
    root = finished.folder.parent / "victims"
    victims = {name: obtain_victim(spec, root) for name, spec in specs}
    hopeless = StoppingBounds(lines={"digits-blended@0.5": [[-1.0, 0.0, -1.0]]})
    settings = [config.defence_config(point) for point in SUITE["start"][:2]]

    def ended(rivals):
        return run_trials(
            settings,
            suite.cases_of(config, victims),
            seed=0,
            rules=TrialRules.of(config, rivals),
            checkpoints=Checkpoints(tmp_path, 1e9),
        )

    first, again = ended(hopeless), ended(StoppingBounds())
    for before, after in zip(first, again, strict=True):
        assert before.stopped == "behind at 0.5 of the rounds on digits-blended"
        assert (after.stopped, after.rungs, after.cases) == (before.stopped, before.rungs, {})


def record(number, badnets, blended, accuracy=0.95):
    scores = {
        name: {
            "clean_accuracy": accuracy,
            "attack_success": success,
            "recovery": 0.5,
            "pruned_share": 0.0,
            "accuracy_drop": 0.0,
        }
        for name, success in (("digits-badnets", badnets), ("digits-blended", blended))
    }
    return {"number": number, "status": "COMPLETE", "scores": scores, "seconds": 1.0}


def test_the_choice_without_an_attack_follows_from_the_others_numbers():
    trials = [record(0, 0.0, 0.9), record(1, 0.3, 0.0), record(2, 0.2, 0.2)]
    before = {"digits-badnets": 0.95, "digits-blended": 0.95}
    found = leave_out.table(config_of(), trials, before)
    assert found["exact"] is False
    badnets, blended = found["attacks"]["badnets"], found["attacks"]["blended"]
    assert (badnets["without"]["number"], badnets["with"]["number"]) == (1, 2)
    assert badnets["loss"] == {"attack_success": pytest.approx(0.1), "clean_accuracy": 0.0}
    assert blended["without"]["number"] == 0
    assert blended["loss"]["attack_success"] == pytest.approx(0.7)
    blind = config_of(sampler="qmc", early_stopping=None)
    assert leave_out.table(blind, trials, before)["exact"] is True
    others = leave_out.without(config_of(), "blended")
    assert [spec.attack["name"] for spec in others.victims] == ["badnets"]
    assert [spec.attack["name"] for spec in others.held_out] == ["blended", "low_frequency"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_learns_in_the_whole_space_also_beside_the_papers_trial(sampler):
    """On a toy whose optimum is a corner: all objectives are told, and points come from the model."""
    config = config_of(
        sampler=sampler, trials=26, paper_defaults=True, early_stopping=None, constraints={}, start=[]
    )
    searcher = ParetoSearch(config, None)
    for number in range(26):
        (member,) = searcher.suggest(str(number))["members"]
        assert member["preset"] == ("paper" if number == 0 else None)
        rate = member["parameters"]["mask_lr"]
        record = {"clean_accuracy": rate, "attack_success": 1 - rate, "pruned_share": 0.5, "seconds": 9}
        searcher.tell(member | record | {"status": "COMPLETE"})
    relative = searcher.study.sampler.infer_relative_search_space(searcher.study, None)
    if sampler not in ("random", "tpe"):  # these two propose each parameter by itself
        assert set(relative) == set(config.space)
    searcher.close()
    assert {trial.state.name for trial in searcher.study.trials} == {"COMPLETE"}


def test_gaussian_processes_do_not_propose_again_what_was_stopped():
    """All beyond 0.3 is stopped, where by what is known of the rest the objectives would be best."""
    space = SUITE["space"] | {"mask_lr": SUITE["space"]["mask_lr"] | {"high": 0.4}}
    config = config_of(sampler="gp", trials=20, constraints={}, start=[], space=space)
    searcher = ParetoSearch(config, None)
    stopped = []
    for number in range(20):
        (member,) = searcher.suggest(str(number))["members"]
        rate = member["parameters"]["mask_lr"]
        record = {"clean_accuracy": rate, "attack_success": 1 - rate, "pruned_share": 0.5, "seconds": 9}
        ended = "PRUNED" if rate > 0.3 else "COMPLETE"
        stopped += [tuple(member["parameters"].values())] if ended == "PRUNED" else []
        searcher.tell(member | record | {"status": ended})
    assert 1 <= len(stopped) <= 6  # 13 and more of 20 where a stopped trial is left out of the model
    assert len(set(stopped)) == len(stopped)
    searcher.close()
    states = [trial.state.name for trial in searcher.study.trials]
    assert (states.count("PRUNED"), states.count("RUNNING")) == (len(stopped), 0)


@pytest.mark.parametrize(("seconds", "settled"), [(1.0, "TPESampler"), (9.0, "GPSampler")])
def test_auto_is_gp_where_trials_take_as_long_as_its_suggestions_are_worth(seconds, settled):
    searcher = ParetoSearch(config_of(sampler="auto", start=[]), None)
    for number in range(STARTUP):
        assert type(searcher.study.sampler).__name__ == "GPSampler"
        (member,) = searcher.suggest(str(number))["members"]
        scores = {"clean_accuracy": 0.9, "attack_success": 0.1, "pruned_share": 0.5, "accuracy_drop": 0}
        searcher.tell(member | scores | {"status": "COMPLETE", "seconds": seconds})
    assert type(searcher.study.sampler).__name__ == settled


def test_auto_is_tpe_where_gp_is_slow_or_blind():
    narrow = {"kind": "int", "low": 1, "high": 3, "when": {"inner_optimizer": "sign"}}
    names = {"kind": "categorical", "choices": ["adamw", "sign"]}
    conditions = config_of(space={"inner_optimizer": names, "inner_steps": narrow}, fixed={}, start=[])
    found = [conditions, config_of(trials=MANY + 1), config_of(trials=MANY), config_of(sampler="qmc")]
    assert [first_sampler(config) for config in found] == ["tpe", "tpe", "gp", "qmc"]


def test_tpe_draws_all_settings_at_once_where_the_history_is_long():
    lengths = [LONG, LONG + 1]
    made = [sampler_of(config_of(trials=trials, sampler="tpe"), 0) for trials in lengths]
    assert [bool(sampler._multivariate) for sampler in made] == [False, True]
    assert not made[1]._group  # which settings come together is asked where some have conditions
    rate = SUITE["space"]["mask_lr"]
    space = {**SUITE["space"], "step_size": {**rate, "when": {"inner_steps": 1}}}
    assert sampler_of(config_of(trials=LONG + 1, sampler="tpe", space=space), 0)._group


def test_the_first_points_are_those_of_the_search_itself():
    members = search.first_points(config_of(), 5)
    assert [member["parameters"] for member in members] == SUITE["start"]
    assert len(search.first_points(config_of(trials=3), 5)) == 3


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(SUITE))
    before = sorted(tmp_path.rglob("*"))
    dry_run(path, {}, outputs=tmp_path / "outputs", console=Console(width=200))
    shown = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for text in ("mask_lr", "low_frequency", "held out", "to be trained", "'mask_lr': 0.02"):
        assert text in shown
    assert "estimate: a trial" in shown
    assert shown.count("inner_steps': 1") == 5


def test_a_dry_run_searches_triggers_once_a_net_and_counts_them(tmp_path, capsys, monkeypatch):
    path = tmp_path / "suite.yaml"
    narrow = [VICTIM | {"attack": {"name": name}} for name in ("badnets", "blended")]
    fixed = SUITE["fixed"] | {"class_triggers": 0.3}
    path.write_text(yaml.safe_dump({**SUITE, "victims": narrow, "fixed": fixed}))
    search, searched = TriggerPool.search, []

    def counted(model, images):
        searched.append(len(images))
        return search(model, images)

    monkeypatch.setattr(TriggerPool, "search", counted)
    dry_run(path, {}, outputs=tmp_path / "outputs", console=Console(width=200))
    assert searched == [30, 30]
    assert "estimate: searching triggers" in capsys.readouterr().out


def test_an_attack_that_is_not_there_cannot_be_left_out():
    with pytest.raises(StudyError, match="got 'wanet'; the tuning victims' attacks are badnets"):
        leave_out.select(config_of(), "wanet")
    with pytest.raises(StudyError, match="of two attacks or more, got badnets"):
        leave_out.select(config_of(victims=[SUITE["victims"][0]]), "all")
    assert leave_out.select(config_of(), "all") == ["badnets", "blended"]


def test_a_warm_start_from_nowhere_is_refused(tmp_path):
    with pytest.raises(StudyError, match="`warm_start_from` names .*nowhere, which holds no study"):
        read_earlier(config_of(warm_start_from=[str(tmp_path / "nowhere")]))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_leaving_out_each_attack_in_turn(sampler, outputs, capsys):
    """A sampler that learns needs a study without each attack; one that does not, none."""
    path = outputs / "leave-out.yaml"
    raw = {**SUITE, "name": f"left-{sampler}", "sampler": sampler, "trials": 3, "early_stopping": None}
    path.write_text(yaml.safe_dump(raw))
    assert run_leave_out(path, {}, "all", outputs=outputs, address="local")
    found = json.loads((outputs / f"left-{sampler}" / "leave_one_out.json").read_text())
    assert found["exact"]
    assert set(found["attacks"]) == {"badnets", "blended"}
    assert "Leave one attack out" in capsys.readouterr().out
    for attack in found["attacks"]:
        folder = outputs / f"left-{sampler}-without-{attack}"
        assert folder.exists() == (sampler == "tpe")
        if sampler == "tpe":
            confirmed = json.loads((folder / "summary.json").read_text())["suite"]["chosen"]["victims"]
            assert confirmed[f"digits-{attack}"]["role"] == "held_out"
            unseen = confirmed[f"digits-{attack}"]["attack_success"]["mean"]
            assert found["attacks"][attack]["without"]["attack_success"] == pytest.approx(unseen)


def test_controls_must_be_clean():
    assert VictimSpec(**SUITE["controls"][0]).is_control
    assert [suite.roles(config_of())[name] for name in config_of().suite_names()] == [
        *("tuning", "tuning"),
        *("held_out", "control"),
    ]


def test_losses_follow_the_objectives_order():
    values = {"clean_accuracy": 0.9, "attack_success": 0.2, "pruned_share": 0.1, "seconds": 3.0}
    assert losses([values], config_of().directions).tolist() == [[-0.9, 0.2, 0.1]]
