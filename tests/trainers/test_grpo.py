"""GRPO on a toy dream: it learns, it replays bit for bit after kill -9, and it says why when it cannot go on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.episodes import EpisodeRequest, Rollout
from rawdream_env.errors import CheckpointError, InvalidOptionError, RunDirError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.policies import load_policy
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.processes import stopped_children
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.memory import NullStarts
from rawdream_env.statistics import wilson_interval
from rawdream_env.trainers.common.run_dir import read_jsonl
from rawdream_env.trainers.grpo.batch import Batch, Rollouts
from rawdream_env.trainers.grpo.gradients import TrainingDivergedError, add_gradients
from rawdream_env.trainers.grpo.grpo import GRPOConfig, GRPOResult, train_grpo
from rawdream_env.trainers.grpo.losses import group_advantages
from rawdream_env.trainers.grpo.rollout import (
    Group,
    GroupCollector,
    NoUsableGroupError,
    RolloutCounts,
    RolloutInterrupted,
)
from rawdream_env.types import Outcome, PolicyOutput, Start, Verdict, Video
from rawdream_env.world_models.null import NullState, NullWorldModel
from rawdream_env.wrappers import DualNoiseVerification
from tests.killing import kill_at_random_moments
from tests.waiting import wait_until

K, A, SIDE, BINS = 2, 7, 8, 5


class ShowActions(NullWorldModel):
    """A world model whose frames show what was done: as bright as the chunk's mean gripper command is high.

    ``hallucinate``: share of chunks, drawn from the noise key, that come out white whatever was done.
    """

    def __init__(self, hallucinate: float = 0.0) -> None:
        super().__init__((SIDE, SIDE, 3), K)
        self.hallucinate = hallucinate

    def imagine(self, state: NullState, actions: Tensor) -> tuple[NullState, Tensor]:
        state, frames = super().imagine(state, actions)
        shade = ((actions[:, :, 6].mean(1) + 1) * 127).round()
        luck = torch.tensor([torch.rand((), generator=key.generator(5)) < self.hallucinate for key in state.keys])
        shade = torch.where(luck, 255.0, shade)
        return state, torch.zeros_like(frames) + shade.to(torch.uint8)[:, None, None, None, None]


def bright(video: Video, instruction: str) -> bool:
    """ "left" and "up" want the gripper closed at the end, "right" and "down" open."""
    closed = video.frames[-1].mean() > 200
    opened = video.frames[-1].mean() < 55
    return bool(closed if instruction.endswith(("left", "up")) else opened)


class TinyPolicy(nn.Module):
    """A linear softmax over coarse pixels and the instruction's last letter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(3 + 4, K * A * BINS)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.1, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.acted = 0

    def _log_p(self, images: Any, instructions: Sequence[str], temperature: float) -> Tensor:
        pixels = torch.as_tensor(images).float().mean((1, 2)) / 255 - 0.5
        words = torch.tensor([[text.endswith(w) for w in ("left", "right", "up", "down")] for text in instructions])
        rows = torch.cat([pixels, words.float()], 1)
        # No matrix product: its kernels may round differently for another batch size.
        logits = (rows[:, None] * self.linear.weight).sum(-1) + self.linear.bias
        return torch.log_softmax(logits.reshape(len(rows), K * A, BINS) / temperature, -1)

    def act(
        self, images: Any, instructions: Sequence[str], *, temperature: float, keys: Sequence[NoiseKey]
    ) -> PolicyOutput:
        self.acted += len(keys)
        log_p = self._log_p(images, instructions, temperature)
        tokens = torch.stack(
            [
                torch.multinomial(p, 1, generator=k.generator(3)).squeeze(1)
                for p, k in zip(log_p.exp(), keys, strict=True)
            ]
        )
        actions = (tokens / (BINS - 1) * 2 - 1).reshape(-1, K, A)
        return PolicyOutput(actions, tokens, log_p.gather(-1, tokens[..., None]).squeeze(-1))

    def logprobs(self, images: Any, instructions: Sequence[str], tokens: Tensor, *, temperature: float) -> Tensor:
        return self._log_p(images, instructions, temperature).gather(-1, tokens[..., None]).squeeze(-1)


