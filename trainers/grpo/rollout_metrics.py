"""What a step's rollouts were like, in numbers: rates with their n and interval, and where the time went."""

from __future__ import annotations

import time
from typing import Any

from gymnasium.vector import VectorEnv

from rawdream_env.statistics import wilson_interval
from rawdream_env.trainers.grpo.groups import RolloutCounts, Rollouts
from rawdream_env.trainers.grpo.losses import DROP_REASONS
from rawdream_env.wrappers.base import find_wrapper
from rawdream_env.wrappers.dual_noise import DualNoiseVerification


def summarize(rollouts: Rollouts) -> dict[str, float]:
    """Metrics of what was rolled out. Rates are over all rollouts of the step, those of dropped groups included."""
    counts, groups = rollouts.counts, rollouts.groups
    low, high = wilson_interval(counts.successes, counts.rollouts)
    rewards = [m.reward for g in groups for m, ok in zip(g.members, g.result.trustworthy, strict=True) if ok]
    return {
        "n": counts.rollouts,
        "success_rate": counts.successes / counts.rollouts,
        "success_low": low,
        "success_high": high,
        "flagged_rate": counts.flagged / counts.successes if counts.successes else 0.0,
        "invalid_rate": counts.invalid / counts.rollouts,
        "reward": sum(rewards) / len(rewards),
        "chunks_per_rollout": counts.chunks / counts.rollouts,
        "groups": counts.groups,
        "groups_kept": len(groups),
        **{f"dropped_{reason}": counts.dropped[reason] for reason in DROP_REASONS},
        **{
            f"success_rate/task_{task}": counts.task_successes[task] / n
            for task, n in sorted(counts.task_rollouts.items())
        },
    }


class StageTimer:
    """Seconds per stage of a step, and the world model's work."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self._last = self._begun = time.perf_counter()
        self._replayed = _replayed_chunks(env)
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent on ``stage``."""
        now = time.perf_counter()
        self._stages[stage] = now - self._last
        self._last = now

    def summary(self, rollouts: Rollouts, env: VectorEnv[Any, Any, Any]) -> dict[str, float]:
        """Seconds and rates of the step so far; ``frames`` are those imagined, second dreams included."""
        shape = env.single_action_space.shape
        chunk_len = shape[0] if shape else 1
        imagined = (rollouts.counts.chunks + _replayed_chunks(env) - self._replayed) * chunk_len
        kept = sum(len(member) for group in rollouts.groups for member in group.members) * chunk_len
        seconds = time.perf_counter() - self._begun
        return {
            **{f"{stage}_s": value for stage, value in self._stages.items()},
            "step_s": seconds,
            "frames": imagined,
            "frames_per_s": imagined / self._stages["rollout"],
            "kept_frames_per_s": kept / seconds,
        }


def _replayed_chunks(env: VectorEnv[Any, Any, Any]) -> int:
    wrapper = find_wrapper(env, DualNoiseVerification)
    return 0 if wrapper is None else wrapper.statistics.replayed_chunks


def describe(counts: RolloutCounts) -> str:
    """One line for a progress bar."""
    rate = 100 * counts.successes / counts.rollouts
    kept = counts.groups - counts.dropped.total()
    return f"success {rate:.0f} % (n={counts.rollouts}), {kept} of {counts.groups} groups kept"
