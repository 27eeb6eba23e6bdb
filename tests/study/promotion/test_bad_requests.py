"""Requests that are wrong get 4xx, a sentence that quotes nothing of them, and a line in the log."""

import base64
import gzip
import io
import json
import random
import socket
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

SIDE = 12
CANARY = "canary7531"
GOOD = [[[0] * 1] * SIDE] * SIDE
JSON = {"Content-Type": "application/json"}


def png(side=SIDE):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def head(*lines, host="localhost"):
    usual = ("POST /invocations HTTP/1.1", f"Host: {host}", "Content-Type: application/json")
    return "\r\n".join([*usual, *lines, "", ""]).encode()


def inputs(*images):
    return json.dumps({"inputs": images}).encode()


BAD = {
    "no body": (b"", {}, 400),
    "no JSON": (f'{{"inputs": [{CANARY}'.encode(), {}, 400),
    "text after it": (inputs(GOOD) + CANARY.encode(), {}, 400),
    "a list": (f'["{CANARY}"]'.encode(), {}, 400),
    "another key": (json.dumps({"inputs": [GOOD], CANARY: 1}).encode(), {}, 400),
    "MLflow's other form": (json.dumps({"dataframe_split": {CANARY: [CANARY]}}).encode(), {}, 400),
    "messages": (json.dumps({"messages": CANARY}).encode(), {}, 400),
    "no list": (json.dumps({"inputs": CANARY}).encode(), {}, 400),
    "an object": (json.dumps({"inputs": [{CANARY: 1}]}).encode(), {}, 400),
    "no picture": (inputs(CANARY), {}, 400),
    "text for numbers": (inputs([[[CANARY]] * SIDE] * SIDE), {}, 400),
    "a number too large": (inputs([[[75317531]] * SIDE] * SIDE), {}, 400),
    "NaN": (b'{"inputs": [[[NaN]]]}', {}, 400),
    "infinity": (b'{"inputs": [[[-Infinity]]]}', {}, 400),
    "1e999": (b'{"inputs": [[[1e999]]]}', {}, 400),
    "digits": (b'{"inputs": [' + b"7" * 5000 + b"]}", {}, 400),
    "deep": (b"[" * 9000, {}, 400),
    "deeper": (b"[" * 100_000, {}, 400),
    "deep objects": (b'{"a":' * 50, {}, 400),
    "deep arrays": (b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}", {}, 400),
    "many lists": (b'{"inputs": [' + b"[]," * 20_000 + b"[]]}", {}, 400),
    "many objects": (b'{"inputs": [' + b"{}," * 20_000 + b"{}]}", {}, 400),
    "too many": (inputs(*[png()] * 65), {}, 400),
    "null bytes": (b"\0" * 100, {}, 400),
    "a null byte in text": (b'{"inputs": ["\\u0000' + CANARY.encode() + b'"]}', {}, 400),
    "surrogates": (b'{"inputs": ["\\ud800"]}', {}, 400),
    "no UTF-8": (b'{"inputs": ["\xff\xfe"]}', {}, 400),
    "UTF-16": (inputs(GOOD).decode().encode("utf-16"), {}, 400),
    "gzip": (gzip.compress(inputs(GOOD)), {"Content-Encoding": "gzip"}, 415),
    "gzip, cut": (gzip.compress(inputs(GOOD))[:20], {"Content-Encoding": "gzip"}, 415),
    "gzip, not said": (gzip.compress(inputs(GOOD))[:20], {}, 400),
    "another type": (inputs(GOOD), {"Content-Type": f"image/{CANARY}"}, 415),
    "CSV": (b"a\n3", {"Content-Type": "text/csv"}, 415),
    "Parquet": (b"PAR1", {"Content-Type": "application/vnd.apache.parquet"}, 415),
    "another charset": (inputs(GOOD), {"Content-Type": "application/json; charset=utf-16"}, 415),
    "a parameter": (inputs(GOOD), {"Content-Type": f"application/json; {CANARY}=1"}, 415),
    "no type": (inputs(GOOD), {"Content-Type": ""}, 415),
    "a large picture": (inputs(png(600)), {}, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_gets_a_sentence_and_a_line_of_the_log(served, logged, name):
    body, headers, expected = BAD[name]
    status, text = served.request(body=body, headers=JSON | headers)
    assert status == expected, text
    assert json.loads(text)["message"].endswith(".")
    assert CANARY not in text
    assert "75317531" not in text
    assert len(text) < 400
    assert len(logged) == 1, logged
    assert CANARY not in logged[0]
    assert "Traceback" not in logged[0]


def test_a_picture_that_claims_to_be_huge_is_refused_without_a_warning(served, logged, capfd):
    bomb = bytearray(base64.b64decode(png()))
    for side in (11_000, 100_000):
        bomb[16:24] = side.to_bytes(4, "big") * 2
        status, _ = served.ask([base64.b64encode(bomb).decode()])
        assert status == 400
    assert len(logged) == 2


@pytest.mark.parametrize(
    "method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", CANARY]
)
def test_another_method_is_refused(served, logged, method):
    status, text = served.request(method=method, headers={})
    assert status == 405
    assert CANARY not in text
    assert len(logged) == 1
    assert CANARY not in logged[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (head("Content-Length: -1"), 400),
        (head("Content-Length: 1", "Content-Length: 2"), 400),
        (head("Content-Length: 9" + "9" * 30), 400),
        (head("Transfer-Encoding: chunked") + b"zz\r\n", 400),
        (head("Transfer-Encoding: gzip"), 400),
        (head("A\0B: c"), 400),
        (head("A: \0"), 400),
        # past h11's 16 KiB, but one packet: an end with something unread resets the connection
        (head()[:-2] + b"A: b\r\n" * 3_000, 400),
        (b"\0" * 100 + b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /ping\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\n\r\n", 400),
        (b"GET /%00%1b%0a HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET http://evil.example/ping HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (
            b"GET /x HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
            404,
        ),
        (head(), 411),
    ],
)
def test_bad_http_gets_a_line_of_the_log(served, logged, data, expected):
    with served.connection() as one:
        with suppress(OSError):
            one.sendall(data)
        said = served.read(one)
    assert int(said.split()[1]) == expected
    assert len(logged) == 1, logged
    assert "Traceback" not in logged[0]
    assert served.ask([GOOD])[0] == 200


@pytest.mark.parametrize(
    "begins",
    [
        head("Content-Length: 1000") + b"{",
        head(f"Content-Length: {10**9}") + b"{" * 1000,
        head("Transfer-Encoding: chunked") + b"5\r\n{",
        b"POST /inv",
    ],
)
def test_a_client_that_leaves_is_no_fault(served, logged, begins):
    for _ in range(3):
        with served.connection() as one:
            one.sendall(begins)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset it
    assert served.ask([GOOD])[0] == 200
    assert all("Traceback" not in line for line in logged)
    assert served.app.held == 0


def test_a_bad_chunk_behind_a_refusal_is_no_fault(served, logged):
    with served.connection() as one:
        one.sendall(head("Transfer-Encoding: chunked", host="evil.example"))
        assert b" 421 " in served.read(one)
        one.sendall(b"zz\r\nzz\r\n")
        while one.recv(4096):
            pass
    assert all("Traceback" not in line for line in logged), logged


def test_fuzzed_requests_are_refused_or_answered(served, logged):
    dice = random.Random(1)
    good = head("Content-Length: 1000") + inputs(png()) + b" " * 1000
    codes = []
    for _ in range(300):
        data = bytearray(good[: len(head("Content-Length: 1000")) + 1000])
        for _ in range(dice.randrange(1, 6)):
            place = dice.randrange(len(data))
            data[place : place + dice.randrange(4)] = dice.randbytes(dice.randrange(4))
        with served.connection() as one:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            said = served.read(one)
        codes.append(int(said.split()[1]) if said else 0)  # nothing where it was not whole
    assert set(codes) <= {0, 200, *range(400, 500)}
    assert len(set(codes)) > 3
    assert all("Traceback" not in line for line in logged)
    assert served.app.held == 0
    assert served.ask([GOOD])[0] == 200