def toy_env(
    num_envs: int = 16, judge: Any = bright, hallucinate: float = 0.0, chunks: int = 2, **kwargs: Any
) -> DreamVectorEnv:
    return DreamVectorEnv(
        num_envs,
        world_model=ShowActions(hallucinate),
        judge=ScriptedJudge(judge),
        starts=NullStarts((SIDE, SIDE, 3)),
        max_episode_steps=chunks,
        **{"autoreset_mode": "Disabled", **kwargs},
    )


def toy_config(run_dir: Path, **kwargs: Any) -> GRPOConfig:
    options: dict[str, Any] = {
        "steps": 4,
        "group_size": 4,
        "groups_per_step": 3,
        "temperature": 1.0,
        "lr": 0.05,
        "save_every": 2,
        "max_groups_per_step": 40,
        "warmup_steps": 0,
        "max_kl": None,
        "ema": 0.0,
        "tensorboard": False,
        "progress": False,
    }
    return GRPOConfig(run_dir, **{**options, **kwargs})


class ShowGripper(ShowActions):
    def __init__(self) -> None:
        NullWorldModel.__init__(self, (16, 16, 3), 8)
        self.hallucinate = 0.0


def show_gripper_env(num_envs: int, **kwargs: Any) -> DreamVectorEnv:
    del kwargs["task"], kwargs["layout"]
    return DreamVectorEnv(
        num_envs, world_model=ShowGripper(), starts=NullStarts((16, 16, 3)), max_episode_steps=4, **kwargs
    )


gym.register("test/ShowGripper-v0", entry_point=show_gripper_env, vector_entry_point=show_gripper_env)


def train(run_dir: Path, env: Any = None, policy: Any = None, **kwargs: Any) -> GRPOResult:
    return train_grpo(toy_config(run_dir, **kwargs), env=env or toy_env(), policy=policy or TinyPolicy())


def weights(result: GRPOResult) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.policy.parameters()])


# -- rollouts --------------------------------------------------------------------------------------------------------


def collector(num_envs: int, **kwargs: Any) -> GroupCollector:
    env = kwargs.pop("env", None) or DualNoiseVerification(toy_env(num_envs, hallucinate=0.15, judge_every="chunk"))
    options: dict[str, Any] = {"group_size": 4, "num_groups": 3, "max_groups": 40, "temperature": 1.0, "seed": 7}
    return GroupCollector(env, TinyPolicy(), **{**options, **kwargs})


def test_rollouts_do_not_depend_on_the_number_of_rows() -> None:
    reference = collector(12).collect(5)
    for num_envs in (1, 5, 7):
        other = collector(num_envs).collect(5)
        assert other.counts == reference.counts
        for a, b in zip(reference.groups, other.groups, strict=True):
            assert a.index == b.index and a.start.instruction == b.start.instruction
            for m, n in zip(a.members, b.members, strict=True):
                assert np.array_equal(m.images, n.images) and torch.equal(m.tokens, n.tokens)
                assert torch.equal(m.logprobs, n.logprobs)
                assert (m.reward, m.verdict, m.valid, m.flagged) == (n.reward, n.verdict, n.valid, n.flagged)


def test_members_share_a_start_and_nothing_else() -> None:
    rollouts = collector(6).collect(0)
    assert len(rollouts.groups) == 3
    for group in rollouts.groups:
        for member in group.members:
            assert np.array_equal(member.images[0], group.start.frame)
            assert len(member) == len(member.tokens) == len(member.logprobs) <= 2
        assert len({member.request.seed for member in group.members}) == 4
        assert len({member.tokens[0].numpy().tobytes() for member in group.members}) == 4
    frames = [group.start.frame.tobytes() for group in rollouts.groups]
    assert len(set(frames)) == 3
    assert collector(6).collect(1).groups[0].start.frame.tobytes() not in frames


