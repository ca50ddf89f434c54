"""A vision-language judge behind an OpenAI-compatible server, such as vLLM (paper section 3.2 and appendix A.5).

    vllm serve Qwen/Qwen3-VL-8B-Instruct --port 8000
    judge = VLMServerJudge(VLMServerConfig(servers=("http://localhost:8000/v1",)))

One request per video asks for all votes (they share the computation of the prompt), constrained to the JSON schema of
the reply; the strict reader checks every vote again. An error on the way gives INVALID with its reason, never FAILURE:
the request is repeated until it has an answer or the deadline has passed, on another server if there is one. Only the
start-up probe raises, so that a run does not start with a judge that cannot work.

A call with N videos starts min(N, max_in_flight) threads, which end with the call. The judge holds no connection and no
thread between calls and may be called from several threads. Verdicts are in the order of the videos, and every
connection carries one request only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from rawdream_env.judges.base import Timer, check_pairs, invalid
from rawdream_env.judges.verdict import verdict_of
from rawdream_env.judges.vlm import prompt
from rawdream_env.judges.vlm.cache import ReplyCache
from rawdream_env.judges.vlm.config import VLMServerConfig
from rawdream_env.judges.vlm.http import Response, Server, Servers, TransportError, api_key, readable, request
from rawdream_env.judges.vlm.probe import check_servers, probe
from rawdream_env.types import Outcome, Verdict, Video

log = logging.getLogger(__name__)

_GRACE_S = 0.3
"""Seconds after the deadline, for threads where no timeout applies, such as in name resolution."""

_URL = "{video}"
"""Stands for the video while JSON is written. No instruction contains it: ``prompt.task_data`` removes braces."""

_TRANSIENT = frozenset({408, 409, 425, 429})
"""Statuses that are retried, beside 500 and above; any other status concerns this request and is final."""


@dataclass
class _Call:
    """One call of the judge: a few threads process its videos in order."""

    videos: Sequence[Video]
    instructions: Sequence[str]
    places: Iterator[int]
    verdicts: list[Verdict | None]
    began: float = field(default_factory=time.monotonic)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_place(self) -> int | None:
        """The index of the next video, None after the last."""
        with self.lock:
            return next(self.places, None)


class VLMServerJudge:
    """Asks one server or several in turn; see the module's docstring and :class:`VLMServerConfig`.

    Args:
        config: servers, model, prompt, votes and timeouts.
        check: probe the servers now. If False, they are probed before their first use and need ``config.model``.

    ``remote`` is True: a call waits for a server, and several threads may call at once.

    Raises:
        InvalidOptionError: the prompt or the API key cannot be used.
        JudgeUnavailableError: no server can be reached, or one lacks the model, video input, multiple replies or JSON
            schemas. Raised only here: a call never raises because of a server.
    """

    remote = True

    def __init__(self, config: VLMServerConfig, *, check: bool = True) -> None:
        api_key()  # a key that cannot be sent is an error here, not an INVALID verdict later
        self.config = config
        self.model = config.model
        self.prompt = prompt.load_prompt(config.prompt)
        self.servers = Servers([Server(url.rstrip("/")) for url in config.servers], config.max_backoff_s)
        self._cache = ReplyCache(config.cache_size, config.cache_dir)
        self._slots = threading.BoundedSemaphore(config.max_in_flight)
        if check:
            self.model = check_servers(self.servers.all, config)

    def __repr__(self) -> str:
        return f"VLMServerJudge({', '.join(self.config.servers)}; {self.model or 'any model'})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.config, self.model)

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """See :class:`Judge`.

        Returns at most ``deadline_s`` plus one second after the last usable answer of a server (or after the call).
        """
        check_pairs(videos, instructions)
        call = _Call(videos, instructions, iter(range(len(videos))), [None] * len(videos))
        count = min(len(videos), self.config.max_in_flight)
        threads = [
            threading.Thread(target=self._work, args=(call,), name=f"judge-{i}", daemon=True) for i in range(count)
        ]
        started: list[threading.Thread] = []
        try:
            with contextlib.suppress(RuntimeError):  # no more threads: the ones that started do the work
                for thread in threads:
                    thread.start()
                    started.append(thread)
            if count and not started:
                self._work(call)
            for thread in started:
                while thread.is_alive() and (left := self._limit(call) + _GRACE_S - time.monotonic()) > 0:
                    thread.join(left)
        finally:
            call.over.set()  # also when interrupted: threads that are still waiting stop
        late = invalid(f"no answer within {self.config.deadline_s:g} s", self.config.deadline_s)
        return [late if verdict is None else verdict for verdict in list(call.verdicts)]

    def frames_seen(self, total: int, fps: float) -> tuple[int, ...]:
        """``sample_fps`` a second, at most ``max_frames``."""
        return prompt.choose_indices(total, fps, self.config.sample_fps, self.config.max_frames)

    def _limit(self, call: _Call) -> float:
        """The time to give up, because no server has given a usable answer for ``deadline_s``."""
        return max(call.began, self.servers.heard_at) + self.config.deadline_s

    def _work(self, call: _Call) -> None:
        while not call.over.is_set() and (place := call.next_place()) is not None:
            timer = Timer()
            try:
                verdict = self._judge(call, call.videos[place], call.instructions[place])
            except Exception as error:
                log.debug("judging failed", exc_info=True)
                verdict = invalid(f"judging failed: {type(error).__name__}: {readable(str(error))}")
            call.verdicts[place] = replace(verdict, latency_s=timer.seconds())

    def _judge(self, call: _Call, video: Video, instruction: str) -> Verdict:
        if reason := prompt.why_not_askable(instruction):
            return invalid(reason)
        config = self.config
        deadline = time.monotonic() + config.deadline_s
        sample, reason = prompt.sample_video(
            video, sample_fps=config.sample_fps, max_frames=config.max_frames, min_side=config.min_side
        )
        if sample is None:
            return invalid(reason)
        body = self.request_body(sample, instruction)
        key = hashlib.sha256(f"{prompt.PROMPT_VERSION}\n".encode() + body).hexdigest()
        if (kept := self._cache.get(key)) is not None:
            return verdict_of([(reply, "") for reply in kept], config.votes, config.need)
        answer = self._ask_until(call, body, deadline)
        if isinstance(answer, str):
            return invalid(answer)
        verdict = verdict_of(answer, config.votes, config.need)
        if verdict.outcome != Outcome.INVALID:
            self._cache.put(key, verdict.raw)
        return verdict

    def request_body(self, sample: prompt.Sample, instruction: str) -> bytes:
        """The JSON of a chat completion about ``sample``; equal questions give equal bytes."""
        config = self.config
        pictures = prompt.encode_frames(sample.frames, cast(prompt.Encoding, config.encoding))
        body = json.dumps(
            {
                "model": self.model,
                "messages": prompt.chat_messages(_URL, instruction, self.prompt),
                "n": config.votes,
                "temperature": config.temperature,
                "max_tokens": config.max_tokens,
                "seed": config.seed,
                "response_format": prompt.response_format(),
                "media_io_kwargs": prompt.media_options(sample),
            }
        )
        # Inserted afterwards: half a megabyte of base64 needs no JSON escapes.
        return body.replace(_URL, prompt.video_url(pictures), 1).encode()

    def _ask_until(self, call: _Call, body: bytes, deadline: float) -> list[tuple[object, str]] | str:
        """Replies with their finish reasons, or the error: retried until the deadline or a final refusal."""
        config, attempts, backoff, last = self.config, 0, self.config.backoff_s, "every server sent Retry-After"
        while not call.over.is_set():
            limit = min(deadline, self._limit(call))
            server, closed_s = self.servers.pick()
            left = limit - time.monotonic()
            if left <= 0:
                break
            if closed_s > 0:
                call.over.wait(min(closed_s, left))
                continue
            if not self._slots.acquire(timeout=left):
                break
            try:
                attempts += 1
                answer, patience = self._ask(server, body, min(limit, time.monotonic() + config.request_timeout_s))
            finally:
                self._slots.release()
            if isinstance(answer, list):
                self.servers.succeeded(server)
                return answer
            last = f"{server.url}: {answer}"
            if patience is None:
                return f"refused by {last}"
            self.servers.failed(server, config.backoff_s, min(patience, config.max_retry_after_s) or None)
            if not self.servers.any_free():
                call.over.wait(max(0.0, min(backoff, limit - time.monotonic())))
                backoff = min(2 * backoff, config.max_backoff_s)
        return f"no answer within {config.deadline_s:g} s, {attempts} attempts; the last: {last}"

    def _ask(self, server: Server, body: bytes, deadline: float) -> tuple[list[tuple[object, str]] | str, float | None]:
        """One attempt: replies, or an error and the server's Retry-After (0: none; None: the error is final)."""
        try:
            if not server.checked and (refusal := probe(server, self.config, deadline)[1]):
                return (
                    refusal,
                    0.0,
                )  # it was unreachable at the start; until it passes the probe it counts as unreachable
            name = uuid.uuid4().hex
            response = request(f"{server.url}/chat/completions", deadline, body, {"X-Request-Id": name})
        except TransportError as error:
            return str(error), 0.0
        if response.status != 200:
            said = f"status {response.status}: {readable(response.body.decode('utf-8', 'replace'))}"
            passes = response.status >= 500 or response.status in _TRANSIENT
            return said, (response.retry_after() or 0.0) if passes else None
        replies = read_completion(response, self.config.votes, name if server.echoes_id else "")
        return replies, 0.0


def read_completion(response: Response, votes: int, name: str = "") -> list[tuple[object, str]] | str:
    """The replies in a chat completion with their finish reasons ("stop", "length"), or the error of the response.

    ``name`` is the id that the completion must contain, so that the response to another request is not used.
    """
    try:
        completion = json.loads(response.body)
    except (ValueError, RecursionError):
        return "the answer is not JSON"
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(choices, list) or not choices or len(choices) > votes:
        return f"the answer is no chat completion with 1 to {votes} replies"
    if name and name not in str(completion.get("id")):
        return "the answer belongs to another request"
    replies: list[tuple[object, str]] = []
    for choice in choices:
        message = choice.get("message") if isinstance(choice, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        replies.append((content, str(choice.get("finish_reason")) if isinstance(choice, dict) else ""))
    return replies


def _unpickled(config: VLMServerConfig, model: str) -> VLMServerJudge:
    """A copy in another process; the original has probed the servers."""
    judge = VLMServerJudge(config, check=False)
    judge.model = model
    for server in judge.servers.all:
        server.checked = True
    return judge
