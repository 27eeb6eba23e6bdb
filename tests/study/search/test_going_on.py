"""Optuna's side and the records' side of a study that goes on, without Ray's processes."""

import json
import sqlite3

import optuna
import pytest
import torch
from optuna.trial import TrialState

from bimask.defences.base import CleanData
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.defence import Ims
from study.search import ParetoSearch
from study.search.actor import checkpoints_of, with_bucket
from study.search.pareto_search import Searcher
from study.spec.config import StudyConfig, StudyError
from study.store.databases import sqlite_url
from study.tracking.recorder import Recorder
from study.trial.checkpoint import Checkpoints

STUDY = {
    "name": "goes-on",
    "trials": 7,
    "trials_per_actor": 2,
    "victims": [
        {"dataset": "digits", "net": "small_resnet", "width": 4, "attack": {"name": "badnets"}}
    ],
    "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 30},
    },
    "start": [{"mask_lr": 0.1}],
}
CONFIG = StudyConfig.model_validate(STUDY)


def complete(number):
    scores = {"clean_accuracy": 0.9, "attack_success": 0.1, "seconds": 1.0}
    return {"number": number, "preset": None, "status": "COMPLETE", "parameters": {}, **scores}


class Life:
    """One driver's life: what it asks and tells, until it is killed."""

    def __init__(self, folder, records=(), config=CONFIG, say=lambda _: None):
        self.searcher = ParetoSearch(
            config, sqlite_url(folder / "optuna.db"), records=records, checkpoints=folder, say=say
        )

    def suggest(self):
        group = self.searcher.suggest("id")
        if group in (None, Searcher.FINISHED):
            return group
        return [(member["number"], member["parameters"]) for member in group["members"]]

    def rest(self):
        return list(iter(self.suggest, Searcher.FINISHED))

    def states(self):
        return {trial.number: trial.state.name for trial in self.searcher.study.get_trials()}


def numbers(groups):
    return [[number for number, _ in group] for group in groups]


def test_a_life_asks_for_every_trial_once(tmp_path):
    life = Life(tmp_path)
    assert life.searcher.groups_left() == 4
    assert numbers(life.rest()) == [[0, 1], [2, 3], [4, 5], [6]]
    assert life.suggest() == Searcher.FINISHED


def test_what_ran_comes_first_with_its_number_its_group_and_its_parameters(tmp_path):
    life = Life(tmp_path)
    first, second, third = (life.suggest() for _ in range(3))
    assert second[0][1]["mask_lr"] != 0.1 == first[1][1]["mask_lr"]
    records = [complete(number) for number, _ in second]
    later = Life(tmp_path, records)  # killed before Optuna was told
    assert later.states()[2] == later.states()[3] == "COMPLETE"
    assert later.searcher.groups_left() == 3
    assert later.suggest() == first
    assert later.suggest() == third
    assert numbers(later.rest()) == [[6]]


def test_a_kill_between_asking_and_suggesting_costs_nothing(tmp_path):
    life = Life(tmp_path)
    life.suggest()
    life.searcher.study.ask()  # and no more: number 2 has no parameters, no group
    later = Life(tmp_path, [complete(0), complete(1)])
    assert numbers(later.rest()) == [[2], [3, 4], [5, 6]]
    parameters = later.searcher.study.get_trials()[2].params
    assert set(parameters) == set(CONFIG.space)


@pytest.mark.parametrize("enqueued", [0, 1])
def test_a_kill_before_all_is_enqueued_costs_no_preset_and_no_starting_point(tmp_path, enqueued):
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path / 'optuna.db'}",
        study_name="goes-on",
        directions=["maximize", "minimize"],
    )
    if enqueued:
        study.enqueue_trial({}, user_attrs={"preset": "paper"})
    (paper, start), *_ = Life(tmp_path).rest()
    assert paper == (0, PurifyConfig().model_dump())
    assert start[1]["mask_lr"] == 0.1


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "nsga2"])
def test_each_life_draws_other_suggestions(tmp_path, sampler):
    config = CONFIG.model_copy(update={"sampler": sampler, "trials_per_actor": 1, "start": []})
    config = config.model_copy(update={"paper_defaults": False})
    seen, records = [], []
    for _ in range(6):
        life = Life(tmp_path, records, config)
        ((number, parameters),) = life.suggest()
        seen.append(tuple(parameters.values()))
        records.append(complete(number))
    assert len(set(seen)) == 6


def test_a_sequence_that_fills_the_space_goes_on_where_it_was(tmp_path):
    """Six points are the same from one life and from six of them."""
    config = CONFIG.model_copy(update={"sampler": "qmc", "trials_per_actor": 1, "start": []})
    config = config.model_copy(update={"paper_defaults": False})
    found = []
    for cuts in (False, True):
        folder = tmp_path / str(cuts)
        folder.mkdir()
        records, points = [], []
        life = Life(folder, records, config)
        for _ in range(6):
            ((number, parameters),) = life.suggest()
            points.append(parameters)
            records.append(complete(number))
            life.searcher.tell(records[-1])
            life = Life(folder, records, config) if cuts else life
        found.append(points)
    assert found[0] == found[1]