def test_only_groups_with_a_difference_are_kept_and_all_rollouts_are_counted() -> None:
    rollouts = collector(12).collect(2)
    counts = rollouts.counts
    assert counts.groups == 3 + counts.dropped.total() and counts.dropped["all_failure"] > 0
    assert counts.rollouts == 4 * counts.groups and counts.successes >= 3
    for group in rollouts.groups:
        trusted = [m.reward for m, ok in zip(group.members, group.result.valid, strict=True) if ok]
        assert set(trusted) == {0.0, 1.0}


def test_refilled_rows_leave_no_row_idle() -> None:
    """Episodes end early at a success; a row that is free takes the next member at once."""
    live: list[int] = []
    env = toy_env(4, judge_every="chunk", chunks=6)
    advance = env._advance

    def watch(rows: Any, actions: Any, last: Any) -> Any:
        live.append(len(rows))
        return advance(rows, actions, last)

    env._advance = watch  # type: ignore[method-assign]
    counts = collector(4, env=env, num_groups=8).collect(0).counts
    assert counts.chunks == sum(live)
    assert sum(live) / (4 * len(live)) > 0.85
    assert counts.chunks < 0.9 * counts.rollouts * 6  # they do end early


def test_flagged_successes_are_left_out() -> None:
    """Hallucinated successes: white frames that a second draw of the noise does not repeat."""
    groups = collector(12, num_groups=8).collect(0).groups
    flagged = [m for g in groups for m in g.members if m.flagged]
    assert flagged and all(m.verdict == Outcome.SUCCESS and not m.valid and m.reward == 0 for m in flagged)
    for group in groups:
        assert [not m.flagged for m in group.members] == group.result.valid.tolist()
        assert all(float(a) == 0 for a, m in zip(group.result.advantages, group.members, strict=True) if m.flagged)


def test_invalid_verdicts_never_become_rewards() -> None:
    def moody(video: Video, instruction: str) -> Any:
        answer = bright(video, instruction)
        return Verdict(Outcome.INVALID, "outage") if video.frames[-1, 0, 0, 0] % 3 == 0 else answer

    rollouts = collector(12, env=toy_env(12, judge=moody)).collect(0)
    assert rollouts.counts.invalid > 0
    members = [m for g in rollouts.groups for m in g.members if m.verdict == Outcome.INVALID]
    assert members and not any(m.valid for m in members)
    assert len(Batch.of(rollouts).advantages) == 12 - len(members)


def test_the_log_keeps_judged_invalid_and_flagged_apart() -> None:
    """Hallucinations, which are flagged, and outages: neither is a success nor a failure of the policy."""

    def moody(video: Video, instruction: str) -> Any:
        outage = video.frames[-1, 0, 0, 0] % 3 == 1
        return Verdict(Outcome.INVALID, "outage") if outage else bright(video, instruction)

    env = DualNoiseVerification(toy_env(12, judge=moody, hallucinate=0.15))
    collected = collector(12, env=env, num_groups=40, max_groups=40, max_flagged=4).collect(0)
    counts, log = collected.counts, collected.metrics()
    members = [m for g in collected.groups for m in g.members]
    assert counts.dropped.total() > 0 and len(members) < log["n"] == 160
    assert min(counts.flagged, counts.invalid, counts.trusted_successes) > 0
    assert log["judged"] + log["invalid"] == log["n"] and log["trusted"] + log["flagged"] == log["judged"]
    assert (log["flagged"], log["invalid"]) == (counts.flagged, counts.invalid)
    assert log["invalid_rate"] == log["invalid"] / 160 and log["success_rate"] == counts.successes / 160
    assert log["trusted_success_rate"] == counts.trusted_successes / log["trusted"] != log["success_rate"]
    low, high = wilson_interval(counts.trusted_successes, int(log["trusted"]))
    assert (log["trusted_success_low"], log["trusted_success_high"]) == (low, high)
    # By hand, on the groups that were kept: what is trusted is what has a reward.
    kept = RolloutCounts()
    for group in collected.groups:
        kept.add(group)
    rewards = [m.reward for m in members if m.valid]
    assert (kept.trusted, kept.trusted_successes) == (len(rewards), sum(rewards))
    assert kept.flagged == sum(m.flagged for m in members) and kept.judged == len(rewards) + kept.flagged
    assert f"(n={counts.trusted}), {counts.flagged} flagged, {counts.invalid} INVALID" in str(counts)
    assert str(RolloutCounts(rollouts=4, invalid=4, groups=1)).startswith("success unknown (n=0), 0 flagged, 4 INVALID")


