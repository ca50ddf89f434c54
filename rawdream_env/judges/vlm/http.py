"""One HTTP request that is over by its deadline, whatever the server does, and servers that take turns.

Time-outs of the usual clients count from byte to byte: a server that sends one byte a second holds them for ever. Here
every read is given what is left until the deadline. A connection carries one request and is closed, so a late reply
cannot be read as that of the next; redirects are not followed, so a key goes only where it was meant to go; proxies are
not used.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from urllib.parse import urlsplit

from rawdream_env.judges.vlm.config import API_KEY

MAX_BODY = 16 * 2**20
"""Bytes of a response: many times what the longest replies need."""


class TransportError(Exception):
    """No whole response: refused, reset, cut short, too long, or not there in time."""


@dataclass(frozen=True)
class Response:
    """Status, lower-case headers and body of an answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def retry_after(self) -> float | None:
        """Seconds of patience the server asks for (a number or a date), None where it does not or writes nonsense."""
        text = self.headers.get("retry-after", "").strip()
        if not text:
            return None
        try:
            seconds = float(text)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, OverflowError, OSError):
                return None
        return None if seconds != seconds else max(0.0, seconds)


class _Reader(io.RawIOBase):
    """A socket as a file whose reads all end by one deadline (``time.monotonic``)."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


class _FileSocket:
    """What ``http.client.HTTPResponse`` wants of a socket."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._reader, 65536)


def request(url: str, deadline: float, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """GET ``url``, or POST a JSON ``body`` to it.

    The API key of the environment travels along as a bearer token.

    Raises:
        TransportError: no whole response by ``deadline`` (seconds of ``time.monotonic``).
    """
    try:
        return _request(url, deadline, body, dict(headers or {}))
    except TimeoutError:
        raise TransportError("no whole answer in time") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TransportError(
            f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
        ) from None


def _request(url: str, deadline: float, body: bytes | None, headers: dict[str, str]) -> Response:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    method = "GET" if body is None else "POST"
    headers = {"Host": parts.netloc, "Accept": "application/json", "Connection": "close", **headers}
    if body is not None:
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    if key := api_key():
        headers["Authorization"] = f"Bearer {key}"
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with _connect(host, port, deadline, parts.scheme == "https") as connection:
        connection.settimeout(_left(deadline))
        # A server may refuse a request before it has read all of it; its answer says why.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(f"{method} {parts.path or '/'} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b""))
        response = http.client.HTTPResponse(
            cast(socket.socket, _FileSocket(_Reader(connection, deadline))), method=method
        )
        response.begin()
        content = response.read(MAX_BODY + 1)
        if len(content) > MAX_BODY:
            raise TransportError(f"the answer has more than {MAX_BODY} bytes")
        if response.length:  # read(amount) does not complain about a body that ends early
            raise TransportError(f"the answer ends {response.length} bytes early")
        return Response(response.status, {name.lower(): value for name, value in response.getheaders()}, content)


def _connect(host: str, port: int, deadline: float, secure: bool) -> socket.socket:
    """Connect to the first address that answers; all of them share the deadline."""
    last: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not secure:
                return connection
            return _tls().wrap_socket(connection, server_hostname=host)
        except OSError as error:
            connection.close()
            last = error
    raise last or OSError(f"{host} has no address")


@cache
def _tls() -> ssl.SSLContext:
    """Certificates are checked; reading them takes longer than a request."""
    return ssl.create_default_context()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def api_key() -> str:
    """The key in the environment, read anew for every request so that no object holds it; "" where there is none."""
    key = os.environ.get(API_KEY, "").strip()
    return key if key.isascii() and key.isprintable() else ""


def readable(text: str, limit: int = 300) -> str:
    """What a server said, fit for a log: one line, bounded, without the API key it may have quoted."""
    if key := api_key():
        text = text.replace(key, "[key]")
    return "".join(character if character.isprintable() else " " for character in text[:limit])


@dataclass
class Server:
    """One address and how it has been doing."""

    url: str
    checked: bool = False
    """Whether the start-up probe has passed."""
    echoes_id: bool = False
    """Whether its replies carry the id of their request."""
    failures: int = 0
    rests_until: float = 0.0
    """Others are asked first until then (``time.monotonic``)."""
    closed_until: float = 0.0
    """It has asked not to be asked before then (Retry-After)."""


@dataclass
class Servers:
    """Round-robin over servers. One that fails rests; when all rest, the one that rests the shortest is asked."""

    all: Sequence[Server]
    max_rest_s: float
    heard_at: float = 0.0
    """When any server last gave a usable answer (``time.monotonic``)."""
    _turn: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def pick(self) -> tuple[Server, float]:
        """Whom to ask next, and how many seconds not to ask anybody yet because all have asked for patience."""
        with self._lock:
            now = time.monotonic()
            order = [self.all[(self._turn + i) % len(self.all)] for i in range(len(self.all))]
            self._turn += 1
            best = min(order, key=lambda server: max(server.rests_until, server.closed_until, now))
            return best, max(0.0, best.closed_until - now)

    def succeeded(self, server: Server) -> None:
        """``server`` gave a usable answer."""
        with self._lock:
            server.failures, server.rests_until, server.closed_until = 0, 0.0, 0.0
            self.heard_at = time.monotonic()

    def failed(self, server: Server, first_rest_s: float, retry_after_s: float | None) -> None:
        """``server`` gave none; ``retry_after_s`` is the patience it asked for."""
        with self._lock:
            now = time.monotonic()
            server.failures += 1
            rest = min(self.max_rest_s, first_rest_s * 2.0 ** min(server.failures - 1, 30))
            server.rests_until = now + rest
            if retry_after_s is not None:
                server.closed_until = max(server.closed_until, now + retry_after_s)

    def any_free(self) -> bool:
        """Whether some server neither rests nor has asked for patience."""
        now = time.monotonic()
        return any(max(server.rests_until, server.closed_until) <= now for server in self.all)
