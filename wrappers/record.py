"""One video per episode: frames, actions, instruction and verdict."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.files import atomic_write_bytes
from rawdream_env.types import Outcome, UInt8Array
from rawdream_env.wrappers.base import (
    AnyVectorEnv,
    ForwardingVectorWrapper,
    as_numpy,
    episode_infos,
    find_wrapper,
    reset_rows,
)
from rawdream_env.wrappers.drawing import Format, Panel, compose, encode
from rawdream_env.wrappers.dual_noise import DualNoiseVerification

_WORD = {Outcome.SUCCESS: "success", Outcome.FAILURE: "failure", Outcome.INVALID: "invalid"}


@dataclass
class _Episode:
    """A running recording. ``number`` counts the episodes started, over all rows."""

    number: int
    frames: list[UInt8Array]
    instruction: str = ""
    actions: list[NDArray[np.float32]] = field(default_factory=list)


class Record(ForwardingVectorWrapper):
    """Writes a gif or mp4 for every ``every``-th episode, of a dream or a simulator.

    The picture: frames enlarged to at least 256 pixels, the instruction above, seven bars below (the action that led to
    the frame: delta xyz, delta rotation, gripper, each in [-1, 1]), and the verdict as border colour: green success,
    red failure, grey invalid, orange flagged. Around a `DualNoiseVerification`, the second dream of a success stands
    beside the first with its own verdict.

    The environment should be made with ``return_frames=True``: then every control step is a frame. Otherwise only the
    last frame of each chunk is known; the film has one frame per chunk at an eighth (1 / K) of the speed in Hz.

    Files are ``episode_000012_env3_success.gif``; numbering continues after the files in the folder. Files are written
    atomically. Episodes cut off by ``reset`` or ``close`` are not written.

    Args:
        env: a vector environment whose observation is an image or has one under ``"image"``, uint8 (H, W, 3).
        folder: created when missing.
        fps: frames per second of the film; default: the environment's ``metadata["render_fps"]``, else 10.
        every: record episodes 0, every, 2 * every, ... in the order in which they start over all rows.
        format: "gif" or "mp4".
        max_videos: maximum number of files; None for no limit.

    Attributes:
        n_videos: files written so far.
        last_video: path of the latest file, or None.

    Raises:
        InvalidOptionError: no image observation, unknown format, ``every`` < 1, ``max_videos`` < 0 or ``fps`` <= 0.
    """

    _CHANGES = ("n_videos", "last_video", "_n_started", "_episodes", "_waiting")

    def __init__(
        self,
        env: AnyVectorEnv,
        folder: str | Path,
        fps: float | None = None,
        every: int = 1,
        format: Format = "gif",
        max_videos: int | None = None,
    ) -> None:
        super().__init__(env)
        self.fps = float(env.metadata.get("render_fps", 10) if fps is None else fps)
        if every < 1 or (max_videos is not None and max_videos < 0) or self.fps <= 0:
            raise InvalidOptionError(
                f"Record: every={every}, max_videos={max_videos}, fps={self.fps}; every must be >= 1, "
                "max_videos >= 0 or None, fps > 0."
            )
        if format not in ("gif", "mp4"):
            raise InvalidOptionError(f"Record: format {format!r} is unknown; use 'gif' or 'mp4'.")
        space: Any = env.single_observation_space
        self._key = "image" if hasattr(space, "spaces") else None
        image = space.spaces.get("image") if self._key else space
        if image is None or len(image.shape or ()) != 3 or image.dtype != np.uint8:
            raise InvalidOptionError(f"Record needs a uint8 (H, W, 3) image in the observation, found {space}.")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.every, self.format, self.max_videos = every, format, max_videos
        self.n_videos = 0
        self.last_video: Path | None = None
        self._first_number = _next_number(self.folder)
        self._n_started = 0
        self._episodes: list[_Episode | None] = [None] * self.num_envs
        self._waiting = np.zeros(self.num_envs, bool)  # ended, and restarted by the next step (NEXT_STEP autoreset)
        self._dual_noise = find_wrapper(env, DualNoiseVerification)
        if self._dual_noise is not None:
            self._dual_noise.verifier.keep_frames = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; recordings of the rows that restart begin anew."""
        rows = reset_rows(options, self.num_envs)
        with self.all_or_nothing():
            observations, infos = self.env.reset(seed=seed, options=options)
            self._begin(np.flatnonzero(rows), observations, infos)
            return observations, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, and write the film of every recorded episode that ended.

        When a film cannot be written, the step is undone and can be taken again.
        """
        with self.all_or_nothing():
            return self._recorded_step(actions)

    def _save(self) -> dict[str, Any]:
        saved = super()._save()
        saved["_episodes"] = [e and replace(e, frames=[*e.frames], actions=[*e.actions]) for e in self._episodes]
        return saved

    def _recorded_step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        result = self.env.step(actions)
        observations, _, terminations, truncations, infos = result
        done = as_numpy(terminations).astype(bool) | as_numpy(truncations).astype(bool)
        mode = self.autoreset_mode
        executed = as_numpy(actions)
        for row in range(self.num_envs):
            if self._episodes[row] is not None and not self._waiting[row]:
                finals = episode_infos(infos, mode) if done[row] else infos
                self._extend(row, executed[row], self._new_frames(row, done[row], observations, infos, finals))
                if done[row]:
                    self._finish(row, finals)
        restarted = self._waiting if mode is AutoresetMode.NEXT_STEP else np.zeros_like(done)
        if mode is AutoresetMode.SAME_STEP:
            restarted = done
        self._begin(np.flatnonzero(restarted), observations, infos)
        self._waiting = done if mode is AutoresetMode.NEXT_STEP else np.zeros_like(done)
        return result

    def _begin(self, rows: NDArray[np.intp], observations: Any, infos: dict[str, Any]) -> None:
        images = self._images(observations)
        for row in rows:
            number, self._n_started = self._n_started, self._n_started + 1
            full = self.max_videos is not None and self.n_videos >= self.max_videos
            if full or number % self.every:
                self._episodes[row] = None
                continue
            frame = np.array(images[row])[None]
            self._episodes[row] = _Episode(self._first_number + number, [frame], _text(infos, row))
        self._waiting[rows] = False

    def _images(self, observations: Any) -> NDArray[Any]:
        return as_numpy(observations if self._key is None else observations[self._key])

    def _new_frames(
        self, row: int, done: bool, observations: Any, infos: dict[str, Any], finals: dict[str, Any]
    ) -> UInt8Array:
        """The chunk's frames (K, H, W, 3), or its last frame (1, H, W, 3) when the environment returns no more."""
        mask = finals.get("_frames")
        if "frames" in finals and (mask is None or mask[row]):
            return np.array(as_numpy(finals["frames"])[row])
        if done and "final_obs" in infos:
            final = infos["final_obs"][row]
            return np.array(as_numpy(final if self._key is None else final[self._key]))[None]
        return np.array(self._images(observations)[row])[None]

    def _extend(self, row: int, chunk: NDArray[Any], frames: UInt8Array) -> None:
        episode = self._episodes[row]
        assert episode is not None
        steps = np.asarray(chunk, np.float32)
        # One frame for a whole chunk shows the chunk's mean action.
        episode.actions.append(steps if len(steps) == len(frames) else steps.mean(0, keepdims=True))
        episode.frames.append(frames)

    def _finish(self, row: int, finals: dict[str, Any]) -> None:
        episode, self._episodes[row] = self._episodes[row], None
        if episode is None or (self.max_videos is not None and self.n_videos >= self.max_videos):
            return
        first = _first_outcome(finals, row)
        outcome = "flagged" if "flagged" in finals and finals["flagged"][row] else first
        panels = [Panel("dream" if self._dual_noise else "episode", np.concatenate(episode.frames), first)]
        second = self._dual_noise.last_replays.get(row) if self._dual_noise else None
        if second is not None and second.frames is not None:
            word = _WORD[second.verdict.outcome if second.verdict else Outcome.INVALID]
            panels.append(Panel("second dream", second.frames, word))
            if len(panels[0].frames) < len(panels[1].frames):  # one frame per chunk against every frame
                panels[1] = _thinned(panels[1], len(panels[0].frames))
        pictures = list(compose(panels, outcome, episode.instruction, np.concatenate(episode.actions)))
        chunk_len = (self.single_action_space.shape or (1,))[0]
        fps = self.fps / chunk_len * len(episode.frames[-1])
        path = self.folder / f"episode_{episode.number:06d}_env{row}_{outcome}.{self.format}"
        atomic_write_bytes(path, encode(pictures, fps, self.format))
        self.n_videos, self.last_video = self.n_videos + 1, path


def _thinned(panel: Panel, n: int) -> Panel:
    """``n`` frames spread evenly over the panel, first and last included."""
    return Panel(panel.title, panel.frames[np.linspace(0, len(panel.frames) - 1, n).round().astype(int)], panel.outcome)


def _text(infos: dict[str, Any], row: int) -> str:
    mask = infos.get("_instruction")
    known = "instruction" in infos and (mask is None or mask[row])
    return str(infos["instruction"][row]) if known else ""


def _first_outcome(finals: dict[str, Any], row: int) -> str:
    """The word for the episode's own verdict, or for ``is_success`` in a backend without verdicts."""
    if "verdict" in finals:
        return _WORD[Outcome(int(finals["verdict"][row]))]
    return "success" if "is_success" in finals and finals["is_success"][row] else "failure"


def _next_number(folder: Path) -> int:
    matches = (re.match(r"episode_(\d+)_", path.name) for path in folder.iterdir())
    return max((int(match[1]) + 1 for match in matches if match), default=0)
