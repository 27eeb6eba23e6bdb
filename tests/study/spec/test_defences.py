"""A study of several defences: one flat space, in which the parameter `defence` says what else
exists."""

import re

import optuna
import pytest
import yaml

from bimask.defences import DEFENCES, settings_from
from bimask.defences.finetuning.ft_sam import FtSamConfig
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.pruning.clp import ClpConfig
from study.search.pareto_search import published
from study.spec.config import StudyConfig, StudyError
from study.spec.objectives import Aggregate, over_victims
from study.spec.reading import load_config
from study.spec.space import suggest
from study.store import records
from study.trial.rules import TrialRules

BASE = """\
name: tiny
trials: 4
victims:
  - {dataset: digits, attack: {name: badnets}}
reference_point: {clean_accuracy: 0.5, attack_success: 1.0}
"""
THREE = (
    BASE
    + """\
defences: [ims, clp, ft_sam]
fixed: {ims: {profile: fast}, ft_sam: {epochs: 20}}
space:
  clp: {u: {kind: float, low: 1, high: 5}}
  ims:
    inner_optimizer: {kind: categorical, choices: [sign, adamw]}
    inner_weight_decay: {kind: float, low: 0, high: 0.1, when: {inner_optimizer: adamw}}
start: [{defence: clp, u: 4.5}]
"""
)


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "study.yaml"

    def of(text):
        path.write_text(text)
        return load_config(path)

    return of


def test_settings_stand_under_their_defence_and_exist_where_it_is_chosen(read):
    config = read(THREE)
    assert (config.defence, config.defences) == (None, ["ims", "clp", "ft_sam"])
    assert list(config.space) == [
        "defence",
        "ims.inner_optimizer",
        "ims.inner_weight_decay",
        "clp.u",
        "ft_sam.lr",
        "ft_sam.rho",
    ], "ft_sam's are its own ranges, but for what is fixed"
    assert config.space["defence"].choices == ["ims", "clp", "ft_sam"]
    assert config.space["clp.u"].when == {"defence": "clp"}
    assert config.space["ims.inner_weight_decay"].when == {
        "defence": "ims",
        "ims.inner_optimizer": "adamw",
    }
    assert config.fixed["ft_sam.epochs"] == 20
    assert config.fixed["ims.keep"] == "average", "the profile, written out"
    assert "ims.inner_optimizer" not in config.fixed, "what is searched is not fixed"


