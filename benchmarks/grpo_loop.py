"""Kept frames per second of a GRPO step against a blocking loop that recomputes old log-probabilities, at toy scale.

Both roll out the same groups with a TinyVLA in a world model that costs nothing, judged by a server that takes 60 ms per wave
of 8 videos, and make the same update. Ours keeps the log-probabilities of sampling and judges while it rolls out. The other
waits for every verdict and, before the update, computes the log-probabilities of all kept chunks again, as loops with a
separate inference engine do. A learning rate too small to change a weight keeps both on-policy in every round.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Result, interleave, ratio

GOAL = 1.5
WAVE, CHUNKS, JUDGE_S = 8, 4, 0.06


def run(quick: bool = False) -> Result:
    """One step of 8 groups of 8 episodes (2 groups when ``quick``)."""
    import torch

    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.judges.scripted import ScriptedJudge
    from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
    from rawdream_env.trainers.grpo import GRPOConfig
    from rawdream_env.trainers.grpo.grpo import update
    from rawdream_env.trainers.grpo.learner import Learner
    from rawdream_env.trainers.grpo.rollout import Batch, GroupCollector

    class Server(ScriptedJudge):
        """Verdicts arrive after a while."""

        remote = True

        def __call__(self, videos: Any, instructions: Any) -> Any:
            time.sleep(JUDGE_S * len(videos) / WAVE)
            return super().__call__(videos, instructions)

    groups = 2 if quick else 8
    config = GRPOConfig(Path(tempfile.gettempdir()), groups_per_step=groups, lr=1e-30, max_kl=None, temperature=1.0)
    policy = TinyVLA(TinyVLAConfig(stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2))
    learner = Learner.of(policy, config)
    kept: dict[bool, list[Any]] = {}

    def step(ours: bool) -> None:
        env: Any = DreamVectorEnv(
            WAVE, world_model="null", judge=Server(success_rate=0.4), starts="null", autoreset_mode="Disabled",
            max_episode_steps=CHUNKS,
        )  # fmt: skip
        collector = GroupCollector(env, policy, num_groups=groups, max_groups=groups, temperature=1.0, overlap=ours)
        rollouts = collector.collect(0)
        if not ours:
            batch = Batch.of(rollouts)
            with torch.no_grad():
                for rows in torch.arange(len(batch.tokens)).split(config.microbatch_size):
                    policy.logprobs(*batch.inputs(rows), temperature=1.0)
        update(config, learner, rollouts, 0)
        collector.close()
        env.close()
        kept[ours] = [m.tokens.sum().item() for g in rollouts.groups for m in g.members]

    times = interleave({"blocking": lambda: step(False), "ours": lambda: step(True)})
    gain = ratio(times["blocking"], times["ours"])
    same = kept[True] == kept[False]
    frames = 8 * CHUNKS * len(kept[True])
    lines = [
        f"{frames} kept frames: {frames / times['blocking'].median:.0f} frames/s blocking, "
        f"{frames / times['ours'].median:.0f} ours: {gain['median']:.2f}x (rounds {gain['lowest_round']:.2f} to "
        f"{gain['highest_round']:.2f}); {'the same' if same else 'OTHER'} groups"
    ]
    numbers = {"ratio": gain, "same": same, **{name: spent.as_dict() for name, spent in times.items()}}
    return Result(
        "grpo_loop", f">= {GOAL}x kept frames/s, same groups", same and gain["median"] >= GOAL, lines, numbers
    )
