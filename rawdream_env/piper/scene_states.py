"""States of the Piper's scene at every control step, without pictures, to train the dynamics of a scene world model.

Two thirds of the episodes are a policy's, with sampling temperatures, action noise, biased chunks and sudden releases, so
that its grasps are there in all degrees of failure; the others are scripted: play, grasp practice and noisy experts. The
policy's scenes are those of the tasks, of the tasks with another object (or none) in place of the target, and of relations
that are no task. **An episode ends before the relation of a task comes true**, so the data hold no success of a task. It also
ends where a task's object is let go near its target, whatever comes of it: if successes alone were cut off, the data would
say that the object always falls.

``states-00000.safetensors`` holds E episodes with T rows in all; absent objects are zero::

    position  (T, O, 3) metres            arm      (T, 8) tool xyz, roll pitch yaw, finger positions
    rotation  (T, O, 4) quaternion wxyz   command  (T, 7) commanded pose after the row's control step
    velocity  (T, O, 6) linear, angular   length   int64 (E,)    present  bool (E, O)    kind  int64 (E,)

A shard depends on the seed, its number, its size and the policies alone. A shard that exists is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from rawdream_env.data.parallel import run_pieces
from rawdream_env.data.recording import claim_folder
from rawdream_env.envs.base import ChunkResult, ChunkVectorEnv, Rows
from rawdream_env.envs.episodes import EpisodeRequest, run_episodes
from rawdream_env.errors import SimulatorError
from rawdream_env.files import save_safetensors
from rawdream_env.piper.envs import CHUNK_LEN, FPS
from rawdream_env.piper.relations import OBJECTS, TASKS, Task
from rawdream_env.piper.scene import arm_state
from rawdream_env.piper.simulator import layouts
from rawdream_env.piper.simulator.practice import TASK_RELATIONS, PlacePractice, begin_scripted, sample_other_task
from rawdream_env.piper.simulator.renderer import PiperRenderer
from rawdream_env.piper.simulator.skills import NOISE_SCALE
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.policies import load_policy
from rawdream_env.resolve import fingerprint
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import Float32Array, Policy, Start

KINDS: Final = ("task scene", "other target", "other relation", "scripted")
"""What ``kind`` counts."""
_KIND_ODDS: Final = (0.5, 0.22, 0.28)
_TASK_ODDS: Final = (0.22, 0.31, 0.28, 0.19)
"""Handle and spoon grasps, which slip, are more frequent."""
_IMAGE_SIZE: Final = 64
_TEMPERATURES: Final = (0.0, 0.5, 0.7, 1.0, 1.3)
_PLACING_SHARE = 0.5
_CHUNKS = 8
_FEWEST_STEPS = 9
_UP, _NEAR_TARGET = 0.01, 0.10
"""An object this much (m) above where it lay, and this close to its target, may be placed on it."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ShardSize:
    """Episodes that are tried for a shard; those that end too early are not in it."""

    rows: int = 24
    """Episodes of one policy that run together."""
    batches: int = 14
    """Times ``rows`` episodes, each with a policy and a temperature drawn for them."""
    scripted: int = 160
    """Scripted episodes."""

    @property
    def episodes(self) -> int:
        """All of them."""
        return self.rows * self.batches + self.scripted


