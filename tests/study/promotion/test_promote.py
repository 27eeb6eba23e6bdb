"""From a finished study to a served model: real Ray, MLflow, SQLite, and HTTP on loopback."""

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file

import study
from bimask import PurifyConfig, fold, load_data, load_victim
from bimask.cleaned.classifier import Classifier
from bimask.defences.purify import defend
from bimask.masking.masks import MaskSet
from bimask.progress import Console
from study import promote as promoting
from study import serve
from study.pipeline import run
from study.promotion.candidate import load_victims, read_candidate
from study.promotion.packing import stored
from study.promotion.registry import CHAMPION, Registry, as_png, load_classifier
from study.purify import resolved
from study.score import score_folder
from study.spec.config import StudyError
from study.tracking.mlflow_runs import tracking_uri

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[3]
VICTIM = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "attack": {"name": "badnets"},
    "epochs": 6,
}
STUDY = {
    "name": "tiny",
    "trials": 3,
    "paper_defaults": False,
    "clean_images_per_class": 3,
    "victims": [VICTIM],
    "confirm": {"seeds": 2, "paper_seeds": 0},
    "gates": {"accuracy_drop": 1, "attack_success": 1, "spread": 1, "seeds": 2},
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None, "loss_form": "log"}
    | {"initialise_rounds": 2, "minimise_rounds": 2, "select_rounds": 4, "inner_steps": 1},
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
}


@pytest.fixture(scope="module", autouse=True)
def _clean_tree():
    """The sources count as committed, whatever the state of those that are tested."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("study.promotion.candidate", "study.tracking.recorder", "study.pipeline.run"):
            patch.setattr(f"{place}.commit", lambda: "0123456789ab")
        yield


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, with_victim):
    """A finished study."""
    outputs = with_victim(tmp_path_factory.mktemp("outputs"))
    (outputs / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    assert run.run_study(outputs / "tiny.yaml", {"concurrency": 1}, outputs=outputs, address="local")
    return outputs


def promote(outputs, *, trial=None, **options):
    """The command, in this process: whether the gates hold, and what is printed."""
    stream = io.StringIO()
    console = Console(file=stream, width=140)
    given = {"apply_": False, "rollback": False, "confirm_": False, "model": None, "victim": None}
    held = promoting.promote("tiny", trial, outputs=outputs, console=console, **given | options)
    return held, stream.getvalue()


@pytest.fixture(scope="module")
def registry(outputs):
    return Registry(tracking_uri(outputs), "tiny")


@pytest.fixture(scope="module")
def applied(outputs, registry):
    """The chosen trial, promoted; what was printed."""
    dry, shown = promote(outputs)
    assert dry
    assert "nothing was registered" in shown
    assert registry.versions() == []
    held, printed = promote(outputs, apply_=True)
    assert held
    return printed


@pytest.fixture(scope="module")
def in_memory(outputs):
    """The chosen trial's purified victim, from the masks that the study left."""
    summary = json.loads((outputs / "tiny" / "summary.json").read_text())
    number = summary["chosen"]["number"]
    masks = load_file(next((outputs / "tiny" / "trials" / f"{number:03d}").glob("*.masks.safetensors")))
    victim = load_victim(next((outputs / "victims").iterdir()))
    settings = PurifyConfig.from_yaml(outputs / "tiny" / "best.yaml")
    model = fold(victim.model, MaskSet.from_tensors(masks, sharpness=settings.sharpness))
    return Classifier(model, victim.classes, (1, 12, 12))


@pytest.fixture(scope="module")
def images():
    return load_data("digits", image_size=12).test.images[:40]


def probabilities(answers):
    return torch.tensor([list(answer["probabilities"].values()) for answer in answers])


def test_the_first_candidate_becomes_the_champion(applied, registry):
    assert "registered: tiny version 1" in applied
    assert registry.champion().number == "1"
    tags = registry.champion().tags
    assert {"study_digest", "commit", "victims_digest", "test.attack_success"} <= tags.keys()


def test_a_second_call_changes_nothing(applied, outputs, registry):
    held, printed = promote(outputs, apply_=True)
    assert held
    assert "nothing to do" in printed
    assert len(registry.versions()) == 1


