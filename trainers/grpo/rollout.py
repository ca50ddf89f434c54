"""Groups of rollouts from a vector environment, with finished rows refilled at once.

All members of a group begin from one start and differ in their sampling and in the environment's noise. Rows of the
environment carry members, not groups: a row whose episode is over takes the next member waiting, whichever group that
belongs to (continuous batching), and rows that are over cost nothing. The environment runs in DISABLED autoreset mode,
so no chunk is spent on a dead action. Dream, simulator and null environments are all driven by this one loop.

Which groups are trained on never depends on ``num_envs`` or on which finish first: groups are numbered, a new one is
opened only to replace one that was dropped, and so those kept are the first that are any good. Taking the first to
*finish* would favour quick successes.

A judge that answers nothing for a while stops the collection (``JudgeUnavailableError``): its step is not counted, and
is collected again when the run is taken up.

With a judge that is waited for (a server), episodes that ended wait for their verdicts while their rows go on with the
next members (``overlap.py``); the groups kept, and their contents, are the same.

Shape letters: T chunks in an episode, K actions in a chunk, A action dimensions, L = K*A tokens, H W image.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError, RawDreamError
from rawdream_env.judges.overlap import is_remote
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.trainers.grpo.groups import Group, Rollout, RolloutCounts, Rollouts, why_none
from rawdream_env.trainers.grpo.losses import DropReason, group_advantages
from rawdream_env.trainers.grpo.overlap import AsyncJudging, EpisodeResult, can_overlap
from rawdream_env.types import Outcome, Policy, Start, UInt8Array

_STREAM_MEMBER, _STREAM_SAMPLING = 11, 12
_LOOK_UP_S = 0.5
"""While nothing is left to do but to wait for verdicts: how often to ask whether to stop."""
_OUTAGE = 16
"""So many episodes in a row that could not be judged (or two groups, if that is more) are an outage. Of a judge that
fails to answer one time in four, one run in 4 billion episodes is as long.
"""


class NoUsableGroupError(RawDreamError, RuntimeError):
    """Every group of a step was dropped; ``dropped`` counts them by reason."""

    def __init__(self, message: str, dropped: Counter[DropReason]) -> None:
        super().__init__(message)
        self.dropped = dropped


class RolloutInterrupted(RawDreamError, RuntimeError):
    """Collection was stopped from outside, between two steps of the environment."""


@dataclass
class _Member:
    """A rollout waiting or running."""

    group: _OpenGroup
    index: int
    seed: int
    images: list[UInt8Array] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    reward: float = 0.0

    def key(self) -> NoiseKey:
        """Names the sampling of the next chunk; apart from the environment's own noise."""
        return NoiseKey(mix(self.seed, _STREAM_SAMPLING), chunk=len(self.tokens))


@dataclass
class _OpenGroup:
    index: int
    start: Start | None = None
    finished: dict[int, Rollout] = field(default_factory=dict)


