"""Rollouts of a policy in a dream, a simulator or on an arm, in closed loop or with given actions.

:func:`run_episodes` is the interface for most callers::

    for rollout in run_episodes(env, starts, policy, temperature=0.0):
        print(rollout.start.instruction, rollout.reward)

Rows are refilled as soon as their episode is over (continuous batching), and finished episodes are yielded at once,
so that memory does not grow with their number. The environment runs in DISABLED autoreset mode, so that no chunk is spent
on an action that is ignored. It may be any Gymnasium vector environment that begins episodes from
``options={"reset_mask": ..., "starts": ...}`` with one seed per row and reports ``instruction``, ``verdict`` and ``valid``
in its infos, as those of this package do.

Shape letters: B envs, T chunks in an episode, K actions in a chunk, A action dimensions, L tokens of a chunk, F = 1 + T*K
frames, H W image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from rawdream_env.envs.verification import EpisodeResult
from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import Float32Array, Outcome, Policy, Start, SupportsLook, Trajectory, UInt8Array, Verdict

_FLAGS = ("verified", "flagged")


@dataclass(frozen=True)
class EpisodeRequest:
    """An episode to run.

    ``start``: where it begins; None lets the environment draw one from ``seed``, the row's seed. ``key`` names the
    policy's sampling at chunk 0. ``actions`` (T, K, A) are carried out instead of asking the policy; T may be less than
    the horizon. ``tag`` is returned with the episode.
    """

    start: Start | None
    seed: int
    key: NoiseKey
    actions: Float32Array | None = None
    tag: Any = None


@dataclass(frozen=True)
class Rollout:
    """A finished episode; ``number`` counts the episodes of its runner in the order in which they began.

    ``images`` uint8 (T, H, W, 3), the policy's observation before each chunk; ``actions`` float32 (T, K, A); ``tokens`` int64
    and ``logprobs`` fp32 torch tensors (T, L) of the policy, None with given actions; ``frames`` uint8 (F, H, W, 3), the
    start first, None where the environment does not return them; ``verdicts`` int8 (T,), the environment's after each
    chunk. ``reward`` is summed over the episode; ``verdict``, ``valid``, ``verified`` and ``flagged`` are those of
    :mod:`rawdream_env.envs.verification`. ``trajectory`` replays the episode where the environment records it.
    ``other_verdicts``: whether the episode is a success by those that are never rewarded, where known: "held_out", the
    hold-out judge, and "state", the environment's ``info["state_success"]`` at the end. ``states`` int8 (T,): that info after
    each chunk, -1 where it is not known; ``lifted``: ``info["lifted"]`` at the end, 1, 0 or -1. ``proprio`` float32 (F, P):
    the start's and ``info["proprio"]`` of every step, None where the environment does not give them.
    """

    request: EpisodeRequest
    number: int
    start: Start
    images: UInt8Array
    actions: Float32Array
    tokens: Any
    logprobs: Any
    verdicts: NDArray[np.int8]
    reward: float
    verdict: Outcome
    valid: bool
    verified: bool = False
    flagged: bool = False
    reason: str = ""
    frames: UInt8Array | None = None
    trajectory: Trajectory | None = None
    other_verdicts: dict[str, bool] = field(default_factory=dict)
    states: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    lifted: int = -1
    proprio: Float32Array | None = None

    def __len__(self) -> int:
        """Number of chunks T."""
        return len(self.images)

    @property
    def success_any(self) -> bool:
        """Whether the environment's verdict was a success after some chunk."""
        return bool((self.verdicts == Outcome.SUCCESS).any())

    @property
    def success_end(self) -> bool:
        """Whether it was one after the last chunk."""
        return bool(self.verdicts[-1] == Outcome.SUCCESS)


@dataclass
class _Running:
    """A running episode of a row."""

    request: EpisodeRequest
    number: int
    start: Start
    images: list[UInt8Array] = field(default_factory=list)
    actions: list[Float32Array] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    frames: list[UInt8Array] = field(default_factory=list)
    proprio: list[Float32Array] = field(default_factory=list)
    verdicts: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    reward: float = 0.0