def test_a_version_has_signature_example_requirements_and_card(applied, outputs):
    client = MlflowClient(tracking_uri(outputs))
    version = client.get_model_version_by_alias("tiny", CHAMPION)
    assert "Measured on test" in version.description
    assert "mask_lr" in version.description
    folder = Path(version.source.removeprefix("file://"))
    model = yaml.safe_load((folder / "MLmodel").read_text())
    assert model["signature"]["inputs"]
    assert "torch==" in (folder / "requirements.txt").read_text()
    assert (folder / "input_example.json").is_file()
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(version.run_id)} >= {"model", "report.html"}


def test_no_file_of_a_version_is_a_pickle(applied, outputs):
    version = MlflowClient(tracking_uri(outputs)).get_model_version_by_alias("tiny", CHAMPION)
    files = [p for p in Path(version.source.removeprefix("file://")).rglob("*") if p.is_file()]
    assert len(files) > 20
    assert all(path.suffix in KINDS or path.name in ("MLmodel", "py.typed") for path in files), files
    others = [path for path in files if path.suffix != ".safetensors"]
    assert not any(zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80" for path in others)
    for path in set(files) - set(others):
        load_file(path)  # what is one, not what is called so


KINDS = {".py", ".safetensors", ".json", ".yaml", ".html", ".txt"}


def test_a_fresh_process_loads_it_by_its_alias_and_answers_the_same(
    applied, outputs, in_memory, images, tmp_path
):
    code = (
        "import json, sys, mlflow\n"
        "model = mlflow.pyfunc.load_model('models:/tiny@champion')\n"
        "import bimask\n"
        "print(json.dumps([bimask.__file__, model.predict(json.load(sys.stdin))]))"
    )
    asked = [as_png(image) for image in images]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(outputs)},
    )
    assert done.returncode == 0, done.stderr
    place, answers = json.loads(done.stdout.splitlines()[-1])
    assert "code" in Path(place).parts, "bimask is the copy that travels with the model"
    expected = probabilities(in_memory(asked))
    assert (probabilities(answers) - expected).abs().max() <= 1e-5


# --- served ---


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    def __init__(self, command, outputs, log):
        self.port, self.log = free_port(), log.open("w")
        words = [*command, "--port", str(self.port)]
        environment = os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(outputs)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        # MLflow starts `uvicorn` by its name
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            words,
            cwd=log.parent,
            env=environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def wait(self):
        for _ in range(1200):
            try:
                return self.request("/ping", None)
            except OSError:
                assert self.process.poll() is None, Path(self.log.name).read_text()
                time.sleep(0.2)
        raise TimeoutError(Path(self.log.name).read_text())

    def request(self, path, body, content_type="application/json", **headers):
        if content_type is not None:
            headers["Content-Type"] = content_type
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        if content_type is None and body is not None:
            request.add_unredirected_header("Content-type", "")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, images):
        status, text = self.request("/invocations", json.dumps({"inputs": images}).encode())
        assert status == 200, text
        return json.loads(text)["predictions"]

    def memory(self, what="VmRSS"):
        """Resident bytes of the process group, or the most that they were."""
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == self.process.pid:
                    (line,) = [x for x in status.read_text().splitlines() if x.startswith(what)]
                    total += int(line.split()[1]) * 1024
            except (OSError, ValueError):
                continue
        return total

    def stop(self, number=signal.SIGTERM):
        os.killpg(self.process.pid, number)
        self.process.wait(60)
        self.log.close()


@pytest.fixture(scope="module")
def server(applied, outputs, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "study.serve", "models:/tiny@champion", "--outputs", str(outputs)]
    server = Server(command, outputs, log)
    try:
        server.wait()
        yield server
    finally:
        server.stop(signal.SIGINT)
    assert server.process.returncode == 130
    said = log.read_text()
    assert "Traceback" not in said
    assert "answers on http://127.0.0.1" in said


def test_over_http_it_answers_as_in_memory(server, in_memory, images):
    encoded = [as_png(image) for image in images]
    lists = [image.permute(1, 2, 0).tolist() for image in images]
    floats = [(image.permute(1, 2, 0).float() / 255).tolist() for image in images]
    expected = probabilities(in_memory(encoded))
    for asked in (encoded, lists, floats):
        answers = server.ask(asked)
        assert (probabilities(answers) - expected).abs().max() <= 1e-5
        assert [a["class"] for a in answers] == [a["class"] for a in in_memory(encoded)]


