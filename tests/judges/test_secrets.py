"""The API key of a judge's server: who receives it, and that no error, verdict or file contains it."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.judges.robometer import KEY_VARIABLE, RobometerJudge
from rawdream_env.judges.vlm import http
from rawdream_env.judges.vlm.config import API_KEY, VLMServerConfig
from rawdream_env.judges.vlm.http import TransportError, request
from rawdream_env.judges.vlm.server import VLMServerJudge
from rawdream_env.testing.faults import FaultServer, reply
from rawdream_env.types import Outcome, Video

KEY = 'sk/very"secret-\\123'
CLIP = Video(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8), 10.0)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@contextmanager
def raw_server(answer: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Any]:
    """A server that sends ``answer`` to whoever connects; yields its port and the requests it has received."""
    listener = socket.create_server(("127.0.0.1", 0))
    received: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                with connection, tls.wrap_socket(connection, server_side=True) if tls else connection as wire:
                    received.append(wire.recv(65536))
                    wire.sendall(answer)
            except ssl.SSLError:
                continue
            except OSError:
                if listener.fileno() < 0:
                    return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], received
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def get(port: int, scheme: str = "http", host: str = "127.0.0.1") -> http.Response:
    return request(f"{scheme}://{host}:{port}/v1/models", time.monotonic() + 60)


# -- where the key goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(status: int) -> None:
    with raw_server(PLAIN % (2, b"{}")) as (other, reached):
        moved = f"HTTP/1.1 {status} Moved\r\nLocation: http://127.0.0.1:{other}/v1/models\r\nContent-Length: 0\r\n\r\n"
        with raw_server(moved.encode()) as (port, received):
            assert get(port).status == status
            assert len(received) == 1 and f"Authorization: Bearer {KEY}".encode() in received[0]
            config = VLMServerConfig(servers=(f"http://127.0.0.1:{port}/v1",))
            with pytest.raises(JudgeUnavailableError, match=f"status {status}"):
                VLMServerJudge(config)
        assert reached == []


def test_a_response_has_a_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY", 1000)
    for body, length in ((b"x" * 1000, b"1000"), (b"x" * 1001, b"1001")):
        with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n\r\n" + body) as (port, _):
            if len(body) == 1000:
                assert get(port).body == body
            else:
                with pytest.raises(TransportError, match="more than 1000 bytes"):
                    get(port)
    with (
        raw_server(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 5000) as (port, _),
        pytest.raises(TransportError, match="more than 1000 bytes"),
    ):
        get(port)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_certificate_and_host_name_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", private, "-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    with raw_server(PLAIN % (2, b"{}"), context) as (port, received):
        http._tls.cache_clear()
        with pytest.raises(TransportError, match="certificate verify failed"):
            get(port, "https", "localhost")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        http._tls.cache_clear()
        with pytest.raises(TransportError, match="IP address mismatch"):
            get(port, "https")
        assert received == []  # no byte of a request, so no key
        assert get(port, "https", "localhost").body == b"{}" and len(received) == 1
    http._tls.cache_clear()


# -- what comes back --------------------------------------------------------------------------------------------------


def spellings() -> list[str]:
    """The key as a server may write it: plain, as JSON, as JSON in JSON, with optional escapes."""
    once = json.dumps(KEY)[1:-1]
    return [KEY, once, json.dumps(once)[1:-1], "".join(f"\\u{ord(c):04X}" for c in KEY), once.replace("/", "\\/")]


def unescaped(text: str) -> str:
    """``text`` after as many rounds of JSON decoding as it allows, without the backslashes that are left."""
    for _ in range(4):
        try:
            text = json.loads(f'"{text}"')
        except ValueError:
            text = text.encode("ascii", "replace").decode("unicode_escape", "replace")
    return text.replace("\\", "")


@pytest.mark.parametrize("spelling", range(5))
def test_the_key_is_removed_from_every_part_of_a_response(spelling: int) -> None:
    echoed = spellings()[spelling]
    secret = KEY.replace("\\", "")
    answers: list[bytes] = [
        f"HTTP/1.1 {echoed}\r\n\r\n".encode(),
        f"{echoed} \x1b[2J\x07\r\n\r\n".encode(),
        f"HTTP/1.1 200 OK\r\nRetry-After: {echoed}\r\nContent-Length: 0\r\n\r\n".encode(),
        PLAIN % (len(echoed), echoed.encode()),
    ]
    for answer in answers:
        with raw_server(answer) as (port, _):
            try:
                response = get(port)
                said = f"{response.headers} {response.body.decode()}"
                assert "[key]" in said
            except TransportError as error:
                said = str(error)
                assert "[key]" in said and said.isprintable()
        assert secret not in unescaped(said) and echoed not in said


def test_other_text_is_returned_as_it_came() -> None:
    body = json.dumps({"text": 'sk\\ " \\u0073k/very \\\\ 123', "n": [1, 2]}).encode() + b"\xff\x00\\\\\\"
    with raw_server(PLAIN % (len(body), body)) as (port, _):
        assert get(port).body == body
    begin = time.monotonic()
    http._redacted(b"\\" * 2_000_000, KEY)  # one pass, whatever the body looks like
    assert time.monotonic() - begin < 30  # two passes over each of 2 million characters would take hours


def test_an_echoed_key_is_in_no_verdict_error_or_file(tmp_path: Path) -> None:
    secret, contents = KEY.replace("\\", ""), [reply(reasoning=f"Bearer {KEY}.")] * 5

    def judged(**options: Any) -> list[str]:
        with FaultServer(**options) as server:
            config = VLMServerConfig(servers=(server.url,), deadline_s=60.0, min_side=0, cache_dir=str(tmp_path))
            verdict = VLMServerJudge(config)([CLIP], ["put the cup down"])[0]
            return [verdict.outcome.name, verdict.reason, *verdict.raw]

    said = judged(answer=lambda request: contents)
    assert said[0] == "SUCCESS" and "Bearer [key]." in said[1] and len(said) == 7
    said += [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(said) == 8
    with pytest.raises(JudgeUnavailableError) as caught, FaultServer(model=f"tiny-{KEY}") as server:
        VLMServerJudge(VLMServerConfig(servers=(server.url,), model="other"))
    said += [str(caught.value)]
    assert "tiny-[key]" in said[-1]
    answer = f"HTTP/1.1 418 {KEY}\r\nContent-Length: {len(KEY)}\r\n\r\n{KEY}".encode()
    with raw_server(answer) as (port, _), pytest.raises(JudgeUnavailableError) as caught:
        VLMServerJudge(VLMServerConfig(servers=(f"http://127.0.0.1:{port}/v1",)))
    said += [str(caught.value)]
    assert not any(secret in unescaped(text) for text in said)


@pytest.mark.parametrize("key", ["sk-schlüssel", "sk-two\nlines", "sk-\x1b[0m"])
def test_a_key_that_cannot_be_sent_is_an_error(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, key)
    monkeypatch.setenv(KEY_VARIABLE, key)
    makers: list[Callable[[str], object]] = [
        lambda url: VLMServerJudge(VLMServerConfig(servers=(url,))),
        lambda url: VLMServerJudge(VLMServerConfig(servers=(url,), model="m"), check=False),
        lambda url: RobometerJudge(url),
    ]
    with FaultServer() as server:
        for make in makers:
            with pytest.raises(InvalidOptionError, match=r"Character \d+ of the \d+ in the environment variable") as no:
                make(server.url)
            assert key not in str(no.value) and str(no.value).isprintable()
        with pytest.raises(TransportError, match="is not printable ASCII"):
            request(f"{server.url}/models", time.monotonic() + 1)
        assert server.requests == 0


def test_a_key_set_later_that_cannot_be_sent_makes_the_verdict_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as server:
        judge = VLMServerJudge(VLMServerConfig(servers=(server.url,), deadline_s=0.5, min_side=0))
        monkeypatch.setenv(API_KEY, "é")
        (verdict,) = judge([CLIP], ["put the cup down"])
    assert verdict.outcome is Outcome.INVALID and "not printable ASCII" in verdict.reason
