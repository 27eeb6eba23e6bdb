"""cluster/kuberay*.yaml against the published fields of ray.io/v1 and Kubernetes' own schemas."""

from __future__ import annotations

import json
from copy import deepcopy
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml
from jsonschema.validators import Draft202012Validator

ROOT = Path(__file__).parents[2]
STRICT = "kubernetes-json-schema/v1.37.0-local-strict/_definitions.json"


@pytest.fixture(scope="module")
def definitions():
    kubernetes = json.loads((files("kubernetes_validate") / STRICT).read_text())["$defs"]
    ours = yaml.safe_load((ROOT / "tests/data/kuberay.yaml").read_text())["$defs"]
    text = json.dumps(kubernetes | ours).replace("/api/_definitions.json#/", "#/")
    return json.loads(text.replace('"k8s:', '"#/$defs/'))


@pytest.fixture(scope="module")
def check(definitions):
    """A manifest -> nothing, or the first thing that its kind does not allow."""
    kinds = {"PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim"}

    def validate(manifest):
        name = kinds.get(manifest["kind"], manifest["kind"])
        Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions}).validate(manifest)

    return validate


def manifests(name):
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


def ray_cluster(name):
    *_, manifest = manifests(name)
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


BOTH = pytest.mark.parametrize("name", ["kuberay.yaml", "kuberay-job.yaml"])


def test_kinds():
    assert [m["kind"] for m in manifests("kuberay.yaml")] == [
        *["PersistentVolumeClaim"] * 2,
        "RayCluster",
    ]
    assert [m["kind"] for m in manifests("kuberay-job.yaml")] == ["RayJob"]


@BOTH
def test_every_manifest_passes_its_schema(check, name):
    for manifest in manifests(name):
        check(manifest)


@pytest.mark.parametrize(
    "place",
    [
        ("spec", "workerGroupSpecs", 0, "maxReplica"),
        ("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"),
        ("spec", "authOption"),
    ],
)
def test_a_misspelt_field_is_found(check, place):
    *_, manifest = deepcopy(manifests("kuberay.yaml"))
    section = manifest
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = 1
    with pytest.raises(jsonschema.ValidationError, match=place[-1]):
        check(manifest)


@BOTH
def test_tokens_are_asked_for_and_nothing_is_open_to_the_world(name):
    cluster = ray_cluster(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress")


@BOTH
def test_head_runs_no_trials_and_workers_scale_from_zero_with_a_gpu_each(name):
    cluster = ray_cluster(name)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == 0 < workers["maxReplicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


@BOTH
def test_pods_run_without_root_without_rights_and_without_secrets(name):
    cluster = ray_cluster(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not [v for v in container.get("env", []) if "PASSWORD" in v["name"]]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_job_and_the_cluster_are_one_cluster():
    assert ray_cluster("kuberay-job.yaml") == ray_cluster("kuberay.yaml")
    (job,) = manifests("kuberay-job.yaml")
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["submitterConfig"] == {"backoffLimit": 0}