class GroupCollector:
    """Collects groups for one policy update after another.

    Args:
        env: a vector environment of this package in DISABLED autoreset mode, or wrappers around one.
        policy: samples the actions; its parameters may change between calls of ``collect``.
        group_size: members of a group (TRL: ``num_generations``), at least 2.
        num_groups: groups wanted per step.
        max_groups: most groups to open for a step; the rest is made up of replacements for dropped ones.
        temperature: of sampling. max_flagged, scale_rewards: see ``losses.group_advantages``.
        seed: with the step, group and member it names every start and every draw: nothing else is random.
        should_stop: asked before every environment step; True raises ``RolloutInterrupted``.
        on_group: called with the counts so far after each finished group.
        overlap: judge ended episodes while the next are imagined; None: where the judge is ``remote`` and it can be done.

    Raises:
        InvalidOptionError: sizes that do not fit, another autoreset mode, or ``overlap`` where it cannot be done.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        policy: Policy,
        *,
        group_size: int = 8,
        num_groups: int = 8,
        max_groups: int = 64,
        temperature: float = 1.6,
        max_flagged: int = 2,
        scale_rewards: Any = "group",
        seed: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        on_group: Callable[[RolloutCounts], None] = lambda counts: None,
        overlap: bool | None = None,
    ) -> None:
        mode = getattr(env, "autoreset_mode", None) or env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise InvalidOptionError(f"groups need autoreset_mode='Disabled', but the environment has {mode}.")
        if group_size < 2 or num_groups < 1 or max_groups < num_groups:
            raise InvalidOptionError(
                f"group_size={group_size} must be at least 2, num_groups={num_groups} at least 1 and "
                f"max_groups={max_groups} at least num_groups."
            )
        self.env, self.policy = env, policy
        self.group_size, self.num_groups, self.max_groups = (group_size, num_groups, max_groups)
        self.temperature, self.max_flagged, self.scale_rewards = (temperature, max_flagged, scale_rewards)
        self.seed = seed
        self._should_stop, self._on_group = should_stop, on_group
        self._rows: list[_Member | None] = [None] * env.num_envs
        self._images: UInt8Array | None = None
        self._started = False
        self._unreadable = 0
        possible = can_overlap(env)
        if overlap and not possible:
            raise InvalidOptionError(
                "overlap=True needs a dream with a judge that is asked at the end of an episode (judge_every='episode'), "
                "and around it at most DualNoiseVerification."
            )
        wanted = is_remote(getattr(env.unwrapped, "judge", None)) if overlap is None else overlap
        self._late: AsyncJudging[_Member] | None = AsyncJudging(env) if wanted and possible else None

    def close(self) -> None:
        """End the threads that wait for verdicts; the environment judges for itself again."""
        if self._late is not None:
            self._late.close()
            self._late = None

    def collect(self, step: int) -> Rollouts:
        """Roll out until ``num_groups`` groups are kept or ``max_groups`` were opened; at least one is returned.

        Raises ``NoUsableGroupError`` when every group was dropped, ``RolloutInterrupted`` when asked to stop,
        ``JudgeUnavailableError`` when many episodes in a row could not be judged.
        """
        self._rows = [None] * self.env.num_envs
        self._unreadable = 0
        if self._late is not None:
            self._late.forget()  # of a step that was interrupted
        waiting: deque[_Member] = deque()
        kept: list[Group] = []
        counts = RolloutCounts()
        opened = running = 0
        while True:
            while len(kept) + running < self.num_groups and opened < self.max_groups:
                waiting.extend(self._open(step, opened))
                opened, running = opened + 1, running + 1
            self._fill(waiting)
            if not any(self._rows) and not self._late:
                break
            if self._should_stop():
                raise RolloutInterrupted(f"stopped while collecting step {step}, with {len(kept)} groups kept.")
            for group in self._completed():
                running -= 1
                counts.add(group)
                if not group.result.dropped:
                    kept.append(group)
                self._on_group(counts)
        if not kept:
            raise NoUsableGroupError(why_none(counts, self.max_flagged), counts.dropped)
        return Rollouts(tuple(sorted(kept, key=lambda group: group.index)), counts)

    def _open(self, step: int, index: int) -> list[_Member]:
        group = _OpenGroup(index)
        return [
            _Member(group, member, mix(self.seed, step, index, member, _STREAM_MEMBER))
            for member in range(self.group_size)
        ]

    def _fill(self, waiting: deque[_Member]) -> None:
        """Give free rows to waiting members. A group's first member draws the start that the others share."""
        free = [row for row, member in enumerate(self._rows) if member is None]
        taken = {row: waiting.popleft() for row in free[: len(waiting)]}
        if not taken:
            return
        if not self._started:  # an environment's first reset must be of all its rows
            self.env.reset(seed=0)
            self._started = True
        self._reset({row: member for row, member in taken.items() if member.group.start is None and member.index == 0})
        self._reset({row: member for row, member in taken.items() if member.index > 0})
        self._rows = [taken.get(row, member) for row, member in enumerate(self._rows)]

    def _reset(self, members: dict[int, _Member]) -> None:
        if not members:
            return
        num_envs = self.env.num_envs
        mask = np.zeros(num_envs, dtype=np.bool_)
        mask[list(members)] = True
        seeds: list[int | None] = [members[row].seed if row in members else None for row in range(num_envs)]
        starts = [members[row].group.start if row in members else None for row in range(num_envs)]
        env: Any = self.env  # Gymnasium's signature knows no seed per row
        observation, _ = env.reset(seed=seeds, options={"reset_mask": mask, "starts": starts})
        self._images = _as_uint8(observation["image"])
        base: Any = self.env.unwrapped
        for row, member in members.items():
            if member.group.start is None:
                member.group.start = base.start_of(row)

    def _completed(self) -> list[Group]:
        """One chunk on every running row, if there is one, and the verdicts that came; the groups this completes."""
        running = any(self._rows)
        endings = self._advance() if running else []
        if self._late is not None:
            endings += self._late.endings(wait_s=0.0 if running else _LOOK_UP_S)
        completed = []
        for member, ending in endings:
            self._look_for_outage(ending)
            member.group.finished[member.index] = _finish(member, ending)
            if len(member.group.finished) == self.group_size:
                completed.append(self._close(member.group))
        return completed

    def _look_for_outage(self, ending: EpisodeResult) -> None:
        """Stop rather than wait for hours, imagine in vain, and drop group after group."""
        self._unreadable = self._unreadable + 1 if ending.unreadable else 0
        if self._unreadable >= max(_OUTAGE, 2 * self.group_size) and getattr(self.env.unwrapped, "judge", None):
            raise JudgeUnavailableError(
                f"None of the last {self._unreadable} episodes could be judged ({ending.reason or 'no reason given'}). "
                "They are not counted; when the judge works again, the same command goes on from the last update."
            )

    @torch.no_grad()
    def _advance(self) -> list[tuple[_Member, EpisodeResult]]:
        """One chunk on every running row; returns the members whose endings are known by this."""
        running = {row: member for row, member in enumerate(self._rows) if member is not None}
        rows = list(running)
        assert self._images is not None
        images = self._images[rows]
        instructions = [_start(member).instruction for member in running.values()]
        keys = [member.key() for member in running.values()]
        output = self.policy.act(images, instructions, temperature=self.temperature, keys=keys)
        actions = np.zeros((self.env.num_envs, *output.actions.shape[1:]), dtype=np.float32)
        actions[rows] = output.actions.detach().float().cpu().numpy()
        tokens, logprobs = output.tokens.cpu(), output.logprobs.detach().float().cpu()
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        self._images = _as_uint8(observation["image"])
        known: list[tuple[_Member, EpisodeResult]] = []
        late: dict[int, _Member] = {}
        for i, (row, member) in enumerate(running.items()):
            member.images.append(images[i])
            member.tokens.append(tokens[i])
            member.logprobs.append(logprobs[i])
            member.reward += float(rewards[row])
            if terminations[row] or truncations[row]:
                self._rows[row] = None
                if self._late is not None and infos["valid"][row]:
                    late[row] = member
                else:
                    known.append((member, self._ending(member, infos, row)))
        if self._late is not None and late:
            self._late.submit(late)
        return known

    def _ending(self, member: _Member, infos: dict[str, Any], row: int) -> EpisodeResult:
        verdict = Outcome(int(infos["verdict"][row]))
        flagged = bool(infos["flagged"][row]) if "flagged" in infos and infos["_flagged"][row] else False
        # Without a verdict at its end an episode's reward of 0 means "not known", which must not become a failure.
        valid = bool(infos["valid"][row]) and verdict != Outcome.INVALID
        recorded = getattr(self.env.unwrapped, "trajectories", None)
        reason = ""
        if verdict == Outcome.INVALID and callable(recorded):
            (trajectory,) = recorded([row])
            told = trajectory.extra.get("verdict") if trajectory else None
            reason = told.reason if told else ""
        return EpisodeResult(member.reward, verdict, valid, flagged, reason)

    def _close(self, group: _OpenGroup) -> Group:
        members = tuple(group.finished[index] for index in range(self.group_size))
        assert group.start is not None
        result = group_advantages(
            torch.tensor([member.reward for member in members], dtype=torch.float64),
            torch.tensor([member.valid for member in members]),
            torch.tensor([member.flagged for member in members]),
            max_flagged=self.max_flagged,
            scale_rewards=self.scale_rewards,
        )
        return Group(group.index, group.start, members, result)


def _start(member: _Member) -> Start:
    assert member.group.start is not None
    return member.group.start


def _finish(member: _Member, ending: EpisodeResult) -> Rollout:
    return Rollout(
        images=np.stack(member.images),
        tokens=torch.stack(member.tokens),
        logprobs=torch.stack(member.logprobs),
        reward=ending.reward,
        verdict=ending.verdict,
        valid=ending.valid,
        flagged=ending.flagged,
        seed=member.seed,
    )


def _as_uint8(images: Any) -> UInt8Array:
    return images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