def test_an_environment_without_a_judge_gives_no_rewards() -> None:
    env = DreamVectorEnv(
        4, world_model=ShowActions(), judge="none", starts="null", max_episode_steps=1, autoreset_mode="Disabled"
    )
    env.starts = NullStarts((SIDE, SIDE, 3))
    with pytest.raises(NoUsableGroupError, match=r"untrustworthy.*look at the judge"):
        collector(4, env=env, max_groups=3).collect(0)


@pytest.mark.parametrize(("answer", "word"), [(True, "solves these starts"), (False, "more demonstrations")])
def test_no_usable_group_says_why_and_what_to_change(answer: bool, word: str) -> None:
    with pytest.raises(NoUsableGroupError, match=word) as caught:
        collector(4, env=toy_env(4, judge=lambda v, i: answer), max_groups=5).collect(0)
    assert "None of 5 groups" in str(caught.value) and f"{20 * answer} of 20 rollouts succeeded" in str(caught.value)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="autoreset_mode='Disabled'"):
        collector(4, env=toy_env(4, autoreset_mode="NextStep"))
    with pytest.raises(InvalidOptionError, match="max_groups=2"):
        collector(4, max_groups=2)
    with pytest.raises(RolloutInterrupted):
        collector(4, should_stop=lambda: True).collect(0)
    with pytest.raises(InvalidOptionError, match="group_size=1 must be at least 2"):
        toy_config(Path("x"), group_size=1)


# -- the update ------------------------------------------------------------------------------------------------------


def test_batch_weights_are_equation_2() -> None:
    """Mean over each trajectory's tokens, over a group's valid members, then over groups."""

    def rollout(length: int, reward: float, flagged: bool = False) -> Rollout:
        images = np.zeros((length, SIDE, SIDE, 3), np.uint8)
        tokens = torch.zeros(length, 14, dtype=torch.int64)
        start, actions, verdicts = Start(images[0], "nothing"), np.zeros((length, K, A)), np.zeros(length, np.int8)
        request = EpisodeRequest(None, 0, NoiseKey(0))
        what = {"verdict": Outcome(int(reward)), "valid": not flagged, "flagged": flagged}
        return Rollout(request, 0, start, images, actions, tokens, tokens.float(), verdicts, reward, **what)

    def group(index: int, *members: Rollout) -> Group:
        rewards = torch.tensor([float(m.reward) for m in members])
        result = group_advantages(rewards, None, torch.tensor([m.flagged for m in members]))
        start = Start(np.zeros((SIDE, SIDE, 3), np.uint8), f"group {index}")
        return Group(index, start, tuple(replace(member, start=start) for member in members), result)

    groups = (
        group(0, rollout(3, 1), rollout(1, 0)),
        group(1, rollout(2, 1), rollout(2, 1, True), rollout(2, 0), rollout(2, 0)),
    )
    batch = Batch.of(Rollouts(groups, RolloutCounts()))
    assert batch.trajectory.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert batch.instructions == ["group 0"] * 4 + ["group 1"] * 6
    chunks, per_token = batch.weights(torch.arange(5), "trajectory")
    assert chunks.tolist() == list(range(10))
    expected = torch.tensor([1 / 12] * 3 + [1 / 4] + [1 / 12] * 6) / 14
    torch.testing.assert_close(per_token, expected)
    chunks, per_token = batch.weights(torch.tensor([3, 1]), "trajectory")
    assert chunks.tolist() == [3, 6, 7] and float(per_token.sum() * 14) == pytest.approx(1)


