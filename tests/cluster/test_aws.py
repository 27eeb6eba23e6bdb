"""cluster.yaml and its foundation: what Ray and AWS would take. No node, no connection."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import boto3
import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws import config as ray_aws

FOUNDATION = Path(__file__).parents[2] / "cluster/aws-foundation.yaml"
LINT = "from cfnlint.runner import main; main()"
GPU_FAMILIES = {"g4dn", "g5", "g6", "g6e", "p3", "p4d", "p5"}
EC2 = {  # what bootstrap may ask, and the answers
    "DescribeSecurityGroups": {
        "SecurityGroups": [{"GroupId": "sg-FILL-IN", "VpcId": "vpc-1", "IpPermissions": []}]
    },
    "DescribeSubnets": {
        "Subnets": [
            {"SubnetId": f"subnet-{zone}", "VpcId": "vpc-1", "State": "available"}
            | {"AvailabilityZone": f"us-west-2{zone}", "MapPublicIpOnLaunch": True}
            for zone in "abc"
        ]
    },
    "DescribeKeyPairs": {"KeyPairs": []},
    "CreateKeyPair": {"KeyName": "ray-autoscaler_us-west-2", "KeyMaterial": "key of a test"},
}


@pytest.fixture
def cluster(ray_config):
    return ray_config("aws")


@pytest.fixture
def head(cluster):
    return cluster["available_node_types"][cluster["head_node_type"]]


@pytest.fixture
def workers(cluster):
    types = cluster["available_node_types"]
    return [types[name] for name in types if name != cluster["head_node_type"]]


@pytest.fixture(scope="module")
def bootstrapped(ray_config, tmp_path_factory):
    """The provider's own bootstrap of the configuration: (result, EC2's operations in order).

    Every request is answered here before it would be sent; one that `EC2` does not list is an error.
    """
    asked = []

    def answer(model, **_):
        asked.append(model.name)
        return SimpleNamespace(status_code=200), deepcopy(EC2[model.name])

    def resource(name, _config):
        session = boto3.Session("AKID", "unused", region_name="us-west-2")
        made = session.resource(name)
        made.meta.client.meta.events.register("before-call", answer)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray keeps the key pair in ~/.ssh
        patch.setattr(ray_aws, "_resource", resource)
        return ray_aws.bootstrap_aws(ray_config("aws")), asked


def launch_problems(node):
    """What EC2's own description of RunInstances, which botocore carries, says of a node type."""
    ec2 = botocore.session.get_session().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
    report = ParamValidator().validate(request, shape)
    return report.generate_report()


def test_head_runs_no_trials(head):
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert head["node_config"]["InstanceType"].split(".")[0] not in GPU_FAMILIES
    assert "InstanceMarketOptions" not in head["node_config"]


def test_workers_are_gpus_on_spot_and_scale_from_zero(cluster, workers):
    assert workers
    for worker in workers:
        assert worker["node_config"]["InstanceType"].split(".")[0] in GPU_FAMILIES
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["resources"]["GPU"] > 0
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= cluster["max_workers"]


def test_nothing_keeps_costing(cluster):
    assert cluster["provider"]["cache_stopped_nodes"] is False
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    for node in cluster["available_node_types"].values():
        for disk in node["node_config"]["BlockDeviceMappings"]:
            assert disk["Ebs"]["DeleteOnTermination"]
            assert disk["Ebs"]["Encrypted"]


def test_ec2_knows_every_setting_of_a_node(cluster, head):
    ec2 = botocore.session.get_session().get_service_model("ec2")
    known = ec2.shape_for("InstanceType").enum
    for node in cluster["available_node_types"].values():
        assert launch_problems(node) == ""
        assert node["node_config"]["InstanceType"] in known
    misspelt = deepcopy(head)
    misspelt["node_config"]["BlockDeviceMapping"] = misspelt["node_config"].pop("BlockDeviceMappings")
    assert "BlockDeviceMapping" in launch_problems(misspelt)


def test_all_nodes_have_one_image_and_none_takes_rays_old_default(cluster):
    images = {n["node_config"].get("ImageId", "") for n in cluster["available_node_types"].values()}
    assert len(images) == 1
    assert images.pop().startswith("ami-")


