"""Kept frames per second of a GRPO step against a blocking loop, at toy scale and for judges of different speed.

The blocking loop does what SimpleVLA-RL's trainer does: it rolls out a batch of groups, then judges all videos in one call,
keeps the groups that are neither all success nor all failure, repeats with whole batches until there are enough and drops the
surplus, computes the log-probabilities of the kept chunks again (there: of all chunks), and updates. Ours judges while it
rolls out, replaces dropped groups one by one, and keeps the log-probabilities of sampling.

A TinyVLA acts in a world model that takes 20 ms for a chunk of 8 rows, about three times as long as the policy, as at full size
(``rawdream plan``); the processor is free meanwhile. One episode in ten succeeds, so that about four groups of ten are
dropped. The judge is a server with 16 videos at a time, the default of our client; a video takes 0, 0.1, 0.3 or 1 s. The goal
is for 0.3 s, the estimate for a model of 8 billion parameters that reads 26 frames and writes five short replies. Judging
then takes about as long as the rollouts, which is where overlap gains most: at full size rollouts take minutes and the
judge seconds. "Success ends" is another case: a judge that answers at once is asked after every chunk, and ours gives the row
of a finished episode to the next one, while the blocking loop steps all rows to the horizon (SimpleVLA-RL's policy does, and
RLinf's Wan environment).

Both keep the same groups. The learning rate is too small to change a weight, and the guard of ``max_kl`` is off on both sides.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import Result, interleave, ratio

GOAL, LATENCY_S = 1.5, 0.3
LATENCIES_S = (0.0, 0.1, LATENCY_S, 1.0)
ROWS, CHUNKS, SLOTS, CHUNK_S = 8, 4, 16, 0.02


class Loop:
    """One of the two ways to make a step; ``latency_s`` of the judge per video, or None: it is asked after every chunk."""

    def __init__(self, latency_s: float | None, groups: int, ours: bool) -> None:
        from rawdream_env.envs.dream import DreamVectorEnv
        from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
        from rawdream_env.trainers.grpo import GRPOConfig
        from rawdream_env.trainers.grpo.learner import Learner
        from rawdream_env.trainers.grpo.rollout import GroupCollector

        self.groups, self.ours, self.count, self.late = groups, ours, 0, latency_s is not None
        self.config = GRPOConfig(
            Path(tempfile.gettempdir()), groups_per_step=groups, lr=1e-30, max_kl=None, temperature=1.0
        )
        sizes = TinyVLAConfig(stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2)
        self.learner, self.kept, self.frames = (
            Learner.of(_seeded(lambda: TinyVLA(sizes)), self.config),
            list[list[Any]](),
            list[int](),
        )
        self.env: Any = DreamVectorEnv(
            ROWS, world_model=_world(), judge=_server(latency_s), starts="null", autoreset_mode="Disabled",
            max_episode_steps=CHUNKS, judge_every="episode" if self.late else "chunk", end_on_success=ours or self.late,
        )  # fmt: skip
        self.collector = GroupCollector(
            self.env, self.learner.policy, num_groups=groups, temperature=1.0, overlap=self.late
        )

    def __call__(self) -> None:
        """The next step."""
        from rawdream_env.trainers.grpo.grpo import update

        rollouts = self.collector.collect(self.count) if self.ours else self.blocking(self.count)
        update(self.config, self.learner, rollouts, self.count)
        self.count += 1
        self.kept.append([(g.index, [m.tokens.sum().item() for m in g.members]) for g in rollouts.groups])
        self.frames.append(self.env.chunk_len * sum(len(m) for g in rollouts.groups for m in g.members))

    def blocking(self, step: int) -> Any:
        """Roll out a batch, judge it, keep what is mixed; after enough batches, compute the log-probabilities again."""
        import torch

        from rawdream_env.trainers.grpo.batch import Batch, Rollouts
        from rawdream_env.trainers.grpo.counts import RolloutCounts

        kept, counts, opened, make = list[Any](), RolloutCounts(), 0, self.collector
        make._runner.clear()
        while len(kept) < self.groups:
            numbers = range(opened, opened + self.groups)
            opened += self.groups
            waiting, starts = deque(request for i in numbers for request in make._open(step, i)), dict[int, Any]()
            rollouts = list[Any]()
            while waiting or len(make._runner):
                make._begin(waiting, starts)
                rollouts += make._runner.step()
            found = {rollout.request.tag: rollout for rollout in self.judged(rollouts)}
            for index in numbers:
                group = make._close(index, starts[index], {m: found[index, m] for m in range(make.group_size)})
                counts.add(group)
                kept += [] if group.result.dropped else [group]
        result = Rollouts(tuple(kept[: self.groups]), counts)
        batch = Batch.of(result)
        with torch.no_grad():
            for rows in torch.arange(len(batch.tokens)).split(self.config.microbatch_size):
                self.learner.policy.logprobs(*batch.inputs(rows), temperature=1.0)
        return result

    def judged(self, rollouts: list[Any]) -> list[Any]:
        """With their verdicts, up to the first success."""
        from rawdream_env.envs.verification import episode_result
        from rawdream_env.judges.base import ask
        from rawdream_env.types import Outcome, Video

        if self.late:
            videos = [Video(rollout.frames, self.env.fps) for rollout in rollouts]
            verdicts = ask(self.env.judge, videos, [rollout.start.instruction for rollout in rollouts])
            return [replace(r, **episode_result(v)._asdict()) for r, v in zip(rollouts, verdicts, strict=True)]
        ends = [[*(r.verdicts == Outcome.SUCCESS), True].index(True) + 1 for r in rollouts]
        return [
            replace(r, images=r.images[:n], tokens=r.tokens[:n], logprobs=r.logprobs[:n])
            for r, n in zip(rollouts, ends, strict=True)
        ]


def _seeded(make: Any) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _world() -> Any:
    from rawdream_env.world_models.null import NullWorldModel

    class Device(NullWorldModel):
        """A chunk takes a fixed time per row."""

        def imagine(self, state: Any, actions: Any) -> Any:
            time.sleep(CHUNK_S * len(state) / ROWS)
            return super().imagine(state, actions)

    return Device()


def _server(latency_s: float | None) -> Any:
    from rawdream_env.judges.scripted import ScriptedJudge

    class Server(ScriptedJudge):
        """Judges ``SLOTS`` videos at a time, those of all calls together."""

        remote = True
        free, lock = [0.0] * SLOTS, threading.Lock()

        def __call__(self, videos: Any, instructions: Any) -> Any:
            done = now = time.monotonic()
            with self.lock:
                for _ in videos:
                    slot = self.free.index(min(self.free))
                    done = self.free[slot] = max(self.free[slot], now) + (latency_s or 0.0)
            time.sleep(done - now)
            return super().__call__(videos, instructions)

    return Server(success_rate=0.3 if latency_s is None else 0.1)


def run(quick: bool = False) -> Result:
    """Steps of 8 groups of 8 episodes (4 groups when ``quick``)."""
    gains, lines, numbers, same = dict[str, float](), list[str](), dict[str, Any](), True
    for latency in (*LATENCIES_S, None):
        name = "success ends" if latency is None else f"{latency:g} s"
        sides = {which: Loop(latency, 4 if quick else 8, which == "ours") for which in ("blocking", "ours")}
        times = interleave(sides)
        gain = ratio(times["blocking"], times["ours"])
        gains[name] = gain["median_round"]  # a round is the same step on both sides
        same &= sides["blocking"].kept == sides["ours"].kept
        frames = sum(sides["ours"].frames[1:])
        rates = {which: frames / spent.seconds.sum() for which, spent in times.items()}
        lines.append(
            f"{name}: {rates['blocking']:.0f} kept frames/s blocking, {rates['ours']:.0f} ours: {gains[name]:.2f}x (rounds "
            f"{gain['lowest_round']:.2f} to {gain['highest_round']:.2f})"
        )
        numbers[name] = {"ratio": gain, "frames_per_s": rates, **{w: spent.as_dict() for w, spent in times.items()}}
        for side in sides.values():
            side.collector.close()
            side.env.close()
    lines.append(f"{'the same' if same else 'OTHER'} groups on both sides")
    passed = same and gains[f"{LATENCY_S:g} s"] >= GOAL
    return Result(
        "grpo_loop", f">= {GOAL}x kept frames/s at {LATENCY_S} s a video, same groups", passed, lines, numbers
    )