def test_failed_trials_are_told_and_not_asked_for_again(tmp_path):
    life = Life(tmp_path)
    life.suggest()
    failed = {"number": 0, "preset": None, "status": "FAILED", "reason": "x"}
    later = Life(tmp_path, [failed, complete(1)])
    assert later.states()[0] == "FAIL"
    assert not any(0 in group for group in numbers(later.rest()))


def test_a_storage_that_was_lost_is_refused(tmp_path):
    with pytest.raises(StudyError, match="lacks trials that have records"):
        Life(tmp_path, [complete(5)])


def test_a_locked_storage_delays_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("study.search.pareto_search.LOCK_SECONDS", 0.1)
    said = []
    config = CONFIG.model_copy(update={"environment_timeout": 0.5})
    life = Life(tmp_path, config=config, say=said.append)
    ((zero, _), (one, _)) = life.suggest()
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    life.searcher.tell(complete(zero))
    life.searcher.tell({"number": one, "preset": None, "status": "FAILED"})
    assert life.suggest() is None, "Tune asks again"
    with pytest.raises(StudyError, match="database is locked"):
        life.searcher.close()
    assert len(said) == 2, "that it waits is said once to each who waits"
    other.execute("COMMIT")
    other.close()
    assert numbers(life.rest()) == [[2, 3], [4, 5], [6]]
    assert [life.states()[number] for number in (zero, one)] == ["COMPLETE", "FAIL"]
    assert TrialState.RUNNING.name not in [life.states()[number] for number in (zero, one)]


def test_a_storage_that_stays_locked_ends_the_study_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("study.search.pareto_search.LOCK_SECONDS", 0.1)
    config = CONFIG.model_copy(update={"environment_timeout": 0.2})
    life = Life(tmp_path, config=config)
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StudyError, match="database is locked"):
        Life(tmp_path, config=config)
    assert life.suggest() is None
    with pytest.raises(StudyError, match=r"does not let us in .*database is locked.*--resume"):
        list(iter(life.suggest, "nothing but an error ends this"))
    other.close()
    assert numbers(life.rest()) == [[0, 1], [2, 3], [4, 5], [6]]


def test_a_storage_that_is_let_go_of_in_time_is_waited_for_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr("study.search.pareto_search.LOCK_SECONDS", 0.1)
    Life(tmp_path)
    said = []
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")

    def say(text):
        said.append(text)
        other.close()

    Life(tmp_path, say=say)
    assert "waiting" in said[0]
    assert "going on" in said[1]


@pytest.mark.parametrize("content", [b"no database at all " * 99, b"SQLite format 3\0" + bytes(8000)])
def test_garbage_for_a_storage_is_one_sentence(tmp_path, content):
    (tmp_path / "optuna.db").write_bytes(content)
    with pytest.raises(StudyError, match="optuna.db cannot be read .*put it back"):
        Life(tmp_path)


def test_trials_whose_records_are_lost_run_again_as_they_were(tmp_path):
    """Optuna knows them to have ended, and takes nothing more of them."""
    life = Life(tmp_path)
    first, second = life.suggest(), life.suggest()
    for number, _ in first + second:
        life.searcher.tell(complete(number))
    life.searcher.close()
    said = []
    later = Life(tmp_path, [complete(1), complete(2)], say=said.append)
    assert said == ["The records of these trials are lost, and they are run again: 0, 3."]
    assert later.searcher.groups_left() == 4
    again = later.suggest() + later.suggest()
    assert again == [first[0], second[1]], "their numbers and parameters"
    for number, _ in again:
        later.searcher.tell(complete(number))
    assert numbers(later.rest()) == [[4, 5], [6]]


def test_a_folder_with_odd_characters_has_its_database_in_it(tmp_path):
    odd = tmp_path / "a?b#c%41[x]{y} z'"
    odd.mkdir()
    Life(odd)
    assert (odd / "optuna.db").stat().st_size
    assert list(tmp_path.iterdir()) == [odd]


# --- records ---