class EpisodeRunner:
    """Drives the rows of ``env``; for callers that choose the next episode while others run.

    Args:
        env: a vector environment in DISABLED autoreset mode, or wrappers around one.
        policy: chooses the actions of episodes without given actions; its parameters may change between steps.
        temperature: of the policy's sampling; 0 is greedy.
        judged: False leaves episodes unjudged (``verdict`` INVALID, ``valid`` where the environment reports valid
            frames) and keeps their frames, for callers that judge them later (``judging.AsyncJudging``).
        keep_frames: keep the frames that the environment returns.

    Raises:
        InvalidOptionError: another autoreset mode.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        policy: Policy | None = None,
        *,
        temperature: float = 0.0,
        judged: bool = True,
        keep_frames: bool = True,
    ) -> None:
        mode = getattr(env, "autoreset_mode", None) or env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise InvalidOptionError(f"episodes run with autoreset_mode='Disabled', but the environment has {mode}.")
        self.env, self.policy, self.temperature = env, policy, temperature
        self.judged, self.keep_frames = judged, keep_frames
        self._rows: list[_Running | None] = [None] * env.num_envs
        self._images: UInt8Array | None = None
        self._begun = 0

    def __len__(self) -> int:
        """Number of running episodes."""
        return sum(episode is not None for episode in self._rows)

    @property
    def free(self) -> int:
        """Number of rows without an episode."""
        return len(self._rows) - len(self)

    def clear(self) -> None:
        """Drop the running episodes."""
        self._rows = [None] * len(self._rows)

    def begin(self, requests: Sequence[EpisodeRequest]) -> list[Start]:
        """Begin episodes on free rows, at most ``free`` of them; returns where each begins."""
        if not requests:
            return []
        rows = [row for row, episode in enumerate(self._rows) if episode is None][: len(requests)]
        if len(rows) < len(requests):
            raise InvalidOptionError(f"{len(requests)} episodes do not fit on {len(rows)} free rows.")
        for request in requests:
            self._check(request)
        size = len(self._rows)
        placed: list[EpisodeRequest | None] = [None] * size
        for row, request in zip(rows, requests, strict=True):
            placed[row] = request
        if self._images is None:  # an environment's first reset is of all its rows: the others repeat a start
            placed = [request or requests[0] for request in placed]
        options: dict[str, Any] = {
            "reset_mask": np.array([request is not None for request in placed]),
            "starts": [None if request is None else request.start for request in placed],
        }
        if not self.judged:
            options["judge"] = False
        env: Any = self.env  # Gymnasium's signature has one seed for all rows
        seeds = [None if request is None else request.seed for request in placed]
        observation, infos = env.reset(seed=seeds, options=options)
        self._images = as_uint8(observation["image"])
        starts = [self._start_of(row, request, infos) for row, request in zip(rows, requests, strict=True)]
        for row, request, start in zip(rows, requests, starts, strict=True):
            self._rows[row] = _Running(request, self._begun, start, frames=[start.frame[None]])
            self._begun += 1
        return starts

    def step(self) -> list[Rollout]:
        """One chunk on every row that has an episode; the episodes that are over by it."""
        running = {row: episode for row, episode in enumerate(self._rows) if episode is not None}
        if not running:
            return []
        assert self._images is not None
        before = self._images
        actions = self._choose(running, before)
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        self._images = as_uint8(observation["image"])
        finished = []
        for row, episode in running.items():
            episode.images.append(before[row].copy())
            episode.actions.append(actions[row])
            episode.reward += float(rewards[row])
            episode.verdicts.append(int(infos["verdict"][row]))
            episode.states.append(_known(infos, "state_success", row))
            if self.keep_frames and "frames" in infos:
                episode.frames.append(np.asarray(infos["frames"][row]).copy())
                if "proprio" in infos:
                    episode.proprio.append(infos["proprio"][row].copy())
            given = episode.request.actions
            used_up = given is not None and len(episode.actions) == len(given)
            if terminations[row] or truncations[row] or used_up:
                self._rows[row] = None
                finished.append(self._rollout(row, episode, infos))
        return finished

    def _check(self, request: EpisodeRequest) -> None:
        wanted = self.env.single_action_space.shape
        if request.actions is None:
            if self.policy is None:
                raise InvalidOptionError("an episode has no actions and the runner has no policy; give one of them.")
        elif not len(request.actions) or request.actions.shape[1:] != wanted:
            raise InvalidActionError(
                f"an episode's actions have shape {request.actions.shape}, expected (T >= 1, chunk_len, action_dim) = (T, "
                f"{', '.join(map(str, wanted or ()))})."
            )

    def _start_of(self, row: int, request: EpisodeRequest, infos: dict[str, Any]) -> Start:
        start_of = getattr(self.env.unwrapped, "start_of", None)
        if callable(start_of):
            start: Start = start_of(row)
            return start
        assert self._images is not None
        task_id = int(infos["task_id"][row]) if "task_id" in infos else -1
        proprio = None if request.start is None else request.start.proprio
        return Start(self._images[row].copy(), str(infos["instruction"][row]), task_id, proprio, request.seed)

    def _choose(self, running: dict[int, _Running], images: UInt8Array) -> Float32Array:
        """The next chunk of every row, (B, K, A); rows without an episode get zeros."""
        shape = self.env.single_action_space.shape
        assert shape is not None
        actions = np.zeros((len(self._rows), *shape), dtype=np.float32)
        asked = []
        for row, episode in running.items():
            if episode.request.actions is None:
                asked.append(row)
            else:
                actions[row] = episode.request.actions[len(episode.actions)]
        if not asked:
            return actions
        assert self.policy is not None
        import torch

        keys = [running[row].request.key.at(chunk=len(running[row].actions)) for row in asked]
        texts = [running[row].start.instruction for row in asked]
        if isinstance(self.policy, SupportsLook):
            self.policy.look(self.env, asked)
        with torch.no_grad():
            output = self.policy.act(images[asked], texts, temperature=self.temperature, keys=keys)
        if tuple(output.actions.shape[1:]) != shape:
            raise InvalidActionError(
                f"{type(self.policy).__name__} chose actions of shape {tuple(output.actions.shape[1:])}, but the environment "
                f"takes (chunk_len, action_dim) = {shape}."
            )
        actions[asked] = output.actions.detach().float().cpu().numpy()
        tokens, logprobs = output.tokens.cpu(), output.logprobs.detach().float().cpu()
        for i, row in enumerate(asked):
            running[row].tokens.append(tokens[i])
            running[row].logprobs.append(logprobs[i])
        return actions

    def _rollout(self, row: int, episode: _Running, infos: dict[str, Any]) -> Rollout:
        base: Any = self.env.unwrapped
        trajectory: Trajectory | None = None
        if callable(getattr(base, "trajectories", None)) and episode.request.actions is None:
            (trajectory,) = base.trajectories([row])
        frames = np.concatenate(episode.frames) if len(episode.frames) > 1 else None
        if frames is None and not self.judged:
            frames = base.videos([row])[0].frames
        return Rollout(
            request=episode.request,
            number=episode.number,
            start=episode.start,
            images=np.stack(episode.images),
            actions=np.stack(episode.actions),
            tokens=_stack(episode.tokens),
            logprobs=_stack(episode.logprobs),
            verdicts=np.array(episode.verdicts, np.int8),
            frames=frames,
            trajectory=trajectory,
            other_verdicts=_other_verdicts(episode.states[-1], trajectory),
            states=np.array(episode.states, np.int8),
            lifted=_known(infos, "lifted", row),
            proprio=_joined(episode.start.proprio, episode.proprio),
            **self._result(row, episode, infos, trajectory)._asdict(),
        )

    def _result(
        self, row: int, episode: _Running, infos: dict[str, Any], trajectory: Trajectory | None
    ) -> EpisodeResult:
        """What the environment's last infos say about an episode."""
        verdict = Outcome(int(infos["verdict"][row]))
        # Without a verdict a reward of 0 means "not known", which must not become a failure.
        valid = bool(infos["valid"][row]) and (verdict != Outcome.INVALID or not self.judged)
        verified, flagged = (name in infos and bool(infos[name][row] & infos[f"_{name}"][row]) for name in _FLAGS)
        judged = trajectory.extra.get("verdict") if trajectory is not None and verdict == Outcome.INVALID else None
        reason = judged.reason if judged is not None else ""
        return EpisodeResult(episode.reward, verdict, valid, verified, flagged, reason)


