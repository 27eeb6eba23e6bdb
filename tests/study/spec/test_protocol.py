import pytest
import yaml

from bimask.data import SHAPES, load_data
from study.launch import SPACES
from study.pipeline.protocol.cost import forward_operations, meta_net
from study.spec.config import StudyError
from study.spec.protocol import Case, ProtocolConfig, load_protocol

SMALL = {
    "name": "small",
    "datasets": {"digits": {"dataset": "digits", "epochs": 2}},
    "nets": {"a": {"net": "small_resnet", "width": 2}, "b": {"net": "small_resnet", "width": 4}},
    "attacks": {
        "badnets": {"attack": {"name": "badnets"}},
        "blended": {"attack": {"name": "blended"}},
        "sig": {"attack": {"name": "sig"}, "poisoning_rate_of": "target_class"},
    },
    "rates": [0.05, 0.1],
    "tuning": ["badnets"],
    "comparison": {
        "defences": ["clp"],
        "published": ["clp"],
        "search_seconds": 5,
        "budgets": [10],
        "seeds": {"tuning": [0], "judged": [1, 2]},
    },
}
SHIPPED = sorted(SPACES.glob("protocol*.yaml"))


def config(**changes):
    return ProtocolConfig.model_validate(SMALL | changes)


def test_a_protocol_has_every_attack_at_every_rate_on_every_net():
    found = config()
    assert len(found.cases()) == 1 * 2 * 3 * 2
    assert set(found.comparisons()) == {("digits", "a"), ("digits", "b")}
    specs = found.case_of()
    attacked = [case for case in specs.values() if case.rate is not None]
    assert sorted(map(str, attacked)) == sorted(map(str, found.cases() * 2)), "two seeds each"
    assert sum(case.rate is None for case in specs.values()) == 2 * 2


def test_trials_see_the_tuning_attacks_at_one_rate_and_nothing_else():
    one = config().comparisons()["digits", "a"]
    seen = one.study_of(one.entries()[0]).suite
    assert [(spec.attack_name, spec.poisoning_rate, spec.seed) for spec in seen] == [
        ("badnets", 0.1, 0)
    ]
    judged = one.judged()
    assert {(s.attack_name, s.poisoning_rate) for s in judged["unseen_seed"]} == {
        ("badnets", 0.1),
        ("badnets", 0.05),
    }
    assert {s.attack_name for s in judged["held_out"]} == {"blended", "sig"}
    low = next(s for s in judged["unseen_seed"] if s.poisoning_rate == 0.05)
    assert low.min_attack_success == 0, "an attack that is not learned at a low rate is a finding"
    assert next(iter(seen)).min_attack_success == 0.5


def test_what_is_excepted_is_no_case():
    found = config(**{"except": [{"net": "b", "attack": "sig"}, {"rate": 0.05, "attack": "blended"}]})
    assert Case("digits", "b", "sig", 0.1) not in found.cases()
    assert Case("digits", "a", "sig", 0.1) in found.cases()
    assert len(found.cases()) == 12 - 2 - 2


def test_a_resolved_protocol_reads_back_as_itself(tmp_path):
    found = config(**{"except": [{"net": "b"}]})
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump(found.model_dump(mode="json", by_alias=True)))
    again = load_protocol(path)
    assert again == found
    assert again.digest == found.digest != config().digest
    assert load_protocol(path, {"name": "other", "search_seconds": 6}).name == "other"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tuning": ["magic"]}, "'magic', which is none of `attacks`"),
        ({"rates": [0.1, 0.05]}, "rates rise"),
        ({"tuning_rate": 0.2}, "`tuning_rate` is one of"),
        ({"comparison": SMALL["comparison"] | {"common": {}}}, "has no 'common': the grid says it"),
        ({"comparison": SMALL["comparison"] | {"defences": ["magic"]}}, "no defence 'magic'"),
        ({"except": [{"net": "c"}]}, "net 'c', which the protocol has not"),
        ({"nets": {"a": {"net": "small_resnet", "width": 0}}}, "width"),
        ({"datasets": {"digits": {"dataset": "nothing"}}}, "unknown dataset"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused_in_words(tmp_path, changes, says):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(StudyError, match=r"bad\.yaml") as error:
        load_protocol(path)
    assert says in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_protocol_is_whole_and_its_nets_can_be_made(path):
    found = load_protocol(path)
    nets = {(s.dataset, s.net, s.width): s for s in found.suite().values()}
    for spec in nets.values():
        assert all(value.is_meta for value in meta_net(spec).parameters())
        assert forward_operations(spec) > 0


def test_the_papers_protocol_has_its_288_cases():
    found = load_protocol(SPACES / "protocol.yaml")
    assert len(found.cases()) == 288
    assert {case.attack for case in found.cases()} == {
        *("badnets", "blended", "low_frequency", "sig"),
        *("ssba", "input_aware", "wanet", "bpp"),
    }
    assert found.rates == [0.01, 0.05, 0.1]


def test_shapes_of_data_sets_are_those_of_the_data():
    train = load_data("digits").train
    shape = SHAPES["digits"]
    assert train.images.shape[1:] == (shape.channels, shape.size, shape.size)
    assert (train.num_classes, len(train)) == (shape.classes, shape.images)
