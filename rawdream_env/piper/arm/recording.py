"""Every episode of the real arm, as a LeRobotDataset v3.0 folder, written when the episode ends.

Beside the columns of simulated data (frames, commanded pose as state, action as really sent) it has the measured pose, what
the policy asked for, and times. ``meta/outcomes.jsonl`` has one line per episode: what operator and judge said, each apart,
and the fault that ended it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rawdream_env.data import schema
from rawdream_env.data.lerobot import LeRobotWriter
from rawdream_env.data.recording import only_writer
from rawdream_env.errors import DatasetError
from rawdream_env.files import atomic_write_bytes
from rawdream_env.piper.arm.end_pose import FloatArray
from rawdream_env.types import ACTION_DIM, Float32Array, UInt8Array

OUTCOMES_PATH = "meta/outcomes.jsonl"
_BUFFER = 10_000
"""Episodes that are kept while they cannot be written."""
_POSE = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
_ACTION = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
FEATURES: schema.Features = {
    schema.STATE_KEY: schema.numeric_feature(7, _POSE),
    schema.ACTION_KEY: schema.numeric_feature(ACTION_DIM, _ACTION),
    "privileged.measured_pose": schema.numeric_feature(7, _POSE),
    "privileged.asked_action": schema.numeric_feature(ACTION_DIM, _ACTION),
    "privileged.time": schema.numeric_feature(2, ["frame", "sent"]),
}


@dataclass(frozen=True)
class Outcome:
    """How an episode ended. ``operator`` and ``judge``: 1, 0, or -1 not asked or not known; ``judge_probability`` None where
    there is none; ``fault``: why the episode was cut short, empty otherwise; ``steps`` actions.
    """

    instruction: str
    task_id: int
    steps: int
    operator: int = -1
    judge: int = -1
    judge_probability: float | None = None
    fault: str = ""


@dataclass
class ArmEpisode:
    """A running episode: N + 1 of everything but the actions. Times are seconds since the first frame."""

    instruction: str
    task_id: int
    frames: list[UInt8Array] = field(default_factory=list)
    commanded: list[FloatArray] = field(default_factory=list)
    measured: list[FloatArray] = field(default_factory=list)
    asked: list[FloatArray] = field(default_factory=list)
    sent: list[FloatArray] = field(default_factory=list)
    frame_times: list[float] = field(default_factory=list)
    sent_times: list[float] = field(default_factory=list)

    def see(self, frame: UInt8Array, at: float, commanded: FloatArray, measured: FloatArray) -> None:
        """What is seen before an action, or at the end."""
        self.frames.append(frame)
        self.frame_times.append(at)
        self.commanded.append(commanded)
        self.measured.append(measured)

    def act(self, asked: FloatArray, sent: FloatArray, at: float) -> None:
        """An action, as asked for and as sent."""
        self.asked.append(asked)
        self.sent.append(sent)
        self.sent_times.append(at)


class ArmRecorder:
    """Appends episodes to a data set folder, which it keeps to itself until ``close``.

    An episode that cannot be written, because the disk is full, stays in memory until it can.

    Raises:
        DatasetError: the folder holds a data set of another kind, or another recorder writes to it.
    """

    def __init__(self, root: str | Path, fps: float, image_size: int) -> None:
        shape = (image_size, image_size, 3)
        self._lines: list[str] = []
        self._outcomes = Path(root) / OUTCOMES_PATH
        Path(root).mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.enter_context(only_writer(root))
            self._writer = LeRobotWriter(
                root, fps=fps, image_shape=shape, features=FEATURES, episodes_per_shard=_BUFFER, robot_type="piper"
            )
            self._lock = opened.pop_all()

    def write(self, episode: ArmEpisode, outcome: Outcome) -> None:
        """Add an episode and its outcome; one without an action is left out.

        Raises:
            DatasetError: see ``flush``.
        """
        n = len(episode.sent_times)  # another thread may still add to the episode
        if not n:
            return
        times = np.zeros((n + 1, 2), np.float32)
        seen = np.array(episode.frame_times[: n + 1])
        times[: len(seen), 0], times[:n, 1] = seen - seen[0], np.array(episode.sent_times[:n]) - seen[0]
        index = self._writer.add_episode(
            np.stack(_filled(episode.frames, n + 1)),
            _float32(episode.sent[:n]),
            _float32(_filled(episode.commanded, n + 1)),
            episode.instruction,
            {
                "measured_pose": np.nan_to_num(_float32(_filled(episode.measured, n + 1))),
                "asked_action": _float32([*episode.asked[:n], np.zeros(ACTION_DIM)]),
                "time": times,
            },
        )
        self._lines.append(json.dumps({"episode_index": index, **asdict(outcome), "steps": n}) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write what could not be written before.

        Raises:
            DatasetError: it still cannot.
        """
        if not self._lines:
            return
        try:
            self._writer.finalize()
            before = self._outcomes.read_bytes() if self._outcomes.exists() else b""
            atomic_write_bytes(self._outcomes, before + "".join(self._lines).encode())
        except OSError as error:
            raise DatasetError(
                f"{len(self._lines)} episodes cannot be written ({error}). They are kept in memory: free space, then call "
                "reset() or close()."
            ) from error
        self._lines.clear()

    def close(self) -> None:
        """Write what is left, as ``flush``, and let others write to the folder."""
        self.flush()
        self._lock.close()


def _filled(rows: list[Any], count: int) -> list[Any]:
    """``count`` rows: the last one is repeated where a fault came before the frame."""
    return rows[:count] + rows[-1:] * (count - len(rows))


def _float32(rows: Sequence[FloatArray]) -> Float32Array:
    return np.stack(rows).astype(np.float32)
