"""Files of strangers through the commands themselves: whatever is in them, a command says in a sentence
what it does not take, in bounded memory, runs nothing, and prints nothing that steers a terminal.

Each variant is a folder that somebody sent, and the words that a user types there.
"""

import importlib.util
import os
import pickle
import re
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
import yaml

import bimask.__main__
import study.pipeline.run  # heavy: not in what a variant may take
import study.promotion.registry  # noqa: F401
from bimask.victims import VictimSpec, obtain_victim
from study import launch, promote, victims
from study.report import __main__ as report
from study.trial.limits import memory_limit

COMMANDS = {
    "bimask": bimask.__main__.main,
    "study.launch": partial(typer.run, launch.main),
    "study.promote": partial(typer.run, promote.main),
    "study.report": partial(typer.run, report.main),
    "study.victims": partial(typer.run, victims.main),
}
SPEC = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
hostile = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hostile)
HASTY, ODD, Hostile = hostile.HASTY, hostile.ODD, hostile.Hostile
bmp, bomb_png, dry, edited, failed, gif = map(
    vars(hostile).get, ["bmp", "bomb_png", "dry", "edited", "failed", "gif"]
)
header, huge_jpeg, jpeg, linked, listed_studies, looping_tiff = map(
    vars(hostile).get, ["header", "huge_jpeg", "jpeg", "linked", "listed_studies", "looping_tiff"]
)
manifest, many_victims, named_victim, nested_manifest, npz, object_array = map(
    vars(hostile).get,
    ["manifest", "many_victims", "named_victim", "nested_manifest", "npz", "object_array"],
)
odd_picture, old, pickled, picture, pictures, replaced = map(
    vars(hostile).get, ["odd_picture", "old", "pickled", "picture", "pictures", "replaced"]
)
ring, settings, sites, sparse, study_of, suite = map(
    vars(hostile).get, ["ring", "settings", "sites", "sparse", "study_of", "suite"]
)
webp, weights, wide_tiff, zero = map(vars(hostile).get, ["webp", "weights", "wide_tiff", "zero"])
HANG = 60  # seconds
SUITES = ("victims", "held_out", "controls")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with code that leaves a file where it is run."""
    for place in ("evil.py", "evilpack/__init__.py", "evilpack/net.py"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("open('RUN', 'w')\n\ndef make(num_classes): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [one for one in sys.modules if one.startswith("evil")]:
        monkeypatch.delitem(sys.modules, name)  # of other tests: a module that is there runs no code
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("victims")
    victim = obtain_victim(VictimSpec(**HASTY), root)
    return root / victim.spec.digest


@pytest.fixture
def run(monkeypatch, capfd):
    """Words of a command line -> its exit code and what it printed."""

    def hung(*_):
        raise AssertionError("it hangs")

    def call(words):
        program, *rest = shlex.split(words) if isinstance(words, str) else words
        monkeypatch.setattr(sys, "argv", [program, *rest])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # the command may wrap them
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        before = signal.signal(signal.SIGALRM, hung)
        signal.alarm(HANG)
        try:
            with memory_limit(0.6), pytest.raises(SystemExit) as ended:
                COMMANDS[program]()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        captured = capfd.readouterr()
        return ended.value.code or 0, captured.out + captured.err

    return call


# name -> (what makes the folder and gives the words, what is said, exit code)
VARIANTS = {
    # names
    "class folder": (
        lambda: sites(weights(), pictures(classes=("a", ODD.replace("/", "|"), "c"))),
        "",
    ),
    "picture": (
        lambda: sites(weights(), odd_picture(ODD.replace("/", "|") + ".png")),
        "Cannot read the picture",
    ),
    "picture in bytes": (
        lambda: sites(weights(), odd_picture(b"\xff\xfe\x1b[2J.png")),
        "Cannot read",
    ),
    "YAML key": (lambda: dry(study_of(**{ODD: 1})), "unknown key"),
    "key of a victim": (
        lambda: f"bimask train-victims {suite(**{ODD: 1})}",
        "extra inputs are not permitted",
    ),
    "key of a victim on Ray": (
        lambda: f"study.victims {suite(**{ODD: 1})}",
        "extra inputs are not permitted",
    ),
    "study": (lambda: dry(study_of(name=ODD)), "name"),
    "study, long": (lambda: dry(study_of(name="x" * 100_000)), "at most 100"),
    "study to resume": (lambda: ["study.launch", "--resume", ODD], "There is no study"),
    "study to report": (lambda: ["study.report", ODD], "There is no study"),
    "studies there are": (listed_studies, "There is no study 'nothing'"),
    "data": (
        lambda: dry(study_of(victims=[{**HASTY, "dataset": f"imagefolder:{ODD}"}])),
        "no folder",
    ),
    "attack": (
        lambda: dry(study_of(victims=[{**HASTY, "attack": {"name": ODD}}])),
        "attack",
    ),
    "setting": (lambda: dry(study_of(fixed={ODD: 1})), "setting"),
    "net": (lambda: f"bimask train-victims {suite(net=ODD)}", "Unknown net|nor path"),
    "weights' keys": (lambda: sites(weights(**{ODD: torch.ones(2, 2)})), ""),
    "weights' keys, long": (
        lambda: sites(weights(**{"x" * 10**6: torch.ones(2, 2)})),
        "",
    ),
    "reason of failure": (
        lambda: old(failed(ODD + "</script>" + "x" * 10**6)),
        "report ",
        0,
    ),
    "victim on a page": (
        lambda: old(edited("summary.json", named_victim)),
        "report ",
        0,
    ),
    "class in a manifest": (
        lambda trained: [
            "bimask",
            "gallery",
            manifest(trained, classes=[ODD + str(k) for k in range(10)]),
        ],
        "picture: gallery.png",
        0,
    ),
    # YAML and JSON
    "pipe": (lambda: (os.mkfifo("s.yaml"), "study.launch s.yaml --dry-run")[1], "not a regular file"),
    "device": (
        lambda: (zero(Path("s.yaml")), "bimask train-victim s.yaml")[1],
        "not a regular file",
    ),
    "ring": (lambda: f"bimask train-victims {ring('s.yaml')}", "Too many levels"),
    "many values": (lambda: dry("a: [" + "1," * 200_000 + "1]"), "more than 50000 values"),
    "merges": (lambda: dry("a: &a {x: &b [*c]}\nb: {<<: [*a, *a]}"), "undefined alias"),
    "pairs": (lambda: dry("a: !!omap " + "[[" * 30 + "]]" * 30), "nested deeper|expected a"),
    "digits in base 2": (lambda: dry("trials: 0b" + "1" * 10_000), "more than 100 digits"),
    "binary": (lambda: dry("name: !!binary '!!!'"), ""),
    "three large suites": (
        lambda: dry(study_of(**{key: many_victims(450, at) for at, key in enumerate(SUITES)})),
        "with every key filled in it has",
    ),
    "settings": (lambda: settings("purify: {" + "? [a]\n: b}"), ""),
    "manifest": (
        lambda trained: ["bimask", "gallery", nested_manifest(trained)],
        "nested deeper",
    ),
    # records
    "a line without end": (
        lambda: old(replaced("trials.jsonl", sparse(5 * 2**30))),
        "no file of records",
    ),
    "a long line": (
        lambda: old(replaced("trials.jsonl", b"[" + b"1," * 2**24 + b"\n")),
        "at most 16777216 are read",
    ),
    "NUL": (
        lambda: old(replaced("trials.jsonl", bytes(2**20) + b"\n")),
        "it has NUL bytes",
    ),
    "nested line": (
        lambda: old(replaced("trials.jsonl", b"[" * 10**5 + b"\n")),
        "nested too deep",
    ),
    "many lines": (
        lambda: old(replaced("trials.jsonl", b"{}\n" * 10**6)),
        "cannot be read",
    ),
    "pipe of records": (
        lambda: old(replaced("trials.jsonl", os.mkfifo)),
        "There is no study",
    ),
    "pipe of reports": (
        lambda: old(replaced("reports.jsonl", os.mkfifo)),
        "no file of records",
    ),
    "device as summary": (
        lambda: old(replaced("summary.json", zero)),
        "report ",
        0,
    ),
    "summary of infinities": (
        lambda: old(edited("summary.json", lambda s: s.update(hypervolume=float("inf"), front=[{}]))),
        "cannot be read",
    ),
    "summary of another": (
        lambda: old(edited("summary.json", lambda s: s["chosen"].update(number=77))),
        "do not fit together",
    ),
    "rounds": (
        lambda: old(replaced("trials/003/digits-badnets.rounds.json", b"[" * 10**5)),
        "cannot be read",
    ),
    "rounds of words": (
        lambda: old(replaced("trials/003/digits-badnets.rounds.json", b'[{"step": "x"}]')),
        "cannot be read",
    ),
    "masks": (
        lambda: old(replaced("trials/003/digits-badnets.masks.safetensors", b"\xff" * 64)),
        "do not fit together",
    ),
    "identity": (
        lambda: old(replaced("identity.json", os.mkfifo), "study.launch --resume old"),
        "not a regular file",
    ),
    "identity, nested": (
        lambda: old(replaced("identity.json", b"[" * 10**6), "study.launch --resume old"),
        "nested too deep",
    ),
    "records to promote": (
        lambda: old(
            edited("summary.json", lambda s: s["chosen"].update(number=77)), "study.promote old"
        ),
        "no COMPLETE trial 77",
    ),
    "a space of words": (
        lambda: old(edited("study.yaml", lambda s: s.update(space={"a": "b"}))),
        "do not fit together",
    ),
    "an earlier study": (
        lambda: (
            old(edited("study.yaml", lambda s: s.update(victims=7))),
            dry(study_of(warm_start_from=["outputs/old"])),
        )[1],
        "do not fit together",
    ),
    # tensors
    "a header of exabytes": (lambda: header(2**63), "nor safetensors"),
    "30,000 tensors": (
        lambda: header(
            0,
            **{f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)},
        ),
        "plain tensors",
    ),
    "a shape without end": (
        lambda: header(0, a={"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}),
        "plain tensors",
    ),
    "a pickle": (pickled, "open"),
    "NPZ that unfolds": (lambda: npz(bytes(2**26)), "refused"),
    "NPZ of objects": (lambda: npz(object_array(), compressed=False), "refused"),
    # pictures
    "PNG": (picture(lambda: bomb_png(2**31 - 1, 2**31 - 1)), "pixels"),
    "PNG of one row": (picture(lambda: bomb_png(2**30, 1)), "pixels"),
    "JPEG": (picture(huge_jpeg), "pixels"),
    "JPEG of scans": (picture(lambda: jpeg(1500, 2000, progressive=True)), "scans"),
    "WebP": (picture(webp), "pixels"),
    "TIFF in a ring": (picture(looping_tiff), ""),
    "BigTIFF": (picture(wide_tiff), "Cannot read the picture|tags"),
    "BMP": (picture(bmp), "pixels|Cannot read"),
    "GIF": (picture(gif), "pixels"),
    "PPM": (picture(lambda: b"P6 999999999 999999999 255\n"), "pixels"),
    "PostScript": (
        picture(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
        "none of PNG",
    ),
    "SVG": (picture(lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "none of PNG"),
    "a device among pictures": (
        lambda: sites(weights(), linked("/dev/zero")),
        "",
    ),
    "a ring among pictures": (lambda: sites(weights(), linked("z.png")), ""),
    # code
    "net of a suite": (
        lambda: f"bimask train-victims {suite(net='evil.py:make')}",
        "nothing of it was run",
    ),
    "net of a suite on Ray": (
        lambda: f"study.victims {suite(net='evilpack.net:make')}",
        "nothing of it",
    ),
    "net of a victim": (
        lambda: (
            suite(),
            Path("s.yaml").write_text(yaml.safe_dump({**HASTY, "net": "evilpack.net:make"})),
            "bimask train-victim s.yaml",
        )[2],
        "nothing of it was run",
    ),
    "net of a manifest": (
        lambda trained: [
            "bimask",
            "export-backdoorbench",
            manifest(trained, spec={"net": "evil.py:make"}),
            "out",
        ],
        "may do anything",
    ),
    "net of a study": (
        lambda: dry(study_of(victims=[{**HASTY, "net": "evilpack.net:make"}])),
        "estimate: none",
        0,
    ),
    "net of a folder": (
        lambda: old(
            edited("study.yaml", lambda s: s["victims"][0].update(net="evil.py:make")),
            "study.launch --resume old",
        ),
        "",
    ),
    "object of YAML": (
        lambda: settings("a: !!python/object/apply:os.system [touch RUN]"),
        "python/object",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stranger_costs_a_sentence(here, run, trained, name):
    make, says, *rest = VARIANTS[name]
    words = make(trained) if make.__code__.co_argcount else make()
    code, said = run(words)
    assert "Traceback" not in said, said[-3000:]
    assert re.search(says, " ".join(said.split())), said[:3000]
    assert code == (rest[0] if rest else 2), said[:3000]
    assert said.replace("\n", "").replace("\t", "").isprintable(), repr(said)
    assert not re.search(r"^error: all is well", said, re.MULTILINE)
    assert len(said) < 25_000
    assert not (here / "RUN").exists()
    assert not [one for one in sys.modules if one.startswith("evil")]
    for page in here.rglob("*.html"):
        text = page.read_text()
        assert len(text) < 2_000_000
        assert not re.search("[\x1b\x07\u202e]|</script>xxx", text)


def test_the_code_is_hostile_indeed(here):
    pickle.loads(pickle.dumps(Hostile()))
    assert (here / "RUN").exists()
