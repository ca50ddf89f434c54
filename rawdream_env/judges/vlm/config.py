"""Options of vision-language judges: as text on a command line, as a mapping, or as a JSON file.

    "vlm_server:http://localhost:8000/v1?model=Qwen/Qwen3-VL-8B-Instruct"       several servers: separated by commas
    {"kind": "vlm_server", "servers": ["http://localhost:8000/v1"], "model": "Qwen/Qwen3-VL-8B-Instruct"}
    "judge.json"                                                                the same JSON in a file
    "vlm_local:models/Qwen3-VL-8B-Instruct?dtype=bfloat16"

Keys are the fields of the classes below. The API key is not an option: it is read from ``RAWDREAM_JUDGE_API_KEY``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from rawdream_env.errors import InvalidOptionError

API_KEY = "RAWDREAM_JUDGE_API_KEY"
"""Environment variable with the servers' API key. Not an option, because options are written to run folders."""


@dataclass(frozen=True)
class VLMConfig:
    """The question, the frames and the sampling (paper section 3.2 and appendix A.5)."""

    votes: int = 5
    """Number of replies sampled per video."""
    need: int = 4
    """Number of votes that make a success."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""
    max_tokens: int = 768
    """Maximum length of a reply. A truncated reply is INVALID."""
    seed: int = 0
    """Sampling seed."""
    prompt: str = "plain"
    """"plain" (the paper's question), "strict" (defaults to Failure), or a text file with {instruction} in it."""
    sample_fps: float = 4.0
    """Frames per second the model sees."""
    max_frames: int = 128
    """Maximum number of frames; longer videos are sampled at a lower rate."""
    min_side: int = 256
    """Smaller frames are enlarged to at least this many pixels; 0: never."""

    def __post_init__(self) -> None:
        positive = {"votes", "need", "max_tokens", "sample_fps", "max_frames"} | self._positive()
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            if isinstance(default, bool | str) or not isinstance(default, int | float):
                continue
            kind = int if isinstance(default, int) else (int, float)
            ok = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
            if not ok or (value == 0 and field.name in positive):
                what = "an integer" if kind is int else "a finite number"
                least = "above 0" if field.name in positive else "of at least 0"
                raise InvalidOptionError(f"{field.name}={value!r} of the judge must be {what} {least}.")
        if not self.votes // 2 < self.need <= self.votes:
            raise InvalidOptionError(
                f"need={self.need} of votes={self.votes}: a success needs more than half of the votes."
            )
        if not isinstance(self.prompt, str):
            raise InvalidOptionError(f"prompt={self.prompt!r} of the judge must be text: a name or the path of a file.")
        if self.max_frames < 2:
            raise InvalidOptionError(f"max_frames={self.max_frames} must be at least 2: the first frame and the last.")

    def _positive(self) -> set[str]:
        """Further fields that may not be 0."""
        return set()


@dataclass(frozen=True)
class VLMServerConfig(VLMConfig):
    """Options of ``vlm_server``; times in seconds."""

    servers: tuple[str, ...] = ()
    """Base URLs, including /v1."""
    model: str = ""
    """Name of the model on the server; empty: the only one it serves."""
    encoding: str = "jpeg"
    """Encoding of the frames: "jpeg" or "png" (lossless)."""
    max_in_flight: int = 16
    """Maximum number of simultaneous requests, over all servers and calls."""
    deadline_s: float = 300.0
    """Maximum time for a video; without an answer by then it is INVALID."""
    request_timeout_s: float = 120.0
    """Maximum time for a request; then it is repeated, on another server if there is one."""
    backoff_s: float = 0.5
    """Wait before the second attempt; doubles with every further one."""
    max_backoff_s: float = 15.0
    """Maximum wait between attempts."""
    max_retry_after_s: float = 60.0
    """Maximum wait that a server can ask for (Retry-After)."""
    cache_size: int = 10_000
    """Number of videos whose replies are cached in memory; 0: none."""
    cache_dir: str = ""
    """Folder that keeps replies between runs; empty: none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "servers", (self.servers,) if isinstance(self.servers, str) else tuple(self.servers))
        super().__post_init__()
        if not self.servers:
            raise InvalidOptionError("vlm_server has no servers; give one, such as 'http://localhost:8000/v1'.")
        for server in self.servers:
            check_url(server)
        if self.encoding not in ("jpeg", "png"):
            raise InvalidOptionError(f"encoding={self.encoding!r} of the judge must be 'jpeg' or 'png'.")
        if not isinstance(self.model, str) or not isinstance(self.cache_dir, str):
            raise InvalidOptionError("model and cache_dir of the judge must be text.")

    def _positive(self) -> set[str]:
        return {"max_in_flight", "deadline_s", "request_timeout_s", "max_backoff_s"}


@dataclass(frozen=True)
class VLMLocalConfig(VLMConfig):
    """Options of ``vlm_local``."""

    model: str = ""
    """A Qwen3-VL checkpoint: a folder, or "owner/name" of the Hugging Face hub."""
    dtype: str = "auto"
    """Precision of the weights: "auto" (as saved), "bfloat16", "float32"."""
    device: str = ""
    """torch device; empty: that of the environment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise InvalidOptionError("vlm_local has no model; give the folder or the hub id of a Qwen3-VL checkpoint.")


KINDS: dict[str, type[VLMServerConfig] | type[VLMLocalConfig]] = {
    "vlm_server": VLMServerConfig,
    "vlm_local": VLMLocalConfig,
}


def parse_vlm_spec(spec: str | Mapping[str, Any]) -> VLMServerConfig | VLMLocalConfig:
    """The configuration for a spec (see the module's docstring).

    Raises:
        InvalidOptionError: an unknown kind or key, a value out of range, or an API key among the options.
    """
    options = dict(spec) if isinstance(spec, Mapping) else _from_words(spec)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise InvalidOptionError(f"a judge given as JSON has kind={kind!r}; choose one of {', '.join(KINDS)}.")
    known = [field.name for field in dataclasses.fields(KINDS[kind])]
    for name in options:
        if "key" in str(name).lower():
            raise InvalidOptionError(
                f"the judge's options contain {name!r}; put the API key into the environment variable {API_KEY}, "
                "which is not written to run folders."
            )
        if name not in known:
            raise InvalidOptionError(f"{kind} has no option {name!r}; known: {', '.join(known)}.")
    try:
        return KINDS[kind](**options)
    except TypeError as error:
        raise InvalidOptionError(f"the options of {kind} cannot be read ({error}).") from error


def _from_words(spec: str) -> dict[str, Any]:
    """Options of ``kind:place?name=value&...``, converted to numbers where needed."""
    kind, _, rest = spec.partition(":")
    place, _, query = rest.partition("?")
    kinds = {field.name: field.type for field in dataclasses.fields(KINDS[kind])} if kind in KINDS else {}
    options: dict[str, Any] = {"kind": kind}
    if place:
        options |= {"servers": tuple(place.split(","))} if kind == "vlm_server" else {"model": place}
    for name, text in parse_qsl(query, keep_blank_values=True):
        try:
            options[name] = {"int": int, "float": float}.get(str(kinds.get(name)), str)(text)
        except ValueError:
            raise InvalidOptionError(f"{name}={text!r} of the judge must be a number.") from None
    return options


def check_url(url: object) -> None:
    """``InvalidOptionError`` unless ``url`` is a plain http or https address without a password in it."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_ok = urlsplit(""), False
    if parts.username is not None or parts.password is not None:
        raise InvalidOptionError(f"the address of a judge server has a user name in it; use {API_KEY} instead.")
    plain = isinstance(url, str) and url.isascii() and url.isprintable() and " " not in url
    if not (plain and port_ok and parts.scheme in ("http", "https") and parts.hostname) or parts.query:
        raise InvalidOptionError(f"{url!r} is no address of a judge server; write 'http://host:8000/v1'.")
