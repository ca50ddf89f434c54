"""Episodes of a policy, in the dream and in the simulator, from the same starts and with the same sampling noise.

The policy's key at chunk c is ``NoiseKey(start.seed, chunk=c)`` in both worlds: while both show the same picture, the
policy does the same thing, so what differs is the world.

Shape letters: n rows, T chunks, K actions in a chunk, A action dimensions, F = T * K + 1 frames, H W picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper.relations import TASKS
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.types import Float32Array, Outcome, Policy, Start, Trajectory, UInt8Array, Verdict

TASK_NAMES = tuple(task.name for task in TASKS)


class Simulator(Protocol):
    """Ground truth, many scenes at once; ``rawdream_env.piper.workers.PiperWorkers`` is one."""

    def reset(self, rows: NDArray[np.int64], seeds: Sequence[int], tasks: Sequence[str]) -> UInt8Array:
        """Begin scenes on ``rows``; equal seed and task give the equal scene. Frames (n, H, W, 3)."""
        ...

    def step(self, rows: NDArray[np.int64], actions: Float32Array) -> Any:
        """One chunk: ``actions`` (n, K, A) -> an object with ``frames`` (n, K, H, W, 3) and ``success`` bool (n,)."""
        ...

    def proprio(self, rows: NDArray[np.int64]) -> Float32Array:
        """(n, P)."""
        ...


@dataclass(frozen=True)
class SimEpisode:
    """``frames`` uint8 (F, H, W, 3); ``actions`` (T, K, A); ``success_any``: established after some chunk (what the
    simulator environment rewards); ``success_end``: true when the video ends (what a judge of the video can know).
    """

    frames: UInt8Array
    actions: Float32Array
    success_any: bool
    success_end: bool


@dataclass(frozen=True)
class DreamEpisode:
    """``frames`` uint8 (F, H, W, 3); the ``trajectory`` that replays it; the judge's ``verdict``."""

    frames: UInt8Array
    trajectory: Trajectory
    verdict: Verdict


def make_starts(simulator: Simulator, tasks: Sequence[str], indices: Sequence[int], seed: int) -> list[Start]:
    """One start per (task, index) pair, rendered by the simulator; its seed is ``mix(seed, task id, index)``."""
    unknown = [task for task in tasks if task not in TASK_NAMES]
    if unknown:
        raise InvalidOptionError(f"task {unknown[0]!r} does not exist; choose among {', '.join(TASK_NAMES)}")
    ids = [TASK_NAMES.index(task) for task in tasks]
    seeds = [mix(seed, task_id, index) for task_id, index in zip(ids, indices, strict=True)]
    rows = np.arange(len(tasks))
    frames, proprio = simulator.reset(rows, seeds, list(tasks)), simulator.proprio(rows)
    return [
        Start(frames[i].copy(), TASKS[ids[i]].instruction, ids[i], np.asarray(proprio[i], np.float32).copy(), seeds[i])
        for i in rows
    ]


def _seed(start: Start) -> int:
    if start.seed is None:
        raise InvalidOptionError(
            "this start has no simulator seed: only starts made by the simulator can be compared with it"
        )
    return start.seed


def _act(policy: Policy, images: UInt8Array, starts: Sequence[Start], chunk: int, temperature: float) -> Float32Array:
    keys = [NoiseKey(_seed(start), chunk=chunk) for start in starts]
    instructions = [start.instruction for start in starts]
    output = policy.act(images, instructions, temperature=temperature, keys=keys)
    return np.asarray(output.actions.detach().cpu().numpy(), dtype=np.float32)