def test_it_learns_from_chance_to_nearly_always(tmp_path: Path) -> None:
    begun = time.process_time()
    env = toy_env(64, chunks=1)
    result = train(
        tmp_path, env, steps=25, group_size=8, groups_per_step=8, lr=0.1, save_every=25, dual_noise_verification=False
    )
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert lines[0]["success_rate"] < 0.35
    last = lines[-1]["success_rate"] if result.stopped == "steps" else 1.0
    assert last > 0.9, [round(line["success_rate"], 2) for line in lines]
    assert time.process_time() - begun < 30
    first = lines[0]
    assert (
        first["first_ratio_deviation"] < 1e-5 and first["success_low"] < first["success_rate"] < first["success_high"]
    )
    assert {
        "approx_kl",
        "clip_frac",
        "entropy",
        "grad_norm",
        "flagged_rate",
        "invalid_rate",
        "dropped_all_failure",
    } <= {*first}
    assert lines[-1]["entropy"] < first["entropy"]
    timings = read_jsonl(tmp_path / "timings.jsonl")[0]
    assert timings["frames"] == first["n"] * K and timings["rollout_s"] > 0 and timings["frames_per_s"] > 0


def test_the_update_clips_below_by_low_and_above_by_high() -> None:
    """The loss and its metrics of a policy that has moved away, against Eq. 2 worked out in double precision."""
    config = toy_config(Path("unused"), clip_eps_low=0.05, clip_eps_high=0.4, temperature=1.0)
    batch, policy = Batch.of(collector(12).collect(0)), TinyPolicy()
    with torch.no_grad():
        noise = torch.randn(policy.linear.weight.shape, generator=torch.Generator().manual_seed(0))
        policy.linear.weight += 0.5 * noise
    chunks, weight = batch.weights(torch.arange(len(batch.advantages)), "trajectory")
    loss, (part,) = add_gradients(config, policy, batch, chunks, weight)
    texts = [batch.instructions[i] for i in chunks.tolist()]
    now = policy.logprobs(batch.images[chunks], texts, batch.tokens[chunks], temperature=1.0).detach().double()
    ratio = (now - batch.old_logprobs[chunks].double()).exp()
    gain = batch.advantages[batch.trajectory[chunks]].double()[:, None].expand_as(ratio)
    above, below = (ratio > 1.4) & (gain > 0), (ratio < 0.95) & (gain < 0)
    assert above.any() and below.any() and ((ratio > 1.05) & (ratio < 1.4) & (gain > 0)).any()
    assert ((ratio < 0.95) & (ratio > 0.6) & (gain < 0)).any()
    cut = torch.where(above, torch.full_like(ratio, 1.4), torch.where(below, torch.full_like(ratio, 0.95), ratio))
    wanted = -(weight.double()[:, None] * cut * gain).sum()
    assert loss == pytest.approx(float(wanted), rel=1e-4)
    assert float(part["clip_frac"]) == pytest.approx(float((above | below).double().mean()))


