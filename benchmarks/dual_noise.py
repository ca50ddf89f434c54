"""Dual-noise verification at 30 % successes: world-model rows with the wrapper, against the ideal 1 + p.

Rows are counted inside the world model, so the result is exact and does not depend on the machine. The judge calls 30 % of
the videos a success, by a hash of their frames; p is the measured share.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import Result

GOAL = 1.05


def run(quick: bool = False) -> Result:
    """Count over 400 episodes (100 when ``quick``)."""
    import numpy as np

    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.judges.scripted import ScriptedJudge
    from rawdream_env.world_models.null import NullWorldModel
    from rawdream_env.wrappers.dual_noise import DualNoiseVerification

    class Counting(NullWorldModel):
        """Counts the rows it imagines."""

        rows = 0

        def imagine(self, state: Any, actions: Any) -> Any:
            self.rows += len(state)
            return super().imagine(state, actions)

    num_envs, rounds = 20, 5 if quick else 20
    counts, statistics = {}, None
    for verify in (False, True):
        world = Counting()
        env: Any = DreamVectorEnv(
            num_envs, world_model=world, judge=ScriptedJudge(success_rate=0.3), starts="null", autoreset_mode="Disabled"
        )
        env = DualNoiseVerification(env) if verify else env
        rng = np.random.default_rng(0)
        for episode in range(rounds):
            env.reset(seed=episode * num_envs)
            for _ in range(8):
                env.step(rng.uniform(-1, 1, (num_envs, 8, 7)).astype(np.float32))
        counts[verify] = world.rows
        if verify:
            statistics = env.statistics
        env.close()
    assert statistics is not None
    p = statistics.n_success / statistics.n_episodes
    work = counts[True] / counts[False]
    over = work / (1 + p)
    lines = [
        f"p = {p:.3f} ({statistics.n_success} of {statistics.n_episodes} episodes): {work:.4f}x the rows without it; "
        f"ideal 1 + p = {1 + p:.4f}; overhead {over:.4f}x"
    ]
    numbers = {
        "p": p,
        "episodes": statistics.n_episodes,
        "work_ratio": work,
        "over_ideal": over,
        "rows": {"without": counts[False], "with": counts[True]},
    }
    return Result("dual_noise", f"<= {GOAL}x of 1 + p world-model rows", bool(over <= GOAL), lines, numbers)
