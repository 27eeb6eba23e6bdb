"""What happens before the first trial: a name is reserved, and what is refused is named."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bimask.progress import Console
from study.pipeline.naming import named
from study.pipeline.prepare import check_data, prepare_victims
from study.spec.config import StudyConfig, StudyError

ROOT = Path(__file__).parents[3]
VICTIM = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "attack": {"name": "badnets"},
    "epochs": 1,
    "min_clean_accuracy": 0.0,
    "min_attack_success": 0.0,
}


def config_of(*victims):
    return StudyConfig.model_validate(
        {
            "name": "reserved",
            "trials": 1,
            "clean_images_per_class": 2,
            "victims": list(victims),
            "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
            "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
        }
    )


HOLDS = """
import sys, time
from pathlib import Path
from study.pipeline.naming import named
from study.spec.config import StudyConfig
config = StudyConfig.model_validate_json(sys.argv[2])
with named(config, Path(sys.argv[1])) as (_, folder):
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_a_second_launch_takes_the_next_name_before_any_victim_is_trained(tmp_path):
    config = config_of(VICTIM)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path), config.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert other.stdout.readline() == "reserved\n"
        with named(config, tmp_path) as (taken, folder):
            assert (taken.name, folder.name) == ("reserved-2", "reserved-2")
        with (
            pytest.raises(StudyError, match="Another process is at work"),
            named(config, tmp_path, chosen_by_user=True),
        ):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with named(config, tmp_path) as (taken, folder):
        assert folder == tmp_path / "reserved"
    assert list(tmp_path.iterdir()) == [], "a name that came to nothing leaves nothing"


def test_a_victim_that_is_refused_after_training_is_named(tmp_path):
    useless = VICTIM | {
        "attack": {"name": "blended"},
        "min_attack_success": 1.0,
        "min_clean_accuracy": 1.0,
    }
    config = config_of(VICTIM, useless)
    with pytest.raises(StudyError, match="The victim digits-blended: "):
        prepare_victims(config, tmp_path, torch.device("cpu"), Console(file=io.StringIO()))


def test_a_victim_that_is_refused_before_training_is_named():
    config = config_of(VICTIM, VICTIM | {"attack": {"name": "badnets", "target": 12}})
    with pytest.raises(StudyError, match="The victim digits-badnets-[0-9a-f]{6}: .*12"):
        check_data(config)