def run_episodes(
    env: VectorEnv[Any, Any, Any],
    episodes: Iterable[Start | EpisodeRequest],
    policy: Policy | None = None,
    *,
    actions: Iterable[Float32Array] | None = None,
    temperature: float = 0.0,
    ordered: bool = True,
) -> Iterator[Rollout]:
    """Run episodes in ``env`` and hand each out as soon as it is over.

    Args:
        env: a vector environment in DISABLED autoreset mode.
        episodes: where each begins, consumed as rows become free. A bare ``Start`` needs its ``seed``: the row's seed is
            the start's, and so is the policy's noise, ``NoiseKey(start.seed)``; so the policy does the same in two worlds as
            long as both show the same picture.
        policy: closed loop; or
        actions: one (T, K, A) array per episode, open loop.
        temperature: of the policy's sampling; 0 is greedy.
        ordered: hand episodes out in the order in which they were given; False: in the order in which they end.

    Yields:
        A :class:`Rollout` per episode. What is in it does not depend on ``num_envs`` or on the other episodes.
    """
    if policy is not None and actions is not None:
        raise InvalidOptionError("give a policy or actions, not both.")
    requests = _requests(episodes, actions)
    runner = EpisodeRunner(env, policy, temperature=temperature)
    waiting: dict[int, Rollout] = {}
    following = 0
    while True:
        runner.begin(list(islice(requests, runner.free)))
        if not len(runner):
            return
        for rollout in runner.step():
            if not ordered:
                yield rollout
                continue
            waiting[rollout.number] = rollout
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def _requests(
    episodes: Iterable[Start | EpisodeRequest], actions: Iterable[Float32Array] | None
) -> Iterator[EpisodeRequest]:
    given = None if actions is None else iter(actions)
    for episode in episodes:
        if isinstance(episode, Start):
            if episode.seed is None:
                raise InvalidOptionError(
                    "a start without a seed cannot be set up again; make starts with the simulator, or give EpisodeRequests."
                )
            episode = EpisodeRequest(episode, episode.seed, NoiseKey(episode.seed))
        if given is not None:
            chunks = next(given, None)
            if chunks is None:
                raise InvalidOptionError("there are fewer actions than episodes; give one (T, K, A) array per episode.")
            episode = replace(episode, actions=np.asarray(chunks, np.float32))
        yield episode