def test_the_log_shows_the_configured_clip_range(tmp_path: Path) -> None:
    """From the options to metrics.jsonl: each bound cuts where it says, and nowhere else."""

    def clipped(name: str, low: float, high: float) -> float:
        train(tmp_path / name, steps=1, epochs=4, lr=0.3, clip_eps_low=low, clip_eps_high=high, minibatches=1)
        return float(read_jsonl(tmp_path / name / "metrics.jsonl")[0]["clip_frac"])

    assert clipped("none", 0.999, 1e6) == 0.0
    assert clipped("above", 0.999, 0.01) > 0.05 and clipped("below", 0.01, 1e6) > 0.05


def test_microbatches_change_nothing_but_rounding(tmp_path: Path) -> None:
    big = train(tmp_path / "a", steps=1)
    small = train(tmp_path / "b", steps=1, microbatch_size=3)
    torch.testing.assert_close(weights(big), weights(small), rtol=1e-4, atol=1e-5)


def test_a_policy_that_changes_between_acting_and_learning_is_caught(tmp_path: Path) -> None:
    class Moody(TinyPolicy):
        def logprobs(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().logprobs(*args, **kwargs) + 1e-3

    with pytest.raises(TrainingDivergedError, match=r"ratio is off 1 by 0\.001.*dropout"):
        train(tmp_path, policy=Moody())


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    policy = TinyPolicy()
    before = [p.detach().clone() for p in policy.parameters()]
    policy.linear.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingDivergedError, match="gradient norm nan"):
        train(tmp_path, policy=policy)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_command_line_run_from_files_to_files(tmp_path: Path) -> None:
    """The policy from a folder, the environment from its id; the trained policy is a folder that loads again."""
    sizes = TinyVLAConfig(stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2, decoder_layers=1)
    TinyVLA(sizes).save_pretrained(tmp_path / "sft")
    config = GRPOConfig(
        tmp_path / "run",
        env_id="rawdream/Dream-v0",
        env_kwargs={"world_model": "null", "judge": "scripted", "starts": "null", "max_episode_steps": 3},
        policy=str(tmp_path / "sft"),
        steps=2,
        group_size=4,
        groups_per_step=2,
        lr=1e-3,
        max_flagged=3,
        progress=False,
    )
    result = train_grpo(config)
    assert result.stopped == "steps" and result.message.startswith("All 2 of 2 steps are done")
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["first_ratio_deviation"] < 1e-5 and first["flagged_rate"] > 0 and first["entropy"] > 5
    before, after = load_policy(tmp_path / "sft"), load_policy(tmp_path / "run" / "policy")
    assert isinstance(before, nn.Module) and isinstance(after, nn.Module)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), result.policy.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))


def gradual() -> ScriptedJudge:
    """Success probability: how bright the last frame is."""

    def judge(video: Video, instruction: str) -> Verdict:
        chance = float(video.frames[-1].mean()) / 255
        return Verdict(Outcome(int(chance > 0.9)), probability=chance)

    return ScriptedJudge(judge)


def test_world_env_s_reward_and_ends_by_options(tmp_path: Path) -> None:
    sizes = TinyVLAConfig(image_size=16, stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2)
    TinyVLA(sizes).save_pretrained(tmp_path / "sft")
    config = toy_config(
        tmp_path / "run",
        env_id="test/ShowGripper-v0",
        env_kwargs={"judge": "none"},
        policy=str(tmp_path / "sft"),
        reflector="test_grpo:gradual",
        reflector_threshold=0.55,
        baseline="leave_one_out",
        scale_rewards="none",
        steps=1,
        lr=1e-3,
        dual_noise_verification=False,
    )
    train_grpo(config)
    line = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert 1 < line["chunks_per_rollout"] < 4 and line["invalid"] == 0  # some end early
    assert 0.2 < line["reward"] < 0.8 and line["reward"] % 0.01 > 1e-6  # a probability, not a verdict
    assert line["dropped_all_failure"] == 0 and line["groups_kept"] == 3


