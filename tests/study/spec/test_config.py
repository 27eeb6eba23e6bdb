import re

import optuna
import pytest
import yaml

from bimask.attacks import ATTACKS
from bimask.defences.ims.purify import PurifyConfig
from study.pipeline.prepare import check_data
from study.search.pareto_search import published
from study.spec.config import StudyConfig, StudyError
from study.spec.reading import load_config
from study.spec.space import suggest

GOOD = """\
name: tiny
trials: 2
victims:
  - {dataset: digits, attack: {name: badnets}}
reference_point: {clean_accuracy: 0.5, attack_success: 1.0}
fixed: {patience: null}
space:
  inner_optimizer: {kind: categorical, choices: [sign, adamw]}
  inner_steps: {kind: int, low: 2, high: 4}
  mask_lr: {kind: float, low: 0.01, high: 0.1, log: true}
  inner_weight_decay: {kind: float, low: 0.0, high: 0.1, when: {inner_optimizer: adamw}}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_a_good_study_is_read_as_it_stands(study):
    config = load_config(study(GOOD))
    assert config.trials == 2
    assert list(config.space) == ["inner_optimizer", "inner_steps", "mask_lr", "inner_weight_decay"]
    assert config.victim_names() == ["digits-badnets"]
    assert config.defence_config({"inner_steps": 3}) == PurifyConfig(patience=None, inner_steps=3)


def test_overrides_replace_and_digest_sees_them(study):
    path = study(GOOD)
    assert load_config(path, {"trials": 5}).trials == 5
    assert load_config(path, {"trials": 5}).digest != load_config(path).digest


def test_how_much_runs_at_once_makes_no_other_study(study):
    config = load_config(study(GOOD), {"trials": 7, "concurrency": 2, "trials_per_actor": 3})
    assert config.groups == 3
    assert config.digest == load_config(study(GOOD), {"trials": 7}).digest


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("trials: 2", "trails: 2", ["study.yaml:2: trails: unknown key", "trials: is missing"]),
        ("trials: 2", "trials: 0", ["study.yaml:2: trials:", "greater than or equal to 1, got 0"]),
        ("trials: 2", "trials: many", ["trials:", "got 'many'"]),
        ("trials: 2", "trials: 2\ntrials_per_actor: 0", ["study.yaml:3: trials_per_actor:", "got 0"]),
        ("name: tiny", "name: ../up", ["study.yaml:1: name:"]),
        ("low: 2, high: 4", "low: 4, high: 2", ["study.yaml:9: space.inner_steps:", "`low < high`"]),
        ("low: 0.01", "low: 0.0", ["space.mask_lr", "log scale"]),
        ("mask_lr:", "maks_lr:", ["space.maks_lr: is no setting of the defence"]),
        ("kind: int", "kind: float", ["space.inner_steps:", "integer"]),
        ("kind: int", "kind: whole", ["study.yaml:9: space.inner_steps"]),
        ("[sign, adamw]", "[sign, sgd]", ["space.inner_optimizer:", "got 'sgd'"]),
        ("patience: null", "patience: -1", ["study.yaml:6: fixed.patience:", "got -1"]),
        ("patience: null", "mask_lr: 0.1", ["fixed.mask_lr: is searched in `space` as well"]),
        ("when: {inner_optimizer: adamw}", "when: {norm: l2}", ["space.inner_weight_decay.when"]),
        ("when: {inner_optimizer: adamw}", "when: {inner_optimizer: sgd}", ["never takes the value"]),
        ("fixed: {", "start: [{inner_steps: 9}]\nfixed: {", ["start.0.inner_steps: 9 is not in"]),
        ("fixed: {", "start: [{budget: 1}]\nfixed: {", ["study.yaml:6: start.0.budget: 1 is not"]),
        ("name: badnets", "name: badnet", ["victims.0", "nknown attack 'badnet'"]),
        ("name: badnets", "name: badnets, size: 0", ["victims.0", "size=0"]),
        ("clean_accuracy: 0.5", "clean_accuracy: 5", ["study.yaml:5: reference_point.clean_accuracy"]),
        ("trials: 2", "trials: 2\nobjectives: [clean_accuracy]", ["study.yaml:3: objectives:"]),
        ("trials: 2", "trials: 2\nobjectives: [recovery, recovery]", ["objectives must differ"]),
        (
            "trials: 2",
            "trials: 2\nobjectives: [clean_accuracy, seconds]",
            ["study.yaml:6: reference_point: a value for the objective seconds is missing"],
        ),
        ("trials: 2", "trials: 2\naggregate: median", ["study.yaml:3: aggregate.rule", "got 'median'"]),
        ("trials: 2", "trials: 2\nconstraints: {max_drop: 1}", ["constraints.max_drop: unknown key"]),
        ("trials: 2", "trials: 2\nwidth: 8", ["study.yaml:3: width: unknown key; remove it or"]),
        (
            "trials: 2",
            "trials: 2\nconfirm: {sedes: 5}",
            ["confirm.sedes: unknown key; did you mean seeds?"],
        ),
        ("digits, attack", "digits, widht: 8, attack", ["widht: unknown key; did you mean width?"]),
        ("log: true", "logg: true", ["space.mask_lr.logg: unknown key; did you mean log?"]),
        (
            "trials: 2",
            "trials: 2\ncontrols: [{attack: {name: badnets}}]",
            ["study.yaml:3: controls.0", "a control is clean: 0, got 0.1"],
        ),
        (
            "trials: 2",
            "trials: 2\nheld_out: [{dataset: digits, attack: {name: badnets}}]",
            ["the same victim is listed twice"],
        ),
        ("trials: 2", "trials: 2\nearly_stopping: {halving: {shares: [1.0]}}", ["shares.0", "got 1.0"]),
        ("trials: 2", "trials: 2\ntrials: 3", ["study.yaml:3: trials: is given twice"]),
    ],
)
def test_a_problem_is_named_with_its_place(study, old, new, expected):
    assert old in GOOD
    with pytest.raises(StudyError) as caught:
        load_config(study(GOOD.replace(old, new, 1)))
    for part in expected:
        assert part in str(caught.value)


def test_keys_that_came_later_change_no_digest_where_they_say_what_goes_without_saying(study):
    config = load_config(study(GOOD))
    said = GOOD + "aggregate: mean\nrepeats: 1\nobjectives: [clean_accuracy, attack_success]\n"
    assert load_config(study(said)).digest == config.digest
    assert load_config(study(GOOD + "aggregate: worst\n")).digest != config.digest


def test_every_problem_is_told_at_once(study):
    text = GOOD.replace("trials: 2", "trials: 0").replace("low: 4", "low: 9")
    text = text.replace("mask_lr:", "maks_lr:").replace("patience: null", "patients: 1")
    with pytest.raises(StudyError) as caught:
        load_config(study(text))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(study(text))) for line in lines)


def test_an_empty_space_is_refused_and_an_unreadable_one_is_not_called_empty(study):
    head = GOOD[: GOOD.index("space:")]
    with pytest.raises(StudyError, match=r"space: .*at least 1"):
        load_config(study(head + "space: {}\n"))
    with pytest.raises(StudyError) as caught:
        load_config(study(head + "space: {mask_lr: 3}\n"))
    assert "at least 1" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list", "a: [unclosed"])
def test_what_is_no_mapping_is_refused_in_one_line(study, text):
    with pytest.raises(StudyError) as caught:
        load_config(study(text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"no\.yaml"):
        load_config(tmp_path / "no.yaml")


def test_the_same_victim_twice_is_refused_but_two_seeds_are_two_victims(study):
    victim = "  - {dataset: digits, attack: {name: badnets}}\n"
    with pytest.raises(StudyError, match="twice"):
        load_config(study(GOOD.replace(victim, victim * 2)))
    other = "  - {dataset: digits, attack: {name: badnets}, seed: 1}\n"
    names = load_config(study(GOOD.replace(victim, victim + other))).victim_names()
    assert len(set(names)) == 2


def test_a_conditional_parameter_exists_where_its_condition_holds(study):
    space = load_config(study(GOOD)).space
    sampler = optuna.samplers.RandomSampler(seed=0)
    asked = optuna.create_study(sampler=sampler)
    seen = set()
    for _ in range(20):
        trial = asked.ask()
        chosen = suggest(space, trial)
        assert chosen == trial.params
        assert ("inner_weight_decay" in chosen) == (chosen["inner_optimizer"] == "adamw")
        PurifyConfig.model_validate(chosen)
        seen.add(chosen["inner_optimizer"])
    assert seen == {"sign", "adamw"}


def test_every_shipped_study_is_valid(shipped_studies):
    assert len(shipped_studies) >= 2
    for path in shipped_studies:
        given = yaml.safe_load(path.read_text())
        # the study of a suspect gets its model on the command line
        config = load_config(path, {} if "victims" in given else {"victims": [{"dataset": "digits"}]})
        assert given["name"] == config.name
        assert path.read_text().startswith("#"), "a study begins with a comment on what it is"


@pytest.mark.parametrize(
    ("fixed", "start", "space", "expected"),
    [
        ({}, [], {}, False),
        ({"class_triggers": 0}, [{"mask_lr": 0.1}], {}, False),
        ({"class_triggers": 0.5}, [], {}, True),
        ({}, [], {"class_triggers": {"kind": "float", "low": 0, "high": 1}}, True),
    ],
)
def test_what_no_trial_has_is_not_prepared_for(study, fixed, start, space, expected):
    config = load_config(study(GOOD))
    changed = config.model_dump() | {"fixed": fixed, "start": start}
    changed["space"] |= space
    assert StudyConfig.model_validate(changed).may_use("class_triggers") == expected


def test_the_papers_trial_takes_nothing_of_what_the_others_share(study):
    config = load_config(study(GOOD))
    assert config.defence_config(published(config)) == PurifyConfig() != config.defence_config({})


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_passes_the_check_of_a_studys_data(name, study):
    check_data(load_config(study(GOOD.replace("badnets", name))))


def test_a_study_names_its_defence_and_searches_its_own_ranges(study):
    path = study(GOOD.split("fixed:")[0].replace("trials: 2", "trials: 2\ndefence: clp"))
    config = load_config(path)
    assert config.defenders.names == ("clp",)
    assert list(config.space) == ["u"]
    assert (config.space["u"].low, config.space["u"].high) == (0, 10)
    assert config.defence_config({"u": 2}).u == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("defence: magic", "there is no defence 'magic'; known are ims, "),
        ("defence: clp\nfixed: {budget: 1}", "fixed.budget: is no setting of the defence"),
        ("defence: clp\nfixed: {profile: fast}", "there is no profile 'fast'; known are none"),
        (
            "defence: ft_sam\nconstraints: {max_pruned_share: 0.5}",
            "ft_sam prunes nothing, so constraints.max_pruned_share bounds nothing",
        ),
        (
            "defence: ft_sam\nobjectives: [clean_accuracy, pruned_share]",
            "ft_sam prunes nothing, so pruned_share cannot be an objective",
        ),
    ],
)
def test_what_does_not_fit_a_defence_is_said(study, extra, said):
    path = study(GOOD.split("fixed:")[0].replace("trials: 2", f"trials: 2\n{extra}"))
    with pytest.raises(StudyError, match=re.escape(said)):
        load_config(path)


def test_what_is_fixed_is_not_searched_where_no_space_is_given(study):
    text = GOOD.split("fixed:")[0].replace("trials: 2", "trials: 2\ndefence: ft_sam")
    config = load_config(study(text + "fixed: {epochs: 20}\n"))
    assert list(config.space) == ["lr", "rho"]
    assert config.defence_config({"rho": 1.0}).epochs == 20


@pytest.mark.parametrize(
    ("trials", "gpus", "given", "size"),
    [
        (1000, 0, "auto", 1),
        (30, 0.25, "auto", 1),
        (100, 0.25, "auto", 2),
        (5000, 1, "auto", 32),
        (1000, 0, 3, 3),
        (30, 1, 8, 8),
    ],
)
def test_a_group_is_as_large_as_is_said_or_as_kernels_and_learning_want(trials, gpus, given, size):
    config = StudyConfig(
        name="groups",
        trials=trials,
        gpus_per_trial=gpus,
        trials_per_actor=given,
        victims=[{"dataset": "digits", "net": "small_resnet", "attack": {"name": "badnets"}}],
        reference_point={"clean_accuracy": 0.1, "attack_success": 1.0},
        space={"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
    )
    assert config.group_size == size
    assert config.groups == -(-trials // size)
