"""The study of 200 trials as one of two defences: every other trial is CLP's."""

import json
import shutil

import pytest
import yaml

from study.spec.config import StudyConfig
from study.store import records

CLP = {"u": {"kind": "float", "low": 0, "high": 10}}


def renamed(trial):
    """A record of the study of IMS, as the study of both has it."""
    own, number = trial["parameters"], trial["number"]
    if number % 2 and trial.get("preset") is None:
        return trial | {"parameters": {"defence": "clp", "clp.u": 0.04 * number}}
    return trial | {"parameters": {"defence": "ims"} | {f"ims.{k}": v for k, v in own.items()}}


@pytest.fixture(scope="session")
def two_defences(large_study, tmp_path_factory):
    """Its folder; the victims are not beside it."""
    folder = tmp_path_factory.mktemp("two") / "large"
    shutil.copytree(large_study, folder)
    old = yaml.safe_load((folder / records.STUDY).read_text())
    content = old | {
        "defence": None,
        "defences": ["ims", "clp"],
        "space": {"ims": old["space"], "clp": CLP},
        "fixed": {"ims": old["fixed"]},
    }
    config = StudyConfig.model_validate(content)
    (folder / records.STUDY).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    rows = [renamed(json.loads(line)) for line in (folder / records.TRIALS).read_text().splitlines()]
    (folder / records.TRIALS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((folder / records.SUMMARY).read_text())
    for name in ("chosen", "paper_defaults"):
        summary[name] = summary[name] and renamed(summary[name])
    summary["front"] = [renamed(point) for point in summary["front"]]
    (folder / records.SUMMARY).write_text(json.dumps(summary))
    return folder
