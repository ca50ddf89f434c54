"""The start-up probe of a judge server: can it be reached, does it serve the model, does it support what is needed?

Structured output fails silently: a server that does not know the field answers 200 with free text (as vLLM does with the
older ``guided_json`` since 0.12). The probe therefore demands a reply that a model cannot give by chance: the schema
allows as its answer a single random word that is not in the question. The same request contains a video and asks for
all votes, which detects text-only models and servers that ignore ``n``. A second request with a longer video must
count more tokens: a server that ignores ``media_io_kwargs`` silently shows its model 32 frames, at wrong times. (Newer
versions of vLLM refuse the field without ``--trust-request-mm-kwargs``; the error message suggests that option.)
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rawdream_env.errors import JudgeUnavailableError
from rawdream_env.judges.verdict import KEYS
from rawdream_env.judges.vlm import prompt
from rawdream_env.judges.vlm.config import API_KEY, VLMServerConfig
from rawdream_env.judges.vlm.http import Response, Server, TransportError, readable, request

log = logging.getLogger(__name__)

_MAX_TOKENS = 1024  # enough for the longest reply by the schema
_SHORT, _LONG = 34, 66
"""Frames of the probe's videos, both above the 32 that a server keeps by default."""


def check_servers(servers: Sequence[Server], config: VLMServerConfig) -> str:
    """Probe every server; returns the model's name.

    An unreachable server is logged as long as another one works, and probed before its first use.

    Raises:
        JudgeUnavailableError: no server can be reached, or one lacks a required feature; the message has its address and
            version.
    """
    away, models = [], {}
    for server in servers:
        try:
            models[server.url], refusal = probe(server, config, time.monotonic() + config.request_timeout_s)
        except TransportError as error:
            away.append(f"{server.url} cannot be reached ({error})")
            continue
        if refusal:
            raise JudgeUnavailableError(refusal)
    if len(away) == len(servers):
        raise JudgeUnavailableError(
            f"No judge server answers: {'; '.join(away)}. Start one (`vllm serve MODEL --port 8000`) and wait until it "
            "is ready."
        )
    if len(set(models.values())) > 1:
        raise JudgeUnavailableError(f"The judge servers serve different models, {models}; set model=... of the judge.")
    for sentence in away:
        log.warning("%s; using the other servers.", sentence)
    return next(iter(models.values()))


def probe(server: Server, config: VLMServerConfig, deadline: float) -> tuple[str, str]:
    """(name of the model, the reason to refuse the server or ""). Marks an accepted server as checked.

    Raises:
        TransportError: it cannot be reached.
    """
    name = f"{server.url}{_version(server, deadline)}"
    listed = request(f"{server.url}/models", deadline)
    if listed.status in (401, 403):
        return "", f"{name} refuses the API key (status {listed.status}); set the environment variable {API_KEY}."
    if listed.status >= 500 or listed.status == 429:
        raise TransportError(f"status {listed.status}")
    names = _model_names(listed)
    if not names:
        return "", f"{name} lists no models (status {listed.status}); the address should end with /v1."
    model = config.model or (names[0] if len(names) == 1 else "")
    if model not in names:
        wanted = f"does not serve the model {config.model!r}" if config.model else "serves several models, name one"
        return "", f"{name} {wanted}; it serves {', '.join(map(repr, names[:10]))}. Set model=... of the judge."
    refusal = _structured_video(server, name, model, config, deadline)
    server.checked = not refusal
    return model, refusal


def _structured_video(server: Server, name: str, model: str, config: VLMServerConfig, deadline: float) -> str:
    """The reason why the server cannot judge videos with a schema; "" if it can."""
    word, request_id = secrets.token_hex(6), secrets.token_hex(16)
    response = _ask(
        server,
        _question(model, _SHORT, config.votes, _MAX_TOKENS, config.temperature, word),
        deadline,
        request_id,
    )
    said = readable(response.body.decode("utf-8", "replace"))
    if response.status != 200 and "media_io_kwargs" in said:
        return (
            f"{name} refuses media_io_kwargs, the frames of a video and their times (status {response.status}); "
            "start it with --trust-request-mm-kwargs."
        )
    if response.status != 200:
        return f"{name} refuses a question about a video (status {response.status}: {said}); can {model!r} see videos?"
    try:
        completion = json.loads(response.body)
        texts = [choice["message"]["content"] for choice in completion["choices"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{name} does not answer as an OpenAI-compatible server does ({said}); the address should end with /v1."
    if len(texts) != config.votes:
        return (
            f"{name} gives {len(texts)} replies where {config.votes} are asked for; it must support n={config.votes}."
        )
    for text in texts:
        if not _answers(text, word):
            return (
                f"{name} ignores structured output: asked for one JSON object by response_format, it replied "
                f"{readable(str(text), 80)!r}. Use a vLLM that supports response_format json_schema (0.12 or newer), "
                "and do not switch its structured output off."
            )
    longer = _ask(server, _question(model, _LONG, 1, 1, 0.0), deadline, secrets.token_hex(16))
    counts = _prompt_tokens(response), _prompt_tokens(longer)
    if None not in counts and counts[0] == counts[1]:
        return (
            f"{name} ignores media_io_kwargs: videos of {_SHORT} and {_LONG} frames both make {counts[0]} tokens, so it "
            "drops frames. Use a newer vLLM, with --trust-request-mm-kwargs."
        )
    server.echoes_id = request_id in str(completion.get("id"))
    return ""


def _question(
    model: str, frames: int, votes: int, max_tokens: int, temperature: float, word: str = ""
) -> dict[str, Any]:
    """A request about a gray video; with ``word``, the schema allows no other answer."""
    sample = prompt.Sample(np.full((frames, 32, 32, 3), 127, np.uint8), tuple(range(frames)), 4.0, frames)
    body: dict[str, Any] = {
        "model": model,
        "messages": prompt.chat_messages(prompt.video_url(prompt.encode_frames(sample.frames)), "say any word"),
        "n": votes,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "media_io_kwargs": prompt.media_options(sample),
    }
    if word:
        body["response_format"] = prompt.response_format(word)
    return body


def _ask(server: Server, body: dict[str, Any], deadline: float, request_id: str) -> Response:
    url = f"{server.url}/chat/completions"
    response = request(url, deadline, json.dumps(body).encode(), {"X-Request-Id": request_id})
    if response.status >= 500 or response.status == 429:
        raise TransportError(f"status {response.status}: {readable(response.body.decode('utf-8', 'replace'))}")
    return response


def _answers(text: object, word: str) -> bool:
    try:
        reply = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(reply, dict) and set(reply) == set(KEYS) and reply[KEYS[1]] == word


def _prompt_tokens(response: Response) -> int | None:
    """Number of prompt tokens; None if the server does not report it."""
    try:
        return int(json.loads(response.body)["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _version(server: Server, deadline: float) -> str:
    """ " (vLLM 0.32.0)" if the server reports its version, else ""."""
    parts = urlsplit(server.url)
    root = f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix('/v1')}"
    response = request(f"{root}/version", deadline)
    try:
        version = json.loads(response.body)["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" (vLLM {readable(str(version), 40)})"


def _model_names(response: Response) -> list[str]:
    try:
        return [str(model["id"]) for model in json.loads(response.body)["data"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
