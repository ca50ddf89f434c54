"""The vector environment that all backends share: one step is one action chunk.

Dream, simulator and arm differ only in two hooks, ``_begin`` and ``_advance``. Seeds, autoreset, partial reset, checks
of actions, infos, rendering and closing are implemented here, so that all backends agree on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rawdream_env.config import (
    SeedLike,
    check_reset_options,
    parse_autoreset_mode,
    parse_choice,
    parse_device,
    parse_positive_int,
    parse_reset_mask,
    parse_seeds,
    parse_starts_option,
)
from rawdream_env.envs.actions import check_actions
from rawdream_env.envs.infos import Infos, objects, put, put_nested
from rawdream_env.envs.reflector import Reflector, make_reflector
from rawdream_env.errors import ClosedEnvironmentError, InvalidOptionError, ResetNeededError
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import ACTION_DIM, Float32Array, Start, UInt8Array, Verdict

Rows = NDArray[np.intp]
_UNSTARTED, _RUNNING, _OVER = 0, 1, 2
_OF_A_STEP = ("frames", "proprio", "success_probability", "env_verdict", "state_success", "lifted")
"""Infos that a reset does not give."""


@dataclass(frozen=True)
class ChunkResult:
    """The result of one chunk for n rows.

    ``frames`` uint8 (n, K, H, W, 3), or the last one alone, (n, 1, H, W, 3), where ``return_frames`` is off;
    ``verdict`` int8 (n,): 1 success, 0 failure, -1 no verdict or invalid; ``valid`` bool (n,): False where the judge
    failed or the frames are not finite; ``ends`` bool (n,): the episode ends before its horizon;
    ``probability`` float64 (n,) of success, NaN where unknown, or None without probabilities; ``state_success`` int8 (n,):
    1 or 0 by the state behind the pictures, -1 unknown, or None without a state; ``lifted``, likewise: whether the object
    that the task moves has been picked up so far. ``proprio`` float32 (n, K, P) after every control step, or None.
    """

    frames: UInt8Array
    verdict: NDArray[np.int8]
    valid: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    probability: NDArray[np.float64] | None = None
    state_success: NDArray[np.int8] | None = None
    lifted: NDArray[np.int8] | None = None
    proprio: Float32Array | None = None


class ChunkVectorEnv(VectorEnv[dict[str, Any], Any, NDArray[Any]]):
    """Base of the vector environments; subclasses define ``_begin``, ``_advance`` and, if needed, ``_save``, ``_restore``,
    ``_finish``, ``_record_verdicts`` and ``close_extras``.

    A step or a reset happens wholly or not at all: after any error the environment is as it was.

    ## Spaces
    ``single_action_space`` is ``Box(-1, 1, (chunk_len, 7), float32)``: per control step end-effector delta xyz, delta
    rotation, gripper (-1 open, +1 close). ``single_observation_space`` is
    ``Dict(image=Box(0, 255, (H, W, 3), uint8))``, the chunk's last frame. With ``output="torch"`` observations are
    torch tensors on ``device``; everything else is numpy.

    ## Rewards and ends
    1.0 (float64) at the step where success is established, which also terminates; 0.0 otherwise. Truncated at
    ``max_episode_steps`` chunks, and at once when the episode is invalid. With ``end_on_success=False`` episodes
    continue to their horizon, so that a video shows whether a success lasts: the reward of 1.0 stays at the first success,
    ``terminations`` at the horizon says whether it holds there. With a ``reflector`` the rewards are its own, and it
    terminates the episodes that it judges finished (:mod:`rawdream_env.envs.reflector`).

    ## Infos
    Arrays with ``_key`` masks: ``instruction`` (object), ``task_id`` (int64), ``is_success`` (bool), ``verdict`` (int8:
    1, 0, -1 none or invalid), ``valid`` (bool), with ``return_frames`` ``frames`` (uint8, (num_envs, K, H, W, 3)) and, where it
    is known, ``proprio`` (float32, (num_envs, K, P)), and ``success_probability`` (float64) where a judge gives one. A dream
    whose world model imagines a state adds ``state_success`` (bool): whether the task is done in it; it is not rewarded.
    Where it is known, ``lifted`` (bool): whether the object that the task moves has been picked up in the episode so far. A
    row whose mask is False did nothing in this call. With a ``reflector``, ``verdict`` and ``is_success`` are the
    reflector's, and ``env_verdict`` (int8) is the environment's own.

    ## Autoreset
    NextStep: the step after an episode's end ignores that row's action, gives reward 0 and the next episode's first
    observation. SameStep: the same step already returns it; the end is in ``final_obs`` and ``final_info``. Disabled:
    a row that is over idles (last observation, reward 0, flags kept, info masks False) until
    ``reset(options={"reset_mask": mask})``; stepping when all rows are over raises ``ResetNeededError``.

    ## Seeds
    ``reset(seed=s)`` gives row i the seed s + i; a list gives one per row, None meaning "continue". Episode e of a row is
    a function of the row's seed, e and the actions; never of ``num_envs`` or of other rows. Resetting without a seed
    begins the row's next episode.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own declaration)
        "render_modes": ["rgb_array", "rgb_tiles"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    robot: str = ""
    """Name of the robot (``rawdream_env.robots``); empty where it is not known."""
    tasks: tuple[tuple[str, str], ...] = ()
    """(name, instruction) of every task, in the order of the task ids; empty where they are not known."""
    _CHANGES: ClassVar[tuple[str, ...]] = (
        "_phase",
        "_elapsed",
        "_terminated",
        "_truncated",
        "_succeeded",
        "_judged",
        "_images",
        "_row_seeds",
        "_episodes",
        "_starts",
        "_np_random_seed",
    )
    """Attributes that a step or a reset changes."""
    _ROW_ATTRIBUTES: ClassVar[tuple[str, ...]] = ("task_description", "task_id", "elapsed_steps", "row_seeds")

    def __init__(
        self,
        num_envs: int,
        *,
        frame_shape: tuple[int, int, int],
        chunk_len: int,
        fps: float,
        action_dim: int = ACTION_DIM,
        max_episode_steps: int = 8,
        autoreset_mode: str | AutoresetMode = "NextStep",
        output: str = "numpy",
        device: str = "cpu",
        render_mode: str | None = None,
        return_frames: bool = False,
        end_on_success: bool = True,
        reflector: Mapping[str, Any] | Reflector | None = None,
    ) -> None:
        """Set up the spaces; ``frame_shape`` (H, W, 3), ``max_episode_steps`` in chunks, ``fps`` in Hz. ``reflector``: a
        ``Reflector`` or its options.

        Raises:
            InvalidOptionError: an option is out of its range.
        """
        self.num_envs = parse_positive_int("num_envs", num_envs)
        self.chunk_len = chunk_len
        self.max_episode_steps = parse_positive_int("max_episode_steps", max_episode_steps)
        self.autoreset_mode = parse_autoreset_mode(autoreset_mode)
        self.output = parse_choice("output", output, ("numpy", "torch"))
        self.render_mode = parse_choice("render_mode", render_mode, (None, "rgb_array", "rgb_tiles"))
        self.device = parse_device(device)
        self.return_frames = bool(return_frames)
        self.end_on_success = bool(end_on_success)
        self.reflector: Reflector | None = None
        self.fps = float(fps)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode, "render_fps": round(fps)}
        self.single_observation_space = Dict({"image": Box(0, 255, frame_shape, np.uint8)})
        self.single_action_space = Box(-1.0, 1.0, (chunk_len, action_dim), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        n = self.num_envs
        self._phase = np.full(n, _UNSTARTED, dtype=np.int8)
        self._elapsed = np.zeros(n, dtype=np.int64)
        self._terminated = np.zeros(n, dtype=np.bool_)
        self._truncated = np.zeros(n, dtype=np.bool_)
        self._succeeded = np.zeros(n, dtype=np.bool_)
        self._judged = np.ones(n, dtype=np.bool_)
        self._images = np.zeros((n, *frame_shape), dtype=np.uint8)
        self._row_seeds: list[int | None] = [None] * n
        self._episodes: list[int] = [-1] * n
        self._starts: list[Start | None] = [None] * n
        if reflector is not None:
            self.attach_reflector(make_reflector(reflector))

    # ---- hooks -------------------------------------------------------------------------------------------------

    def _begin(self, rows: Rows, keys: Sequence[NoiseKey], given: Sequence[Start | None]) -> list[Start]:
        """Begin an episode on ``rows``, from ``given`` starts where not None. Returns the starts actually used."""
        raise NotImplementedError

    def _advance(self, rows: Rows, actions: Float32Array, last: NDArray[np.bool_]) -> ChunkResult:
        """Carry out ``actions`` (n, K, A) on ``rows``; ``last`` (n,) marks rows at their horizon."""
        raise NotImplementedError

    def _save(self) -> dict[str, Any]:
        """What ``_restore`` needs to undo a step or a reset. A subclass adds what its hooks change.

        Arrays and lists are copied here; anything else must be replaced by the hooks, not changed in place.
        """
        saved = {name: getattr(self, name) for name in self._CHANGES}
        saved = {name: value.copy() if isinstance(value, np.ndarray | list) else value for name, value in saved.items()}
        saved["_np_random"] = deepcopy(self._np_random)
        saved["reflector"] = None if self.reflector is None else self.reflector.save()
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        """Undo what happened since ``_save``."""
        for name in (*self._CHANGES, "_np_random"):
            setattr(self, name, saved[name])
        if self.reflector is not None:
            self.reflector.restore(saved["reflector"])

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo the steps and resets inside when anything is raised there, Ctrl-C included."""
        saved = self._save()
        try:
            yield
        except BaseException:
            self._restore(saved)
            raise

    # ---- the Gymnasium interface -------------------------------------------------------------------------------

    def reset(
        self, *, seed: SeedLike = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin new episodes.

        Args:
            seed: None, an integer (row i gets seed + i) or one per row; see the class docstring.
            options: ``reset_mask``: boolean (num_envs,) array, reset only these rows. ``starts``: a ``Start`` or None
                per row, to begin from. ``seed``: the same as the argument, for wrappers that only pass integers.
                ``judge``: False leaves the episodes that begin here unjudged (``verdict`` -1 at their end), for callers who
                judge the videos themselves.

        Returns:
            Observations of all rows (last ones for rows not reset) and infos (masks True for the rows reset).

        Raises:
            InvalidOptionError: bad seed or options. ResetNeededError: the first reset leaves rows out.
            ClosedEnvironmentError: the environment is closed.
        """
        self._require_open("reset")
        chosen = check_reset_options(options)
        if "seed" in chosen:
            if seed is not None:
                raise InvalidOptionError("seed is given both as an argument and in options; give it once.")
            seed = chosen["seed"]
        seeds = parse_seeds(seed, self.num_envs)
        mask = parse_reset_mask(chosen.get("reset_mask"), self.num_envs)
        given = parse_starts_option(chosen.get("starts"), self.num_envs)
        never = np.flatnonzero((self._phase == _UNSTARTED) & ~mask)
        if len(never):
            raise ResetNeededError(f"env {never[0]} was never reset; call reset() without reset_mask first.")
        rows = np.flatnonzero(mask)
        with self.all_or_nothing():
            super().reset(seed=next((s for s in seeds if s is not None), None))
            self._restart(rows, seeds, given, judged=bool(chosen.get("judge", True)))
            infos: Infos = {}
            self._put_reset_info(infos, rows)
            return self._observe(self._images), infos

    def step(self, actions: Any) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Carry out one action chunk per row: ``actions`` (num_envs, chunk_len, 7), numpy or torch, in [-1, 1].

        Raises:
            InvalidActionError: wrong shape or dtype, NaN, infinite or out-of-range values. ResetNeededError: before
                ``reset``, or (Disabled) when every episode is over. ClosedEnvironmentError: closed. After any error, Ctrl-C
                included, the environment is as it was before the call.
        """
        self._require_open("step")
        if (self._phase == _UNSTARTED).any():
            raise ResetNeededError("step() was called before reset(); call reset() first.")
        over = self._phase == _OVER
        disabled = self.autoreset_mode == AutoresetMode.DISABLED
        if disabled and over.all():
            raise ResetNeededError(
                f"all {self.num_envs} episodes are over and autoreset is disabled; call reset(), "
                "or reset(options={'reset_mask': mask}) for some of them."
            )
        rows, waiting = np.flatnonzero(~over), np.flatnonzero(over)
        shape = (self.num_envs, *self.single_action_space.shape)  # type: ignore[misc]
        batch = check_actions(actions, shape, rows)
        infos: Infos = {}
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        with self.all_or_nothing():
            if len(rows):
                self._step_rows(rows, batch, rewards, infos)
            terminations, truncations = self._terminated.copy(), self._truncated.copy()
            if len(waiting) and not disabled:
                self._restart(waiting)
                self._put_reset_info(infos, waiting)
                terminations[waiting] = truncations[waiting] = False
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                self._restart_finished(infos)
            return self._observe(self._images), rewards, terminations, truncations, infos

    def attach_reflector(self, reflector: Reflector) -> None:
        """Use ``reflector`` for rewards and predicted ends from now on. Call ``reset()`` afterwards.

        Raises:
            InvalidOptionError: there is one already, or ``return_frames`` is off (its judge is shown every frame).
        """
        if self.reflector is not None:
            raise InvalidOptionError("this environment already has a reflector; create another environment.")
        if not self.return_frames:
            raise InvalidOptionError(
                "a reflector shows its judge every frame: create the environment with return_frames=True."
            )
        self.reflector = reflector
        self._phase[:] = _UNSTARTED

    def render(self) -> Any:
        """The last frames: "rgb_array" a tuple with one (H, W, 3) uint8 per row, "rgb_tiles" one picture of them all.

        Returns None without a ``render_mode``.
        """
        self._require_open("render")
        if self.render_mode is None:
            return None
        if (self._phase == _UNSTARTED).any():
            raise ResetNeededError("render() was called before reset(); call reset() first.")
        return tuple(self._images.copy()) if self.render_mode == "rgb_array" else tile(self._images)

    # ---- inspection -------------------------------------------------------------------------------------------

    @property
    def task_description(self) -> tuple[str, ...]:
        """The instruction of every row ("" before the first reset)."""
        return tuple("" if start is None else start.instruction for start in self._starts)

    @property
    def task_id(self) -> tuple[int, ...]:
        """The task id of every row, -1 where unknown."""
        return tuple(-1 if start is None else start.task_id for start in self._starts)

    @property
    def elapsed_steps(self) -> tuple[int, ...]:
        """Chunks done in the running episode of every row."""
        return tuple(int(count) for count in self._elapsed)

    @property
    def row_seeds(self) -> tuple[int | None, ...]:
        """The seed of every row, None before the first reset."""
        return tuple(self._row_seeds)

    def start_of(self, row: int) -> Start:
        """The start of row ``row``'s running episode (or of the one just over).

        Raises:
            ResetNeededError: before the first reset. InvalidOptionError: there is no such row.
        """
        if not 0 <= row < self.num_envs:
            raise InvalidOptionError(f"row={row} does not exist; there are {self.num_envs} environments.")
        start = self._starts[row]
        if start is None:
            raise ResetNeededError(f"env {row} has no episode yet; call reset() first.")
        return start

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Attribute or method ``name``, one value per row; values that do not belong to one row are repeated."""
        value = getattr(self, name)
        if name in self._ROW_ATTRIBUTES:
            return tuple(value)
        return (value(*args, **kwargs) if callable(value) else value,) * self.num_envs

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Attribute ``name``, one value per row."""
        value = getattr(self, name)
        return tuple(value) if name in self._ROW_ATTRIBUTES else (value,) * self.num_envs

    def set_attr(self, name: str, values: Any) -> None:
        """Set attribute ``name``; the rows share it, so a list or tuple must repeat one value ``num_envs`` times.

        Raises:
            InvalidOptionError: no such settable attribute, or values that differ between rows.
        """
        if name in self._ROW_ATTRIBUTES or name.startswith("_") or not hasattr(self, name):
            raise InvalidOptionError(f"{name!r} is not an attribute that can be set on {type(self).__name__}.")
        if isinstance(values, list | tuple):
            if len(values) != self.num_envs or any(value != values[0] for value in values):
                raise InvalidOptionError(
                    f"{name!r} is shared by all rows: give one value, or the same value {self.num_envs} times."
                )
            values = values[0]
        setattr(self, name, values)

    # ---- internals --------------------------------------------------------------------------------------------

    def _require_open(self, what: str) -> None:
        if self.closed:
            raise ClosedEnvironmentError(f"{what}() was called on a closed environment; create a new one.")

    def _restart(
        self,
        rows: Rows,
        seeds: Sequence[int | None] | None = None,
        given: Sequence[Start | None] | None = None,
        *,
        judged: bool = True,
    ) -> None:
        """Begin the next episode of ``rows``."""
        keys: list[NoiseKey] = []
        base: int | None = None
        for row in rows:
            seed, episode = None if seeds is None else seeds[row], 0
            if seed is None:
                seed, episode = self._row_seeds[row], self._episodes[row] + 1
            if seed is None:  # never seeded: one draw serves all rows
                base = int(self.np_random.integers(2**31)) if base is None else base
                seed, episode = base + int(row), 0
            keys.append(NoiseKey(seed, episode=episode))
        starts = self._begin(rows, keys, [None if given is None else given[row] for row in rows])
        for row, key, start in zip(rows, keys, starts, strict=True):
            self._row_seeds[row], self._episodes[row], self._starts[row] = key.seed, key.episode, start
            self._images[row] = start.frame
            if self.reflector is not None:
                self.reflector.begin(int(row), start)
        self._phase[rows] = _RUNNING
        self._elapsed[rows] = 0
        self._terminated[rows] = self._truncated[rows] = self._succeeded[rows] = False
        self._judged[rows] = judged

    def _step_rows(self, rows: Rows, actions: Float32Array, rewards: NDArray[np.float64], infos: Infos) -> None:
        last = self._elapsed[rows] + 1 >= self.max_episode_steps
        result = self._advance(rows, actions, last)
        success = (result.verdict == 1) & result.valid
        terminated = success & (last | self.end_on_success)
        over = terminated | last | result.ends
        rewards[rows] = success & ~self._succeeded[rows]
        if self.reflector is not None:
            put(infos, self.num_envs, "env_verdict", rows, result.verdict)
            result, terminated, over, rewards[rows] = self._reflect(self.reflector, rows, result, terminated, over)
        self._elapsed[rows] += 1
        self._succeeded[rows] |= success
        self._images[rows] = result.frames[:, -1]
        self._terminated[rows] = terminated
        self._truncated[rows] = ~terminated & over
        self._phase[rows[over]] = _OVER
        self._finish(rows[over])
        self._put_info(infos, rows, result.verdict, result.valid)
        if result.probability is not None:
            known = ~np.isnan(result.probability)
            put(infos, self.num_envs, "success_probability", rows[known], result.probability[known])
        for name, values in (("state_success", result.state_success), ("lifted", result.lifted)):
            if values is not None and (known := values >= 0).any():
                put(infos, self.num_envs, name, rows[known], values[known] == 1)
        if self.return_frames:
            put(infos, self.num_envs, "frames", rows, result.frames)
            if result.proprio is not None:
                put(infos, self.num_envs, "proprio", rows, result.proprio)

    def _reflect(
        self,
        reflector: Reflector,
        rows: Rows,
        result: ChunkResult,
        terminated: NDArray[np.bool_],
        over: NDArray[np.bool_],
    ) -> tuple[ChunkResult, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
        """The result with the reflector's verdicts at episode ends, its rewards and its predicted ends."""
        answer = reflector.reflect(rows.tolist(), result.frames, result.valid, self.fps)
        outcomes = np.array([verdict.outcome for verdict in answer.verdicts], np.int8)
        terminated, over = terminated | answer.done, over | answer.done
        self._record_verdicts(
            rows[over], [verdict for verdict, ended in zip(answer.verdicts, over, strict=True) if ended]
        )
        verdict = np.where(over, outcomes, -1).astype(np.int8)
        seen = replace(result, verdict=verdict, valid=outcomes >= 0, probability=answer.probability)
        return seen, terminated, over, answer.rewards

    def _finish(self, rows: Rows) -> None:
        """Hook: the episodes of ``rows`` are over."""

    def _record_verdicts(self, rows: Rows, verdicts: Sequence[Verdict]) -> None:
        """Hook: record the reflector's ``verdicts`` for the episodes of ``rows``."""

    def _put_info(self, infos: Infos, rows: Rows, verdict: NDArray[np.int8], valid: NDArray[np.bool_]) -> None:
        starts = [self.start_of(row) for row in rows.tolist()]
        put(infos, self.num_envs, "instruction", rows, objects([start.instruction for start in starts]))
        put(infos, self.num_envs, "task_id", rows, np.array([start.task_id for start in starts], dtype=np.int64))
        put(infos, self.num_envs, "is_success", rows, (verdict == 1) & valid)
        put(infos, self.num_envs, "verdict", rows, verdict)
        put(infos, self.num_envs, "valid", rows, valid)

    def _put_reset_info(self, infos: Infos, rows: Rows) -> None:
        self._put_info(infos, rows, np.full(len(rows), -1, dtype=np.int8), np.ones(len(rows), dtype=np.bool_))

    def _restart_finished(self, infos: Infos) -> None:
        """SameStep: move the end of finished rows to ``final_obs`` and ``final_info`` and begin their next episodes."""
        done = np.flatnonzero(self._phase == _OVER)
        if not len(done):
            return
        final_obs = objects([{"image": image} for image in self._observe(self._images[done])["image"]])
        final_info: Infos = {}
        for key in [key for key in infos if not key.startswith("_")]:
            rows = done[infos["_" + key][done]]
            put(final_info, self.num_envs, key, rows, infos[key][rows])
            if key in _OF_A_STEP:  # the new episode has none yet
                infos[key][rows] = 0
                infos["_" + key][rows] = False
        self._restart(done)
        self._put_reset_info(infos, done)
        put(infos, self.num_envs, "final_obs", done, final_obs)
        put_nested(infos, self.num_envs, "final_info", done, final_info)

    def _observe(self, images: UInt8Array) -> dict[str, Any]:
        """An observation that shares no memory with the environment or with earlier observations."""
        copied = images.copy()
        if self.output == "numpy":
            return {"image": copied}
        import torch

        return {"image": torch.from_numpy(copied).to(self.device)}


def tile(images: UInt8Array) -> UInt8Array:
    """(n, H, W, 3) -> one picture, near square, row by row; missing tiles are black."""
    n, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    lines = -(-n // columns)
    canvas = np.zeros((lines * columns, height, width, channels), dtype=np.uint8)
    canvas[:n] = images
    grid = canvas.reshape(lines, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(lines * height, columns * width, channels)