def collect_states(
    folder: Path,
    shards: int,
    *,
    policies: Sequence[str] = ("embedded",),
    seed: int = 0,
    workers: int = 0,
    size: ShardSize = ShardSize(),
    progress: bool = True,
) -> None:
    """Write ``shards`` files, by default of about 500 episodes and 22,000 steps each (half a minute on one core).

    Args:
        folder: where to; created.
        shards: number of files when done.
        policies: names or folders of policies, drawn at random for every ``size.rows`` episodes.
        seed: equal seeds, sizes and policies give equal shards.
        workers: processes; 0: this one.
        size: number of episodes of a shard.
        progress: show a progress bar.

    Raises:
        CheckpointError: no such policy. DatasetError: the folder holds states of another seed, size or policy.
        RendererError: no OpenGL. SimulatorError: a worker process died; rerun the same command to resume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "size": asdict(size), "policies": [fingerprint(load_policy(name)) for name in policies]}
    claim_folder(folder, "config.json", settings, "collected")
    missing = [i for i in range(shards) if not shard_path(folder, i).exists()]
    factory = partial(_ShardWriter, folder, tuple(policies), seed, size)
    bar = tqdm(total=shards * size.episodes, initial=(shards - len(missing)) * size.episodes, desc="states", unit="episode",
               disable=not progress)  # fmt: skip
    with bar:
        try:
            for _ in run_pieces(missing, factory, workers=workers, count=bar.update):
                pass
        except BrokenProcessPool as error:
            raise SimulatorError("a collection process died; rerun the same command to resume.") from error


def shard_path(folder: Path, number: int) -> Path:
    """Where shard ``number`` is."""
    return folder / f"states-{number:05d}.safetensors"


class _ShardWriter:
    """Makes the shards of one process."""

    def __init__(self, folder: Path, policies: Sequence[str], seed: int, size: ShardSize) -> None:
        self.folder, self.seed, self.size = folder, seed, size
        self.policies = [load_policy(name) for name in policies]
        self.renderer = PiperRenderer(_IMAGE_SIZE)
        self.twins = [PiperTwin(renderer=self.renderer) for _ in range(size.rows)]

    def __call__(self, piece: int, tick: Callable[[], None], stopped: Callable[[], bool]) -> None:
        """Make shard ``piece``."""
        arrays = []
        for recording in self._episodes(mix(self.seed, 3, piece)):
            tick()
            if stopped():
                return
            if recording is not None:
                arrays.append(recording.arrays())
        tensors = {name: torch.from_numpy(np.concatenate([a[name] for a in arrays])) for name in arrays[0]}
        save_safetensors(shard_path(self.folder, piece), tensors)

    def _episodes(self, seed: int) -> Iterator[Recording | None]:
        rng = np.random.default_rng(seed)
        for batch in range(self.size.batches):
            policy = self.policies[int(rng.integers(len(self.policies)))]
            yield from _policy_episodes(self.twins, policy, float(rng.choice(_TEMPERATURES)), mix(seed, batch))
        for i in range(self.size.scripted):
            yield _scripted_episode(self.twins[0], mix(seed, self.size.batches + i))

    def close(self) -> None:
        """Free the renderer."""
        self.renderer.close()


class Recording:
    """The states of an episode so far; ``over`` once a task's relation has come true, which is not recorded."""

    def __init__(self, twin: PiperTwin, kind: int) -> None:
        self.twin, self.kind, self.present, self.over = twin, kind, twin.present, False
        self._rows = [self._row()]

    def __len__(self) -> int:
        return len(self._rows) - 1

    def step(self, action: Float32Array) -> None:
        """Carry out one action (7,), unless the episode is over."""
        if self.over:
            return
        self.twin.step(action, render=False)
        self.over = bool(self.twin.relations()[TASK_RELATIONS].any())
        if not self.over:
            self._rows.append(self._row())

    def arrays(self) -> Arrays:
        """The episode as in a shard."""
        rows = {name: np.stack([row[name] for row in self._rows]) for name in self._rows[0]}
        present = np.array([[name in self.present for name in OBJECTS]])
        end = let_go_near_target(rows["position"], present[0], rows["command"])
        rows = {name: values[:end] for name, values in rows.items()}
        return rows | {"length": np.array([end]), "present": present, "kind": np.array([self.kind])}

    def _row(self) -> Arrays:
        twin = self.twin
        poses = np.nan_to_num(twin.object_poses())
        arm = np.concatenate([arm_state(twin.tool_pose(), 0.0)[:6], twin.finger_positions()])
        row = {
            "position": poses[:, :3],
            "rotation": poses[:, 3:],
            "velocity": twin.object_velocities(),
            "arm": arm,
            "command": twin.pose,
        }
        return {name: np.asarray(value, np.float32) for name, value in row.items()}


def let_go_near_target(position: NDArray[Any], present: NDArray[np.bool_], command: NDArray[Any]) -> int:
    """Number of rows (of T) before the gripper opens while a task's object is held up near its target.

    Args:
        position: (T, O, 3). present: (O,). command: (T, 7), after each row's control step.
    """
    opens = command[:, 6] < 0
    end = len(position)
    for task in TASKS:
        a, b = OBJECTS.index(task.object_a), OBJECTS.index(task.object_b)
        if present[a] and present[b]:
            before = np.concatenate([position[:1], position[:-1]])
            up = before[:, a, 2] > position[0, a, 2] + _UP
            near = np.linalg.norm(before[:, a, :2] - before[:, b, :2], axis=-1) < _NEAR_TARGET
            found = np.flatnonzero(opens & up & near)
            end = min(end, int(found[0])) if len(found) else end
    return end


def _policy_episodes(
    twins: list[PiperTwin], policy: Policy, temperature: float, seed: int
) -> Iterator[Recording | None]:
    env = _PracticeEnv(twins)
    requests = [EpisodeRequest(None, mix(seed, i), NoiseKey(mix(seed, i))) for i in range(len(twins))]
    list(run_episodes(env, requests, policy, temperature=temperature))
    yield from (recording if recording and len(recording) >= _FEWEST_STEPS else None for recording in env.recordings)


