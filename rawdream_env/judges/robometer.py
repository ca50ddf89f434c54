"""Robometer over HTTP: a reward model that gives a success probability for every frame (paper appendix A.7).

The model (4 B parameters) runs in the evaluation server of its public repository, which answers
``POST /evaluate_batch_npy``. One video is one request, a multipart form:

    sample_0                       JSON: {"sample_type": "progress", "trajectory": {"task": "...", "frames":
                                   {"__numpy_file__": "sample_0_trajectory_frames"}, ...}}
    sample_0_trajectory_frames     the frames as a .npy file, uint8 (N, H, W, 3)
    use_frame_steps                "true": each frame is judged from the frames up to it, never from later ones

The frames sent are the start frame and the last frame of each chunk, so ``outputs_success.success_probs[0]`` has one
probability per chunk end behind that of the start frame. The first chunk that reaches the threshold (0.85) is the
success, and the later frames do not count. (The server's other endpoint, ``/evaluate_batch``, takes frames only as paths
on its own disk.)

Any other response is INVALID, as is an outage: refused or reset connections, 429 and 5xx are repeated until the deadline,
everything else is not. The key, if the service wants one, is read from ``ROBOMETER_API_KEY`` and never stored.
"""

from __future__ import annotations

import io
import json
import math
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rawdream_env.errors import InvalidOptionError
from rawdream_env.judges.base import Timer, check_pairs, checked_frames, checked_instruction, invalid
from rawdream_env.judges.vlm.http import Response, TransportError, api_key, readable, request
from rawdream_env.text import clean_instruction
from rawdream_env.types import Outcome, UInt8Array, Verdict, Video

THRESHOLD = 0.85
KEY_VARIABLE = "ROBOMETER_API_KEY"

_FRAMES = "sample_0_trajectory_frames"


class _RefusedError(Exception):
    """A response that does not change when the request is repeated."""


