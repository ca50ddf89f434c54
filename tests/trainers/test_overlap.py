"""Judging behind the rollouts: verdicts reach their episodes, results do not depend on timing, and nothing hangs."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rawdream_env import cli
from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError, RawDreamError
from rawdream_env.files import load_safetensors
from rawdream_env.judges.overlap import OverlappedJudge
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.testing.faults import FaultServer, free_port, reply
from rawdream_env.trainers.grpo import rollout
from rawdream_env.trainers.grpo.batch import Rollouts
from rawdream_env.trainers.grpo.grpo import GRPOConfig, train_grpo
from rawdream_env.trainers.grpo.rollout import GroupCollector, can_overlap
from rawdream_env.types import Outcome, Verdict, Video
from rawdream_env.wrappers.dual_noise import DualNoiseVerification


class SlowJudge(ScriptedJudge):
    """By hash, after a time that differs from call to call."""

    remote = True

    def __init__(self, seed: int = 0, longest_s: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.longest_s, self.lock, self.rng = longest_s, threading.Lock(), np.random.default_rng(seed)

    def __call__(self, videos: Any, instructions: Any) -> list[Verdict]:
        with self.lock:
            wait = self.rng.uniform(0, self.longest_s)
        time.sleep(wait)
        return super().__call__(videos, instructions)


def numbered(count: int) -> list[Video]:
    return [Video(np.full((2, 1, 1, 3), i % 251, np.uint8), 1.0 + i) for i in range(count)]


def test_ten_thousand_delayed_and_shuffled_replies_reach_their_own_video() -> None:
    def judge(videos: Any, instructions: Any) -> list[Verdict]:
        time.sleep(float(hash(instructions[0]) % 7) * 1e-4)
        return [Verdict(Outcome.SUCCESS, text, video.fps) for video, text in zip(videos, instructions, strict=True)]

    late: OverlappedJudge[int] = OverlappedJudge(judge, threads=16)
    videos = numbered(10_000)
    for begin in range(0, len(videos), 8):
        tags = list(range(begin, begin + 8))
        late.submit(tags, [videos[tag] for tag in tags], [f"text {tag}" for tag in tags])
    found: dict[int, Verdict] = {}
    while len(late):
        found |= late.fetch(wait_s=1.0)
    assert sorted(found) == list(range(10_000))
    assert all(found[tag].reason == f"text {tag}" and found[tag].probability == 1.0 + tag for tag in found)
    assert late.fetch() == {}
    late.close()


def test_failures_are_raised_once_and_lose_nothing_else() -> None:
    def judge(videos: Any, instructions: Any) -> list[Verdict]:
        if instructions[0] == "down":
            raise JudgeUnavailableError("nobody there")
        return [Verdict(Outcome.SUCCESS)] * (len(videos) + (instructions[0] == "many"))

    late: OverlappedJudge[str] = OverlappedJudge(judge, threads=1)
    for word in ("down", "up", "many"):
        late.submit([word], numbered(1), [word])
    concurrent.futures.wait(late._calls, 60)
    with pytest.raises(JudgeUnavailableError):
        late.fetch()
    with pytest.raises(RawDreamError, match="gave 2 verdicts for 1 videos"):
        late.fetch()
    assert list(late.fetch()) == ["up"] and len(late) == 0
    with pytest.raises(ValueError, match="1 tags but 2 videos"):
        late.submit(["a"], numbered(2), ["a", "b"])
    late.close()


def policy() -> TinyVLA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyVLA(TinyVLAConfig(stem_channels=8, trunk_channels=8, trunk_blocks=1, width=16, heads=2))


def dream(judge: Any, num_envs: int = 6, verify: bool = True, **kwargs: Any) -> Any:
    options = {"autoreset_mode": "Disabled", "max_episode_steps": 2, **kwargs}
    env = DreamVectorEnv(num_envs, world_model="null", judge=judge, starts="null", **options)
    return DualNoiseVerification(env) if verify else env


def contents(rollouts: Rollouts) -> list[Any]:
    return [
        (
            g.index,
            m.reward,
            m.verdict,
            m.valid,
            m.flagged,
            m.request.seed,
            m.tokens.sum().item(),
            m.logprobs.sum().item(),
        )
        for g in rollouts.groups
        for m in g.members
    ]


@pytest.mark.parametrize("verify", [False, True])
def test_groups_are_the_same_whatever_the_timing(verify: bool) -> None:
    options: dict[str, Any] = {"group_size": 3, "num_groups": 4, "max_groups": 16, "max_flagged": 1}
    rates = {"success_rate": 0.6, "invalid_rate": 0.15}
    seen, statistics, counts = [], [], []
    for overlap, num_envs, seed in ((False, 6, 0), (True, 6, 1), (True, 6, 2), (True, 4, 3)):
        env = dream(SlowJudge(seed, **rates), num_envs, verify)
        collector = GroupCollector(env, policy(), overlap=overlap, **options)
        rollouts = [collector.collect(step) for step in (0, 1)]
        collector.close()
        seen.append([contents(r) for r in rollouts])
        counts.append([(r.counts.rollouts, r.counts.successes, r.counts.flagged, r.counts.invalid) for r in rollouts])
        statistics.append(env.statistics if verify else None)
        env.reset(seed=0)  # the environment judges for itself again
        steps = [env.step(np.zeros(env.action_space.shape, np.float32))[4] for _ in range(2)]
        assert (steps[-1]["verdict"] >= 0).any()
        env.close()
    assert seen[1:] == seen[:1] * 3 and counts[1:] == counts[:1] * 3 and statistics[1:] == statistics[:1] * 3
    if verify:
        assert statistics[0].n_flagged and statistics[0].n_invalid


def test_rows_go_on_while_verdicts_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all rows end with the same chunk: every episode is sent to the judge before the first verdict."""
    everyone = threading.Barrier(3)  # 3 waves of 4 rows, one call each

    class Late(ScriptedJudge):
        remote = True

        def __call__(self, videos: Any, instructions: Any) -> list[Verdict]:
            everyone.wait(timeout=10)
            return super().__call__(videos, instructions)

    monkeypatch.setattr(rollout, "_POLL_S", 30.0)
    collector = GroupCollector(dream(Late(), 4, verify=False), policy(), group_size=4, num_groups=3, max_groups=3)
    assert collector.collect(0).counts.rollouts == 12  # a broken barrier raises
    collector.close()


