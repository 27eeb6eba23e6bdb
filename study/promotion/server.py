"""A promoted model over HTTP: the paths, requests and answers of `mlflow models serve`.

MLflow's own server is not asked. It puts the body of a bad request and tracebacks into its answers,
reads bodies of any length, opens CSV and Parquet, which no model here takes, and answers 500 or 504
where the request is at fault. Here the model's shape says what a request may cost, before it is read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn

from bimask.data.sent import MOST_IMAGES
from bimask.errors import DataError, SettingError
from bimask.tasks import Predictor

MOST = 64  # images of a request, where nobody says otherwise
USUAL = 16 * 2**20  # bytes of a request, for which large images are fewer
NUMBER, BESIDE = 32, 4096  # bytes of a number with its separators; bytes beside the pixels of an image
HELD = 64 * 2**20  # bytes of all requests at once, at least
LINGER = 5.0  # seconds in which a client that was refused may finish its body and read why
ROUTES = {"/ping": "GET", "/health": "GET", "/version": "GET", "/invocations": "POST"}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]*)?")
FORM = '{"inputs": [IMAGE, ...]}'

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """What one request may have.

    Attributes:
        images: in it.
        size: bytes of its body.
        values, lists: numbers, and nested lists, in its body.
    """

    images: int
    size: int
    values: int
    lists: int

    @classmethod
    def of(cls, shape: tuple[int, int, int], images: int | None = None) -> Limits:
        """The limits for images of a shape (C, H, W) or less.

        Args:
            images: None for 64, or for as many as 16 MiB hold where images are large, but at least one.

        Raises:
            SettingError: a number of images that no model takes at once.
        """
        channels, height, width = shape
        numbers = channels * height * width
        one = NUMBER * numbers + BESIDE
        if images is None:
            images = max(1, min(MOST, USUAL // one))
        if not 1 <= images <= MOST_IMAGES:
            raise SettingError(f"A request may have 1 to {MOST_IMAGES} images, got --batch {images}.")
        return cls(images, images * one, images * numbers, images * (1 + height + height * width) + 1)


class Refused(Exception):
    """A request that gets a status and a sentence; the sentence holds nothing of the request.

    Attributes:
        ended: whether its body has come to its end, so that nothing more is to be dropped.
    """

    def __init__(self, status: int, sentence: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers
        self.ended = False


class Left(Exception):
    """The client closed the connection before its request was whole."""


class ModelServer:
    """An ASGI application in front of a model.

    Args:
        predictor: answers requests, in threads.
        hosts: names that a request's Host may have beside those of the loopback. A page of another site
            whose name was pointed here (DNS rebinding) has none of them.
        images: of a request, at most; None for what `Limits.of` says.

    Raises:
        SettingError: see `Limits.of`.
    """

    def __init__(
        self, predictor: Predictor, hosts: Iterable[str] = (), images: int | None = None
    ) -> None:
        self.predictor, self.limits = predictor, Limits.of(predictor.shape, images)
        self.hosts = {
            *LOOPBACK,
            *(f"[{name}]" if ":" in name else name for name in map(str.lower, hosts)),
        }
        self.held, self.most_held = 0, max(HELD, 8 * self.limits.size)  # bytes of bodies in memory
        self.turns = asyncio.Semaphore(os.cpu_count() or 1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; one that is refused is one line in the log."""
        client = "{}:{}".format(*scope["client"] or ("somebody", 0))
        try:
            answer = await self._answer(scope, receive)
        except Left:
            return
        except Refused as refused:
            log.warning("%s got %d: %s", client, refused.status, refused)
            await _refuse(refused, receive, send)
        else:
            await send(_head(200, answer))
            await send({"type": "http.response.body", "body": answer})

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        headers = dict(scope["headers"])
        host = HOST.fullmatch(headers.get(b"host", b"").decode("latin-1").lower())
        if host is None or host[1] not in self.hosts:
            raise Refused(421, "Host names another server; --allow-host NAME of study.serve allows it.")
        method = ROUTES.get(scope["path"])
        if method is None:
            raise Refused(404, f"There is no such path; there are {', '.join(ROUTES)}.")
        if scope["method"] != method:
            raise Refused(405, f"This path takes {method} alone.", (b"allow", method.encode()))
        if scope["path"] == "/version":
            return version("mlflow").encode()
        return b"\n" if method == "GET" else await self._invocation(headers, receive)

    async def _invocation(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """What the model says of a request's body, which is counted as held until then."""
        self._look_at(headers)
        body, more = bytearray(), True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Left
                part, more = message.get("body", b""), message.get("more_body", False)
                if len(body) + len(part) > self.limits.size:
                    raise self._too_large()
                if self.held + len(part) > self.most_held:
                    raise Refused(503, "Too many requests at once; ask again.", (b"retry-after", b"1"))
                body += part
                self.held += len(part)
            async with self.turns:
                return await asyncio.to_thread(self._asked, body)
        except Refused as refused:
            refused.ended = not more
            raise
        finally:
            self.held -= len(body)

    def _look_at(self, headers: dict[bytes, bytes]) -> None:
        """Refuse what headers alone tell."""
        kind, *parameters = headers.get(b"content-type", b"").lower().translate(None, b' "').split(b";")
        if kind != b"application/json" or parameters not in ([], [b"charset=utf-8"]):
            raise Refused(
                415, "Content-Type must be application/json, in UTF-8; no other content types."
            )
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "A body must come without a Content-Encoding.")
        if b"transfer-encoding" not in headers:
            length = headers.get(b"content-length")
            if length is None:
                raise Refused(411, "A request must say its Content-Length.")
            if int(length) > self.limits.size:  # h11 lets nothing but up to 20 digits pass
                raise self._too_large()

    def _too_large(self) -> Refused:
        size, images = self.limits.size, self.limits.images
        return Refused(
            413, f"A body may have {size} bytes, which {images} images can need; send fewer at once."
        )

    def _asked(self, body: bytearray) -> bytes:
        """The answer to a body, in a thread."""
        limits = self.limits
        if (
            body.count(b",") > limits.values
            or body.count(b"[") > limits.lists
            or body.count(b"{") > limits.images + 1
        ):
            raise Refused(
                400, f"The body has more numbers than {limits.images} images, or is nested too deeply."
            )
        request = _parsed(body)
        if not isinstance(request, dict) or set(request) != {"inputs"}:
            raise Refused(400, f"The body must be {FORM}, without another key.")
        images = request["inputs"]
        if isinstance(images, list) and len(images) > limits.images:
            raise Refused(400, f"Give 1 to {limits.images} images at once, got {len(images)}.")
        try:
            answers = self.predictor(images)
        except DataError as error:
            raise Refused(400, str(error)) from error
        return json.dumps({"predictions": answers}).encode()


