"""The environment that GRPO rolls out in, and what a step in it costs."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gymnasium.vector import VectorEnv

from rawdream_env.envs.episodes import make_env
from rawdream_env.judges.ensemble import HoldOutJudge
from rawdream_env.trainers.grpo.batch import Rollouts
from rawdream_env.trainers.grpo.config import GRPOConfig
from rawdream_env.wrappers.base import find_wrapper
from rawdream_env.wrappers.dual_noise import DualNoiseVerification


def rollout_env(config: GRPOConfig, processes: int = 1) -> VectorEnv[Any, Any, Any]:
    """The environment of ``config`` in one of ``processes``, no wider than its rollouts of one step."""
    num_envs = min(config.num_envs, -(-config.groups_per_step // processes) * config.group_size)
    kwargs: dict[str, Any] = {
        "task": config.task,
        "layout": config.layout,
        "device": config.device,
        **config.env_kwargs,
    }
    if config.held_out_judge:
        kwargs["held_out_judge"] = config.held_out_judge
    if config.reflector:
        options = {"threshold": config.reflector_threshold, "patience": config.reflector_patience}
        kwargs["reflector"] = {"judge": config.reflector, "device": config.device, **options}
        kwargs["return_frames"] = True
    return make_env(config.env_id, num_envs, **kwargs)


def watched(env: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """``env`` without the alarm of its hold-out judge: GRPO's compares episodes, and continues in a resumed run."""
    judge = getattr(env.unwrapped, "judge", None)
    if isinstance(judge, HoldOutJudge):
        judge.alarm = None
    return env


def replayed_chunks(env: VectorEnv[Any, Any, Any]) -> int:
    """Number of chunks imagined for verification so far."""
    wrapper = find_wrapper(env, DualNoiseVerification)
    return 0 if wrapper is None else wrapper.statistics.replayed_chunks


def offloaded(env: VectorEnv[Any, Any, Any], config: GRPOConfig) -> AbstractContextManager[None]:
    """A context for the update, with the world model in host memory if ``config`` says so."""
    offload = getattr(env.unwrapped, "offload", None)
    return offload() if config.offload_world_model and callable(offload) else nullcontext()


def timings(
    rollouts: Rollouts, env: VectorEnv[Any, Any, Any], replayed: float, begun: float, rolled_out: float
) -> dict[str, float]:
    """Seconds and rates of a step with its start and end of rollouts; ``frames`` includes second dreams."""
    now, chunk_len = time.perf_counter(), (env.single_action_space.shape or (1,))[0]
    frames = (rollouts.counts.chunks + replayed) * chunk_len
    kept = sum(len(member) for group in rollouts.groups for member in group.members) * chunk_len
    return {
        "rollout_s": rolled_out - begun,
        "update_s": now - rolled_out,
        "step_s": now - begun,
        "frames": frames,
        "frames_per_s": frames / (rolled_out - begun),
        "kept_frames_per_s": kept / (now - begun),
    }


def verified(env: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """``env`` with dual-noise verification, unless it has it already or is a simulator without noise."""
    if find_wrapper(env, DualNoiseVerification) is not None or not callable(getattr(env.unwrapped, "replay", None)):
        return env
    return DualNoiseVerification(env)
