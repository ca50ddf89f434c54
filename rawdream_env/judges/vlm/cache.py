"""Replies of a vision-language judge, kept by the hash of what was asked.

The key is the SHA-256 of the request: frames, instruction, model, prompt, votes, sampling and seed. What is kept are the
replies themselves, which are read again, so a stricter reader is strict with old replies too. In memory up to a number
of videos, and in a folder (one small file each) when there is one: then a run that is taken up again, or a second
evaluation of the same videos, asks nothing twice.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from pathlib import Path

from rawdream_env.files import atomic_write_json

log = logging.getLogger(__name__)


class ReplyCache:
    """Thread-safe; the least recently used replies are forgotten. ``folder`` "" keeps nothing on disk."""

    def __init__(self, size: int, folder: str = "") -> None:
        self._size = size
        self._folder = Path(folder) if folder else None
        self._kept: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._warned = False

    def get(self, key: str) -> tuple[str, ...] | None:
        """The replies under ``key``, or None; a damaged file counts as none."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        if self._folder is None:
            return None
        try:
            replies = json.loads(self._path(key).read_text(encoding="utf-8"))["replies"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(replies, list) or not all(isinstance(reply, str) for reply in replies):
            return None
        self._remember(key, tuple(replies))
        return tuple(replies)

    def put(self, key: str, replies: tuple[str, ...]) -> None:
        """Keep ``replies``. A folder that cannot be written is said once and costs nothing but the repetition."""
        self._remember(key, replies)
        if self._folder is None:
            return
        try:
            self._path(key).parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self._path(key), {"replies": list(replies)})
        except (OSError, UnicodeError) as error:
            if not self._warned:
                self._warned = True
                log.warning("The judge's replies cannot be kept in %s (%s); going on without.", self._folder, error)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"

    def _remember(self, key: str, replies: tuple[str, ...]) -> None:
        with self._lock:
            self._kept[key] = replies
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
