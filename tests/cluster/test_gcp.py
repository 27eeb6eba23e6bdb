"""cluster/gcp.yaml against Compute Engine's own description of an instance."""

from __future__ import annotations

import json
from importlib.resources import files

import jsonschema
import pytest
from jsonschema.validators import Draft7Validator


@pytest.fixture(scope="module")
def check():
    """Validates an instance by Compute Engine's published schemas, closed: unknown keys are errors."""
    document = files("googleapiclient") / "discovery_cache/documents/compute.v1.json"
    published = json.loads(document.read_text())["schemas"]
    definitions = {}

    def take(name):
        if name not in definitions:
            definitions[name] = closed(published[name])

    def closed(node):
        if not isinstance(node, dict):
            return node
        if isinstance(node.get("$ref"), str):
            take(node["$ref"])
            return {"$ref": f"#/definitions/{node['$ref']}"}
        copied = {key: closed(value) for key, value in node.items() if key not in ("id", "format")}
        return copied | ({"additionalProperties": False} if "properties" in node else {})

    take("Instance")
    return Draft7Validator({"$ref": "#/definitions/Instance", "definitions": definitions}).validate


def numbers_as_text(node):
    """The API's int64 travel as strings; Ray's client turns numbers into them."""
    if isinstance(node, dict):
        return {k: str(v) if k == "diskSizeGb" else numbers_as_text(v) for k, v in node.items()}
    return [numbers_as_text(item) for item in node] if isinstance(node, list) else node


def test_compute_engine_knows_every_setting_of_a_node(ray_config, check):
    for node in ray_config("gcp")["available_node_types"].values():
        check(numbers_as_text(node["node_config"]))
        with pytest.raises(jsonschema.ValidationError, match="machineTyp"):
            check({"machineTyp": "g2-standard-4"})


def test_head_runs_no_trials_and_workers_are_gpus_on_spot(ray_config):
    types = ray_config("gcp")["available_node_types"]
    assert types["ray_head_default"]["resources"] == {"CPU": 0}
    worker = types["ray_worker_default"]
    assert worker["min_workers"] == 0
    assert worker["resources"]["GPU"] == 1
    assert worker["node_config"]["machineType"].startswith("g2-")
    scheduling = worker["node_config"]["scheduling"]
    assert scheduling["provisioningModel"] == "SPOT"
    assert scheduling["instanceTerminationAction"] == "DELETE"


def test_accounts_are_our_own_and_the_network_is_not_the_default(ray_config):
    config = ray_config("gcp")
    assert config["provider"]["cache_stopped_nodes"] is False
    for role, node in config["available_node_types"].items():
        (account,) = node["node_config"]["serviceAccounts"]
        assert account["email"].startswith("bimask-head" if "head" in role else "bimask-worker")
        (interface,) = node["node_config"]["networkInterfaces"]
        assert interface["subnetwork"].endswith("/subnetworks/bimask")
        assert node["node_config"]["disks"][0]["autoDelete"]
    worker = config["available_node_types"]["ray_worker_default"]["node_config"]
    assert "cloud-platform" not in str(worker["serviceAccounts"])
