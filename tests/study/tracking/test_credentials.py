"""A password in MLflow's address is in no message, no traceback, no log and no file."""

import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
import traceback
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml

from study.promotion.registry import Registry, load_classifier
from study.report import log_report
from study.spec.config import StudyError
from study.tracking import credentials
from study.tracking.mlflow_runs import Tracker, log_to_study, require_server, tracking_uri

ROOT = Path(__file__).parents[3]
CANARY = "hunter22canary"
VARIABLES = (*credentials.ADDRESSES, credentials.USER, credentials.PASSWORD, credentials.TOKEN)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The environment and the addresses of databases are as they were, after each test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 0)  # of a database that is away
    kept = dict(credentials._databases)
    yield monkeypatch
    credentials._databases.clear()
    credentials._databases.update(kept)


def moved(address):
    os.environ["MLFLOW_TRACKING_URI"] = address
    credentials.move_credentials()
    return [os.environ.get(name) for name in VARIABLES if name != "MLFLOW_REGISTRY_URI"]


@pytest.mark.parametrize(
    ("address", "clean", "user", "password", "token"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000", None, None, None),
        ("http://h:5000/p@th", "http://h:5000/p@th", None, None, None),
        ("http://[::1]:5000/p@th", "http://[::1]:5000/p@th", None, None, None),
        ("http://me:word@h:5000/a", "http://h:5000/a", "me", "word", None),
        ("https://me:wo%2Frd%40@h", "https://h", "me", "wo/rd@", None),
        ("https://me:wo/r?d#@h:50/a", "https://h:50/a", "me", "wo/r?d#", None),
        ("http://h/?user=me&password=word", "http://h/", "me", "word", None),
        ("http://h?token=word", "http://h", None, None, "word"),
        ("http://me@h", "http://h", "me", None, None),
        ("http://h/x?api_key=word", "http://h/x", None, None, None),
        ("http://h/x#token=word", "http://h/x", None, None, None),
        ("http://h/x;token=word", "http://h/x", None, None, None),
        ("databricks://profile", "databricks://profile", None, None, None),
        ("sqlite:////a/x.db", "sqlite:////a/x.db", None, None, None),
        ("sqlite:////a/x.db?password=word", "sqlite:////a/x.db", None, None, None),
        ("mysql+pymysql://me:wo%2Frd@h/db", "mysql+pymysql://me@h/db", None, None, None),
        ("postgresql://h/db?user=me&password=w", "postgresql://h/db?user=me", None, None, None),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dword", "mssql+pyodbc:///", None, None, None),
        ("postgres://me:word@h/db", "postgres://me@h/db", None, None, None),
    ],
)
def test_a_password_goes_to_mlflows_variables_and_leaves_the_address(
    address, clean, user, password, token
):
    assert moved(address) == [clean, user, password, token]
    assert credentials.redacted(address) == clean


@pytest.mark.parametrize(
    "address",
    [
        f"me:{CANARY}@h:5000",
        f"//me:{CANARY}@h",
        f"http://me:{CANARY}@h:port",
        f"mysql://me:{CANARY}@h:{CANARY}/db",
        f"mysql://me:x@{CANARY}@h/db",
    ],
)
def test_what_is_no_address_is_refused_and_not_shown(address):
    with pytest.raises(StudyError, match="Got a MLFLOW_TRACKING_URI that is no address") as caught:
        moved(address)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert CANARY not in credentials.redacted(address)


# --- what connects has it ---


@contextmanager
def listening(answer):
    """A server of one kind of answer, a function of the connection; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        ended = threading.Event()

        def serve():
            while not ended.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with closing(connection):
                    connection.settimeout(10)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def test_a_database_is_told_the_password_that_its_address_lost():
    """PostgreSQL's own client, and a server that asks for the password and reads it."""
    heard = []

    def ask(connection):
        (length,) = struct.unpack("!I", connection.recv(4))
        startup = connection.recv(length - 4)
        if startup.startswith(struct.pack("!I", 80877103)):  # may it be encrypted?
            connection.sendall(b"N")
            (length,) = struct.unpack("!I", connection.recv(4))
            startup = connection.recv(length - 4)
        connection.sendall(b"R" + struct.pack("!II", 8, 3))
        heard.append((startup, connection.recv(1024)))

    with listening(ask) as port:
        os.environ["MLFLOW_TRACKING_URI"] = f"postgresql+psycopg2://me:{CANARY}@127.0.0.1:{port}/runs"
        uri = tracking_uri(Path())
        assert uri == f"postgresql+psycopg2://me@127.0.0.1:{port}/runs"
        with pytest.raises(StudyError, match="cannot be opened"):
            Tracker(uri, Path("artifacts"))
    startup, password = heard[0]
    assert b"user\0me\0" in startup
    assert password[5:].rstrip(b"\0").decode() == CANARY


def test_a_server_is_told_the_password_that_its_address_lost():
    heard = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers["Authorization"])
            self.send_error(401)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            os.environ["MLFLOW_TRACKING_URI"] = f"http://me:word@127.0.0.1:{server.server_port}"
            with pytest.raises(StudyError, match="cannot be opened"):
                Tracker(tracking_uri(Path()), Path("artifacts"))
        finally:
            server.shutdown()
    assert heard[0] == "Basic bWU6d29yZA=="


# --- nothing else has it ---