def test_the_simulator_is_driven_by_the_same_loop(tmp_path: Path) -> None:
    """Random actions never succeed there; what counts is that members share a scene and are told apart by sampling."""
    from rawdream_env.piper.envs import PiperSimVectorEnv

    env = PiperSimVectorEnv(3, max_episode_steps=1, autoreset_mode="Disabled")
    groups: list[RolloutCounts] = []
    with pytest.raises(NoUsableGroupError, match=r"0 of 4 rollouts succeeded\); the policy never succeeds"):
        GroupCollector(
            env,
            TinyVLA(TinyVLAConfig(width=16, heads=2)),
            group_size=4,
            num_groups=1,
            max_groups=1,
            on_group=groups.append,
        ).collect(0)
    assert groups[0].rollouts == groups[0].chunks == 4 and groups[0].invalid == 0
    assert len({env.start_of(row).seed for row in range(3)}) == 1
    env.close()


# -- stopping and resuming -------------------------------------------------------------------------------------------


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_two_runs_are_equal_and_a_resumed_one_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 5, "epochs": 2, "hallucinate": 0.1}

    def go(name: str, **changes: Any) -> GRPOResult:
        chosen = {**options, **changes}
        env = toy_env(chosen.pop("num_envs", 12), hallucinate=chosen.pop("hallucinate"), judge_every="chunk")
        return train(tmp_path / name, env, **chosen)

    a, b = go("a"), go("b", num_envs=5)
    assert torch.equal(weights(a), weights(b))
    go("c", steps=2)
    c = go("c")
    assert torch.equal(weights(a), weights(c)) and c.step == 5 and c.stopped == "steps"
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc"]
    assert logs[0] == logs[1] == logs[2]
    assert go("a").step == 5  # nothing left to do
    with pytest.raises(RunDirError, match=r"seed: 0 -> 1"):
        go("a", seed=1)
    with pytest.raises(RunDirError, match=r"lr: 0.05 -> 0.1"):
        go("a", lr=0.1)


def test_a_checkpoint_of_another_policy_is_refused(tmp_path: Path) -> None:
    train(tmp_path, steps=1)
    other = TinyPolicy()
    other.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"another policy: 1 parameters differ.*'extra'"):
        train(tmp_path, policy=other, steps=2)


def train_on_toy(run_dir: Path) -> GRPOResult:
    env = toy_env(12, hallucinate=0.1, judge_every="chunk")
    return train(run_dir, env, steps=12, save_every=1, epochs=2)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_identical(quick_disk: Path) -> None:
    unbroken, killed = kill_at_random_moments("test_grpo:train_on_toy", quick_disk)
    last = "checkpoints/step_00000012/manifest.json"
    for run in killed:  # config.json differs in run_dir alone
        assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
        manifests = [json.loads((folder / last).read_text())["files"] for folder in (run, unbroken)]
        assert manifests[0] == manifests[1]
        assert torch.equal(weights(train_on_toy(run)), weights(train_on_toy(unbroken)))