class Told:
    """A tracker's calls, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


REPORT = {
    "scores": {"v": {}},
    "seconds": 1.0,
    "rounds": 2,
    "passes": {"forward": 1, "backward": 0},
    "device": "cpu",
}
SCORES = {"clean_accuracy": 0.9, "attack_success": 0.1, "recovery": 0.8}
LOG = {"step": 0, "loss": 1.0, "losses": {}}


@pytest.fixture
def recorder(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "v.rounds.json").write_text(json.dumps([LOG]))

    def make():
        return Recorder(CONFIG, tmp_path, Told(), {}, lambda _: None)

    return make


def report():
    return {**REPORT, **SCORES, "scores": {"v": SCORES}}


def test_a_disk_that_takes_no_files_is_no_verdict_on_the_trial(recorder, tmp_path):
    first = recorder()
    (tmp_path / "trials").write_text("in the way")
    first.started(1, None, {})
    with pytest.raises(OSError, match="exists"):
        first.completed(1, report(), tmp_path / "made")
    assert first.write() == []
    (tmp_path / "trials").unlink()
    first.completed(1, report(), tmp_path / "made")
    (record,) = first.write()
    assert record["status"] == "COMPLETE"
    assert set(record["files"]) == {"v.rounds.json", "purify.yaml"}


def test_records_that_cannot_be_written_wait_and_are_written_in_order(recorder, tmp_path):
    first = recorder()
    (tmp_path / "trials.jsonl").unlink()
    (tmp_path / "trials.jsonl").mkdir()  # nothing can be appended to a folder
    first.started(1, None, {})
    first.failed(1, "one")
    with pytest.raises(OSError, match="directory"):
        first.write()
    (tmp_path / "trials.jsonl").rmdir()
    first.started(2, None, {})
    first.failed(2, "two")
    assert [record["number"] for record in first.write()] == [1, 2]
    assert [record["reason"] for record in recorder().records] == ["one", "two"]


def test_curves_are_whole_after_a_kill_and_steps_reported_twice_count_once(recorder, tmp_path):
    first = recorder()
    first.started(1, None, {})
    for step, value in ((1, 0.1), (3, 0.2)):
        scores = dict.fromkeys(SCORES, value)
        first.reported({"number": 1, "victim": "v", "step": step, **scores})
    second = recorder()
    second.started(1, None, {})
    second.reported({"number": 1, "victim": "v", "step": 3, **dict.fromkeys(SCORES, 0.2)})
    second.completed(1, report(), tmp_path / "made")
    second.write()
    name, _, kwargs = second.tracker.calls[-1]
    assert name == "end_trial"
    curve = kwargs["histories"]["v/attack_success"]
    assert curve[:2] == [(1, 0.1), (3, 0.2)]
    assert len(curve) == 3
    third = recorder()
    third.show_again({7})
    assert [call[0] for call in third.tracker.calls] == ["start_trial", "end_trial"]
    assert third.tracker.calls[-1] == second.tracker.calls[-1]


# --- checkpoints of a group ---


def ims(net, images, config, place=None, *, on_step=None):
    """One run of IMS, gone on with from what its place keeps."""
    results = Ims().run(
        net,
        CleanData(images),
        [config],
        generators=[torch.Generator().manual_seed(0)],
        on_step=on_step,
        state=None if place is None else place.state([config]),
        between_steps=None if place is None else place.between_steps,
    )
    if place is not None:
        place.keep()
    return results


def test_a_group_goes_on_from_the_state_that_was_kept(tiny_net, pictures, tmp_path):
    settings = {"inner_steps": 1, "patience": None, "budget": 0.2, "step_size": None}
    rounds = {"initialise_rounds": 2, "minimise_rounds": 3, "select_rounds": 3}
    config, seen = PurifyConfig(**settings, **rounds), []

    def heard(_member, log, _masks):
        seen.append(log.step)
        if log.step == stops_at:
            raise KeyboardInterrupt  # what a kill is for the rounds

    def place():
        return Checkpoints(tmp_path / "000", 1e-9).place("victim")

    stops_at = None
    (whole,) = ims(tiny_net, pictures, config, on_step=heard)
    seen.clear()
    stops_at = 5
    with pytest.raises(KeyboardInterrupt):
        ims(tiny_net, pictures, config, place(), on_step=heard)
    stops_at = None
    later = place()
    (result,) = ims(tiny_net, pictures, config, later, on_step=heard)
    assert seen == [0, 1, 2, 3, 4, 5, 5, 6, 7], "only the round that was cut is run again"
    assert result.rounds == whole.rounds
    assert torch.equal(result.masks.mask, whole.masks.mask)
    assert later.seconds > 0
    ims(tiny_net, pictures, config, place(), on_step=heard)
    assert len(seen) == 9, "what was over is not run again"


def test_without_a_common_folder_a_group_goes_on_from_the_copies(tiny_net, pictures, tmp_path):
    """Two nodes, each with a folder of its own, and a bucket between them."""
    rounds = {"initialise_rounds": 2, "minimise_rounds": 0, "select_rounds": 0}
    config = PurifyConfig(inner_steps=1, budget=0.2, step_size=None, **rounds)
    bucket, ran = (tmp_path / "bucket").as_uri(), []

    def on_a_node(folder, *, on_round):
        group = {"checkpoint": str(tmp_path / folder / "007")}

        def function(group, *, study, cases):
            place = checkpoints_of(group, 1e-9).place("victim")
            ims(tiny_net, pictures, config, place, on_step=on_round)

        with_bucket(function, bucket)(group, study=None, cases=[])

    def cut_off(_member, log, _masks):
        if log.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_a_node("one", on_round=cut_off)
    on_a_node("two", on_round=lambda _member, log, _masks: ran.append(log.step))
    assert ran == [1]


def test_a_state_that_is_damaged_or_of_others_costs_the_work_alone(tiny_net, pictures, tmp_path):
    config = PurifyConfig(initialise_rounds=2, minimise_rounds=0, select_rounds=0)
    (tmp_path / "victim.safetensors").write_bytes(b"torn")
    (result,) = ims(tiny_net, pictures, config, Checkpoints(tmp_path, 60).place("victim"))
    assert len(result.rounds) == 2
