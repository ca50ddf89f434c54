"""GRPO's guard (``max_kl``): seconds of a step's updates with it over without it, on the bundled policy.

The guard costs one forward pass per update, and copies of the weights and of the optimizer's state. Rollouts are collected
once, in random frames; a learning rate too small to change a weight keeps them on-policy for every round.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.common import Result, embedded_models, interleave, milliseconds, ratio

GOAL = 1.5


def run(quick: bool = False) -> Result:
    """Time the updates of one step of 8 groups of 8 episodes (2 groups when ``quick``)."""
    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.judges.scripted import ScriptedJudge
    from rawdream_env.trainers.grpo import GRPOConfig
    from rawdream_env.trainers.grpo.grpo import update
    from rawdream_env.trainers.grpo.learner import Learner
    from rawdream_env.trainers.grpo.rollout import GroupCollector

    policy, groups = embedded_models()[2], 2 if quick else 8
    without = GRPOConfig(Path(tempfile.gettempdir()), groups_per_step=groups, lr=1e-30, temperature=0.7, max_kl=None)
    env = DreamVectorEnv(
        16, world_model="null", judge=ScriptedJudge(), starts="null", autoreset_mode="Disabled", max_episode_steps=8
    )
    rollouts = GroupCollector(env, policy, num_groups=groups, temperature=without.temperature).collect(0)
    env.close()
    learner = Learner.of(policy, without)
    sides = {"without": without, "with": replace(without, max_kl=1.0)}
    times = interleave({name: lambda c=c: update(c, learner, rollouts, 0) for name, c in sides.items()})
    cost = ratio(times["with"], times["without"])
    lines = [
        f"updates of {8 * groups} episodes: {milliseconds(times['without'])} without, {milliseconds(times['with'])} with "
        f"the guard: {cost['median']:.2f}x (rounds {cost['lowest_round']:.2f} to {cost['highest_round']:.2f}, processor "
        f"{cost['processor_median']:.2f}x)"
    ]
    numbers = {"ratio": cost, **{name: spent.as_dict() for name, spent in times.items()}}
    return Result("grpo_guard", f"<= {GOAL}x of the updates", cost["median"] <= GOAL, lines, numbers)