def run_in_simulator(
    simulator: Simulator,
    starts: Sequence[Start],
    *,
    policy: Policy | None = None,
    actions: Sequence[Float32Array] | None = None,
    chunks: int = 8,
    temperature: float = 0.0,
) -> list[SimEpisode]:
    """Episodes in the simulator: closed loop with ``policy`` for ``chunks`` chunks, or open loop with given
    ``actions``.

    ``actions``: one (T, K, A) array per start, T may differ. Episodes are not cut at their first success, so that the
    video shows whether it lasts.
    """
    assert (policy is None) != (actions is None), "give a policy or actions"
    n = len(starts)
    tasks = [TASK_NAMES[start.task_id] for start in starts]
    images = simulator.reset(np.arange(n), [_seed(start) for start in starts], tasks)
    lengths = np.full(n, chunks) if actions is None else np.array([len(a) for a in actions])
    frames: list[list[UInt8Array]] = [[image[None].copy()] for image in images]
    done: list[list[Float32Array]] = [[] for _ in starts]
    any_success, end_success = np.zeros(n, bool), np.zeros(n, bool)
    for c in range(int(lengths.max(initial=0))):
        running = np.flatnonzero(lengths > c)
        rows = running.tolist()
        if policy is not None:
            chunk = _act(policy, np.stack([frames[r][-1][-1] for r in rows]), [starts[r] for r in rows], c, temperature)
        else:
            assert actions is not None
            chunk = np.stack([actions[r][c] for r in rows])
        step = simulator.step(running, chunk)
        end_success[running] = step.success
        any_success |= end_success
        for i, r in enumerate(rows):
            frames[r].append(np.asarray(step.frames[i]).copy())
            done[r].append(chunk[i])
    return [
        SimEpisode(np.concatenate(frames[i]), np.stack(done[i]), bool(any_success[i]), bool(end_success[i]))
        for i in range(n)
    ]


def run_in_dream(env: Any, starts: Sequence[Start], policy: Policy, *, temperature: float = 0.0) -> list[DreamEpisode]:
    """Closed-loop episodes in a dream environment (``DreamVectorEnv`` with autoreset disabled) from given starts.

    At most ``env.num_envs`` starts; fewer are filled up by repeating the last one, which changes nothing for the
    others.
    """
    filled = [*starts, *[starts[-1]] * (env.num_envs - len(starts))]
    if len(filled) > env.num_envs:
        raise InvalidOptionError(f"{len(starts)} starts do not fit into {env.num_envs} environments")
    observation, _ = env.reset(options={"starts": filled, "seed": [_seed(start) for start in filled]})
    over = np.zeros(env.num_envs, bool)
    for c in range(env.max_episode_steps):
        chunk = _act(policy, np.asarray(observation["image"]), filled, c, temperature)
        observation, _, terminated, truncated, _ = env.step(chunk)
        over |= np.asarray(terminated) | np.asarray(truncated)
        if over.all():
            break
    rows = list(range(len(starts)))
    recorded = zip(env.videos(rows), env.trajectories(rows), strict=True)
    return [DreamEpisode(video.frames, trajectory, _verdict(trajectory)) for video, trajectory in recorded]


def _verdict(trajectory: Trajectory) -> Verdict:
    verdict: Verdict | None = trajectory.extra.get("verdict")
    if verdict is None:
        return Verdict(Outcome.INVALID, "no verdict was recorded")
    return (
        verdict
        if trajectory.extra.get("valid", True)
        else Verdict(Outcome.INVALID, verdict.reason or "invalid episode")
    )


def replay_in_dream(env: Any, starts: Sequence[Start], actions: Sequence[Float32Array]) -> list[DreamEpisode]:
    """The world model's version of actions (T, K, A) that were executed elsewhere, judged (open loop, draw 0)."""
    trajectories = [
        Trajectory(start, NoiseKey(_seed(start)), np.asarray(a, np.float32))
        for start, a in zip(starts, actions, strict=True)
    ]
    replays = env.replay(trajectories, draw=0, return_frames=True)
    return [
        DreamEpisode(replay.frames, trajectory, replay.verdict or Verdict(Outcome.INVALID, "no judge"))
        for replay, trajectory in zip(replays, trajectories, strict=True)
    ]


def verify(env: Any, episodes: Sequence[DreamEpisode], draw: int = 1) -> list[Verdict | None]:
    """Dual-noise verification (paper section 3.3): the second verdict of each success, None for the others."""
    chosen = [i for i, episode in enumerate(episodes) if episode.verdict.outcome is Outcome.SUCCESS]
    second: list[Verdict | None] = [None] * len(episodes)
    for i, replay in zip(chosen, env.replay([episodes[i].trajectory for i in chosen], draw=draw), strict=True):
        second[i] = replay.verdict
    return second
