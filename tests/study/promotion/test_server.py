"""What the server answers, and what it bounds: names, bodies, time, connections."""

import base64
import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from bimask.errors import SettingError
from study.promotion import listening
from study.promotion.listening import bound
from study.promotion.server import Limits

SIDE = 12
GOOD = [[[0] * 1] * SIDE] * SIDE


def png(side=SIDE):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def head(*lines, host="localhost"):
    usual = ("POST /invocations HTTP/1.1", f"Host: {host}", "Content-Type: application/json")
    return "\r\n".join([*usual, *lines, "", ""]).encode()


def test_it_answers(served):
    status, text = served.ask([GOOD, png()])
    assert status == 200
    first, second = json.loads(text)["predictions"]
    assert first == second
    assert first["class"] in "abc"
    for path in ("/ping", "/health", "/version"):
        assert served.request(path, method="GET")[0] == 200


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"']
)
def test_json_may_say_its_charset(served, kind):
    body = json.dumps({"inputs": [GOOD]}).encode()
    assert served.request(body=body, headers={"Content-Type": kind})[0] == 200


def test_a_chunked_body_is_read(served):
    body = json.dumps({"inputs": [png()]}).encode()
    status, said = served.raw(
        head("Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    )
    assert status == 200, said


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/", "//"]
)
def test_there_are_no_pages(served, path):
    status, text = served.request(path, method="GET", headers={})
    assert status == 404
    assert "http" not in text


# --- whose server it is ---


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "127.0.0.1", "127.0.0.1:5001", "LOCALHOST:80", "[::1]", "[::1]:5001"),
        *("inside.example", "Inside.Example:5001"),
    ],
)
def test_its_own_names_are_answered(served_under, host):
    with served_under("inside.example", "::1") as served:
        assert served.raw(f"GET /ping HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())[0] == 200


@pytest.mark.parametrize(
    "line",
    [
        *("Host: evil.example", "Host: evil.example:5001", "Host: 127.0.0.1.evil.example", "Host:"),
        *(
            "Host: localhost.evil.example",
            "Host: x@localhost",
            "Host: localhost:x",
            "Host: localhost:1:2",
        ),
        *("Host: 127.0.0.2", "Host: [::2]", "Host: 2130706433", "Host: localhost/", "Origin: null"),
    ],
)
def test_another_name_is_not_answered(served, logged, line):
    """A page of another site whose name was pointed at the loopback."""
    status, said = served.raw(f"GET /ping HTTP/1.0\r\n{line}\r\n\r\n".encode())
    assert status == 421
    assert "evil" not in said
    assert len(logged) == 1


# --- a body is bounded before it is read ---


def test_limits_are_what_the_shape_needs():
    digits, large = Limits.of((1, 28, 28)), Limits.of((3, 224, 224))
    assert digits.images == 64
    assert large.images == 3
    assert large.size < 16 * 2**20
    assert Limits.of((3, 1024, 1024)).images == 1
    assert Limits.of((3, 224, 224), 64).images == 64
    for images in (0, 10**6):
        with pytest.raises(SettingError, match="--batch"):
            Limits.of((1, 8, 8), images)


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 32, 32), (3, 7, 5)])
def test_every_form_of_the_most_images_is_within_the_limits(shape):
    limits, (c, h, w) = Limits.of(shape), shape
    pixels = np.random.default_rng(0).random((h, w, c)) * 1e-4  # the longest numbers
    body = json.dumps({"inputs": [pixels.tolist()] * limits.images}, indent=0).encode()
    for text in (
        body,
        json.dumps({"inputs": [pixels.astype(np.float32).tolist()] * limits.images}).encode(),
    ):
        assert text.count(b",") <= limits.values
        assert text.count(b"[") <= limits.lists
        assert len(text) <= limits.size
    noise = np.random.default_rng(0).integers(0, 256, (h, w, c), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise.squeeze(), "RGB" if c == 3 else "L").save(buffer, "PNG")
    assert limits.images * (len(base64.b64encode(buffer.getvalue())) + 4) <= limits.size


def test_too_long_a_body_is_refused_by_its_length(served):
    status, said = served.raw(head(f"Content-Length: {10**12}"))
    assert status == 413
    assert str(served.app.limits.size) in said


def test_a_client_that_asks_first_is_refused_before_it_sends(served):
    status, said = served.raw(head(f"Content-Length: {10**9}", "Expect: 100-continue"))
    assert status == 413
    assert "100 Continue" not in said


