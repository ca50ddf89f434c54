"""Episodes imagined by a world model and judged by a judge (paper section 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rawdream_env.config import parse_choice, parse_positive_int
from rawdream_env.envs.base import ChunkResult, ChunkVectorEnv, Rows
from rawdream_env.envs.imagination import (
    Episode,
    Replay,
    begin_states,
    imagine,
    on_host,
    scatter,
    select,
    state_lifted,
    state_success,
)
from rawdream_env.envs.reflector import Reflector
from rawdream_env.errors import InvalidActionError, InvalidOptionError, OffloadedError, RawDreamError
from rawdream_env.judges import load_judge
from rawdream_env.judges.base import ask, frames_seen, is_scanning, says_what_it_sees
from rawdream_env.judges.ensemble import HoldOutJudge
from rawdream_env.robots import DEFAULT_ROBOT
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts import load_starts
from rawdream_env.starts.base import TaskLike, find_task
from rawdream_env.types import (
    Float32Array,
    Judge,
    Outcome,
    Start,
    SupportsClose,
    SupportsPrepare,
    SupportsShownFrames,
    Trajectory,
    UInt8Array,
    Verdict,
    Video,
)
from rawdream_env.world_models import load_world_model

_BROKEN = Verdict(Outcome.INVALID, "the world model returned frames that are not finite")


class DreamVectorEnv(ChunkVectorEnv):
    """``num_envs`` episodes in one world model, one action chunk a step.

    Spaces, infos, autoreset and seeds are those of :class:`ChunkVectorEnv`. An episode's chunk c is imagined with the
    noise ``NoiseKey(seed=row's seed, env=0, episode=row's episode count, chunk=c, draw=0)``. Only running rows are
    passed to the world model; rows that are over leave the batch.

    The judge sees the episode's video so far, start frame first: once at the horizon (``judge_every="episode"``), or
    after every chunk (``"chunk"``: the episode ends at the first success). "auto" is "chunk" for judges that scan a video
    for its first success (``judge.scanning``: VideoMAE, Robometer), as in the paper, and "episode" for the others. An
    INVALID verdict (outage, unreadable reply, frames that are not finite) gives reward 0, ``verdict`` -1 and ``valid``
    False; at the horizon it truncates. Frames that are not finite are never shown to the judge and truncate at once. When
    a judge raises, the environment is as it was before the step, which can be tried again.

    Frames that nobody looks at are not computed where the world model can do without (``SupportsShownFrames``): with
    ``return_frames`` off, only the last one of every chunk and those that the judge will look at (``SupportsFramesSeen``). In
    episodes that the caller judges (``options={"judge": False}``) all are. :meth:`videos` computes the others when it is asked.

    The world model's state is freed when all episodes are over, and ``offload`` moves its weights to host memory: a policy that
    is updated between rollouts on the same GPU has the memory of both.

    Raises on construction:
        InvalidOptionError: an option is unknown or does not fit the others.
        CheckpointError: world model, judge or start pack is missing or damaged.
    """

    _CHANGES = (*ChunkVectorEnv._CHANGES, "_state", "_current", "_finished")

    def __init__(
        self,
        num_envs: int = 1,
        *,
        world_model: Any = "embedded",
        judge: Any = "embedded",
        held_out_judge: Any = None,
        starts: Any = "pack",
        robot: str = "",
        task: TaskLike = None,
        layout: str = "narrow",
        max_episode_steps: int = 8,
        autoreset_mode: str | AutoresetMode = "NextStep",
        judge_every: str = "auto",
        device: str = "cpu",
        dtype: str | None = None,
        output: str = "numpy",
        render_mode: str | None = None,
        return_frames: bool = False,
        num_inference_steps: int | None = None,
        approximations: Sequence[str] = (),
        micro_batch_size: int = 0,
        end_on_success: bool = True,
        reflector: Mapping[str, Any] | Reflector | None = None,
        micro_batch: int | None = None,
    ) -> None:
        """Load the parts and set up the spaces.

        Args:
            num_envs: number of rows.
            world_model: "embedded", "null" (random frames, for tests), a folder, or a ``WorldModel``.
            judge: "embedded", "scripted" (hash of the frames, for tests), "none", a folder, a vision-language model
                ("vlm_server:http://host:8000/v1" or its options, see ``judges.vlm_config``), or a ``Judge``.
            held_out_judge: a second judge, given like ``judge``, that judges the same videos and never rewards
                (``judges.ensemble.HoldOutJudge``); None: no second judge.
            starts: "pack", "sim", "null", a folder of images, a ``.safetensors`` pack, a list of ``Start``, or an
                object with ``sample(key, task)``.
            robot: the robot whose "pack" and "sim" starts are used; empty: that of the world model, else the default.
            task: name, instruction or id of the task; None draws one per episode.
            layout: "narrow" or "wide": how far objects are scattered in "pack" and "sim" starts.
            max_episode_steps: horizon in chunks.
            autoreset_mode: "NextStep", "SameStep" or "Disabled".
            judge_every: "auto", "episode" or "chunk".
            device: device of the world model, the judge and torch observations.
            dtype: precision of the world model's weights, such as "bfloat16"; None: as saved.
            output: "numpy" or "torch" observations.
            render_mode: None, "rgb_array" or "rgb_tiles".
            return_frames: put every chunk's frames into ``infos["frames"]``.
            num_inference_steps: denoising steps; None: the model's own.
            approximations: faster, less accurate variants of the world model: "rolling_cache", "tiny_decoder",
                "fp8".
            micro_batch_size: rows, or frames of a scene model, that the world model computes at once, to bound its memory
                (docs/world_model.md); 0: its own choice.
            end_on_success: False continues episodes to their horizon.
            reflector: options of a ``Reflector`` (rewards at every chunk, predicted ends), or one; None: none.
            micro_batch: deprecated name of ``micro_batch_size``.
        """
        if micro_batch is not None:
            warnings.warn("micro_batch is deprecated; use micro_batch_size.", DeprecationWarning, stacklevel=2)
            micro_batch_size = micro_batch
        self.world_model = load_world_model(
            world_model,
            device=device,
            dtype=dtype,
            num_inference_steps=num_inference_steps,
            approximations=approximations,
            micro_batch_size=micro_batch_size,
        )
        self.judge = _named_judge(judge, device)
        if held_out_judge is not None:
            if self.judge is None:
                raise InvalidOptionError(
                    "held_out_judge needs a judge to compare with, but this environment has none; set judge."
                )
            watching = _named_judge(held_out_judge, device)
            if watching is not None:
                self.judge = HoldOutJudge(self.judge, watching)
        self.judge_every = parse_choice("judge_every", judge_every, ("auto", "episode", "chunk"))
        if self.judge_every == "auto":
            self.judge_every = "chunk" if is_scanning(self.judge) else "episode"
        self.layout = parse_choice("layout", layout, ("narrow", "wide"))
        self.task = task
        shape = self.world_model.frame_shape
        self.robot = robot or getattr(self.world_model, "robot", "") or DEFAULT_ROBOT
        self.starts = load_starts(starts, device=device, frame_shape=shape, layout=layout, robot=self.robot)
        self.tasks = tuple(getattr(self.starts, "tasks", ()))
        if task is not None and self.tasks:
            find_task(task, [name for name, _ in self.tasks], [instruction for _, instruction in self.tasks])
        super().__init__(
            num_envs,
            frame_shape=shape,
            chunk_len=self.world_model.chunk_len,
            fps=self.world_model.fps,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            output=output,
            device=device,
            render_mode=render_mode,
            return_frames=return_frames,
            end_on_success=end_on_success,
            reflector=reflector,
        )
        if isinstance(self.world_model, SupportsPrepare):
            self.world_model.prepare(self.num_envs)
        self._every = np.ones(self.chunk_len, np.bool_)
        self._state: Any = None
        self._current: list[Episode | None] = [None] * self.num_envs
        self._finished: list[Episode | None] = [None] * self.num_envs
        self._offloaded = False

    @contextmanager
    def offload(self) -> Iterator[None]:
        """Within the context the world model's weights are in host memory, and the environment cannot be used. Results do not
        change. The state of episodes that are not over stays on the device.

        Raises ``OffloadedError`` when the environment is used nevertheless.
        """
        with on_host(self.world_model):
            self._offloaded = True
            try:
                yield
            finally:
                self._offloaded = False

    def _require_open(self, what: str) -> None:
        super()._require_open(what)
        if self._offloaded:
            raise OffloadedError(f"{what}() was called within offload(), without the world model; leave it first.")

    # ---- recorded episodes -------------------------------------------------------------------------------------

    def trajectories(self, rows: Sequence[int] | None = None, *, which: str = "finished") -> list[Trajectory | None]:
        """Recorded episodes of ``rows`` (None: all), one per row.

        Args:
            rows: row indices.
            which: "finished": the row's last episode that is over; "current": the running one (or the one just over,
                until the row is reset), with the actions so far.

        Returns:
            ``Trajectory`` per row, None where there is none yet. ``extra["verdict"]`` is the last ``Verdict`` or None,
            ``extra["valid"]`` False for an invalid episode.
        """
        shape = (self.chunk_len, self.single_action_space.shape[1])  # type: ignore[index]
        return [None if e is None else e.trajectory(shape) for e in self._episodes_of(rows, which)]

    def videos(self, rows: Sequence[int] | None = None, *, which: str = "finished") -> list[Video | None]:
        """The videos of ``rows``, as in :meth:`trajectories`. Frames that were not computed (the class docstring) are
        computed now, by imagining the recorded episodes once more, with the world model as it is now. To see every frame as it
        comes, ``return_frames=True`` costs less.

        Raises ``OffloadedError``, ``ClosedEnvironmentError`` or ``RawDreamError`` where that is needed and cannot be done.
        """
        episodes = self._episodes_of(rows, which)
        missing = [episode for episode in episodes if episode is not None and not episode.complete]
        if missing:
            self._require_open("videos")
            self._complete(missing)
        return [None if episode is None else episode.video(self.fps) for episode in episodes]

    def _complete(self, episodes: Sequence[Episode]) -> None:
        """Compute the frames that recorded episodes lack; those that they have stay as they are."""
        shape = (self.chunk_len, self.single_action_space.shape[1])  # type: ignore[index]
        for none in {episode.start.proprio is None for episode in episodes}:  # a batch has poses or it has none
            group = [episode for episode in episodes if (episode.start.proprio is None) == none]
            recorded = [replace(e, start=replace(e.start, frame=e.frames[0][0])).trajectory(shape) for e in group]
            again = self._imagine_again(recorded, None)
            for episode, whole in zip(group, again, strict=True):
                if len(whole.frames) != len(episode.frames):
                    raise RawDreamError(
                        f"{type(self.world_model).__name__} gave frames that are not finite when a recorded episode was "
                        "imagined again to show all of them; its state must have `finite`, and it must not have changed."
                    )
                for frames, kept, shown in zip(whole.frames, episode.frames, episode.shown, strict=True):
                    frames[shown] = kept
                episode.frames, episode.shown = whole.frames, whole.shown

    def _episodes_of(self, rows: Sequence[int] | None, which: str) -> list[Episode | None]:
        parse_choice("which", which, ("finished", "current"))
        source = self._finished if which == "finished" else self._current
        chosen = range(self.num_envs) if rows is None else rows
        if any(not 0 <= row < self.num_envs for row in chosen):
            raise InvalidOptionError(f"rows={list(chosen)} must lie between 0 and {self.num_envs - 1}.")
        return [source[row] for row in chosen]

    def replay(
        self,
        trajectories: Sequence[Trajectory],
        *,
        draw: int = 1,
        return_frames: bool = False,
        judge: bool | Judge = True,
        batch_size: int | None = None,
    ) -> list[Replay]:
        """Imagine recorded episodes again: same actions, noise of ``draw``. The environment is untouched.

        ``draw=0`` gives back the very frames of the recording, ``draw=1`` is the second draw of dual-noise verification
        (paper section 3.2). Equal draws give bit-identical frames, whatever else is in the batch.

        Args:
            trajectories: any number, of any lengths.
            draw: index of the noise draw.
            return_frames: keep the frames in the result.
            judge: True: ask the environment's judge; False (or where it has none): ``verdict`` is None; or a judge to ask.
            batch_size: maximum number of episodes imagined at once; None: all.

        Raises:
            InvalidActionError: a trajectory's actions do not fit. InvalidOptionError: bad arguments or start frames.
            ClosedEnvironmentError: the environment is closed.
        """
        self._require_open("replay")
        draw = parse_positive_int("draw", draw, minimum=0)
        size = len(trajectories) if batch_size is None else parse_positive_int("batch_size", batch_size)
        for index, trajectory in enumerate(trajectories):
            self._check_trajectory(index, trajectory)
        replays: list[Replay] = []
        for first in range(0, len(trajectories), max(size, 1)):
            asked = self.judge if judge is True else (judge or None)
            some = [replace(t, noise_key=t.noise_key.at(draw=draw)) for t in trajectories[first : first + size]]
            sparing = isinstance(self.world_model, SupportsShownFrames) and not return_frames
            seen = [self._seen(asked, [len(t.actions)]) for t in some] if sparing else None
            episodes = self._imagine_again(some, seen)
            verdicts = self._judge(asked, episodes, [e.valid for e in episodes])
            for episode, verdict in zip(episodes, verdicts, strict=True):
                frames = np.concatenate(episode.frames) if return_frames else None
                verdict = verdict if episode.valid else _BROKEN
                replays.append(Replay(frames, verdict, tuple(episode.states), episode.lifted))
        return replays

    def _check_trajectory(self, index: int, trajectory: Trajectory) -> None:
        if not isinstance(trajectory, Trajectory):
            raise InvalidOptionError(
                f"trajectories[{index}] has type {type(trajectory).__name__}, expected a Trajectory."
            )
        shape, actions = self.single_action_space.shape, np.asarray(trajectory.actions)
        fits = actions.ndim == 3 and actions.shape[1:] == shape and actions.dtype.kind == "f"
        if not fits or not np.isfinite(actions).all():
            raise InvalidActionError(
                f"trajectories[{index}].actions has shape {actions.shape} and dtype {actions.dtype}; "
                f"expected finite float32 (T, {', '.join(map(str, shape or ()))})."
            )

    def _imagine_again(
        self, trajectories: Sequence[Trajectory], seen: Sequence[NDArray[np.bool_]] | None
    ) -> list[Episode]:
        """Recorded episodes under their noise; ``seen`` as of ``_seen``, per trajectory, None: all frames."""
        episodes = [Episode.begin(t.start, t.noise_key) for t in trajectories]
        state = begin_states(self.world_model, [t.start for t in trajectories], [t.noise_key for t in trajectories])
        rows = list(range(len(trajectories)))
        for chunk in range(max(len(t.actions) for t in trajectories)):
            keep = [i for i, row in enumerate(rows) if chunk < len(trajectories[row].actions) and episodes[row].valid]
            if not keep:
                break
            if len(keep) < len(rows):
                state, rows = select(state, keep), [rows[i] for i in keep]
            actions = np.stack([trajectories[row].actions[chunk] for row in rows]).astype(np.float32)
            shown = None if seen is None else np.stack([seen[row][chunk] for row in rows])
            state, frames, finite = imagine(self.world_model, state, actions, shown)
            starts = [episodes[row].start for row in rows]
            done, lifted = state_success(self.world_model, state, starts), state_lifted(self.world_model, state, starts)
            for i, row in enumerate(rows):
                episodes[row].actions.append(actions[i])
                episodes[row].states.append(int(done[i]))
                episodes[row].lifted = int(lifted[i])
                episodes[row].valid = bool(finite[i])
                if finite[i]:
                    episodes[row].frames.append(frames[i])
                    episodes[row].shown.append(self._every if shown is None else shown[i])
        return episodes

    def _seen(self, judge: Judge | None, lengths: Sequence[int]) -> NDArray[np.bool_]:
        """The frames that ``judge`` looks at in episodes of ``lengths`` chunks: bool (longest, K), without the start."""
        k, longest = self.chunk_len, max(lengths)
        seen = np.zeros(1 + longest * k, np.bool_)
        for length in lengths if judge is not None else ():
            seen[list(frames_seen(judge, 1 + length * k, self.fps))] = True
        return seen[1:].reshape(longest, k)

    def _enough(self, episode: Episode, judge: Judge) -> bool:
        """Whether the episode has the frames that ``judge`` looks at."""
        if episode.complete:
            return True
        seen = self._seen(judge, [len(episode.actions)])
        return not (seen & ~np.stack(episode.shown[1:])).any()

    # ---- hooks of the base class -------------------------------------------------------------------------------

    def _begin(self, rows: Rows, keys: Sequence[NoiseKey], given: Sequence[Start | None]) -> list[Start]:
        starts = [
            self.starts.sample(key, self.task) if start is None else start
            for key, start in zip(keys, given, strict=True)
        ]
        state = begin_states(self.world_model, starts, keys)
        whole = len(rows) == self.num_envs
        self._state = state if whole else scatter(self._state, self.num_envs, rows, state)
        for row, start, key in zip(rows.tolist(), starts, keys, strict=True):
            self._current[row] = Episode.begin(start, key)
        return starts

    def _advance(self, rows: Rows, actions: Float32Array, last: NDArray[np.bool_]) -> ChunkResult:
        whole = len(rows) == self.num_envs
        state = self._state if whole else select(self._state, rows)
        sparing = isinstance(self.world_model, SupportsShownFrames) and not self.return_frames
        shown = self._looked_at(rows) if sparing else None
        state, frames, finite = imagine(self.world_model, state, actions, shown)
        episodes = [
            self._extended(row, actions[i], frames[i], self._every if shown is None else shown[i], bool(finite[i]))
            for i, row in enumerate(rows.tolist())
        ]
        starts = [episode.start for episode in episodes]
        done, lifted = state_success(self.world_model, state, starts), state_lifted(self.world_model, state, starts)
        for episode, success, up in zip(episodes, done.tolist(), lifted.tolist(), strict=True):
            episode.states, episode.lifted = [*episode.states, success], up
        wanted = finite & (last | (self.judge_every == "chunk")) & self._judged[rows]
        verdicts = self._judge(self.judge, episodes, wanted.tolist())
        self._state = state if whole else scatter(self._state, self.num_envs, rows, state)
        for i, row in enumerate(rows.tolist()):
            verdict = verdicts[i] if finite[i] else _BROKEN
            if not finite[i]:
                frames[i][:] = episodes[i].frames[-1][-1]
            if verdict is not None:
                episodes[i].verdict = verdict
            episodes[i].valid = verdict is None or verdict.outcome != Outcome.INVALID
            self._current[row] = episodes[i]
        returned = np.stack(frames if self.return_frames else [piece[-1:] for piece in frames])
        return self._result(returned, episodes, verdicts, ~finite)

    def _looked_at(self, rows: Rows) -> NDArray[np.bool_]:
        """The frames that somebody looks at in the rows' next chunk, bool (n, K): the last one, which is observed, and the
        judge's; all in episodes that the caller judges.
        """
        shown = np.ones((len(rows), self.chunk_len), np.bool_)
        if self.judge is not None and not says_what_it_sees(self.judge):
            return shown
        known: dict[int, NDArray[np.bool_]] = {}
        for i, row in enumerate(rows.tolist()):
            episode = self._current[row]
            assert episode is not None
            done = len(episode.actions)
            if self._judged[row] and done not in known:
                horizon = max(self.max_episode_steps, done + 1)
                asked = range(done + 1, horizon + 1) if self.judge_every == "chunk" else [horizon]
                known[done] = self._seen(self.judge, asked)[done]
                known[done][-1] = True
            if self._judged[row]:
                shown[i] = known[done]
        return shown

    def _finish(self, rows: Rows) -> None:
        for row in rows.tolist():
            self._finished[row] = self._current[row]
        if (self._terminated | self._truncated).all():
            self._state = None  # the next episodes begin with their own

    def _record_verdicts(self, rows: Rows, verdicts: Sequence[Verdict]) -> None:
        for row, verdict in zip(rows.tolist(), verdicts, strict=True):
            episode = self._current[row]
            assert episode is not None
            episode.verdict, episode.valid = verdict, verdict.outcome != Outcome.INVALID

    def _extended(
        self, row: int, actions: Float32Array, frames: UInt8Array, shown: NDArray[np.bool_], finite: bool
    ) -> Episode:
        """A copy of the row's episode with one more chunk; the recorded episode does not change."""
        old = self._current[row]
        assert old is not None
        more = ([frames], [shown]) if finite else ([], [])
        return replace(
            old, frames=old.frames + more[0], shown=old.shown + more[1], actions=[*old.actions, actions.copy()]
        )

    def _judge(self, judge: Judge | None, episodes: Sequence[Episode], wanted: Sequence[bool]) -> list[Verdict | None]:
        """Verdicts of the episodes that are ``wanted``, None for the others."""
        verdicts: list[Verdict | None] = [None] * len(episodes)
        chosen = [i for i, asked in enumerate(wanted) if asked]
        if judge is None or not chosen:
            return verdicts
        lacking = [episodes[i] for i in chosen if not self._enough(episodes[i], judge)]
        if lacking:  # the judge or the horizon was changed during the episode
            self._complete(lacking)
        videos, texts = [episodes[i].video(self.fps) for i in chosen], [episodes[i].start.instruction for i in chosen]
        for i, answer in zip(chosen, ask(judge, videos, texts), strict=True):
            verdicts[i] = answer
        return verdicts

    def _result(
        self,
        frames: UInt8Array,
        episodes: Sequence[Episode],
        verdicts: Sequence[Verdict | None],
        broken: NDArray[np.bool_],
    ) -> ChunkResult:
        outcome = np.array([-1 if v is None else int(v.outcome) for v in verdicts], dtype=np.int8)
        valid = np.array([episode.valid for episode in episodes], dtype=np.bool_)
        probability = None
        if any(v is not None and v.probability is not None for v in verdicts):
            values = [np.nan if v is None or v.probability is None else v.probability for v in verdicts]
            probability = np.array(values, dtype=np.float64)
        states = np.array([episode.states[-1] for episode in episodes], dtype=np.int8)
        lifted = np.array([episode.lifted for episode in episodes], dtype=np.int8)
        return ChunkResult(frames, outcome, valid, broken, probability, states, lifted)

    def close_extras(self, **kwargs: Any) -> None:
        """Free the state and the recordings; close the starts and the judge."""
        self._state = None
        self._current = [None] * self.num_envs
        for part in (self.starts, self.judge, self.reflector):
            if isinstance(part, SupportsClose):
                part.close()


def _named_judge(judge: Any, device: str) -> Judge | None:
    """The judge that an option names; None for None and "none"."""
    none = judge is None or (isinstance(judge, str) and judge == "none")
    return None if none else load_judge(judge, device=device)