def test_bootstrap_keeps_our_group_and_profiles_and_makes_none_of_its_own(bootstrapped):
    config, asked = bootstrapped
    nodes = {name: node["node_config"] for name, node in config["available_node_types"].items()}
    assert {tuple(node["SecurityGroupIds"]) for node in nodes.values()} == {("sg-FILL-IN",)}
    assert nodes["ray.head.default"]["IamInstanceProfile"] == {"Name": "bimask-head"}
    assert nodes["ray.worker.default"]["IamInstanceProfile"] == {"Name": "bimask-worker"}
    assert "IamInstanceProfile" not in config["head_node"]  # where Ray's own role would be
    for node in nodes.values():
        assert node["SubnetIds"] == ["subnet-a", "subnet-b", "subnet-c"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    changing = [name for name in asked if not name.startswith("Describe")]
    assert changing == ["CreateKeyPair"]  # no group, no rule, no role, no instance


def test_the_private_key_stays_private_and_out_of_the_configuration(bootstrapped, text_of):
    config, _ = bootstrapped
    key = Path(config["auth"]["ssh_private_key"])
    assert os.stat(key).st_mode & 0o077 == 0
    assert key.read_text() not in text_of(config)


# --- the foundation ---


class Tagged(yaml.SafeLoader):
    """CloudFormation's short forms, such as !Ref Vpc, as {"Ref": "Vpc"}."""


def short_form(loader, suffix, node):
    name = suffix if suffix == "Ref" else f"Fn::{suffix}"
    return {name: loader.construct_scalar(node)}


Tagged.add_multi_constructor("!", short_form)


@pytest.fixture(scope="module")
def foundation():
    return yaml.load(FOUNDATION.read_text(), Tagged)["Resources"]


def statements(role):
    return [
        statement
        for policy in role["Properties"]["Policies"]
        for statement in policy["PolicyDocument"]["Statement"]
    ]


def listed(value):
    return value if isinstance(value, list) else [value]


def test_cloudformations_own_schemas_accept_the_foundation():
    checked = subprocess.run(
        [sys.executable, "-c", LINT, str(FOUNDATION)], capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_world_reaches_port_22_from_a_stated_range_and_nothing_else(foundation):
    rules = [
        rule for r in foundation.values() for rule in r["Properties"].get("SecurityGroupIngress", [])
    ]
    assert [(rule["FromPort"], rule["ToPort"], rule["CidrIp"]) for rule in rules] == [
        (22, 22, {"Ref": "SshFrom"})
    ]
    (between,) = [r for r in foundation.values() if r["Type"] == "AWS::EC2::SecurityGroupIngress"]
    assert "CidrIp" not in between["Properties"]
    assert between["Properties"]["SourceSecurityGroupId"] == between["Properties"]["GroupId"]
    parameters = yaml.load(FOUNDATION.read_text(), Tagged)["Parameters"]
    allowed = parameters["SshFrom"]["AllowedPattern"]
    assert "Default" not in parameters["SshFrom"]
    assert re.fullmatch(allowed, "198.51.100.7/32")
    assert not re.fullmatch(allowed, "0.0.0.0/0")


@pytest.mark.parametrize("role", ["HeadRole", "WorkerRole"])
def test_roles_have_no_wildcard_action_and_write_to_our_bucket_only(foundation, role):
    for statement in statements(foundation[role]):
        actions = listed(statement["Action"])
        assert not [action for action in actions if "*" in action]
        if any(action.startswith("s3:") for action in actions):
            assert "Storage.Arn" in str(statement["Resource"])
        if "*" in listed(statement["Resource"]):
            assert all(action.startswith("ec2:Describe") for action in actions)
    assert "ManagedPolicyArns" not in foundation[role]["Properties"]


def test_a_worker_may_do_nothing_in_ec2(foundation):
    actions = {a for s in statements(foundation["WorkerRole"]) for a in listed(s["Action"])}
    assert {action.split(":")[0] for action in actions} == {"s3"}


def test_the_head_starts_and_ends_only_this_clusters_workers(foundation, cluster, workers):
    allowed = statements(foundation["HeadRole"])
    (run,) = [s for s in allowed if s["Action"] == "ec2:RunInstances" and "Condition" in s]
    conditions = run["Condition"]["StringEquals"]
    assert conditions["aws:RequestTag/ray-cluster-name"] == cluster["cluster_name"]
    assert {w["node_config"]["InstanceType"] for w in workers} <= set(conditions["ec2:InstanceType"])
    (end,) = [s for s in allowed if "ec2:TerminateInstances" in listed(s["Action"])]
    tag = {"aws:ResourceTag/ray-cluster-name": cluster["cluster_name"]}
    assert end["Condition"]["StringEquals"] == tag
    (passing,) = [s for s in allowed if s["Action"] == "iam:PassRole"]
    assert passing["Resource"] == {"Fn::GetAtt": "WorkerRole.Arn"}


def test_the_profiles_are_those_that_the_nodes_name(foundation, cluster):
    names = {
        r["Properties"]["InstanceProfileName"]
        for r in foundation.values()
        if r["Type"] == "AWS::IAM::InstanceProfile"
    }
    nodes = cluster["available_node_types"].values()
    assert {node["node_config"]["IamInstanceProfile"]["Name"] for node in nodes} == names


def test_the_bucket_is_closed_and_encrypted_and_outlives_the_stack(foundation):
    bucket = foundation["Storage"]
    assert all(bucket["Properties"]["PublicAccessBlockConfiguration"].values())
    assert bucket["Properties"]["BucketEncryption"]
    assert bucket["DeletionPolicy"] == "Retain"