def _parsed(body: bytearray) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_no_number)  # noqa: TID251 (its body is bounded)
    except RecursionError as error:
        raise Refused(400, "The body is nested too deeply.") from error
    except UnicodeDecodeError as error:
        raise Refused(400, f"The body is no JSON in UTF-8; send {FORM}.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Refused(400, f"The body is no JSON at {place}; send {FORM}.") from error
    except ValueError as error:
        raise Refused(400, "The body cannot be read: a number has too many digits.") from error


def _no_number(_: str) -> NoReturn:
    raise Refused(400, "The body has NaN or Infinity, which are no JSON.")


def _head(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    usual = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return {"type": "http.response.start", "status": status, "headers": [*usual, *headers]}


async def _refuse(refused: Refused, receive: Receive, send: Send) -> None:
    """Answer at once, then drop what still comes of the body.

    A connection that is closed while bytes arrive is reset, and the client never sees the answer.
    """
    body = json.dumps({"error_code": "BAD_REQUEST", "message": str(refused)}).encode()
    closing = [] if refused.ended else [(b"connection", b"close")]
    await send(_head(refused.status, body, *refused.headers, *closing))
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if not refused.ended:
        try:
            await asyncio.wait_for(_drop(receive), LINGER)
        except asyncio.TimeoutError:
            log.warning("A refused body did not end in %g s; its connection is closed.", LINGER)
    await send({"type": "http.response.body", "body": b""})


async def _drop(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass
