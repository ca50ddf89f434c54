"""Cache of a vision-language judge's replies, by the hash of the request.

The key is the SHA-256 of the request: frames, instruction, model, prompt, votes, sampling and seed. The cache stores the
replies and not the verdicts, so a change of the reader applies to cached replies too. It holds a number of videos in
memory and, with a folder, one small file per video: a resumed run or a second evaluation of the same videos repeats no
request.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from pathlib import Path

from rawdream_env.files import atomic_write_json, json_sha256

log = logging.getLogger(__name__)


class ReplyCache:
    """Thread-safe, least recently used first out. ``folder`` "": memory only."""

    def __init__(self, size: int, folder: str = "") -> None:
        self._size = size
        self._folder = Path(folder) if folder else None
        self._kept: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._warned = False

    def get(self, key: str) -> tuple[str, ...] | None:
        """The replies for ``key``; None if there are none or the file is damaged."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        if self._folder is None:
            return None
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
            replies = entry["replies"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(replies, list) or not all(isinstance(reply, str) for reply in replies):
            return None
        if "sha256" in entry and entry["sha256"] != json_sha256([key, replies]):  # earlier versions wrote none
            return None
        self._remember(key, tuple(replies))
        return tuple(replies)

    def put(self, key: str, replies: tuple[str, ...]) -> None:
        """Store ``replies``. If the folder cannot be written, a warning is logged once and the memory cache is used."""
        self._remember(key, replies)
        if self._folder is None:
            return
        try:
            self._path(key).parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self._path(key), {"replies": list(replies), "sha256": json_sha256([key, list(replies)])})
        except (OSError, UnicodeError) as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "The judge's replies cannot be stored in %s (%s); continuing without the folder.",
                    self._folder,
                    error,
                )

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"

    def _remember(self, key: str, replies: tuple[str, ...]) -> None:
        with self._lock:
            self._kept[key] = replies
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
