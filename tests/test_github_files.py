"""The files that a code host reads fit its schemas, which check-jsonschema brings along."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if "CI" not in os.environ:
    pytest.importorskip("check_jsonschema")

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    ".github/workflows/*": "github-workflows",
    ".github/ISSUE_TEMPLATE/*": "github-issue-forms",
    "CITATION.cff": "citation-file-format",
}


def check(schema, *paths):
    words = ["--builtin-schema", f"vendor.{schema}", "--force-filetype", "yaml", *map(str, paths)]
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *words], capture_output=True, text=True
    )


@pytest.mark.parametrize(("files", "schema"), SCHEMAS.items())
def test_files_fit_their_schema(files, schema):
    paths = list(ROOT.glob(files))
    assert paths
    done = check(schema, *paths)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_for_the_code_host_has_a_schema():
    known = {path for files in SCHEMAS for path in ROOT.glob(files)}
    assert {path for path in (ROOT / ".github").rglob("*") if path.is_file()} <= known


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        (".github/workflows/test.yml", "runs-on", "run-on"),
        (".github/ISSUE_TEMPLATE/bug.yml", "type: textarea", "type: text"),
        ("CITATION.cff", "authors", "author"),
    ],
)
def test_a_mistake_is_found(tmp_path, file, right, wrong):
    (text := (ROOT / file).read_text()).index(right)
    (tmp_path / "file.yml").write_text(text.replace(right, wrong))
    schema = next(name for files, name in SCHEMAS.items() if (ROOT / file) in ROOT.glob(files))
    assert check(schema, tmp_path / "file.yml").returncode == 1