def test_a_chunked_body_is_refused_where_it_gets_too_long(served):
    part = b"%x\r\n%s\r\n" % (2**16, b" " * 2**16)
    with served.connection() as one:
        one.sendall(head("Transfer-Encoding: chunked"))
        for _ in range(served.app.limits.size // 2**16 + 1):
            one.sendall(part)
        assert b" 413 " in served.read(one)  # and no end of the body was sent


@pytest.mark.parametrize("chunked", [False, True])
def test_four_that_send_all_of_a_huge_body_can_read_why(served, chunked):
    pieces = [b"9" * 2**20] * 62
    body = iter(pieces) if chunked else b"".join(pieces)

    def send(_):
        return served.request(body=iter(pieces) if chunked else body)

    with ThreadPoolExecutor(4) as pool:
        for status, text in pool.map(send, range(4)):
            assert status == 413
            assert len(text) < 300
    assert served.app.held == 0


def test_bodies_of_all_requests_are_bounded_together(served, monkeypatch):
    size = served.app.limits.size
    monkeypatch.setattr(served.app, "most_held", 2 * size)
    with served.connection() as one, served.connection() as two:
        for waiting in (one, two):
            waiting.sendall(head(f"Content-Length: {size}") + b" " * (size - 1))
        for _ in range(600):
            if served.app.held == 2 * size - 2:
                break
            time.sleep(0.05)
        assert served.ask([GOOD])[0] == 503
        for waiting in (one, two):
            waiting.sendall(b" ")
            assert b" 400 " in served.read(waiting)
    assert served.ask([GOOD])[0] == 200
    assert served.app.held == 0


# --- a slow client is not waited for ---


@pytest.mark.parametrize(
    ("begins", "drips"),
    [
        (b"POST /invocations HTTP/1.1\r\nHost: localhost\r\n", b"A: b\r\n"),
        (head("Content-Length: 1000"), b" "),
        (head("Transfer-Encoding: chunked"), b"1\r\n \r\n"),
        (head(f"Content-Length: {10**9}"), b" "),
        (b"GET /ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", b" "),
        (b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ping HTTP/1.1\r\n", b"A: b\r\n"),
    ],
)
def test_a_slow_client_is_closed(served, monkeypatch, begins, drips):
    monkeypatch.setattr(listening, "PATIENCE", 0.5)
    with served.connection() as one:
        one.sendall(begins)
        with pytest.raises(OSError, match=r"reset|Broken pipe|closed"):  # noqa: PT012
            for _ in range(300):  # a minute
                one.sendall(drips)
                time.sleep(0.1)
    assert served.ask([GOOD])[0] == 200


def test_a_client_that_reads_no_answer_is_closed(served, monkeypatch, logged):
    monkeypatch.setattr(listening, "PATIENCE", 0.5)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", served.port))
        one.settimeout(0.3)
        with pytest.raises(OSError, match=r"reset|Broken pipe|timed out"):  # noqa: PT012
            while True:
                one.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        for _ in range(300):
            if any("too slow" in line for line in logged):
                break
            time.sleep(0.1)
        assert any("too slow" in line for line in logged)


def test_an_active_connection_stays(served, monkeypatch):
    monkeypatch.setattr(listening, "PATIENCE", 0.5)
    with served.connection() as one:
        for _ in range(8):
            one.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in served.read(one)
            time.sleep(0.1)


def test_connections_are_counted(served, monkeypatch, logged):
    monkeypatch.setattr(listening, "CONNECTIONS", 3)
    with served.connection(), served.connection(), served.connection():
        time.sleep(0.2)
        with pytest.raises(OSError, match=r"reset|without|[Bb]roken pipe"):
            served.ask([GOOD])
    assert any("another was closed" in line for line in logged)


# --- where it listens ---


def test_a_port_that_is_taken_is_one_sentence(served):
    with pytest.raises(SettingError, match=f"port {served.port} .*give another"):
        bound("127.0.0.1", served.port)
    with pytest.raises(SettingError, match="no.such.host.invalid"):
        bound("no.such.host.invalid", 0)


def test_answers_are_not_held_back(served):
    """Nagle's algorithm would keep an answer's body until the client confirms its head, 40 ms later."""
    one, _ = socket.create_connection(("127.0.0.1", served.port)), time.sleep(0.2)
    with one:
        (protocol,) = [
            x for x in served.server.server_state.connections if x.client == one.getsockname()
        ]
        accepted = protocol.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