def test_ctrl_c_saves_and_says_so(quick_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    unbroken = train(quick_disk / "unbroken", steps=6)
    env = toy_env()
    step = env.step

    def stepping(actions: Any) -> Any:
        if len(read_jsonl(quick_disk / "run" / "metrics.jsonl")) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(actions)

    env.step = stepping  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    result = train(quick_disk / "run", env, steps=6, save_every=100)
    assert (result.stopped, result.step) == ("interrupted", 2)
    assert result.message.startswith("Stopped on request: 2 of 6 steps are done and saved")
    assert result.message in caplog.messages
    assert signal.getsignal(signal.SIGINT) is before
    again = train(quick_disk / "run", steps=6, save_every=100)
    assert again.stopped == "steps" and torch.equal(weights(again), weights(unbroken))
    logs = [(quick_disk / run / "metrics.jsonl").read_bytes() for run in ("run", "unbroken")]
    assert logs[0] == logs[1]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
def test_ctrl_c_does_not_wait_for_a_stopped_child(quick_disk: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    os.kill(child.pid or 0, signal.SIGSTOP)
    wait_until(lambda: stopped_children() == [child.pid])
    env = toy_env()
    step = env.step

    def stepping(actions: Any) -> Any:
        if len(read_jsonl(quick_disk / "run" / "metrics.jsonl")) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it waits on")
        return step(actions)

    env.step = stepping  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            train(quick_disk / "run", env, steps=4, save_every=100)
    finally:
        child.kill()
    assert torch.equal(weights(train(quick_disk / "run", steps=4)), weights(train(quick_disk / "unbroken", steps=4)))


def test_it_stops_when_the_minutes_are_up_and_when_everything_is_solved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"minutes": 0.0, "steps": 3, "max_groups_per_step": 3}  # without replacements
    result = train(tmp_path / "minutes", toy_env(judge=None), **options)  # verdicts by hash
    assert (result.stopped, result.step) == ("minutes", 1) and "1 of 3 steps are done" in result.message
    solved = train(tmp_path / "solved", toy_env(judge=lambda v, i: True), max_groups_per_step=4)
    assert solved.stopped == "solved" and "nothing left to learn" in solved.message
    with pytest.raises(NoUsableGroupError, match="all_failure"):
        train(tmp_path / "hopeless", toy_env(judge=lambda v, i: False), max_groups_per_step=4)


def test_a_step_that_finds_no_usable_groups_ends_with_its_minutes(tmp_path: Path, caplog: Any) -> None:
    """It opens the groups that every step needs and no replacements; the resumed run is as if it had not been stopped."""
    shown: list[int] = []

    def hopeless(video: Video, instruction: str) -> bool:
        shown.append(len(video.frames))
        return False

    config = toy_config(tmp_path / "run")
    result = train(tmp_path / "run", toy_env(12, judge=hopeless), minutes=0.0, max_groups_per_step=64)
    assert (result.stopped, result.step) == ("minutes", 0) and "0 of" in result.message
    assert len(shown) <= config.groups_per_step * config.group_size
    assert any("Time is up in step 1, with 0 of" in message for message in caplog.messages)
    again = train(tmp_path / "run", steps=2, max_groups_per_step=64)
    unbroken = train(tmp_path / "unbroken", steps=2, max_groups_per_step=64)
    assert torch.equal(weights(again), weights(unbroken))
    logs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("run", "unbroken")]
    assert logs[0] == logs[1]


def test_a_failure_between_updates_loses_no_finished_step(tmp_path: Path) -> None:
    env = toy_env()
    step = env.step

    def failing(actions: Any) -> Any:
        if len(read_jsonl(tmp_path / "metrics.jsonl")) == 3:
            raise RuntimeError("judge is gone")
        return step(actions)

    env.step = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="judge is gone"):
        train(tmp_path, env, steps=6, save_every=100)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]
    unbroken = train(tmp_path / "unbroken", steps=6)
    assert torch.equal(weights(train(tmp_path, steps=6, save_every=100)), weights(unbroken))


def test_a_step_whose_log_line_is_refused_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes half of the third line, then none of it; the run after that writes what an unbroken one writes."""
    real, half = os.write, list[int]()

    def write(descriptor: int, data: Any) -> int:
        if bytes(data[:10]) == b'{"step": 3' and not half:
            half.append(real(descriptor, bytes(data[: len(data) // 2])))
            return half[0]
        if half:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    unbroken = train(tmp_path / "unbroken", steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(RunDirError, match=r"metrics.jsonl.*No space left"):
            train(tmp_path / "run", steps=4, save_every=2)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    resumed = train(tmp_path / "run", steps=4, save_every=2)
    assert torch.equal(weights(resumed), weights(unbroken))
    logs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("run", "unbroken")]
    assert logs[0] == logs[1]


def test_it_runs_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[GRPOResult] = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path, steps=1)))
    thread.start()
    thread.join()
    assert results[0].step == 1