class RobometerJudge:
    """The service behind the ``Judge`` protocol. A verdict's ``probability`` is the highest among the chunks.

    Args:
        url: address of the evaluation server, such as ``http://localhost:8000``.
        threshold: a chunk with at least this probability is a success.
        chunk_len: frames in a chunk.
        deadline_s: maximum duration of a call; a video without an answer by then is INVALID.
        concurrency: maximum number of simultaneous requests of one call.

    Attributes:
        remote: True: a call waits for a server, and several threads may call at once.
        scanning: True: a success ends the video, so a dream asks after every chunk by default.

    Raises:
        InvalidOptionError: the address, an option or the API key cannot be used.
    """

    remote = True
    scanning = True

    def __init__(
        self,
        url: str,
        *,
        threshold: float = THRESHOLD,
        chunk_len: int = 8,
        deadline_s: float = 120.0,
        concurrency: int = 8,
    ) -> None:
        check_address(url)
        if not 0 < threshold < 1 or chunk_len < 1 or not 0 < deadline_s < math.inf or concurrency < 1:
            raise InvalidOptionError(
                f"threshold={threshold} must lie between 0 and 1, chunk_len={chunk_len}, concurrency={concurrency} be at "
                f"least 1 and deadline_s={deadline_s} positive."
            )
        api_key(KEY_VARIABLE)
        self.url, self.threshold, self.chunk_len = url.rstrip("/"), threshold, chunk_len
        self.deadline_s, self.concurrency = deadline_s, concurrency

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video, in order. Only unequal lengths raise (``ValueError``)."""
        check_pairs(videos, instructions)
        if not videos:
            return []
        deadline = monotonic() + self.deadline_s
        with ThreadPoolExecutor(min(self.concurrency, len(videos)), thread_name_prefix="robometer") as pool:
            return list(pool.map(self._one, videos, instructions, [deadline] * len(videos)))

    def frames_seen(self, total: int, fps: float) -> list[int]:
        """The start frame, the last frame of every chunk, and the last frame."""
        return sorted({*range(0, total, self.chunk_len), total - 1})

    def _one(self, video: Video, instruction: str, deadline: float) -> Verdict:
        timer = Timer()
        try:
            frames, reason = checked_frames(video)
            reason = reason or checked_instruction(instruction)
            if frames is None or reason:
                return invalid(reason, timer.seconds())
            seen = self.frames_seen(len(frames), video.fps)
            sent = np.ascontiguousarray(frames[seen])
            answer = self._ask(*form(sent, clean_instruction(instruction)), deadline)
            return self._verdict(
                success_probabilities(answer.body, len(sent))[1:], seen[1:], timer.seconds(), answer.body
            )
        except (_RefusedError, TransportError) as error:
            return invalid(str(error), timer.seconds())
        except Exception as error:  # noqa: BLE001 (a judge never raises for one video)
            return invalid(f"Robometer failed: {type(error).__name__}: {readable(str(error))}", timer.seconds())

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

    def _ask(self, body: bytes, content_type: str, deadline: float) -> Response:
        """The first response with status 200; repeats the request until the deadline."""
        pause, last = 0.2, "no request was sent"
        while (left := deadline - monotonic()) > 0:
            wait = 0.0
            try:
                response = request(
                    f"{self.url}/evaluate_batch_npy",
                    monotonic() + left,
                    body,
                    {"Content-Type": content_type},
                    key_variable=KEY_VARIABLE,
                )
            except TransportError as error:
                last = str(error)
            else:
                if response.status == 200:
                    return response
                last = f"status {response.status}"
                if response.status < 500 and response.status != 429:
                    raise _RefusedError(f"Robometer refuses the request with status {response.status}")
                wait = response.retry_after() or 0.0
            # The deadline bounds any Retry-After.
            sleep(max(0.0, min(max(pause, wait), deadline - monotonic())))
            pause = min(2 * pause, 5.0)
        raise TransportError(f"no answer from Robometer within {self.deadline_s:g} s; last: {last}")


def check_address(url: str) -> None:
    """``InvalidOptionError`` unless ``url`` is a plain http or https address without a login."""
    try:
        parts = urlsplit(url if isinstance(url, str) and url.isascii() and url.isprintable() else "")
        ok = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if not ok or parts.username is not None or parts.password is not None or parts.query or " " in url:
        raise InvalidOptionError("the Robometer service needs an address like http://host:8000, without a login.")


def form(frames: UInt8Array, instruction: str) -> tuple[bytes, str]:
    """Body and content type of a request about frames uint8 (N, H, W, 3)."""
    file = io.BytesIO()
    np.save(file, frames, allow_pickle=False)
    trajectory = {
        "frames": {"__numpy_file__": _FRAMES},
        "frames_shape": list(frames.shape),
        "task": instruction,
        "id": "0",
        "metadata": {"subsequence_length": len(frames)},
        "video_embeddings": None,
    }
    sample = json.dumps({"sample_type": "progress", "trajectory": trajectory})
    boundary = uuid.uuid4().hex
    start = f"--{boundary}\r\nContent-Disposition: form-data; name="
    fields = (("sample_0", sample), ("use_frame_steps", "true"))
    parts = [
        f'{start}"{_FRAMES}"; filename="{_FRAMES}.npy"\r\nContent-Type: application/octet-stream\r\n\r\n'.encode(),
        file.getvalue(),
        b"\r\n",
        *(f'{start}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields),
        f"--{boundary}--\r\n".encode(),
    ]
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


def success_probabilities(answer: bytes, count: int) -> list[float]:
    """``outputs_success.success_probs[0]`` of a response: exactly ``count`` finite numbers in [0, 1]; read strictly."""
    try:
        content: Any = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"Robometer's response is not JSON ({type(error).__name__})") from error
    success = content.get("outputs_success") if isinstance(content, dict) else None
    rows = success.get("success_probs") if isinstance(success, dict) else None
    if not isinstance(rows, list):
        raise _RefusedError(
            "Robometer's response has no list outputs_success.success_probs; the checkpoint needs a success head"
        )
    if len(rows) != 1 or not isinstance(rows[0], list) or len(rows[0]) != count:
        got = [len(row) if isinstance(row, list) else type(row).__name__ for row in rows[:4]]
        raise _RefusedError(f"success_probs has {len(rows)} rows of {got} numbers, expected 1 row of {count}")
    for chance in rows[0]:
        if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
            raise _RefusedError(f"success_probs contains {str(chance)[:40]!r}, expected numbers from 0 to 1")
    return [float(chance) for chance in rows[0]]
