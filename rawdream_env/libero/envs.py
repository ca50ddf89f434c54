"""The LIBERO suites as environments: the simulator, and the dream with equal spaces and infos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.config import parse_choice, parse_positive_int
from rawdream_env.envs.base import ChunkResult, ChunkVectorEnv, Rows
from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.reflector import Reflector
from rawdream_env.envs.simulated import SimulatedVectorEnv
from rawdream_env.envs.single import SingleEnv
from rawdream_env.errors import InvalidOptionError
from rawdream_env.libero.protocols import Protocol, Split, find_protocol, state_number
from rawdream_env.libero.scene import SceneTruth
from rawdream_env.libero.starts import DEFAULT_PROTOCOL, LiberoStarts, parse_task, task_list
from rawdream_env.libero.workers import LiberoWorkers, SceneOptions
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, draw_task, seed_for
from rawdream_env.types import Float32Array, Start

FPS = 20.0


class LiberoSimVectorEnv(SimulatedVectorEnv):
    """``num_envs`` rows of a LIBERO suite in hf-libero's simulator: ``gym.make_vec("rawdream/LiberoGoalSim-v0", ...)``.

    Spaces, infos, autoreset and seeds are those of :class:`ChunkVectorEnv`; control is at 20 Hz. Actions are LIBERO's own
    (``OSC_POSE``): 1 is 5 cm, or 0.5 rad, of the gripper; -1 opens, +1 closes. Frames are those of the camera ``agentview``,
    rotated upright, bit-equal to hf-libero's.

    Success is LIBERO's own check. A chunk is a success if the goal holds after any of its control steps; after the first
    success (``end_on_success=False``), if it holds at the chunk's end. With ``judge_every="episode"``, ``verdict`` is 1 or 0 at
    the horizon alone, as in a dream. ``valid`` is False, and the episode truncated, when the row's worker process died or
    did not answer in time; it is started again.

    A row's episode has the task and the scene seed (``seed_for``) of a dream with ``starts="sim"``: equal seeds, equal scenes.
    The scene seed ends with the number of the initial state. To begin from given starts pass
    ``options={"starts": [...]}``; each needs its ``seed`` and ``task_id``.

    Raises on construction:
        InvalidOptionError: an option is out of its range. MissingDependencyError: hf-libero is not installed.
    Raises at the first reset:
        MissingAssetsError: LIBERO's meshes and textures are not here. RendererError: no working OpenGL renderer.
    """

    _workers: LiberoWorkers

    def __init__(
        self,
        num_envs: int = 1,
        *,
        suite: str = "libero_spatial",
        task: TaskLike = "all",
        protocol: str | Protocol = DEFAULT_PROTOCOL,
        init_states: Split = "eval",
        settle_steps: int | None = None,
        max_episode_steps: int | None = None,
        chunk_len: int = 8,
        autoreset_mode: str | AutoresetMode = "NextStep",
        judge_every: str = "chunk",
        num_workers: int = 0,
        timeout_s: float = 300.0,
        max_scenes: int = 10,
        image_size: int = 256,
        device: str = "cpu",
        output: str = "numpy",
        render_mode: str | None = None,
        return_frames: bool = False,
        end_on_success: bool = True,
        reflector: Mapping[str, Any] | Reflector | None = None,
    ) -> None:
        """Start the simulators.

        Args:
            num_envs: number of rows.
            suite: "libero_spatial", "libero_object", "libero_goal", "libero_10" or "libero_90".
            task: name, instruction or id of the task; "all" or None draws one per episode.
            protocol: "raw-dream", "openvla-oft", "simplevla", "rlinf", "lerobot" (:mod:`rawdream_env.libero.protocols`), or a
                ``Protocol``.
            init_states: "eval" or "train": which of the protocol's initial states to begin from.
            settle_steps: control steps before the first observation; None: the protocol's.
            max_episode_steps: horizon in chunks; None: the protocol's, in which the last chunk may be cut short.
            chunk_len: control steps in a chunk.
            autoreset_mode: "NextStep", "SameStep" or "Disabled".
            judge_every: "chunk" or "episode": when success is checked.
            num_workers: worker processes that share the rows; 0: this process. Results do not depend on it.
            timeout_s: how long a worker may take to answer, in seconds; the first reset builds the scenes.
            max_scenes: scenes that a process keeps built (230 MB each); another replaces the one not used for longest, which
                costs seconds at every chunk whose rows need more scenes than that.
            image_size: side of the frames in pixels.
            device: device of torch observations.
            output: "numpy" or "torch" observations.
            render_mode: None, "rgb_array" or "rgb_tiles".
            return_frames: put every chunk's frames into ``infos["frames"]``.
            end_on_success: False continues episodes to their horizon.
            reflector: options of a ``Reflector`` (rewards at every chunk, predicted ends), or one; None: none.
        """
        chunk_len = parse_positive_int("chunk_len", chunk_len)
        rules, chunks = horizon_of(find_protocol(protocol, suite), chunk_len, max_episode_steps)
        rules = rules.changed(settle_steps=settle_steps)
        self.suite = self.robot = suite
        self.tasks = task_list(suite)
        size = parse_positive_int("image_size", image_size)
        super().__init__(
            num_envs,
            frame_shape=(size, size, 3),
            chunk_len=chunk_len,
            fps=FPS,
            max_episode_steps=chunks,
            autoreset_mode=autoreset_mode,
            output=output,
            device=device,
            render_mode=render_mode,
            return_frames=return_frames,
            end_on_success=end_on_success,
            reflector=reflector,
        )
        self._rules = rules
        self._task = parse_task(task, self.tasks)
        self.task = task
        self.init_states: Split = parse_choice("init_states", init_states, ("train", "eval"))
        self.judge_every = parse_choice("judge_every", judge_every, ("chunk", "episode"))
        workers = parse_positive_int("num_workers", num_workers, minimum=0)
        kept = parse_positive_int("max_scenes", max_scenes)
        options = SceneOptions(suite, size, rules.scene_seed, rules.settle_steps, kept)
        self._workers = LiberoWorkers(self.num_envs, workers, options, timeout_s)

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol, for results; its name says what was changed."""
        return {**self._rules.as_dict(), "init_states": self.init_states}

    def trial_seed(self, seed: int, task_id: int, index: int) -> int:
        """Scene seed of episode ``index`` of a task in an evaluation: the initial states in order, each equally often."""
        return self._rules.trial(seed, task_id, index, self.init_states)

    def start_at(self, task_id: int, seed: int) -> Start:
        """A start for ``options={"starts": [...]}``: a task and a scene seed, without a picture."""
        blank = np.zeros(self._images.shape[1:], np.uint8)
        return Start(blank, self.tasks[task_id][1], task_id, seed=seed)

    def truth(self, rows: Sequence[int]) -> list[SceneTruth | None]:
        """What is behind the pictures of ``rows``, for scripted experts; None for a row whose worker died."""
        return self._workers.truth(rows)

    def _begin(self, rows: Rows, keys: Sequence[NoiseKey], given: Sequence[Start | None]) -> list[Start]:
        scenes = [self._scene(row, key, start) for row, key, start in zip(rows.tolist(), keys, given, strict=True)]
        numbers = [state_number(seed) for seed, _ in scenes]
        begun = self._workers.reset(rows.tolist(), [task for _, task in scenes], numbers)
        return [
            Start(frame, self.tasks[task][1], task, proprio, seed)
            for (seed, task), (frame, proprio) in zip(scenes, begun, strict=True)
        ]

    def _scene(self, row: int, key: NoiseKey, start: Start | None) -> tuple[int, int]:
        """(scene seed, task id) of an episode."""
        if start is None:
            task = draw_task(key, len(self.tasks)) if self._task is None else self._task
            return self._rules.scene(seed_for(key.seed, key.episode), self.init_states), task
        return self._given_scene(row, start)

    def _advance(self, rows: Rows, actions: Float32Array, last: NDArray[np.bool_]) -> ChunkResult:
        left = self._rules.horizon - self._elapsed[rows] * self.chunk_len
        counts = np.clip(left, 1, self.chunk_len)
        cut = [chunk[:count] for chunk, count in zip(actions, counts, strict=True)]
        step = self._workers.step(rows.tolist(), cut, every_frame=self.return_frames)
        count = self.chunk_len if self.return_frames else 1
        frames = [_whole(part, self._images[row], count) for row, part in zip(rows, step.frames, strict=True)]
        proprio = [_whole(part, np.zeros(8, np.float32), self.chunk_len) for part in step.proprio]
        every_chunk = self.judge_every == "chunk"
        success = np.where(self._succeeded[rows] | (not every_chunk), step.success_end, step.success_any)
        wanted = (last | every_chunk) & self._judged[rows] & ~step.lost
        verdict = np.where(wanted, success, -1).astype(np.int8)
        return ChunkResult(np.stack(frames), verdict, ~step.lost, step.lost, proprio=np.stack(proprio))