def test_training_is_bit_identical_with_and_without_and_after_an_interruption(tmp_path: Path) -> None:
    def train(name: str, steps: int, overlap: str, seed: int) -> Path:
        config = GRPOConfig(
            tmp_path / name, steps=steps, group_size=3, groups_per_step=2, temperature=1.0, lr=1e-3, save_every=1,
            overlap_judge=overlap, tensorboard=False, progress=False, max_flagged=3,
        )  # fmt: skip
        train_grpo(config, env=dream(SlowJudge(seed, success_rate=0.6)), policy=policy())
        return tmp_path / name

    plain = train("plain", 3, "off", 0)
    late = train("late", 3, "auto", 1)
    train("cut", 1, "auto", 2)
    cut = train("cut", 3, "on", 3)
    for run in (late, cut):
        assert (run / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
        ours, theirs = (load_safetensors(path / "policy" / "model.safetensors") for path in (run, plain))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_run_whose_judge_goes_away_parks_and_goes_on_as_if_nothing_had_been(
    overlap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, the real client, and a server that refuses every request from the middle of a step on.

    A refusal is final at once, so the deadlines can be long: answers that are slow on a busy machine still count.
    """
    policy().save_pretrained(tmp_path / "policy")

    def answer(request: Any) -> list[str]:
        url = request["messages"][-1]["content"][0]["video_url"]["url"]
        return [reply("Success" if sum(url.encode()) % 5 < 3 else "Failure")] * request["n"]

    def grpo(name: str, faults: Iterable[str], port: int) -> tuple[int, int]:
        with FaultServer(faults, answer=answer, port=port) as server:
            judge = f"vlm_server:{server.url}?deadline_s=120&request_timeout_s=60"
            parts = ["world_model", "null", "starts", "null", "max_episode_steps", "2", "judge", judge]
            code = cli.main([
                "grpo", "--run-dir", str(tmp_path / name), "--policy", str(tmp_path / "policy"), "--env-id",
                "rawdream/Dream-v0", "--env-kwargs", *parts, "--steps", "3", "--group-size", "4", "--groups-per-step", "4",
                "--num-envs", "16", "--temperature", "1", "--lr", "1e-3", "--no-tensorboard", "--no-progress",
                "--overlap-judge", overlap, "--max-flagged", "4",
            ])  # fmt: skip
            return code, server.requests

    port = free_port()
    code, asked = grpo("whole", (), port)
    assert code == 0
    capsys.readouterr()
    good = asked * 2 // 3  # in the second step or the third
    code, _ = grpo("parked", itertools.chain(["ok"] * good, itertools.repeat("400")), port)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 3 and "of the last 16 episodes could be judged (refused by http://" in said
    assert "status 400" in said and said.endswith("rerun the same command to resume from the last update.")
    assert 1 <= len((tmp_path / "parked" / "metrics.jsonl").read_text().splitlines()) < 3
    assert grpo("parked", (), port)[0] == 0
    whole, parked = tmp_path / "whole", tmp_path / "parked"
    assert (parked / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours, theirs = (load_safetensors(path / "policy" / "model.safetensors") for path in (parked, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_overlap_only_where_verdicts_may_come_later() -> None:
    from rawdream_env.wrappers import InstantReflector

    plain = dream(ScriptedJudge(), return_frames=True, verify=False)
    assert can_overlap(plain) and can_overlap(DualNoiseVerification(plain))
    every_chunk, nobody = dream(ScriptedJudge(), judge_every="chunk"), dream("none")
    for env in (InstantReflector(plain, "scripted"), every_chunk, nobody):
        assert not can_overlap(env)
        with pytest.raises(InvalidOptionError, match="overlap=True needs"):
            GroupCollector(env, policy(), overlap=True)
    assert GroupCollector(plain, policy())._judging is None  # a judge that computes here gains nothing


def test_an_unreachable_judge_ends_the_step_and_the_next_one_starts_clean() -> None:
    class Flaky(SlowJudge):
        down = True

        def __call__(self, videos: Any, instructions: Any) -> list[Verdict]:
            if self.down:
                raise JudgeUnavailableError("gone")
            return super().__call__(videos, instructions)

    judge = Flaky(success_rate=0.5)
    collector = GroupCollector(dream(judge), policy(), group_size=3, num_groups=2)
    with pytest.raises(JudgeUnavailableError):
        collector.collect(0)
    judge.down = False
    again = contents(collector.collect(0))
    collector.close()
    blocking = GroupCollector(dream(SlowJudge(success_rate=0.5)), policy(), group_size=3, num_groups=2, overlap=False)
    assert again == contents(blocking.collect(0))
