"""A node is killed twice in a study of 24 trials on three nodes: all end once, same bits."""

import json
import threading
import time
from types import SimpleNamespace

import mlflow
import optuna
import pytest
import ray
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

import study as study_package
from bimask.purify import PurifyConfig
from bimask.victim import obtain_victim
from study import records, search
from study.config import StudyConfig
from study.tracking import Tracker, tracking_uri
from study.trial import Case, run_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STUDY = {
    "name": "faults",
    "trials": 24,
    "clean_images_per_class": 2,
    "report_every": 2,
    "retries": 2,
    "victims": [
        {
            "dataset": "digits",
            "image_size": 12,
            "net": "small_resnet",
            "width": 4,
            "attack": {"name": "badnets"},
            "epochs": 6,
        }
    ],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "fixed": {
        "inner_optimizer": "sign",
        "step_size": None,
        "patience": None,
        "initialise_rounds": 2,
        "minimise_rounds": 2,
        "select_rounds": 2,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 2},
    },
}
STRUCK = (4, 13)  # the trials whose node is killed, at their very end


def kill_nodes(cluster, marks):
    """SIGKILL to all processes of the node that a trial of STRUCK runs on, one after the other."""
    for number in STRUCK:
        mark = marks / str(number)
        while not mark.exists() or not mark.read_text():
            time.sleep(0.05)
        (node,) = [n for n in cluster.worker_nodes if n.node_id == mark.read_text()]
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def struck(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    marks = tmp_path_factory.mktemp("marks")
    config = StudyConfig.model_validate(STUDY)
    victim = obtain_victim(config.victims[0], outputs / "victims")
    case = Case.of("digits-badnets", victim, config)

    def held(group, *, study, cases):
        """Trials of STRUCK report all their rounds and then wait for the end, the first time."""
        import time

        import ray

        from study.search import actor

        (member,) = group["members"]
        mark = marks / str(member["number"])
        if member["number"] in STRUCK and not mark.exists():

            def wait(*_):
                mark.write_text(ray.get_runtime_context().get_node_id())
                time.sleep(600)

            actor.write_artifacts = wait
        if member["preset"]:  # the paper's defaults take longer than all the others
            member = member | {"preset": None, "parameters": {}}
        actor.trainable({"members": [member]}, study=study, cases=cases)

    folder = outputs / config.name
    folder.mkdir()
    tracker = Tracker(tracking_uri(outputs), outputs / "mlartifacts")
    tracker.start_study(config.name, {}, {})
    recorder = records.Recorder(config, folder, tracker, {}, lambda *_: None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        killer = threading.Thread(target=kill_nodes, args=(cluster, marks), daemon=True)
        killer.start()
        search.run_search(config, [case], recorder, folder=folder, concurrency=3, function=held)
        killer.join(60)
        assert not killer.is_alive(), "a node was not killed"
    finally:
        ray.shutdown()
        cluster.shutdown()
    return SimpleNamespace(config=config, outputs=outputs, folder=folder, case=case)


def test_24_trials_finish_and_none_twice(struck):
    trials = study_package.load("faults", struck.outputs)
    assert trials["number"].tolist() == list(range(24))
    assert set(trials["status"]) == {"COMPLETE"}
    storage = f"sqlite:///{struck.folder / 'optuna.db'}"
    asked = optuna.load_study(study_name="faults", storage=storage).trials
    assert [trial.state.name for trial in asked] == ["COMPLETE"] * 24


def test_mlflow_has_one_run_a_trial_and_each_point_of_a_curve_once(struck):
    client = mlflow.MlflowClient(tracking_uri(struck.outputs))
    experiment = client.get_experiment_by_name("bimask")
    runs = client.search_runs([experiment.experiment_id], "tags.trial != ''")
    assert sorted(int(run.data.tags["trial"]) for run in runs) == list(range(24))
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if int(run.data.tags["trial"]) in STRUCK:
            curve = client.get_metric_history(run.info.run_id, "digits-badnets/attack_success")
            assert [point.step for point in curve] == [1, 3, 5, 6]


@pytest.mark.parametrize("number", [*STRUCK, 1, 23])
def test_a_trial_that_ran_again_has_the_bits_of_one_that_was_left_alone(struck, number):
    lines = (struck.folder / "trials.jsonl").read_text().splitlines()
    (record,) = [r for r in map(json.loads, lines) if r["number"] == number]
    settings = struck.config.purify_config(record["parameters"])
    assert isinstance(settings, PurifyConfig)
    (alone,) = run_trials([settings], [struck.case], seed=struck.config.seed)
    kept = load_file(struck.folder / "trials" / f"{number:03d}" / "digits-badnets.masks.safetensors")
    expected = alone.cases["digits-badnets"].masks.tensors()
    assert set(kept) == set(expected)
    for name, values in expected.items():
        assert (kept[name] == values).all(), name
    assert record["attack_success"] == alone.scores["attack_success"]
