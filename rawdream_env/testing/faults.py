"""A judge server for tests: an OpenAI-compatible server with deliberate faults, chosen by name.

    with FaultServer(faults=["500", "reset"]) as server:          # its first requests; then it answers
        judge = VLMServerJudge(VLMServerConfig(servers=(server.url,)))

It answers /version, /v1/models and /v1/chat/completions, obeys JSON schemas as far as the start-up probe and the reply
of the judge need it, and counts what it was asked. Faults: ``FAULTS`` below. Times are seconds and meant to be small.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

FAULTS = ("refuse", "reset", "500", "503", "429", "truncated", "drip", "never", "garbage", "html", "other id")
"""refuse: the connection is closed unanswered; reset: with RST, in the middle of the answer; 429: with a Retry-After of
``retry_after``; truncated: half of the promised body; drip: a byte every ``drip_s``; never: silence; garbage: 200 with
bytes that are not JSON; html: 200 with a page, like that of a proxy; other id: a good reply with the id of another request."""

Answer = Callable[[Mapping[str, Any]], "list[Any]"]
"""Contents of the replies to a request (its JSON), one per vote."""


def reply(answer: str = "Success", reasoning: str = "It is there.") -> str:
    """A reply as the judge's schema wants it."""
    return json.dumps({"Reasoning": reasoning, "Final Answer": answer})


class FaultServer:
    """A server on a free local port, in threads of this process; a context manager.

    Args:
        faults: one entry per chat request after the probe: "ok", one of ``FAULTS``, or "400" (a refusal); "ok" when they
            have run out. An iterable may be endless.
        answer: contents of the replies; default: every vote a success.
        structured: obey JSON schemas. False: the server that ignores them, and answers the probe with prose.
        honours_n: give as many replies as asked for. False: one.
        honours_frames: see every frame of a video. False: 32 of them.
        version: reported version; model: id of the served model.
        retry_after: the header of a 429.
        drip_s: pause between bytes of a "drip".
        delay: seconds to hold a good answer back, as a function of the request.

    Attributes:
        requests: chat requests since the start, probes among them.
        seen: authorization headers and bodies of the chat requests, when ``keep`` was set.
    """

    def __init__(
        self,
        faults: Iterable[str] = (),
        *,
        answer: Answer | None = None,
        structured: bool = True,
        honours_n: bool = True,
        honours_frames: bool = True,
        version: str = "0.32.0",
        model: str = "tiny-vlm",
        retry_after: str = "1e9",
        drip_s: float = 1.0,
        delay: Callable[[Mapping[str, Any]], float] | None = None,
        keep: bool = False,
        port: int = 0,
    ) -> None:
        self.answer = answer or (lambda request: [reply()] * int(request["n"]))
        self.structured, self.honours_n, self.honours_frames = structured, honours_n, honours_frames
        self.version, self.model = version, model
        self.retry_after, self.drip_s, self.delay, self.keep = retry_after, drip_s, delay, keep
        self.requests = 0
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.down = threading.Event()
        """While set, every connection is closed unanswered, the probe's too."""
        self.closing = threading.Event()
        self._faults: Iterator[str] = iter(faults)
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Base address, up to /v1."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def next_fault(self) -> str:
        """What to do to the next chat request."""
        with self._lock:
            return next(self._faults, "ok")

    def count(self, authorization: str, body: dict[str, Any]) -> None:
        """Record a chat request."""
        with self._lock:
            self.requests += 1
            if self.keep:
                self.seen.append((authorization, body))

    def close(self) -> None:
        """Stop; open connections are closed."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    """A local port without a listener: connections to it are refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Server(ThreadingHTTPServer):
    owner: FaultServer
    daemon_threads = True
    request_queue_size = 512
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect early."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        owner = self.server.owner
        if owner.down.is_set():
            return self._reset()
        if self.path == "/version":
            return self._send({"version": owner.version})
        if self.path == "/v1/models":
            return self._send({"object": "list", "data": [{"id": owner.model, "object": "model"}]})
        return self._send({"error": "not found"}, 404)

    def do_POST(self) -> None:
        owner = self.server.owner
        if owner.down.is_set():
            return self._reset()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.count(self.headers.get("Authorization", ""), body)
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
        name = f"chatcmpl-{self.headers.get('X-Request-Id', '')}"
        count = int(body["n"]) if owner.honours_n else 1
        allowed = schema.get("properties", {}).get("Final Answer", {}).get("enum", [])
        if len(allowed) == 1:  # the probe
            text = reply(allowed[0]) if owner.structured else "Sure! Hello."
            return self._send(_completion([text] * count, name, self._tokens(body)))
        if body["max_tokens"] == 1:  # its longer video
            return self._send(_completion(["{"], name, self._tokens(body)))
        fault = owner.next_fault()
        if fault == "ok":
            contents = owner.answer(body)
            if owner.delay is not None:
                owner.closing.wait(owner.delay(body))
            return self._send(_completion(contents, name))
        return self._misbehave(fault, json.dumps(_completion([reply()] * count, name)).encode())

    def _tokens(self, body: Mapping[str, Any]) -> int:
        """How many tokens the prompt would have: two per frame seen."""
        frames = str(body["messages"][-1]["content"][0]["video_url"]["url"]).count(",")
        return 2 * (frames if self.server.owner.honours_frames else min(32, frames))

    def _misbehave(self, fault: str, good: bytes) -> None:
        owner = self.server.owner
        if fault == "refuse":
            self.close_connection = True
        elif fault == "reset":
            self._head(200, len(good))
            self.wfile.write(good[: len(good) // 2])
            self._reset()
        elif fault in ("400", "500", "503"):
            self._send({"error": {"message": "out of order"}}, int(fault))
        elif fault == "429":
            self._send({"error": {"message": "busy"}}, 429, {"Retry-After": owner.retry_after})
        elif fault == "truncated":
            self._head(200, len(good))
            self.wfile.write(good[: len(good) // 2])
        elif fault == "drip":
            self._head(200, len(good))
            for byte in good:
                if owner.closing.wait(owner.drip_s):
                    return
                self.wfile.write(bytes([byte]))
        elif fault == "never":
            owner.closing.wait()
        elif fault == "other id":
            self._send(_completion([reply()] * 5, "chatcmpl-of-somebody-else"))
        else:
            page = b"<html>Please log in.</html>" if fault == "html" else b"\xff\xfe{" * 9
            self._head(200, len(page))
            self.wfile.write(page)

    def _send(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(status, len(body), headers)
        self.wfile.write(body)

    def _head(self, status: int, length: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def _reset(self) -> None:
        """Close with RST, as a crashed process or a firewall does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def _completion(contents: list[Any], name: str, prompt_tokens: int = 0) -> dict[str, Any]:
    choices = [
        {"index": i, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        for i, content in enumerate(contents)
    ]
    usage = {"prompt_tokens": prompt_tokens}
    return {"id": name, "object": "chat.completion", "created": int(time.time()), "choices": choices, "usage": usage}
