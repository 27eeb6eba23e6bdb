"""The site builds from a clean clone, and the README's Python runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from study.spec.reading import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_site_builds_without_a_warning_or_a_dead_link(tmp_path):
    words = ["-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees"), "-c", "docs", "."]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words, str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "site" / "docs" / "reference" / "settings.html").read_text()
    assert "class_triggers" in settings
    assert "label_smoothing" in settings
    assert (tmp_path / "site" / "docs" / "reference" / "api.html").stat().st_size > 20_000


PAGES = [
    str(path.relative_to(ROOT))
    for folder in ("docs", "docs/decisions", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_what_pages_link_to_is_there(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


DECISIONS = sorted((ROOT / "docs" / "decisions").glob("0*.md"))


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_is_a_record_and_stands_in_the_list(path):
    text = path.read_text()
    assert text.startswith("# ")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == ["Context", "Choice", "Evidence", "What would change it"]
    title = text.splitlines()[0].removeprefix("# ")
    assert f"- [{title}]({path.name})" in (path.parent / "index.md").read_text()


def test_decisions_are_numbered_without_a_gap():
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_the_architecture_is_short():
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 90


def test_the_readmes_study_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    path = tmp_path / "study.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config.defenders.names == ("clp",)
    assert list(config.space) == ["u"]


def test_the_readmes_ten_lines_of_python_run(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([20, 10])" in done.stdout


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"python -m (bimask [a-z-]+|study\.[a-z]+)", README)))
)
def test_every_command_in_the_readme_is_there(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
