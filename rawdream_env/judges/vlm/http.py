"""One HTTP request that ends by its deadline, and servers that take turns.

The timeouts of the usual clients apply to each read: a server that sends one byte per second is never cut off. Here
every read gets the time left until the deadline. A connection carries one request and is closed, so a late reply
cannot be taken for the next one. Redirects are not followed, so the API key reaches only the server it belongs to;
proxies are not used.

Everything a server sends leaves this module through ``request``, which removes the API key from it: a server that
echoes the key in a status line, a header, a model name or a reply cannot put it into an error, a verdict or a file.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from urllib.parse import urlsplit

from rawdream_env.errors import InvalidOptionError
from rawdream_env.judges.vlm.config import API_KEY

MAX_BODY = 16 * 2**20
"""Maximum size of a response in bytes, many times the longest reply."""

_SECRET_LEN = 4
"""A shorter key is no secret, and removing it would damage every reply."""


class TransportError(Exception):
    """No complete response: refused, reset, cut short, too long, or too late."""


@dataclass(frozen=True)
class Response:
    """Status, lower-case headers and body of a response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def retry_after(self) -> float | None:
        """The Retry-After header in seconds (a number or a date); None where it is missing or unreadable."""
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
    """A socket as a file. Every read ends by one deadline (``time.monotonic``)."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


class _FileSocket:
    """The part of a socket that ``http.client.HTTPResponse`` uses."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._reader, 65536)


def request(
    url: str,
    deadline: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    key_variable: str = API_KEY,
) -> Response:
    """GET ``url``, or POST ``body`` to it (JSON, unless ``headers`` name another content type).

    The API key in the environment variable ``key_variable`` is sent as a bearer token. It is removed from everything
    that is returned or raised, and error messages contain no control characters.

    Raises:
        TransportError: no complete response by ``deadline`` (seconds of ``time.monotonic``), or the key cannot be sent.
    """
    key = ""
    try:
        key = api_key(key_variable)
        response = _request(url, deadline, body, dict(headers or {}), key)
    except TimeoutError:
        raise TransportError("no complete response in time") from None
    except (OSError, http.client.HTTPException, ValueError, TransportError) as error:
        name = "" if isinstance(error, TransportError | InvalidOptionError) else f"{type(error).__name__}: "
        said = _redacted(str(error).encode("utf-8", "replace"), key).decode("utf-8", "replace")
        raise TransportError(f"{name}{readable(said, 200)}".removesuffix(": ")) from None
    clean = {
        name: _redacted(value.encode("utf-8", "replace"), key).decode("utf-8", "replace")
        for name, value in response.headers.items()
    }
    return Response(response.status, clean, _redacted(response.body, key))


def _request(url: str, deadline: float, body: bytes | None, headers: dict[str, str], key: str) -> Response:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    method = "GET" if body is None else "POST"
    headers = {"Host": parts.netloc, "Accept": "application/json", "Connection": "close", **headers}
    if body is not None:
        headers = {"Content-Type": "application/json", **headers, "Content-Length": str(len(body))}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with _connect(host, port, deadline, parts.scheme == "https") as connection:
        connection.settimeout(_left(deadline))
        # A server may refuse a request before it has read all of it; its response says why.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(f"{method} {parts.path or '/'} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b""))
        response = http.client.HTTPResponse(
            cast(socket.socket, _FileSocket(_Reader(connection, deadline))), method=method
        )
        response.begin()
        content = response.read(MAX_BODY + 1)
        if len(content) > MAX_BODY:
            raise TransportError(f"the response has more than {MAX_BODY} bytes")
        if response.length:  # read(amount) does not complain about a body that ends early
            raise TransportError(f"the response ends {response.length} bytes early")
        return Response(response.status, {name.lower(): value for name, value in response.getheaders()}, content)


def _connect(host: str, port: int, deadline: float, secure: bool) -> socket.socket:
    """Connect to the first address that accepts; all of them share the deadline."""
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
    """Certificates and host names are verified. Cached, because reading the certificates takes longer than a request."""
    return ssl.create_default_context()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def api_key(variable: str = API_KEY) -> str:
    """The key in the environment, "" where there is none. Read for every request, so that no object holds it.

    Raises:
        InvalidOptionError: it has a character that an HTTP header cannot carry.
    """
    key = os.environ.get(variable, "").strip()
    wrong = next((i for i, character in enumerate(key) if not (character.isascii() and character.isprintable())), None)
    if wrong is not None:
        raise InvalidOptionError(
            f"Character {wrong + 1} of the {len(key)} in the environment variable {variable} is not printable ASCII; "
            "set the variable to the server's API key."
        )
    return key


def _redacted(content: bytes, key: str) -> bytes:
    """``content`` with ``[key]`` in place of the API key, however often JSON has escaped it."""
    if len(key) < _SECRET_LEN:
        return content
    return _pattern(key).sub(b"[key]", content)


def _pattern(key: str) -> re.Pattern[bytes]:
    """Matches each character as itself or as backslash-u, after any number of backslashes (nested JSON strings)."""
    characters = [rf"(?:{re.escape(c)}|u00(?i:{ord(c):02x}))" if c != "\\" else "(?:u00(?i:5c))?" for c in key]
    return re.compile("".join([r"(?<!\\)", *(rf"\\*+{character}" for character in characters)]).encode())


def readable(text: str, limit: int = 300) -> str:
    """A server's text as one line of printable characters, at most ``limit``: fit for a terminal and a log."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])


@dataclass
class Server:
    """One address and its state."""

    url: str
    checked: bool = False
    """Whether the start-up probe has passed."""
    echoes_id: bool = False
    """Whether its replies carry the id of their request."""
    failures: int = 0
    rests_until: float = 0.0
    """Until then (``time.monotonic``) other servers are asked first."""
    closed_until: float = 0.0
    """The server has asked for no request before then (Retry-After)."""


@dataclass
class Servers:
    """Round-robin over servers. A server that fails rests; when all rest, the one with the shortest rest is asked."""

    all: Sequence[Server]
    max_rest_s: float
    heard_at: float = 0.0
    """When any server last gave a usable answer (``time.monotonic``)."""
    _turn: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def pick(self) -> tuple[Server, float]:
        """The next server, and the seconds to wait because every server has sent Retry-After."""
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
        """``server`` gave no usable answer; ``retry_after_s`` is its Retry-After."""
        with self._lock:
            now = time.monotonic()
            server.failures += 1
            rest = min(self.max_rest_s, first_rest_s * 2.0 ** min(server.failures - 1, 30))
            server.rests_until = now + rest
            if retry_after_s is not None:
                server.closed_until = max(server.closed_until, now + retry_after_s)

    def any_free(self) -> bool:
        """Whether some server neither rests nor waits for its Retry-After."""
        now = time.monotonic()
        return any(max(server.rests_until, server.closed_until) <= now for server in self.all)
