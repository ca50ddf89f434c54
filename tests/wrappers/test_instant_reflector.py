"""The instant reflector: its rule, its contract as a vector environment, and when it stops experts in the simulator."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.reflector import Reflection
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.piper.envs import PiperSimVectorEnv
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.types import Outcome, Verdict, Video
from rawdream_env.wrappers import DualNoiseVerification, InstantReflector


def by_hash(video: Video, instruction: str) -> float:
    """A probability from the frames; one in seven is unreadable."""
    digest = zlib.crc32(np.ascontiguousarray(video.frames).data)
    return float("nan") if digest % 7 == 0 else (digest % 1000) / 1000


def dream(num_envs: int = 3, judge: Any = "none", **kwargs: Any) -> DreamVectorEnv:
    return DreamVectorEnv(num_envs, world_model="null", judge=judge, starts="null", return_frames=True, **kwargs)


def script(*chances: float) -> ScriptedJudge:
    """The probability after chunk c, from the length of the video (8 frames a chunk)."""
    return ScriptedJudge(lambda video, text: chances[(len(video.frames) - 1) // 8 - 1])


def actions(env: Any, seed: int = 0) -> Any:
    return np.random.default_rng(seed).uniform(-1, 1, env.action_space.shape).astype(np.float32)


def test_the_rule_by_hand() -> None:
    def verdict(chance: float | None, outcome: Outcome = Outcome.FAILURE) -> Verdict:
        return Verdict(outcome, "x", chance)

    rule = Reflection(0.8, 2, 0.1)
    steps = [rule.add(v) for v in (verdict(0.5), verdict(0.9), verdict(None, Outcome.INVALID), verdict(0.85))]
    assert [reward for reward, _ in steps] == pytest.approx([0.4, 0.4, 0.0, -0.05])
    assert [done for _, done in steps] == [False, False, False, True]  # an outage does not break the streak
    assert sum(reward for reward, _ in steps) == pytest.approx(0.85 - 0.1)
    own = Reflection(None, 1)  # the judge's own decision, and no probability at all
    assert own.add(verdict(0.99)) == (0.99, False)
    assert own.add(verdict(None, Outcome.SUCCESS)) == (pytest.approx(0.01), True)


def test_it_keeps_the_contract_in_every_mode() -> None:
    def make(num_envs: int = 1, **kwargs: Any) -> InstantReflector:
        return InstantReflector(dream(num_envs, **kwargs), ScriptedJudge(by_hash), threshold=0.8)

    report = check_vector_env(make, num_envs=(1, 3), chunks=20, strict=True)
    assert not report.failed and not report.skipped


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_episodes_stop_where_predicted_and_rewards_sum_to_the_probability(mode: str) -> None:
    env = InstantReflector(dream(autoreset_mode=mode), script(0.2, 0.1, 0.9, 0.3), threshold=0.8)
    env.reset(seed=0)
    told = [env.step(actions(env, chunk)) for chunk in range(3)]
    rewards = np.stack([step[1] for step in told])
    assert rewards[:, 0] == pytest.approx([0.2, -0.1, 0.8])
    assert [step[2].all() for step in told] == [False, False, True] and not any(step[3].any() for step in told)
    final = told[2][4]["final_info"] if mode == "SameStep" else told[2][4]
    assert final["is_success"].all() and (final["verdict"] == 1).all() and (final["env_verdict"] == -1).all()
    assert final["success_probability"] == pytest.approx([0.9] * 3) and final["frames"].shape[1] == 8
    assert (told[1][4]["verdict"] == -1).all()
    recorded = env.unwrapped.trajectories()
    assert [len(t.actions) for t in recorded] == [3] * 3
    assert all(t.extra["verdict"].outcome is Outcome.SUCCESS for t in recorded)
    if mode == "SameStep":
        assert told[2][4]["_final_obs"].all() and not told[2][4]["_success_probability"].any()
    if mode == "NextStep":
        _, reward, terminated, _, infos = env.step(actions(env))
        assert not reward.any() and not terminated.any() and not infos.get("_frames", np.zeros(3)).any()
    if mode == "Disabled":
        env.reset(options={"reset_mask": np.array([True, False, False])})
    _, reward, _, _, infos = env.step(actions(env))
    assert reward[0] == pytest.approx(0.2)  # a new episode begins from nothing
    assert infos["_success_probability"].tolist() == [True, mode != "Disabled", mode != "Disabled"]


def test_patience_and_the_horizon() -> None:
    env = InstantReflector(dream(1, max_episode_steps=3), script(0.9, 0.2, 0.9), threshold=0.8, patience=2)
    env.reset(seed=0)
    ends = [env.step(actions(env))[2:] for _ in range(3)]
    assert [bool(t[0]) for t, *_ in ends] == [False] * 3 and ends[2][1].all()
    assert ends[2][2]["is_success"].all()  # at the horizon the last chunk decides


@pytest.mark.parametrize("kind", ["unreadable", "unavailable"])
def test_outages_are_masked_and_end_nothing(kind: str) -> None:
    def rule(video: Video, text: str) -> float:
        return float("nan") if len(video.frames) == 17 else 0.5

    class Down(ScriptedJudge):
        def __call__(self, videos: Any, instructions: Any) -> Any:
            if kind == "unavailable" and len(videos[0].frames) == 17:
                raise JudgeUnavailableError("gone")
            return super().__call__(videos, instructions)

    env = InstantReflector(dream(2, max_episode_steps=2), Down(rule), threshold=0.4, patience=2)
    env.reset(seed=0)
    env.step(actions(env))
    _, reward, terminated, truncated, infos = env.step(actions(env))
    assert not reward.any() and not terminated.any() and truncated.all()
    assert not infos["valid"].any() and (infos["verdict"] == -1).all() and not infos["is_success"].any()
    assert not infos.get("_success_probability", np.zeros(2)).any()


@pytest.mark.parametrize("repeats", [True, False])
def test_verification_around_it_asks_its_judge_and_judges_of_windows_see_the_last_frames(repeats: bool) -> None:
    seen: list[int] = []

    def rule(video: Video, text: str) -> float:
        seen.append(len(video.frames))
        return 0.9 if repeats or len(seen) <= 2 else 0.7  # the judge's own decision would be a success at 0.7 too

    def never(video: Video, text: str) -> bool:
        raise AssertionError("the environment's own judge was asked about the second dream")

    inner = dream(2, judge=ScriptedJudge(never))
    env = DualNoiseVerification(InstantReflector(inner, ScriptedJudge(rule), threshold=0.8, last_frames=8))
    env.reset(seed=0)
    _, reward, terminated, _, infos = env.step(actions(env))
    assert terminated.all() and seen == [8] * 4
    assert infos["verified"].tolist() == [repeats] * 2 and infos["flagged"].tolist() == [not repeats] * 2
    assert reward.tolist() == pytest.approx([0.9 * repeats] * 2) and infos["valid"].tolist() == [repeats] * 2
    assert env.statistics.n_flagged == 2 * (not repeats)


def test_the_same_as_an_argument_of_the_environment() -> None:
    options = {"judge": ScriptedJudge(by_hash), "threshold": 0.8, "patience": 2}
    inside, outside = dream(reflector=options), InstantReflector(dream(), options["judge"], threshold=0.8, patience=2)
    for env in (inside, outside):
        env.reset(seed=3)
    for chunk in range(12):
        one, two = (env.step(actions(env, chunk)) for env in (inside, outside))
        assert all(np.array_equal(a, b) for a, b in zip(one[1:4], two[1:4], strict=True))
        assert np.array_equal(one[4]["verdict"], two[4]["verdict"])
    with pytest.raises(InvalidOptionError, match="already has a reflector"):
        InstantReflector(inside, "scripted")


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidOptionError, match="return_frames=True"):
        InstantReflector(DreamVectorEnv(1, world_model="null", starts="null", judge="scripted"))
    for options in ({"threshold": 0.0}, {"patience": 0}, {"initial": 2.0}, {"last_frames": 1}):
        with pytest.raises(InvalidOptionError, match="=-?[0-9]"):
            InstantReflector(dream(), "scripted", **options)
    with pytest.raises(InvalidOptionError, match="a reflector needs a judge"):
        InstantReflector(dream())
    with pytest.raises(InvalidOptionError, match=r"reflector has unknown options \['patients'\]; pass .*patience"):
        dream(reflector={"judge": "scripted", "patients": 2})
    for options in ({"patience": 2}, "scripted"):
        with pytest.raises(InvalidOptionError, match="reflector has (no judge|unknown options)"):
            dream(reflector=options)


def test_the_simulator_may_judge_at_the_horizon_alone() -> None:
    env = PiperSimVectorEnv(1, judge_every="episode", max_episode_steps=2)
    env.reset(seed=0)
    verdicts = [int(env.step(np.zeros(env.action_space.shape, np.float32))[4]["verdict"][0]) for _ in range(2)]
    env.close()
    assert verdicts == [-1, 0]


@pytest.mark.slow
def test_it_stops_experts_in_the_simulator_when_they_are_done() -> None:
    from benchmarks.instant_reflector import LATE, _play, _record

    episodes = [_record(seed, 0.1) for seed in range(8)]
    stops, whole = _play(episodes, None, 2)
    first = [int(np.flatnonzero(episode["truth"])[0]) for episode in episodes]
    late = [LATE + 1 if stop is None else stop - done for stop, done in zip(stops, first, strict=True)]
    assert whole and sum(0 <= chunks <= LATE for chunks in late) >= 7, late
