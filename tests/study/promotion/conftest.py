"""A server of a small model, asked over loopback: uvicorn in a thread."""

import http.client
import json
import logging
import socket
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bimask.cleaned.classifier import Classifier
from study.promotion.listening import bound, server_of
from study.promotion.server import ModelServer

SIDE = 12


def classifier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 3))
    return Classifier(net, "abc", (1, SIDE, SIDE))


class Served:
    """A server in a thread, and ways to ask it."""

    def __init__(self, hosts=(), images=None, predictor=None):
        self.app = ModelServer(predictor or classifier(), hosts, images)
        self.socket = bound("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.server = server_of(self.app)

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()

    def request(self, path="/invocations", body=None, headers=None, method="POST"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            usual = {"Content-Type": "application/json"}
            connection.request(method, path, body, usual if headers is None else headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def ask(self, images):
        return self.request(body=json.dumps({"inputs": images}).encode())

    @contextmanager
    def connection(self):
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as one:
            yield one

    def raw(self, data):
        """The status of an answer to bytes, and all that came."""
        with self.connection() as one:
            one.sendall(data)
            said = self.read(one)
        return int(said.split()[1]), said.decode()

    @staticmethod
    def read(one):
        """An answer, up to its end as Content-Length says it, or to the connection's."""
        said = b""
        while part := one.recv(65536):
            said += part
            head, found, body = said.partition(b"\r\n\r\n")
            length = [x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")]
            if found and length and len(body) >= int(length[0].split(b":")[1]):
                break
        return said


@pytest.fixture(scope="module")
def served():
    """A server that goes by the names of the loopback."""
    with Served() as served:
        yield served


@pytest.fixture(scope="module")
def served_under():
    """Names of hosts -> such a server, for a `with`."""
    return lambda *hosts: Served(hosts)


@pytest.fixture(scope="module")
def serving():
    """Whatever answers -> a server of it, for a `with`."""
    return lambda predictor: Served(predictor=predictor)


@pytest.fixture
def logged(served):
    """The lines that the server logs during a test."""
    log, handler, lines = logging.getLogger("uvicorn.error"), logging.Handler(), []
    handler.emit = lambda record: lines.append(handler.format(record))
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)