def hang_up(connection):
    connection.recv(1024)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """What is wrong -> an address with the canary, at which it is wrong."""
    garbage = tmp_path_factory.mktemp("store") / "garbage.db"
    garbage.write_bytes(b"no database" * 1000)
    with socket.create_server(("127.0.0.1", 0)) as free:
        away = free.getsockname()[1]
    with listening(hang_up) as port:
        yield {
            "no server": f"http://me:{CANARY}@127.0.0.1:{away}",
            "no server, slashes": f"http://me:{CANARY}/{CANARY}@127.0.0.1:{away}",
            "a server that hangs up": f"http://me:{CANARY}@127.0.0.1:{port}",
            "a query": f"http://127.0.0.1:{port}/?user=me&password={CANARY}",
            "no address": f"http://me:{CANARY}@127.0.0.1:{CANARY}",
            "no database": f"postgresql+psycopg2://me:{CANARY}@127.0.0.1:{away}/runs",
            "a database that hangs up": f"postgresql+psycopg2://127.0.0.1:{port}/runs?password={CANARY}",
            "no driver": f"mysql+pymysql://me:{CANARY}@127.0.0.1:{away}/runs",
            "no such database": f"oracle://me:{CANARY}@127.0.0.1:{away}/runs",
            "a garbage file": f"sqlite:///{garbage}?password={CANARY}",
            "a file with a password": f"sqlite://me:{CANARY}@/{garbage}",
        }


WRONG = (
    *("no server", "no server, slashes", "a server that hangs up", "a query", "no address"),
    *("no database", "a database that hangs up", "no driver", "no such database"),
    *("a garbage file", "a file with a password"),
)
CALLS = {
    "the study's runs": lambda uri: Tracker(uri, Path("artifacts")),
    "the registry": lambda uri: Registry(uri, "tiny"),
    "a registered model": lambda uri: load_classifier("models:/tiny@champion", uri),
    "a report": lambda uri: log_to_study(uri, "tiny", "0" * 16, Path(__file__)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_no_failure_shows_the_password(addresses, wrong, capfd, caplog):
    os.environ["MLFLOW_TRACKING_URI"] = addresses[wrong]
    said = []
    for call in CALLS.values():
        try:
            uri = tracking_uri(Path())
            require_server(uri)
            call(uri)
        except StudyError as error:
            said += traceback.format_exception(error)
    assert said, "it failed"
    shown = capfd.readouterr()
    for text in ("".join(said), shown.out, shown.err, caplog.text):
        assert CANARY not in text
    assert CANARY not in os.environ["MLFLOW_TRACKING_URI"] or wrong == "no address"


# --- the commands, as they are typed ---

STUDY = {
    "name": "tiny",
    "trials": 2,
    "clean_images_per_class": 3,
    "victims": [
        {"dataset": "digits", "image_size": 12, "net": "small_resnet", "width": 4, "epochs": 1}
        | {"min_clean_accuracy": 0.0, "min_attack_success": 0.0, "attack": {"name": "badnets"}}
    ],
    "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
    "fixed": {"initialise_rounds": 1, "minimise_rounds": 1, "select_rounds": 1, "inner_steps": 1},
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
}


def typed(folder, address, *words):
    """`python -m study.COMMAND` with the address in its environment: the code, and all that it said."""
    done = subprocess.run(
        [sys.executable, "-m", f"study.{words[0]}", *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": address},
    )
    return done.returncode, done.stdout + done.stderr


def holding_the_canary(folder):
    return [p for p in folder.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]


@pytest.fixture(scope="module")
def studied(tmp_path_factory, mlflow_server, with_store):
    """A study that ended well, told to a server whose address had a password; what it printed."""
    folder = tmp_path_factory.mktemp("studied")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    with mlflow_server(f"sqlite:///{with_store(folder)}/mlflow.db", folder) as address:
        with_password = address.replace("http://", f"http://me:{CANARY}@")
        code, said = typed(folder, with_password, "launch", "tiny.yaml", "--address", "local")
    assert code == 0, said
    return folder, said


@pytest.mark.slow
def test_a_study_that_goes_well_leaves_the_password_nowhere(studied):
    folder, said = studied
    assert "View run" in said or "trials: http://127.0.0.1" in said
    assert CANARY not in said
    assert holding_the_canary(folder) == []


REFERENCE = "models:/tiny@champion"
FAILURES = [
    ("no server", ("launch", "tiny.yaml", "--address", "local")),
    ("no driver", ("launch", "tiny.yaml", "--address", "local")),
    ("no address", ("launch", "tiny.yaml", "--address", "local")),
    ("no server, slashes", ("launch", "--resume", "tiny", "--address", "local")),
    ("a server that hangs up", ("launch", "--resume", "tiny", "--address", "local")),
    ("a query", ("promote", "tiny", "--rollback")),
    ("no such database", ("promote", "tiny", "--rollback")),
    ("a garbage file", ("report", "tiny")),
    ("a server that hangs up", ("report", "tiny")),
    ("no driver", ("score", REFERENCE, ".", "--out", "scores.csv")),
    ("a file with a password", ("serve", REFERENCE)),
    ("no server", ("purify", "--config", REFERENCE)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "words"), FAILURES)
def test_a_command_that_fails_shows_the_password_nowhere(studied, addresses, wrong, words):
    folder, _ = studied
    code, said = typed(folder, addresses[wrong], *words)
    assert code == (0 if words[0] == "report" else 2), said  # a report that MLflow lacks is a report
    assert CANARY not in said
    assert "Traceback" not in said
    assert holding_the_canary(folder) == []


@pytest.mark.slow
def test_a_report_is_never_ended_by_mlflow(studied, addresses):
    folder, _ = studied
    for wrong in ("no server", "no address"):
        os.environ["MLFLOW_TRACKING_URI"] = addresses[wrong]
        told = log_report(folder / "report.html", folder / "outputs" / "tiny", folder / "outputs")
        assert told.startswith("not logged: ")
        assert CANARY not in told