class LiberoDreamVectorEnv(DreamVectorEnv):
    """A LIBERO suite imagined by a world model of your own: ``gym.make_vec("rawdream/LiberoGoalDream-v0", world_model=...)``.

    ``starts="sim"`` renders the initial states that the simulator environment begins from; a start pack
    (``rawdream starts export``) needs no simulator. Horizon and initial states are those of the protocol. The remaining
    options are those of :class:`DreamVectorEnv`.

    Raises on construction:
        InvalidOptionError: no world model or judge is named, or an option is out of its range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        suite: str = "libero_spatial",
        world_model: Any = None,
        judge: Any = None,
        starts: Any = "sim",
        task: TaskLike = "all",
        protocol: str | Protocol = DEFAULT_PROTOCOL,
        init_states: Split = "train",
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the parts.

        Args:
            num_envs: number of rows.
            suite: as in the simulator environment.
            world_model: a folder, a hub id or a ``WorldModel``; none is bundled for LIBERO.
            judge: "none", a folder, a vision-language model, or a ``Judge``; none is bundled for LIBERO.
            starts: "sim", a ``.safetensors`` start pack, or any other source of :class:`DreamVectorEnv`.
            task: name, instruction or id of the task; "all" or None draws one per episode.
            protocol: as in the simulator environment.
            init_states: "train" or "eval": which of the protocol's initial states ``starts="sim"`` renders.
            max_episode_steps: horizon in chunks; None: the protocol's.
            **kwargs: see :class:`DreamVectorEnv`.
        """
        for name, part in (("world_model", world_model), ("judge", judge)):
            if part in (None, "embedded"):
                raise InvalidOptionError(
                    f"no {name.replace('_', ' ')} is bundled for LIBERO; pass {name}=, a folder or a hub id."
                )
        rules = find_protocol(protocol, suite)
        if rendered := isinstance(starts, str) and starts == "sim":
            starts = LiberoStarts(suite, protocol=rules, init_states=init_states)
        super().__init__(
            num_envs,
            world_model=world_model,
            judge=judge,
            starts=starts,
            robot=suite,
            task=None if task == "all" else task,
            max_episode_steps=8 if max_episode_steps is None else max_episode_steps,
            **kwargs,
        )
        self.suite = suite
        self._rules, self.max_episode_steps = horizon_of(rules, self.chunk_len, max_episode_steps)
        self.init_states = init_states
        if rendered:
            self.starts.image_size = self.world_model.frame_shape[0]  # type: ignore[attr-defined]

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol, for results; its name says what was changed."""
        return {**self._rules.as_dict(), "init_states": self.init_states}


def horizon_of(protocol: Protocol, chunk_len: int, chunks: int | None) -> tuple[Protocol, int]:
    """The protocol and the horizon in chunks; another number of ``chunks`` than the protocol's makes it another protocol."""
    if chunks is None or chunks == protocol.chunks(chunk_len):
        return protocol, protocol.chunks(chunk_len)
    chunks = parse_positive_int("max_episode_steps", chunks)
    return protocol.changed(horizon=chunks * chunk_len), chunks


def _whole(parts: NDArray[Any], before: NDArray[Any], count: int) -> NDArray[Any]:
    """``count`` entries of a chunk: the last one is repeated where there are fewer, ``before`` where there are none."""
    parts = parts if len(parts) else before[None]
    missing = count - len(parts)
    return np.concatenate([parts, np.repeat(parts[-1:], missing, axis=0)]) if missing else parts


class LiberoSimEnv(SingleEnv):
    """One row of a LIBERO suite in the simulator; options of :class:`LiberoSimVectorEnv`."""

    def _make(self, **kwargs: Any) -> ChunkVectorEnv:
        return LiberoSimVectorEnv(**kwargs)


class LiberoDreamEnv(SingleEnv):
    """One imagined row of a LIBERO suite; options of :class:`LiberoDreamVectorEnv`."""

    def _make(self, **kwargs: Any) -> ChunkVectorEnv:
        return LiberoDreamVectorEnv(**kwargs)