def test_a_trial_has_the_settings_of_its_defence_alone(read):
    config = read(THREE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    kinds = {"ims": PurifyConfig, "clp": ClpConfig, "ft_sam": FtSamConfig}
    seen = set()
    for _ in range(20):
        parameters = suggest(config.space, study.ask())
        name = parameters["defence"]
        assert all(key == "defence" or key.startswith(f"{name}.") for key in parameters)
        settings = config.defence_config(parameters)
        assert type(settings) is kinds[name]
        for key, value in config.defenders.own(name, parameters).items():
            assert getattr(settings, key) == value
        seen.add(name)
    assert seen == set(kinds)
    assert config.defence_config({"defence": "ft_sam", "ft_sam.rho": 1.0}).epochs == 20


def test_each_defence_is_begun_with_once_at_its_own_values_where_they_lie_in_the_space(read):
    start = read(THREE).start
    assert start == [
        {"defence": "clp", "clp.u": 4.5},
        {"defence": "ims", "ims.inner_optimizer": "sign", "ims.inner_weight_decay": 0.01},
        {"defence": "ft_sam", "ft_sam.lr": 0.01, "ft_sam.rho": 2.0},
    ]
    narrow = "space: {clp: {u: {kind: float, low: 4, high: 5}}}\n"
    assert read(BASE + "defences: [clp, ft_sam]\n" + narrow).start[0] == {"defence": "clp"}


def test_a_resolved_study_is_read_back_as_it_is(read):
    empty = BASE + "defences: [ims, clp]\nspace: {clp: {}}\n"  # nothing of clp is searched
    for text in (THREE, empty, BASE + "defences: all\n"):
        config = read(text)
        again = read(yaml.safe_dump(config.model_dump(), sort_keys=False))
        assert again == config
        assert again.digest == config.digest


def test_a_list_of_one_is_a_study_of_one(read):
    named = "space: {u: {kind: float, low: 1, high: 5}}\nfixed: {}\nstart: [{u: 3}]\ndefence: clp\n"
    listed = (
        "space: {clp: {u: {kind: float, low: 1, high: 5}}}\nfixed: {clp: {}}\n"
        "start: [{u: 3, defence: clp}]\ndefences: [clp]\n"
    )
    assert read(BASE + listed) == read(BASE + named)
    assert read(BASE + "defences: [ft_sam]\n") == read(BASE + "defence: ft_sam\n")
    assert read(BASE + "defences: [ims]\n").digest == read(BASE).digest
    assert read(BASE + "defence: null\n") == read(BASE)


def test_a_study_of_one_keeps_its_digest(shipped_studies):
    known = {
        "clp-digits": "8fd84a40831763a0",
        "ft-sam-digits": "29043bc0738b40b6",
        "ims-digits": "253e8db3eb05131e",
    }
    found = {}
    for path in shipped_studies:
        if yaml.safe_load(path.read_text()).get("name") in known:
            config = load_config(path)
            found[config.name] = config.digest
    assert found == known


def test_all_are_all_of_the_registry(read):
    config = read(BASE + "defences: all\n")
    assert config.space["defence"].choices == list(DEFENCES)
    assert [point["defence"] for point in config.start] == list(DEFENCES)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            "defences: [ims, clp]\ndefence: ims",
            ":6: defences: stands beside `defence`; give one of the two",
        ),
        ("defences: [clp]\ndefence: ims", ":6: defences: stands beside `defence`; give one of the two"),
        ("defences: [ims, magic]", "defences: there is no defence 'magic'; known are ims"),
        ("defences: [ims, ims]", "defences: defences must differ, got ims, ims"),
        ("defences: []", "defences: give `all`, or a list of defences' names"),
        ("defences: every", "defences: give `all`, or a list of defences' names"),
        ("defences: [ims, {clp: 1}]", "defences: there is no defence {'clp': 1}"),
        (
            "defences: [ims, clp]\nsampler: gp",
            ":7: sampler: gp models the parameters that all trials have",
        ),
        (
            "defences: all\nsampler: nsga2",
            ":7: sampler: nsga2 models the parameters that all trials have",
        ),
        (
            "defences: [ims, clp]\nspace: {clp: {x: {kind: int, low: 1, high: 2}}}",
            ":7: space.clp.x: is no setting of the defence; its settings are u",
        ),
        (
            "defences: [ims, clp]\nspace:\n  clp:\n    u: {kind: float, low: -1, high: 2}",
            ":9: space.clp.u: Input should be greater than or equal to 0, got -1.0",
        ),
        (
            "defences: [ims, clp]\nspace:\n  clp:\n    u: {kind: float, low: 3, high: 2}",
            ":9: space.clp.u: `low < high` must hold",
        ),
        (
            "defences: [ims, clp]\nspace: {u: {kind: float, low: 1, high: 2}}",
            ":7: space.u: stands under none of the study's defences; give it under one of ims, clp",
        ),
        (
            "defences: [ims, clp]\nfixed: {ft_sam: {epochs: 3}}",
            ":7: fixed.ft_sam.epochs: stands under none of the study's defences",
        ),
        (
            "defences: [ims, clp]\nfixed: {clp: {profile: fast}}",
            ":7: fixed.clp.profile: there is no profile 'fast'; known are none",
        ),
        (
            "defences: [ims, clp]\nfixed: {clp: {u: 3}}\n"
            "space: {clp: {u: {kind: float, low: 1, high: 5}}}",
            ":7: fixed.clp.u: is searched in `space` as well; drop one of the two",
        ),
        (
            "defences: [ims, clp]\nstart: [{defence: clp, u: 99}]",
            ":7: start.0.clp.u: 99 is not in the space",
        ),
        (
            "defences: [ims, clp]\nstart: [{defence: ft_sam}]",
            "start.0.defence: 'ft_sam' is not in the space",
        ),
    ],
)
def test_what_does_not_fit_is_said_once_with_its_line(read, extra, said):
    with pytest.raises(StudyError, match=re.escape(said)) as refused:
        read(BASE + extra + "\n")
    assert len(str(refused.value).splitlines()) == 1


