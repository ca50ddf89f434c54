"""Groups of rollouts from a vector environment, for one policy update after another.

All members of a group begin from one start and differ in their sampling and in the environment's noise. A row of
the environment runs members, not groups: when its episode is over it takes the next waiting member of any group
(``envs/episodes.py``), so no row is idle. Dream, simulator and null environments are all driven by this one loop.

Which groups are trained on never depends on ``num_envs`` or on which finish first: groups are numbered, and a new one is
opened only to replace one that was dropped, so the usable groups with the lowest numbers are kept. Taking the first to
*finish* would favor quick successes.

With a remote judge, finished episodes wait for their verdicts while their rows go on with the next members
(``envs/judging.py``); the groups kept, and their contents, are the same. A judge that gives no verdict for a while stops the
collection (``JudgeUnavailableError``): its step is not counted, and is collected again when the run is resumed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from rawdream_env.envs.episodes import EpisodeRequest, EpisodeRunner, Rollout
from rawdream_env.envs.judging import AsyncJudging
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError, RawDreamError
from rawdream_env.judges.overlap import is_remote
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.trainers.common.distributed import ALONE, ProcessGroup
from rawdream_env.trainers.grpo.batch import Rollouts
from rawdream_env.trainers.grpo.counts import Group, RolloutCounts
from rawdream_env.trainers.grpo.losses import Baseline, DropReason, ScaleRewards, group_advantages
from rawdream_env.types import Policy, Start
from rawdream_env.wrappers.base import chain
from rawdream_env.wrappers.dual_noise import DualNoiseVerification

_STREAM_MEMBER, _STREAM_SAMPLING = 11, 12
_POLL_S = 0.5
"""Seconds between checks of ``should_stop`` while only verdicts are waited for."""
_OUTAGE = 16
"""This many episodes in a row without a verdict (or two groups, if that is more) are an outage. With a judge that fails on
one video in four, a series this long occurs once in 4 billion episodes.
"""


class NoUsableGroupError(RawDreamError, RuntimeError):
    """Every group of a step was dropped; ``dropped`` counts them by reason."""

    def __init__(self, message: str, dropped: Counter[DropReason]) -> None:
        super().__init__(message)
        self.dropped = dropped


class RolloutInterrupted(RawDreamError, RuntimeError):
    """Collection was stopped by the caller, between two steps of the environment."""


class GroupCollector:
    """Collects groups for one policy update after another.

    Args:
        env: a vector environment of this package in DISABLED autoreset mode, or wrappers around one.
        policy: samples the actions; its parameters may change between calls of ``collect``.
        group_size: members of a group (TRL: ``num_generations``), at least 2.
        num_groups: groups wanted per step.
        max_groups: maximum number of groups to open for a step; the rest is made up of replacements for dropped ones.
        temperature: sampling temperature. max_flagged, scale_rewards, baseline: see ``losses.group_advantages``.
        seed: with step, group and member it determines every start and every draw.
        should_stop: asked before every environment step; True raises ``RolloutInterrupted``.
        out_of_time: asked before a group is opened in place of a dropped one; True raises ``RolloutInterrupted``. The groups
            that every step needs are always finished.
        on_group: called with the counts so far after each finished group.
        overlap: judge finished episodes while the next are imagined; None: if the judge is ``remote`` and the
            environment allows it.
        group: the processes that collect together. Process r of w rolls out the groups r, r + w, ...; groups in place of
            dropped ones are opened when all processes have finished theirs.

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
        scale_rewards: ScaleRewards = "group",
        baseline: Baseline = "mean",
        seed: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        out_of_time: Callable[[], bool] = lambda: False,
        on_group: Callable[[RolloutCounts], None] = lambda counts: None,
        overlap: bool | None = None,
        group: ProcessGroup = ALONE,
    ) -> None:
        if group_size < 2 or num_groups < 1 or max_groups < num_groups:
            raise InvalidOptionError(
                f"group_size={group_size} must be at least 2, num_groups={num_groups} at least 1 and "
                f"max_groups={max_groups} at least num_groups."
            )
        self.env, self.seed, self._group = env, seed, group
        self.group_size, self.num_groups, self.max_groups = group_size, num_groups, max_groups
        self.max_flagged, self.scale_rewards, self.baseline = max_flagged, scale_rewards, baseline
        self._should_stop, self._out_of_time, self._on_group = should_stop, out_of_time, on_group
        self._unjudged = 0
        possible = can_overlap(env)
        if overlap and not possible:
            raise InvalidOptionError(
                "overlap=True needs a dream with a judge that is asked at the end of an episode (judge_every='episode'), "
                "and around it at most DualNoiseVerification."
            )
        wanted = is_remote(getattr(env.unwrapped, "judge", None)) if overlap is None else overlap
        self._judging: AsyncJudging | None = None
        if wanted and possible:
            wrapper = env if isinstance(env, DualNoiseVerification) else None
            self._judging = AsyncJudging(env, wrapper.verifier if wrapper else None)
        self._runner = EpisodeRunner(
            env, policy, temperature=temperature, judged=self._judging is None, keep_frames=False
        )

    def close(self) -> None:
        """End the threads that wait for verdicts."""
        if self._judging is not None:
            self._judging.close()

    def collect(self, step: int) -> Rollouts:
        """Roll out until ``num_groups`` groups are kept or ``max_groups`` were opened; at least one is returned. With several
        processes, those of all of them on each.

        Raises ``NoUsableGroupError`` when every group was dropped, ``RolloutInterrupted`` when asked to stop,
        ``JudgeUnavailableError`` when many episodes in a row could not be judged.
        """
        kept, counts, wanted, opened = list[Group](), RolloutCounts(), self.num_groups, 0
        while opened < wanted:
            problem: RawDreamError | None = None
            try:
                self._roll_out(step, opened, wanted, kept, counts)
            except (RolloutInterrupted, JudgeUnavailableError) as error:
                problem = error
            said = self._group.everyone((problem, counts.dropped.total()))
            for theirs, _ in said:  # all processes stop together
                if theirs is not None:
                    raise theirs
            opened, wanted = wanted, min(self.num_groups + sum(dropped for _, dropped in said), self.max_groups)
            wanted = opened if self._group.size == 1 else wanted  # alone, dropped groups are replaced at once
        found = Rollouts(tuple(sorted(kept, key=lambda group: group.index)), counts).everywhere(self._group)
        if not found.groups:
            raise NoUsableGroupError(why_none(found.counts, self.max_flagged), found.counts.dropped)
        return found

    def _roll_out(self, step: int, opened: int, wanted: int, kept: list[Group], counts: RolloutCounts) -> None:
        """This process's groups of the numbers ``opened`` to ``wanted``; alone, also those that replace dropped ones."""
        self._runner.clear()  # episodes of an interrupted step
        if self._judging is not None:
            self._judging.forget()
        self._unjudged = 0
        waiting: deque[EpisodeRequest] = deque()
        running: dict[int, dict[int, Rollout]] = {}  # group -> member -> its rollout
        starts: dict[int, Start] = {}
        while True:
            while opened < wanted:
                if opened >= self.num_groups and self._out_of_time():
                    raise RolloutInterrupted(
                        f"Time is up in step {step + 1}, with {len(kept)} of {self.num_groups} groups kept and {opened} opened "
                        f"({counts}). It is begun anew when the run is resumed."
                    )
                if opened % self._group.size == self._group.rank:
                    waiting.extend(self._open(step, opened))
                    running[opened] = {}
                opened += 1
            self._begin(waiting, starts)
            if not running:
                break
            if self._should_stop():
                raise RolloutInterrupted(f"stopped while collecting step {step}, with {len(kept)} groups kept.")
            for rollout in self._advance(more=bool(waiting)):
                self._look_for_outage(rollout)
                index, member = rollout.request.tag
                running[index][member] = rollout
                if len(running[index]) < self.group_size:
                    continue
                group = self._close(index, starts[index], running.pop(index))
                counts.add(group)
                if not group.result.dropped:
                    kept.append(group)
                elif self._group.size == 1:
                    wanted = min(wanted + 1, self.max_groups)
                self._on_group(counts)

    def _open(self, step: int, index: int) -> list[EpisodeRequest]:
        """The members of a new group."""
        seeds = [mix(self.seed, step, index, member, _STREAM_MEMBER) for member in range(self.group_size)]
        return [
            EpisodeRequest(None, seed, NoiseKey(mix(seed, _STREAM_SAMPLING)), tag=(index, member))
            for member, seed in enumerate(seeds)
        ]

    def _begin(self, waiting: deque[EpisodeRequest], starts: dict[int, Start]) -> None:
        """Give free rows to waiting members. A group's first member draws the start that the others share."""
        taken = [waiting.popleft() for _ in range(min(self._runner.free, len(waiting)))]
        first = [request for request in taken if request.tag[1] == 0]
        for request, start in zip(first, self._runner.begin(first), strict=True):
            starts[request.tag[0]] = start
        self._runner.begin([replace(r, start=starts[r.tag[0]]) for r in taken if r.tag[1] > 0])

    def _advance(self, more: bool) -> list[Rollout]:
        """Run one chunk on every running row; returns the rollouts whose result is now known. Verdicts are waited for when
        nothing runs and there are no ``more`` members to begin.
        """
        finished = self._runner.step()
        if self._judging is None:
            return finished
        self._judging.submit([rollout for rollout in finished if rollout.valid])
        broken = [rollout for rollout in finished if not rollout.valid]
        return broken + self._judging.results(wait_s=0.0 if more or len(self._runner) else _POLL_S)

    def _look_for_outage(self, rollout: Rollout) -> None:
        """Stop the collection in an outage of the judge, instead of dropping group after group for hours."""
        self._unjudged = 0 if rollout.valid or rollout.flagged else self._unjudged + 1
        if self._unjudged >= max(_OUTAGE, 2 * self.group_size) and getattr(self.env.unwrapped, "judge", None):
            raise JudgeUnavailableError(
                f"None of the last {self._unjudged} episodes could be judged ({rollout.reason or 'no reason given'}). "
                "They are not counted; when the judge works again, rerun the same command to resume from the last update."
            )

    def _close(self, index: int, start: Start, rollouts: dict[int, Rollout]) -> Group:
        members = tuple(rollouts[member] for member in range(self.group_size))
        result = group_advantages(
            torch.tensor([member.reward for member in members], dtype=torch.float64),
            torch.tensor([member.valid for member in members]),
            torch.tensor([member.flagged for member in members]),
            max_flagged=self.max_flagged,
            scale_rewards=self.scale_rewards,
            baseline=self.baseline,
        )
        return Group(index, start, members, result)


