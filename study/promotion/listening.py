"""The socket of the server, and connections that must not stay for ever.

uvicorn waits without an end for a request's head, its body, and a client that does not read its answer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bimask.errors import SettingError
from study.promotion.server import ModelServer

PATIENCE = 20.0  # seconds for a whole request, head and body, and for the client to read the answer
CONNECTIONS = 256  # at once; more are closed as they come, before the process is out of descriptors
log = logging.getLogger("uvicorn.error")


class PunctualProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn, where a client has `PATIENCE` seconds whenever it is the client's turn."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            log.warning("There are %d connections; another was closed.", CONNECTIONS)
            transport.abort()
        self._since = self.loop.time()
        self._watch()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def _watch(self) -> None:
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            return
        sends = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        now = self.loop.time()
        if not sends and not self.transport.get_write_buffer_size():
            self._since = now  # the turn is the model's
        elif now - self._since > PATIENCE:
            log.warning("%s:%s was too slow, and was closed.", *self.client or ("somebody", 0))
            self.transport.abort()
            return
        self.loop.call_later(PATIENCE / 20, self._watch)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; where an answer has begun there is nothing left to say."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # uvicorn would log two lines; without an upgrade the request is as any other


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens on one address; port 0 is any that is free.

    Raises:
        SettingError: an address that is none of this machine's, or a port that is taken.
    """
    try:
        (family, *_), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
        # asyncio does so only where a socket names its protocol; bodies would come 40 ms after heads.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise SettingError(
            f"Nothing can listen on {host}, port {port} ({error.strerror or error}); give another "
            "--host or --port."
        ) from error


def server_of(app: ModelServer) -> uvicorn.Server:
    """uvicorn with connections as above; its log has warnings alone."""
    options: dict[str, Any] = {"http": PunctualProtocol, "ws": "none", "lifespan": "off"}
    return uvicorn.Server(uvicorn.Config(app, **options, log_level="warning", server_header=False))