@pytest.mark.parametrize(
    ("body", "content_type", "status", "says"),
    [
        (b'{"inputs": [3]}', "application/json", 400, "nested lists"),
        (b'{"inputs": ["aGVsbG8="]}', "application/json", 400, "no PNG"),
        (b'{"inputs": "a"}', "application/json", 400, "list"),
        (b"{}", "application/json", 400, "inputs"),
        (b"", "application/json", 400, "JSON"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", "application/json", 400, "cannot be read"),
        (b"{}", "image/png", 415, "content types"),
        (b"{}", None, 415, "Content-Type"),
        (b"\xff\xfe\xff", "application/json", 400, "JSON"),
        (b"a\n3", "text/csv", 415, "content types"),
        (b"PAR1", "application/vnd.apache.parquet", 415, "content types"),
    ],
)
def test_a_bad_request_gets_a_sentence(server, body, content_type, status, says):
    got, text = server.request("/invocations", body, content_type)
    assert got == status, text
    assert says in text


def test_a_body_that_is_too_long_or_of_no_length_is_refused_unread(server):
    head = "POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for line, status in ((f"Content-Length: {10**12}\r\n", b" 413 "), ("", b" 411 ")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as one:
            one.sendall(f"{head}{line}\r\n".encode())
            assert status in one.recv(4096)


def test_four_huge_bodies_at_once_cost_no_memory(server, images):
    good = as_png(images[0])
    server.ask([good])
    before = server.memory("VmHWM")
    body = b'{"inputs": [' + b"9," * 2**25  # 64 MiB
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.request("/invocations", body), range(8)))
    assert {status for status, _ in answers} == {413}
    assert all(len(text) < 300 for _, text in answers)
    assert server.memory("VmHWM") - before < 32 * 2**20
    server.ask([good])


def test_another_host_and_pages_are_refused(server):
    assert server.request("/ping", None, Host="evil.example")[0] == 421
    for page in ("/docs", "/redoc", "/openapi.json"):
        assert server.request(page, None)[0] == 404


