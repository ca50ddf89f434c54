"""Recorded episodes for evaluation and training: in memory, or with frames that stay on disk until they are needed.

Shape letters: N actions in an episode, A action dimensions, P proprio, H W picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from rawdream_env.data.reader import LeRobotReader
from rawdream_env.types import Float32Array, UInt8Array


@dataclass(frozen=True)
class RecordedEpisode:
    """A recorded episode: ``frames`` uint8 (N+1, H, W, 3), frame t seen before action t; ``actions`` float32 (N, A);
    ``proprio`` float32 (P,) at the start, or None. Episodes with the same ``camera`` come from the same fixed camera.
    """

    frames: UInt8Array
    actions: Float32Array
    proprio: Float32Array | None = None
    name: str = ""
    camera: str = ""


@dataclass(frozen=True)
class StoredEpisode:
    """A recorded episode of a data set whose frames stay on disk: each access to ``frames`` decodes them, so that memory
    does not grow with the number of episodes.
    """

    reader: LeRobotReader
    index: int
    actions: Float32Array
    proprio: Float32Array | None

    @property
    def frames(self) -> UInt8Array:
        """uint8 (N+1, H, W, 3)."""
        return self.reader.episode(self.index).frames[: len(self.actions) + 1]

    @property
    def name(self) -> str:
        """Index and instruction."""
        return f"{self.index}: {self.reader.task(self.index)}"

    @property
    def camera(self) -> str:
        """The folder: all its episodes have the same camera."""
        return str(self.reader.root)


Recording = RecordedEpisode | StoredEpisode


def episodes_from_dataset(
    reader: LeRobotReader, indices: Iterable[int] | None = None, limit: int | None = None, horizon: int | None = None
) -> Iterator[StoredEpisode]:
    """Recorded episodes of a data set: those of ``indices`` (for example the held-out ones) or all, at most ``limit``, cut
    after ``horizon`` actions.
    """
    for index in islice(range(len(reader)) if indices is None else indices, limit):
        episode = reader.episode(index, frames=False)
        yield StoredEpisode(reader, index, episode.actions[:horizon].copy(), episode.state[0].copy())