def test_the_published_defaults_of_each_defence_bear_its_name(read):
    config = read(THREE)
    assert published(config, "clp") == {"defence": "clp", "clp.u": 3.0}
    for name, defence in DEFENCES.items():
        if name in config.defences and name != "ims":
            assert config.defence_config(published(config, name) | {}).model_dump() == (
                defence.config().model_dump()
            )


def test_what_is_prepared_for_is_asked_by_the_flat_name(read):
    held = "fixed: {ims: {class_triggers: 0.5}}\n"
    config = read(BASE + "defences: [ims, clp]\n" + held)
    assert config.may_use(config.defenders.flat("ims", "class_triggers"))
    assert not config.may_use(config.defenders.flat("clp", "class_triggers"))


def test_a_trials_file_names_its_defence_and_is_read_as_its_settings(read, tmp_path):
    config = read(THREE)
    content = records.settings_content(config, {"defence": "ft_sam", "ft_sam.rho": 1.5})
    assert content["defence"] == "ft_sam"
    records.write_yaml(tmp_path / "best.yaml", content | {"study": "tiny", "trial": 3}, "a trial")
    assert settings_from(tmp_path / "best.yaml") == FtSamConfig(rho=1.5, epochs=20)


def test_one_that_prunes_nothing_has_pruned_nothing(read):
    bound = "constraints: {max_pruned_share: 0.1}\n"
    config = read(BASE + "defences: [clp, ft_sam]\n" + bound)
    rules = TrialRules.of(config)
    assert rules.numbers({}) == {"pruned_share": 0.0}
    assert rules.numbers({"pruned_share": 0.4}) == {"pruned_share": 0.4}
    assert TrialRules.of(read(BASE + "defence: ft_sam\n")).numbers({}) == {}
    others = [name for name, one in DEFENCES.items() if "pruned_share" not in one.numbers][:2]
    if len(others) == 2:
        with pytest.raises(StudyError, match="prune nothing, so constraints.max_pruned_share"):
            read(BASE + f"defences: [{', '.join(others)}]\n" + bound)


def test_numbers_that_a_defence_alone_knows_are_means_and_only_where_every_run_has_them():
    runs = {"a": [{"found": 1.0, "risk": 0.2}], "b": [{"found": 0.0, "risk": 0.4}]}
    worst = Aggregate(rule="worst")
    assert over_victims(worst, runs, seconds=1.0) == pytest.approx(
        {"found": 0.5, "risk": 0.3, "seconds": 1.0}
    )
    runs["b"] = [{"risk": 0.4}]
    assert set(over_victims(worst, runs, seconds=1.0)) == {"risk", "seconds"}


def test_rungs_are_of_one_defence(read):
    class Run:
        key = name = "v"
        before = 1.0

    several = TrialRules.of(read(BASE + "defences: [clp, ft_sam]\n"))
    assert several.rung(Run, 0.5, FtSamConfig()) == "ft_sam/v@0.5"
    assert several.rung(Run, 0.5, ClpConfig()) == "clp/v@0.5"
    assert TrialRules.of(read(BASE)).rung(Run, 0.5, PurifyConfig()) == "v@0.5"


def test_a_study_needs_no_file(read):
    config = read(THREE)
    assert StudyConfig.model_validate(yaml.safe_load(THREE)) == config