def make_env(env_id: str, num_envs: int, **kwargs: Any) -> VectorEnv[Any, Any, Any]:
    """The vector environment of an id, in DISABLED autoreset mode.

    Raises:
        InvalidOptionError: the environment does not take one of ``kwargs``.
    """
    try:
        return gym.make_vec(env_id, num_envs=num_envs, autoreset_mode="Disabled", **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise InvalidOptionError(f"the options do not fit {env_id}: {error}.") from error


def held_out_verdict(verdict: Verdict | None) -> dict[str, bool]:
    """What the hold-out judge said, for ``Rollout.other_verdicts``; empty if it said nothing."""
    known = verdict is not None and verdict.held_out in (Outcome.SUCCESS, Outcome.FAILURE)
    return {"held_out": verdict.held_out == Outcome.SUCCESS} if verdict is not None and known else {}


def _other_verdicts(state: int, trajectory: Trajectory | None) -> dict[str, bool]:
    others = held_out_verdict(None if trajectory is None else trajectory.extra.get("verdict"))
    return others if state < 0 else others | {"state": state == 1}


def _known(infos: dict[str, Any], name: str, row: int) -> int:
    """A row's boolean info as 1 or 0; -1 where it has none."""
    return int(infos[name][row]) if name in infos and infos[f"_{name}"][row] else -1


def _joined(first: Float32Array | None, parts: list[Float32Array]) -> Float32Array | None:
    return None if first is None or not parts else np.concatenate([first[None], *parts])


def _stack(parts: list[Any]) -> Any:
    if not parts:
        return None
    import torch

    return torch.stack(parts)


def as_uint8(images: Any) -> UInt8Array:
    """Images from numpy or a torch tensor on any device."""
    return images.cpu().numpy() if hasattr(images, "cpu") else np.asarray(images)
