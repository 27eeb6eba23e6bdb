"""Secrets leave MLflow's addresses before MLflow, a message or a traceback has them.

MLflow prints the address of its store, and puts it into errors. So a password in MLFLOW_TRACKING_URI
goes where only what connects looks: that of a server to MLflow's own variables, that of a database to
SQLAlchemy's hook for what is about to open a connection.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError

from study.spec.config import StudyError

ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
USER, PASSWORD, TOKEN = (f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN"))
IN_A_QUERY = {
    **dict.fromkeys(("user", "username"), USER),
    **dict.fromkeys(("password", "passwd", "pwd"), PASSWORD),
    "token": TOKEN,
}
SECRET = re.compile("pass|pwd|secret|token|key|credential|odbc_connect", re.IGNORECASE)
NO_SCHEME = re.compile(r"[^@]*:[^@]*@")  # USER:PASSWORD@, where http:// was forgotten

_databases: dict[str, URL] = {}  # address without secrets -> with them


def move_credentials() -> None:
    """Take the secrets out of `ADDRESSES` in the environment, and put them where what connects looks.

    Raises:
        StudyError: an address that cannot be read.
    """
    for name in ADDRESSES:
        if address := os.environ.get(name):
            try:
                clean, found = _split(address)
            except (ArgumentError, ValueError):
                raise StudyError(
                    f"Got a {name} that is no address (it is not shown, for it may hold a password); "
                    "expected http(s)://HOST:PORT or DIALECT://USER:PASSWORD@HOST/DATABASE, with other "
                    "characters than letters and digits as %XX in user and password."
                ) from None  # the cause's text may have a part of it
            if clean != address:
                _keep(clean, found)
                os.environ[name] = clean


def redacted(address: str) -> str:
    """An address without its secrets, for people to read."""
    try:
        return _split(address)[0]
    except (ArgumentError, ValueError):
        scheme, separator, _ = address.partition("://")
        return f"{scheme}://..." if separator else "..."


def _keep(clean: str, found: URL | dict[str, str]) -> None:
    if isinstance(found, dict):
        os.environ |= found
        return
    _databases[clean] = found
    if not event.contains(Engine, "do_connect", _with_secrets):
        event.listen(Engine, "do_connect", _with_secrets)


def _with_secrets(dialect: Dialect, _record: Any, words: list[Any], options: dict[str, Any]) -> None:
    """Before a connection is opened: what opens it is given the secrets of its address again."""
    for clean, whole in _databases.items():
        if whole.get_backend_name() != dialect.name or whole.get_driver_name() != dialect.driver:
            continue
        without = dialect.create_connect_args(make_url(clean))
        if list(without[0]) == words and without[1].items() <= options.items():
            with_them = dialect.create_connect_args(whole)
            words[:] = with_them[0]
            options.update(with_them[1])


def _split(address: str) -> tuple[str, URL | dict[str, str]]:
    """An address without its secrets, and those: MLflow's variables, or a database's whole address.

    Raises:
        ArgumentError, ValueError: it cannot be read.
    """
    if address.lower().startswith(("http:", "https:")):
        return _split_server(address)
    if "://" in address and ("@" in address or SECRET.search(address)):
        return _split_database(address)
    if "://" not in address and NO_SCHEME.match(address):
        raise ValueError("no scheme, but a password")
    return address, {}


def _split_server(address: str) -> tuple[str, dict[str, str]]:
    scheme, _, rest = address.partition("://")
    end = re.search("[/?#]", rest)
    authority = rest[: end.start()] if end else rest
    port = re.search(r":(\d*)$|^[^:]*$|\]$", authority)
    found = {}
    # a password with /, ? or # as they are, and not as %XX, ends at the last @
    before, at, _after = (authority if "@" in authority or port else rest).rpartition("@")
    if at:
        rest = rest[len(before) + 1 :]
        user, colon, password = before.partition(":")
        found = {USER: unquote(user)} | ({PASSWORD: unquote(password)} if colon else {})
    parts = urlsplit(f"{scheme}://{rest}")
    _ = parts.port  # raises where it is none
    for key, value in parse_qsl(parts.query):
        if name := IN_A_QUERY.get(key.lower()):
            found[name] = value
    beside = f"{parts.query} {parts.fragment} {parts.path.partition(';')[2]}"
    if not found and not SECRET.search(beside):
        return address, {}
    path = parts.path.partition(";")[0]
    return parts._replace(path=path, query="", fragment="").geturl(), found


def _split_database(address: str) -> tuple[str, URL | dict[str, str]]:
    whole = make_url(address)
    if "@" in (whole.host or ""):
        raise ValueError("a password with an @ that is not written as %40")
    secrets = [name for name in whole.query if SECRET.search(name)]
    if whole.password is None and not secrets:
        return address, {}
    clean = URL.create(
        whole.drivername, whole.username, None, whole.host, whole.port, whole.database, whole.query
    ).difference_update_query(secrets)
    # SQLite knows no password, and would refuse one
    kept: URL | dict[str, str] = {} if whole.get_backend_name() == "sqlite" else whole
    return clean.render_as_string(hide_password=False), kept