def can_overlap(env: VectorEnv[Any, Any, Any]) -> bool:
    """Whether verdicts of ``env`` may arrive later: a dream judged at the horizon, without a reflector, and without
    wrappers that use verdicts, except dual-noise verification.
    """
    *wrappers, base = chain(env)
    return (
        getattr(base, "judge", None) is not None
        and callable(getattr(base, "videos", None))
        and getattr(base, "reflector", None) is None
        and getattr(base, "judge_every", "") == "episode"
        and all(isinstance(wrapper, DualNoiseVerification) for wrapper in wrappers)
    )


def why_none(counts: RolloutCounts, max_flagged: int) -> str:
    """One sentence on why every group of a step was dropped, and what to change."""
    reasons = ", ".join(f"{count} {name}" for name, count in sorted(counts.dropped.items()))
    rate = f"{counts.successes} of {counts.rollouts} rollouts succeeded"
    if counts.flagged or counts.invalid:
        rate += f", {counts.flagged} of them flagged; {counts.invalid} INVALID"
    most = counts.dropped.most_common(1)[0][0]
    advice = {
        "all_success": "the policy solves these starts: stop here, choose harder ones (layout, task), raise temperature",
        "all_failure": "the policy never succeeds: give it more demonstrations first, choose easier starts (layout, "
        "task), change temperature, or raise group_size or max_groups_per_step",
        "untrustworthy": f"more than max_flagged={max_flagged} members of a group were flagged or invalid: look at the "
        "judge, train the world model longer, or raise max_flagged",
        "all_equal": "all rewards of a group are the same: raise temperature or group_size",
    }
    return f"None of {counts.groups} groups can be trained on ({reasons}; {rate}); {advice.get(most, '')}."
