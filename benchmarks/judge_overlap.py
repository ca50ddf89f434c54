"""Asynchronous judging: wall time of a step whose judge takes as long as its rollouts, overlapped against sequential.

The world model and the judge mostly sleep (the verdict of a video is a hash of its frames), so that this measures the loop
and not the machine: 64 rollouts in waves of 8, and for every wave one call of
the judge that takes as long as the wave. What is left after the last rollout, its two judgements and its second dream, is
the tail. Both loops must keep the same groups with the same verdicts.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.common import Result

GOAL = 1.1
CHUNK_S, CHUNKS, WAVE = 0.05, 8, 8


def run(quick: bool = False) -> Result:
    """One step of 64 rollouts each way (32 when ``quick``), without and with dual-noise verification."""
    groups = 4 if quick else 8
    wave_s = _collect(overlap=False, verify=False, groups=groups, wave_s=0.0)[2]["rollout_s"] / groups
    lines, numbers, passed = [], {}, True
    for verify in (False, True):
        blocking, kept, work = _collect(overlap=False, verify=verify, groups=groups, wave_s=wave_s)
        overlapped, also, also_work = _collect(overlap=True, verify=verify, groups=groups, wave_s=wave_s)
        same = kept == also
        busiest = max(work["rollout_s"], work["judge_s"])
        # Cannot be overlapped: judging the last wave and, with verification, its second dream and judging that.
        tail = wave_s * (3 if verify else 1)
        share = overlapped / (GOAL * busiest + tail)
        passed &= same and share <= 1.0
        name = "with verification" if verify else "judging alone"
        lines.append(
            f"{name}: taking turns {blocking:.2f} s, overlapped {overlapped:.2f} s ({blocking / overlapped:.2f} times "
            f"faster); rollouts {work['rollout_s']:.2f} s, judge {work['judge_s']:.2f} s, {GOAL} x max + tail "
            f"{GOAL * busiest + tail:.2f} s; {'the same' if same else 'OTHER'} verdicts ({len(kept)} rollouts)"
        )
        numbers["verification" if verify else "plain"] = {
            "blocking_s": blocking, "overlapped_s": overlapped, "tail_s": tail, "same_verdicts": same,
            "blocking_work": work, "overlapped_work": also_work,
        }  # fmt: skip
    return Result("judge_overlap", f"<= {GOAL} x max(rollout, judge) + tail, same verdicts", passed, lines, numbers)


def _collect(*, overlap: bool, verify: bool, groups: int, wave_s: float) -> tuple[float, list[Any], dict[str, float]]:
    """(seconds, what was kept, seconds of world model and judge) of one step."""
    import torch

    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.judges.scripted import ScriptedJudge
    from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
    from rawdream_env.trainers.grpo.rollout import GroupCollector
    from rawdream_env.world_models.null import NullWorldModel
    from rawdream_env.wrappers.dual_noise import DualNoiseVerification

    work = {"rollout_s": 0.0, "judge_s": 0.0}

    class Slow(NullWorldModel):
        """A chunk takes a fixed time per full wave of rows."""

        def imagine(self, state: Any, actions: Any) -> Any:
            begin = time.perf_counter()
            time.sleep(CHUNK_S * len(state) / WAVE)
            result = super().imagine(state, actions)
            work["rollout_s"] += time.perf_counter() - begin
            return result

    class SlowJudge(ScriptedJudge):
        """A wave's videos take as long as the wave."""

        remote = True

        def __call__(self, videos: Any, instructions: Any) -> Any:
            work["judge_s"] += wave_s * len(videos) / WAVE
            time.sleep(wave_s * len(videos) / WAVE)
            return super().__call__(videos, instructions)

    env: Any = DreamVectorEnv(
        WAVE, world_model=Slow(), judge=SlowJudge(success_rate=0.4, invalid_rate=0.1), starts="null",
        autoreset_mode="Disabled", max_episode_steps=CHUNKS,
    )  # fmt: skip
    env = DualNoiseVerification(env) if verify else env
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = TinyVLA(TinyVLAConfig(stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2))
    act = policy.act

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = act(*args, **kwargs)
        work["rollout_s"] += time.perf_counter() - begin
        return result

    policy.act = timed  # type: ignore[method-assign]
    collector = GroupCollector(
        env, policy, group_size=8, num_groups=groups, max_groups=groups, max_flagged=8, overlap=overlap
    )
    begin = time.perf_counter()
    rollouts = collector.collect(0)
    seconds = time.perf_counter() - begin
    collector.close()
    env.close()
    kept = [
        (group.index, i, m.reward, m.verdict, m.valid, m.flagged, m.tokens.sum().item())
        for group in rollouts.groups
        for i, m in enumerate(group.members)
    ]
    return seconds, kept, work
