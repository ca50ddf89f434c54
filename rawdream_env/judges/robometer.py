"""Robometer over HTTP: a reward model that gives a success probability after every chunk (paper appendix A.7).

The first chunk whose probability reaches 0.85 makes a video a success; the paper then drops the later frames. The model
itself (4 B parameters) runs in a service of its own; what is asked of it is one POST per video:

    {"instruction": "...", "fps": 10.0, "chunk_ends": [8, 16, ...], "frames": ["<base64 PNG>", ...]}

answered with status 200 and ``{"success_probability": [0.02, 0.1, ...]}``, one number in [0, 1] for each of
``chunk_ends`` (indices into ``frames``). Any other answer is INVALID, as is an outage: refused or reset connections, 429
and 5xx are tried again until the deadline, everything else is not. A call is back within its deadline, whatever the
service does. A key, if the service wants one, is read from the environment (``ROBOMETER_API_KEY``) and never stored.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from rawdream_env.errors import InvalidOptionError
from rawdream_env.judges.base import Timer, check_pairs, checked_frames, checked_instruction, invalid
from rawdream_env.media import encode_picture
from rawdream_env.text import clean_instruction
from rawdream_env.types import Outcome, UInt8Array, Verdict, Video

THRESHOLD = 0.85
KEY_VARIABLE = "ROBOMETER_API_KEY"
MAX_ANSWER_BYTES = 1_000_000
_AGAIN = (429, 500, 502, 503, 504)


class _RefusedError(Exception):
    """An answer that will not get better by asking again."""


class _BusyError(Exception):
    """Worth asking again, after ``wait_s`` if the service says so."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class RobometerJudge:
    """The service behind the ``Judge`` protocol. A verdict's ``probability`` is the highest of the chunks'.

    Args:
        url: where to POST, such as ``http://localhost:8000/judge``.
        threshold: a chunk with this probability is a success.
        chunk_len: frames in a chunk.
        deadline_s: a call is back after this long; what has no answer by then is INVALID.
        concurrency: most requests under way in one call.

    Attributes:
        remote: True: asking means waiting, and several threads may ask at once.
    """

    remote = True

    def __init__(
        self,
        url: str,
        *,
        threshold: float = THRESHOLD,
        chunk_len: int = 8,
        deadline_s: float = 120.0,
        concurrency: int = 8,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise InvalidOptionError(
                "the Robometer service needs an address like http://host:port/path, without a login."
            )
        if not 0 < threshold < 1 or chunk_len < 1 or not 0 < deadline_s < math.inf or concurrency < 1:
            raise InvalidOptionError(
                f"threshold={threshold} must lie between 0 and 1, chunk_len={chunk_len}, concurrency={concurrency} be at "
                f"least 1 and deadline_s={deadline_s} positive."
            )
        self.url, self.threshold, self.chunk_len = url, threshold, chunk_len
        self.deadline_s, self.concurrency = deadline_s, concurrency
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video, in order. Only unequal lengths raise (``ValueError``)."""
        check_pairs(videos, instructions)
        if not videos:
            return []
        deadline = monotonic() + self.deadline_s
        with ThreadPoolExecutor(min(self.concurrency, len(videos)), thread_name_prefix="robometer") as pool:
            return list(pool.map(self._one, videos, instructions, [deadline] * len(videos)))

    def _one(self, video: Video, instruction: str, deadline: float) -> Verdict:
        timer = Timer()
        try:
            frames, reason = checked_frames(video)
            reason = reason or checked_instruction(instruction)
            if frames is None or reason:
                return invalid(reason, timer.seconds())
            ends = sorted({*range(self.chunk_len, len(frames), self.chunk_len), len(frames) - 1})
            body = {
                "instruction": clean_instruction(instruction),
                "fps": float(video.fps),
                "chunk_ends": ends,
                "frames": [_png(frame) for frame in frames],
            }
            answer = self._ask(json.dumps(body).encode(), deadline)
            return self._verdict(_probabilities(answer, len(ends)), ends, timer.seconds(), answer)
        except (_RefusedError, _BusyError) as error:
            return invalid(str(error), timer.seconds())
        except Exception as error:  # noqa: BLE001 (a judge never raises for one video)
            return invalid(f"Robometer failed: {type(error).__name__}: {error}"[:300], timer.seconds())

    def _verdict(self, chances: list[float], ends: list[int], latency_s: float, answer: bytes) -> Verdict:
        raw = (answer[:2000].decode("utf-8", "replace"),)
        best = max(chances)
        first = next((end for chance, end in zip(chances, ends, strict=True) if chance >= self.threshold), None)
        if first is None:
            reason = f"no chunk reaches {self.threshold:.2f}, the best has {best:.3f}"
            return Verdict(Outcome.FAILURE, reason, best, latency_s=latency_s, raw=raw)
        return Verdict(
            Outcome.SUCCESS, f"reaches {self.threshold:.2f} at frame {first}", best, latency_s=latency_s, raw=raw
        )

    def _ask(self, body: bytes, deadline: float) -> bytes:
        """The body of a good answer; tries again until the deadline."""
        pause, last = 0.2, "it was not asked"
        while (left := deadline - monotonic()) > 0:
            try:
                return self._post(body, left)
            except _BusyError as error:
                last, asked_for = str(error), error.wait_s
            # An absurd Retry-After is not waited out beyond the deadline.
            sleep(max(0.0, min(max(pause, asked_for), deadline - monotonic())))
            pause = min(2 * pause, 5.0)
        raise _BusyError(f"no answer from Robometer within {self.deadline_s:g} s; last: {last}")

    def _post(self, body: bytes, left_s: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connection_type(self._host, self._port, timeout=left_s)
        guard: threading.Timer | None = None
        try:
            connection.connect()
            # A socket's time limit starts anew with every byte; this one does not. The socket is held here because the
            # connection lets go of it once the answer has begun.
            guard = threading.Timer(left_s, _cut, (connection.sock,))
            guard.daemon = True
            guard.start()
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _BusyError(f"{type(error).__name__}: {error}"[:200]) from error
        finally:
            if guard is not None:
                guard.cancel()
            connection.close()
        if response.status in _AGAIN:
            raise _BusyError(f"status {response.status}", _seconds(response.getheader("Retry-After")))
        if response.status != 200:
            raise _RefusedError(f"Robometer answered with status {response.status}")
        if response.length not in (None, 0) and len(content) <= MAX_ANSWER_BYTES:
            raise _BusyError(f"the answer was cut off, {response.length} bytes are missing")
        return content


def _cut(connection: socket.socket) -> None:
    """End whatever is being waited for on a connection; its reader sees the end of the stream."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _png(frame: UInt8Array) -> str:
    return base64.b64encode(encode_picture(frame, "png", compress_level=1)).decode("ascii")


def _seconds(header: str | None) -> float:
    """A Retry-After header in seconds; 0 where it is missing or silly (dates are not waited for)."""
    try:
        value = float(header or 0)
    except ValueError:
        return 0.0
    return value if 0 <= value < 1e6 else 0.0


def _probabilities(answer: bytes, count: int) -> list[float]:
    """The strict reader: exactly one key, exactly ``count`` finite numbers in [0, 1]."""
    if len(answer) > MAX_ANSWER_BYTES:
        raise _RefusedError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
    try:
        content: Any = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"the answer is no JSON ({type(error).__name__})") from error
    if not isinstance(content, dict) or set(content) != {"success_probability"}:
        raise _RefusedError("the answer is not one JSON object with the key 'success_probability'")
    chances = content["success_probability"]
    if not isinstance(chances, list) or len(chances) != count:
        got = len(chances) if isinstance(chances, list) else type(chances).__name__
        raise _RefusedError(f"success_probability has {got}, expected {count} numbers")
    for chance in chances:
        if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
            raise _RefusedError(f"success_probability holds {str(chance)[:40]!r}, expected numbers from 0 to 1")
    return [float(chance) for chance in chances]
