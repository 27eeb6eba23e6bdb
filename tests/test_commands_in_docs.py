"""Every shell command of the pages is in a table, parses, and runs, or is covered where the table says.

The table is commands_in_docs.yaml. What runs, runs literally, in a folder as a page takes it for
granted: a suspect, pictures, studies of the names that the pages use, but tiny.
"""

import base64
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import metadata
from pathlib import Path

import pytest
import typer
import yaml

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("sandbox", Path(__file__).with_name("sandbox.py"))
sandbox = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sandbox)
TABLE = yaml.safe_load((ROOT / "tests" / "commands_in_docs.yaml").read_text())
PAGES = [
    *("README.md", "CONTRIBUTING.md"),
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").rglob("*.md")
        if "reference" not in path.parts  # made of the code itself
    ),
]
FENCE = re.compile(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1\s*$", re.M | re.S)
SHELL = ("", "sh", "bash", "console", "text")
START = (
    r"(?:python -m |make |mlflow |ray |pip |bimask |bimask-study |export [A-Z_]+=|\. |source |"
    r"[A-Za-z_][A-Za-z_0-9]*=\S)"
)


def commands_of(text):
    """The shell commands of a page, each once: of code blocks, their comments, and inline code."""
    blocks = [body for _, language, body in FENCE.findall(text) if language in SHELL]
    prose = FENCE.sub("", text)
    blocks += re.findall(r"(?:^    .*\n?)+", prose, re.M)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        code, _, comment = re.sub(r"^\s*\$ ", "", line).strip().partition(" #")
        found.append(code)
        found += re.findall(f": ({START}.*)", comment)
        prose += f"\n{comment}"
    found += re.findall(r"`([^`]+)`", prose)
    plain = (" ".join(command.split()) for command in found)
    return list(dict.fromkeys(command for command in plain if re.match(START, command)))


def rows(page):
    return TABLE["pages"].get(page, [])


def filled(row, **more):
    """The command with something in the place of every placeholder, and the words that are appended."""
    command = f"{row['command']} {row.get('more', '')}".strip()
    for old, new in (TABLE["placeholders"] | {"PORT": "5002"} | row.get("fill", {}) | more).items():
        command = re.sub(rf"(?<![\w-]){re.escape(old)}(?![\w-])", lambda _, new=new: new, command)
    return command


@pytest.mark.parametrize("page", PAGES)
def test_the_table_has_every_command_of_a_page(page):
    commands = set(commands_of((ROOT / page).read_text()))
    here = {row["command"] for row in rows(page)}
    anywhere = {*TABLE["names"], *(row["command"] for row in TABLE["anywhere"])}
    assert commands - here - anywhere == set(), "cover it in tests/commands_in_docs.yaml"
    assert here <= commands, "the page has it no more"


def test_the_table_has_no_page_that_is_gone():
    assert set(TABLE["pages"]) <= set(PAGES)


@pytest.mark.parametrize(
    "text",
    [
        "```\npython -m bimask new --x 1    # what it does\n```\n",
        "```console\n$ python -m bimask new \\\n  --x 1\nits answer\n```\n",
        "Words,\n\n    python -m bimask new --x 1\n\nwords.\n",
        "Words `python -m bimask\nnew --x 1` and `bimask.new`.\n",
        "```\nmkdir folder   # or, in another: python -m bimask new --x 1\n```\n",
        "```python\nmake = 1\n```\n```\nresult   # of `python -m bimask new --x 1`\n```\n",
    ],
)
def test_a_new_command_is_found_however_it_is_written(text):
    assert commands_of(text) == ["python -m bimask new --x 1"]


ROWS = [("any page", row) for row in TABLE["anywhere"]]
ROWS += [("any page", {"command": name, "name": True}) for name in TABLE["names"]]
ROWS += [(page, row) for page in TABLE["pages"] for row in rows(page)]


@pytest.mark.parametrize(("page", "row"), [row for row in ROWS if "elsewhere" in row[1]])
def test_what_cannot_run_here_is_covered_elsewhere(page, row):
    assert row["elsewhere"]
    file, words = row["covered"]
    assert words in (ROOT / file).read_text()


def test_words_are_appended_for_a_reason():
    assert all(row.get("why") for _, row in ROWS if "more" in row)


# --- they parse ---


def program(words):
    """The command of typer or click that the words start, and the words behind its name."""
    if words[:2] == ["python", "-m"]:
        module, rest = words[2], words[3:]
    elif words[0] == "bimask-study":
        module, rest = f"study.{words[1]}", words[2:]
    else:
        module, rest = words[0], words[1:]
    if module == "study.purify":
        module, rest = "bimask", ["purify", *rest]
    if module == "bimask":
        return typer.main.get_command(importlib.import_module("bimask.__main__").app), rest
    if module == "ray":
        return importlib.import_module("ray.scripts.scripts").cli, rest
    if module == "mlflow":
        return importlib.import_module("mlflow.cli").cli, rest
    if importlib.util.find_spec(module).submodule_search_locations:
        module += ".__main__"
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    return typer.main.get_command(app), rest


def parse(words, *, name_alone=False):
    """Fails as the command itself would, for unknown commands and options and for wrong values."""
    command, words = program(words)
    while hasattr(command, "get_command") and words:
        name, *words = words
        parent, command = command, command.get_command(command.context_class(command), name)
        assert command is not None, f"{parent.name} has no command {name}"
    if not name_alone:
        command.make_context(command.name, list(words)).close()


def parse_make(words):
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parse_pip(words):
    from pip._internal.commands import create_command

    options, packages = create_command(words[0]).parse_args(words[1:])
    for package in [*packages, *options.editables]:
        name, extras = re.fullmatch(r"([\w.]+)(?:\[(.*)\])?", package).groups()
        assert name in (".", "bimask")
        assert set(extras.split(",")) <= set(metadata("bimask").get_all("Provides-Extra"))
    for file in options.constraints:
        assert (ROOT / file).is_file()


def simple_commands(command):
    """The words of each command of a chain, without what sets variables and where output goes."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    chain = [[]]
    for word in lexer:
        chain.append([]) if word == "&&" else chain[-1].append(word)
    for words in chain:
        if ">" in words:
            words = words[: words.index(">")]
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        yield words


@pytest.mark.parametrize(("page", "row"), ROWS, ids=[f"{page}: {row['command']}" for page, row in ROWS])
def test_a_command_parses(page, row, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for words in simple_commands(filled(row)):
        if not words or words[0] in ("export", ".", "chmod"):
            continue
        if words[0] == "make":
            parse_make(words[1:])
        elif words[0] == "pip":
            parse_pip(words[1:])
        elif words[:3] == ["python", "-m", "benchmarks.purify"]:
            parse_arguments(words[3:], monkeypatch)
        else:
            parse(words, name_alone="name" in row)


def parse_arguments(words, monkeypatch):
    """benchmarks.purify is one of argparse, which says what is wrong and leaves."""
    import argparse

    from benchmarks import purify

    class Parsed(Exception):
        pass

    def parsed(parser, words):
        assert parser.parse_known_args(words)[1] == []
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        purify.main(words)


@pytest.mark.parametrize(
    "command",
    [
        "python -m bimask purify --model a --out b --nonsense",
        "python -m bimask nonsense",
        "python -m bimask purify --model a",
        "python -m study.launch tiny.yaml --trials many",
        "python -m study.promote",
        "ray up cluster.yaml --nonsense",
        "mlflow nonsense",
    ],
)
def test_a_wrong_command_does_not_parse(command):
    with pytest.raises(Exception, match=r"nonsense|valid integer|Missing|--out"):
        parse(shlex.split(command))


# --- they run ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder, and the project beside it."""
    folder = tmp_path_factory.mktemp("docs")
    sandbox.make_project(folder / "project")
    sandbox.make_home(folder / "user")
    return folder / "user"


def ask(page, command):
    """Start a server, ask it about a picture, end it by its process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = page.start(f"exec {re.sub('5002', str(port), command)}")
    try:
        for _ in range(1200):
            assert process.poll() is None, process.communicate()[0]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            time.sleep(0.2)
        picture = base64.b64encode(next(page.folder.glob("pictures/*/*.png")).read_bytes()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": [picture]}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (found,) = json.loads(answer.read())["predictions"]
        assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    "name",
    [p for p in TABLE["pages"] if any("elsewhere" not in row for row in rows(p))],
)
def test_the_commands_of_a_page_run(name, home):
    page = sandbox.Page(name, home, home.parent / "project")
    for row in rows(name):
        if "elsewhere" in row:
            continue
        victims = page.folder / "outputs" / "victims"
        known = {"DIGEST": page.digest()} if "DIGEST" in row["command"] and victims.is_dir() else {}
        command = filled(row, **known)
        if "before" in row:
            getattr(page, row["before"])()
        if row.get("serves"):
            ask(page, command)
            continue
        begun = time.time() - 0.1
        printed = page.run(command)
        assert row.get("says", "") in " ".join(printed.split()), f"{command}\n{printed}"
        for pattern in row.get("leaves", ()):
            written = [path.stat() for path in page.folder.glob(pattern)]
            assert any(one.st_size and one.st_mtime >= begun for one in written), (command, pattern)
