"""The Piper tabletop as environments: the dream, and the simulator as its ground truth, with equal spaces and infos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.config import parse_choice, parse_positive_int
from rawdream_env.envs.base import ChunkResult, ChunkVectorEnv, Rows
from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.reflector import Reflector
from rawdream_env.envs.simulated import SimulatedVectorEnv
from rawdream_env.envs.single import SingleEnv
from rawdream_env.piper.starts import INSTRUCTIONS, TASK_LIST, TASK_NAMES, piper_task
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike, seed_for
from rawdream_env.types import Float32Array, Start

if TYPE_CHECKING:
    from rawdream_env.piper.simulator.workers import PiperWorkers

CHUNK_LEN = 8
FPS = 10.0


class PiperDreamVectorEnv(DreamVectorEnv):
    """The Piper tabletop in the bundled world model: the environment of ``gym.make_vec("rawdream/PiperDream-v0")``.

    Four tasks (stack block, place pot, put spoon, place cup), 64x64 pixels at 10 Hz, 8 actions a chunk, 8 chunks an
    episode; all parts are bundled and run on a CPU. ``PiperSimVectorEnv`` has the same spaces and infos.
    Options are those of :class:`DreamVectorEnv`.
    """

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        """Create the environment; see :class:`DreamVectorEnv`."""
        super().__init__(num_envs, **{"robot": "piper", **kwargs})


class PiperSimVectorEnv(SimulatedVectorEnv):
    """``num_envs`` Piper tabletops in MuJoCo, one action chunk (8 control steps at 10 Hz) a step.

    Spaces, infos, autoreset and seeds are those of :class:`ChunkVectorEnv`. Success is checked at the end of every
    chunk and terminates (``judge_every="chunk"``; ``verdict`` is then 1 or 0 after every chunk), or at the horizon alone,
    as in a dream (``"episode"``; -1 before). ``valid`` is always True.

    Scene and task of a row's episode follow from the row's seed and the episode's number alone (``seed_for``), as they
    do in a dream with ``starts="sim"``: equal seeds, equal scenes. To begin from given starts (those of a dream, say)
    pass ``options={"starts": [...]}``; each needs its ``seed`` and a ``task_id`` of the four tasks.

    Raises on construction:
        InvalidOptionError: an option is out of its range.
    Raises at the first reset:
        RendererError: no working OpenGL renderer.
    """

    robot = "piper"
    tasks = TASK_LIST
    _workers: PiperWorkers

    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: TaskLike = None,
        layout: str = "narrow",
        max_episode_steps: int = 8,
        autoreset_mode: str | AutoresetMode = "NextStep",
        judge_every: str = "chunk",
        num_workers: int = 0,
        image_size: int = 64,
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
            task: name, instruction or id of the task; None draws one per episode.
            layout: "narrow" (objects within 3 cm of their usual places) or "wide".
            max_episode_steps: horizon in chunks.
            autoreset_mode: "NextStep", "SameStep" or "Disabled".
            judge_every: "chunk" or "episode": when success is checked.
            num_workers: worker processes that share the rows; 0: this process. Results do not depend on it.
            image_size: side of the frames in pixels.
            device: device of torch observations.
            output: "numpy" or "torch" observations.
            render_mode: None, "rgb_array" or "rgb_tiles".
            return_frames: put every chunk's frames into ``infos["frames"]``.
            end_on_success: False continues episodes to their horizon.
            reflector: options of a ``Reflector`` (rewards at every chunk, predicted ends), or one; None: none.
        """
        size = parse_positive_int("image_size", image_size)
        super().__init__(
            num_envs,
            frame_shape=(size, size, 3),
            chunk_len=CHUNK_LEN,
            fps=FPS,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            output=output,
            device=device,
            render_mode=render_mode,
            return_frames=return_frames,
            end_on_success=end_on_success,
            reflector=reflector,
        )
        self.layout = parse_choice("layout", layout, ("narrow", "wide"))
        self.judge_every = parse_choice("judge_every", judge_every, ("chunk", "episode"))
        self.task = task
        if task is not None:
            piper_task(NoiseKey(0), task)
        from rawdream_env.piper.simulator import workers as simulator

        workers = parse_positive_int("num_workers", num_workers, minimum=0)
        self._workers = simulator.PiperWorkers(self.num_envs, num_workers=workers, image_size=size, layout=self.layout)

    def _begin(self, rows: Rows, keys: Sequence[NoiseKey], given: Sequence[Start | None]) -> list[Start]:
        scenes = [self._scene(row, key, start) for row, key, start in zip(rows.tolist(), keys, given, strict=True)]
        names = [TASK_NAMES[task] for _, task in scenes]
        frames = self._workers.reset(rows.tolist(), [seed for seed, _ in scenes], names)
        proprio = np.asarray(self._workers.proprio(rows.tolist()), dtype=np.float32)
        return [
            Start(np.array(frames[i]), INSTRUCTIONS[task], task, proprio[i].copy(), seed)
            for i, (seed, task) in enumerate(scenes)
        ]

    def _scene(self, row: int, key: NoiseKey, start: Start | None) -> tuple[int, int]:
        """(scene seed, task id) of an episode."""
        if start is None:
            return seed_for(key.seed, key.episode), piper_task(key, self.task)
        return self._given_scene(row, start)

    def _advance(self, rows: Rows, actions: Float32Array, last: NDArray[np.bool_]) -> ChunkResult:
        # Only the last frame is observed; drawing the others takes most of the time.
        step = self._workers.step(rows.tolist(), actions, every_frame=self.return_frames)
        success = np.asarray(step.success, dtype=np.bool_)
        wanted = (last | (self.judge_every == "chunk")) & self._judged[rows]
        verdict = np.where(wanted, success, -1).astype(np.int8)
        nothing = np.zeros(len(rows), dtype=np.bool_)
        return ChunkResult(np.asarray(step.frames), verdict, ~nothing, nothing, lifted=step.lifted.astype(np.int8))


class PiperDreamEnv(SingleEnv):
    """The Piper tabletop, imagined; options of :class:`PiperDreamVectorEnv`."""

    def _make(self, **kwargs: Any) -> ChunkVectorEnv:
        return PiperDreamVectorEnv(**kwargs)


class PiperSimEnv(SingleEnv):
    """The Piper tabletop in the simulator; options of :class:`PiperSimVectorEnv`."""

    def _make(self, **kwargs: Any) -> ChunkVectorEnv:
        return PiperSimVectorEnv(**kwargs)