def _scripted_episode(twin: PiperTwin, seed: int) -> Recording | None:
    rng = np.random.default_rng(seed)
    if rng.random() < _PLACING_SHARE:
        task = sample_other_task(rng)
        twin.set_scene(layouts.sample_task_layout(task, "wide", rng), layouts.sample_tool(rng))
        act = PlacePractice(twin, task, rng).act
    else:
        act, _ = begin_scripted(twin, rng)
    recording = Recording(twin, KINDS.index("scripted"))
    try:
        for _ in range(_CHUNKS * CHUNK_LEN):
            if recording.over:
                break
            recording.step(act())
    except SimulatorError:
        return None
    return recording if len(recording) >= _FEWEST_STEPS else None


class _PracticeEnv(ChunkVectorEnv):
    """A policy's episodes with disturbed actions, each recorded; a row's scene and disturbance depend on its seed."""

    def __init__(self, twins: list[PiperTwin]) -> None:
        super().__init__(
            len(twins),
            frame_shape=(twins[0].image_size, twins[0].image_size, 3),
            chunk_len=CHUNK_LEN,
            fps=FPS,
            max_episode_steps=_CHUNKS,
            autoreset_mode="Disabled",
        )
        self.twins = twins
        self.recordings: list[Recording | None] = [None] * len(twins)
        self._disturb: list[Callable[[Float32Array], Float32Array]] = [lambda actions: actions] * len(twins)

    def _begin(self, rows: Rows, keys: Sequence[NoiseKey], given: Sequence[Start | None]) -> list[Start]:
        starts = []
        for row, key in zip(rows, keys, strict=True):
            rng = np.random.default_rng(mix(key.seed, key.episode))
            kind, task, places = practice_scene(rng)
            frame = self.twins[row].set_scene(places, layouts.sample_tool(rng))
            self.recordings[row] = Recording(self.twins[row], kind)
            self._disturb[row] = _disturbance(rng)
            starts.append(Start(frame, task.instruction, seed=key.seed))
        return starts

    def _advance(self, rows: Rows, actions: Float32Array, last: NDArray[np.bool_]) -> ChunkResult:
        frames, ends = [], []
        for row, chunk in zip(rows, actions, strict=True):
            recording = self.recordings[row]
            assert recording is not None
            try:
                for action in self._disturb[row](chunk):
                    recording.step(action)
            except SimulatorError:
                recording.over = True
            ends.append(recording.over)
            frames.append(self._images[row] if recording.over else self.twins[row].frame())
        n = len(rows)
        return ChunkResult(np.stack(frames)[:, None], np.full(n, -1, np.int8), np.ones(n, bool), np.array(ends))


def practice_scene(rng: np.random.Generator) -> tuple[int, Task, dict[str, layouts.Pose2D]]:
    """Kind, instruction and places of a policy's episode."""
    kind = int(rng.choice(len(_KIND_ODDS), p=_KIND_ODDS))
    if KINDS[kind] == "other relation":
        task = sample_other_task(rng)
        return kind, task, layouts.sample_task_layout(task, "wide", rng)
    task = TASKS[int(rng.choice(len(TASKS), p=_TASK_ODDS))]
    places = layouts.sample_task_layout(task, "narrow" if rng.random() < 0.6 else "wide", rng)
    if KINDS[kind] == "other target":
        at = places.pop(task.object_b)
        if rng.random() < 0.6:
            others = [name for name in OBJECTS if name not in (task.object_a, task.object_b)]
            places[str(rng.choice(others))] = at
    return kind, task, places


def _disturbance(rng: np.random.Generator) -> Callable[[Float32Array], Float32Array]:
    """Changes the chunks (K, 7) of one episode: noise on every action, a bias on a chunk, a gripper that opens or closes
    too early.
    """
    noise = float(rng.choice([0.0, 0.05, 0.12, 0.25], p=[0.35, 0.25, 0.25, 0.15]))
    bias = float(rng.choice([0.0, 0.1, 0.25], p=[0.5, 0.3, 0.2]))
    slips = rng.random() < 0.12

    def disturb(actions: Float32Array) -> Float32Array:
        actions = np.array(actions)
        actions[:, :6] += (noise * rng.normal(size=(len(actions), 6)) + bias * rng.normal(size=6)) * NOISE_SCALE
        if slips and rng.random() < 0.25:
            actions[int(rng.integers(len(actions))) :, 6] *= -1
        return np.clip(actions, -1.0, 1.0)

    return disturb