def test_a_port_that_is_taken_ends_with_a_sentence(server, outputs, capsys):
    options = {"allow_host": None, "batch": None, "outputs": outputs}
    for port, host, batch, says in (
        (server.port, "127.0.0.1", None, f"port {server.port} "),
        (0, "no.such.host.invalid", None, "no.such.host.invalid"),
        (0, "127.0.0.1", 0, "--batch 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            serve.main("models:/tiny@champion", port=port, host=host, **options | {"batch": batch})
        assert caught.value.code == 2
        shown = capsys.readouterr().err.strip()
        assert says in shown
        assert len(shown.splitlines()) == 1


def fuzzed(number, good):
    """One malformed request: (body, content type). The same for the same number."""
    dice = random.Random(number)
    size = dice.choice([0, 1, 3, 11, 12, 13, 64])

    def pixels(h, w, c, value=lambda: dice.randrange(256)):
        return [[[value() for _ in range(c)] for _ in range(w)] for _ in range(h)]

    def png(h, w, mode):
        buffer = io.BytesIO()
        Image.new(mode, (w, h)).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    junk = dice.choice([None, True, -1, 1e400, "x", "", {}, [], [[]], {"b64": good}, "é" * 50, 10**50])
    cut = json.dumps({"inputs": [good]}).encode()
    bodies = [
        lambda: dice.randbytes(dice.randrange(2000)),
        lambda: cut[: dice.randrange(len(cut))],
        lambda: json.dumps(junk).encode(),
        lambda: json.dumps({"inputs": junk}).encode(),
        lambda: json.dumps({"inputs": [junk] * dice.randrange(1, 9)}).encode(),
        lambda: json.dumps({"inputs": [good, junk]}).encode(),
        lambda: json.dumps({"inputs": [pixels(size, 12 if size != 12 else 11, 1)]}).encode(),
        lambda: json.dumps({"inputs": [pixels(12, 12, dice.choice([0, 2, 3, 4]))]}).encode(),
        lambda: json.dumps(
            {"inputs": [pixels(12, 12, 1, lambda: dice.choice([256, -1, 1e9]))]}
        ).encode(),
        lambda: json.dumps({"inputs": [pixels(12, 12, 1, lambda: junk)]}).encode(),
        lambda: json.dumps({"inputs": [png(dice.choice([1, 11, 600]), 12, "L")]}).encode(),
        lambda: json.dumps({"inputs": [good[: dice.randrange(len(good) // 2)]]}).encode(),
        lambda: json.dumps({"instances": [good], "inputs": None}).encode(),
        lambda: json.dumps({dice.choice(["dataframe_split", "dataframe_records"]): junk}).encode(),
        lambda: json.dumps({"messages": junk, "inputs": junk}).encode(),
        lambda: b"[" * dice.choice([10, 900, 50_000]),
        lambda: b'{"inputs": ' + b"[" * 990 + b"]" * 990 + b"}",
        lambda: b'{"inputs": [' + b"1" * dice.choice([400, 5000]) + b"]}",
        lambda: json.dumps({"inputs": [good] * 2000}).encode(),
    ]
    content_type = dice.choice(
        ["application/json"] * 12
        + ["text/csv", "application/vnd.apache.parquet", "text/plain", None]
        + ["application/json; charset=utf-16", "application/json; a=b", "é".encode().decode("latin-1")]
    )
    return dice.choice(bodies)(), content_type


def attack(server, count, good):
    """Send that many malformed requests; status codes, and the memory before and after."""
    server.ask([good])
    for number in range(count // 10):  # what libraries load at their first use
        server.request("/invocations", *fuzzed(number, good))
    before, codes = server.memory(), []
    for number in range(count):
        status, text = server.request("/invocations", *fuzzed(number, good))
        codes.append(status)
        assert 400 <= status < 500, (number, status, text[:300], fuzzed(number, good))
        assert text
    return codes, before, server.memory()


def test_malformed_requests_are_refused_and_the_server_lives(server, images, in_memory):
    good = as_png(images[0])
    codes, _, _ = attack(server, 60, good)
    assert len(set(codes)) > 1
    assert server.ask([good])[0]["class"] == in_memory([good])[0]["class"]


@pytest.mark.slow
def test_two_thousand_malformed_requests_leave_memory_flat(server, images):
    codes, before, after = attack(server, 2000, as_png(images[0]))
    print(
        {code: codes.count(code) for code in set(codes)},
        f"{before / 2**20:.0f} -> {after / 2**20:.0f} MiB",
    )
    assert after - before < 32 * 2**20
    assert "Traceback" not in Path(server.log.name).read_text()


@pytest.mark.slow
def test_mlflows_own_server_answers_the_same(applied, outputs, images, in_memory, tmp_path):
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny@champion"]
    server = Server([*command, "--env-manager", "local"], outputs, tmp_path / "log")
    try:
        server.wait()
        encoded = [as_png(image) for image in images]
        expected = probabilities(in_memory(encoded))
        assert (probabilities(server.ask(encoded)) - expected).abs().max() <= 1e-5
        assert server.request("/invocations", b'{"inputs": [3]}')[0] == 400
        assert server.request("/invocations", b"[" * 100_000)[0] == 500, "then the guard can go"
    finally:
        server.stop()


# --- another trial, and the way back ---


@pytest.fixture(scope="module")
def other(outputs):
    """A trial that was not chosen."""
    summary = json.loads((outputs / "tiny" / "summary.json").read_text())
    complete = study.load("tiny", outputs).query("status == 'COMPLETE'")["number"]
    return int(next(number for number in complete if number != summary["chosen"]["number"]))


def test_scores_on_val_are_refused(outputs, registry, other):
    held, printed = promote(outputs, trial=other, apply_=True)
    assert not held
    assert "val" in printed
    assert f"--trial {other} --confirm" in printed


def test_a_dirty_tree_is_refused(applied, outputs, monkeypatch):
    monkeypatch.setattr("study.promotion.candidate.commit", lambda: "0123456789ab-dirty")
    held, printed = promote(outputs, apply_=True)
    assert not held
    assert "uncommitted changes" in printed


def test_a_gate_that_fails_registers_nothing(applied, outputs, registry):
    path = outputs / "tiny" / "study.yaml"
    before = path.read_text()
    path.write_text(
        before.replace("seeds: 2\n  spread", "seeds: 2\n  spread").replace("seeds: 2", "seeds: 3")
    )
    try:
        held, printed = promote(outputs, apply_=True, model="elsewhere")
    finally:
        path.write_text(before)
    assert not held
    assert "FAILED" in printed
    assert Registry(registry.uri, "elsewhere").versions() == []


def test_another_trial_takes_the_alias_only_if_it_is_better_and_gives_it_back(
    applied, outputs, registry, other
):
    held, printed = promote(outputs, trial=other, confirm_=True, apply_=True)
    assert held, printed
    first, second = registry.versions()

    def rank(one):
        return float(one.tags["test.attack_success"]), float(one.tags["test.accuracy_drop"])

    better = rank(second) < rank(first)
    assert registry.champion().number == ("2" if better else "1")
    if not better:
        registry.set_champion(second)
    assert registry.champion().number == "2"
    _, printed = promote(outputs, rollback=True)
    assert "version 1 again" in printed
    assert registry.champion().number == "1"
    with pytest.raises(StudyError, match="first champion"):
        promote(outputs, rollback=True)


def test_one_judged_on_other_victims_is_not_compared(applied, registry):
    tags = dict(registry.champion().tags) | {"victims_digest": "another", "test.attack_success": "-1"}
    better, why = promoting.beats(tags, registry.champion())
    assert not better
    assert "other victims" in why


# --- reuse ---


def test_a_configuration_is_purified_with_by_its_alias(applied, outputs, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(outputs))
    word, config = resolved(["--config", "models:/tiny@champion"], tmp_path)
    assert word == "--config"
    assert PurifyConfig.from_yaml(config) == PurifyConfig.from_yaml(outputs / "tiny" / "best.yaml")
    with pytest.raises(StudyError, match="nowhere"):
        resolved(["models:/nowhere@champion"], tmp_path)


@pytest.mark.parametrize("resize", [False, True])
def test_a_folder_is_scored_by_a_model_of_oblong_images(tmp_path, resize):
    class Oblong:
        shape = (3, 6, 10)

        def __call__(self, images):
            assert {image.shape for image in images} == {(6, 10, 3)}
            return [{"class": "a", "probabilities": {"a": 1.0}}] * len(images)

    Image.fromarray(np.zeros((6, 10), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((10, 6), np.uint8)).save(tmp_path / "b.png")
    frame = score_folder(Oblong(), tmp_path, Console(file=io.StringIO()), resize=resize)
    said = "6x10 pixels, the model takes 10x6; --resize"
    assert [error for error in frame["error"] if isinstance(error, str)] == ([] if resize else [said])


def test_a_folder_is_scored_and_a_broken_picture_is_told(applied, outputs, images, in_memory, tmp_path):
    for row, image in enumerate(images[:5]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{row}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "small.png")
    model = load_classifier("models:/tiny@champion", tracking_uri(outputs))
    frame = score_folder(model, tmp_path, Console(file=io.StringIO())).set_index("file")
    expected = [answer["class"] for answer in in_memory([as_png(image) for image in images[:5]])]
    assert frame["class"].tolist()[:5] == expected
    assert "Cannot read" in frame.loc["broken.png", "error"]
    assert "5x5" in frame.loc["small.png", "error"]
    assert frame["error"].notna().sum() == 2


def test_what_the_trial_stored_is_what_the_defence_would_end_with(applied, outputs):
    """What is stored is packed as it is, and a run anew has the same bits."""
    candidate = read_candidate("tiny", outputs, None)
    victims = load_victims(candidate.config, outputs)
    (name, victim), *_ = victims.items()
    kept = stored(candidate, name, victim.model)
    clean = victim.spec.load_data().train.clean_subset(3, seed=0).floats()
    anew = defend(victim.model, clean, candidate.settings, generator=torch.Generator().manual_seed(0))
    assert kept.tensors.keys() == anew.tensors.keys()
    assert all(torch.equal(kept.tensors[key], anew.tensors[key].detach()) for key in kept.tensors)
    assert kept.passes == anew.passes
    assert [log.loss for log in kept.history] == [log.loss for log in anew.history]
    assert stored(candidate, "another", victim.model) is None
