"""The rule from verdicts to a reward, against its table written out by hand, and the component that verifies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.verification import DualNoiseStatistics, EpisodeResult, Verifier, episode_result
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.types import Outcome, Trajectory, Verdict, Video
from rawdream_env.world_models.null import NullWorldModel

YES, NO, NONE = Verdict(Outcome.SUCCESS, "y"), Verdict(Outcome.FAILURE, "n"), Verdict(Outcome.INVALID, "?")

# (first, second) -> reward, verdict, valid, verified, flagged, reason; with "mask"
TABLE = [
    (NO, None, EpisodeResult(0.0, Outcome.FAILURE, True, True, False, "n")),
    (NO, YES, EpisodeResult(0.0, Outcome.FAILURE, True, True, False, "n")),
    (NONE, None, EpisodeResult(0.0, Outcome.INVALID, False, False, False, "?")),
    (NONE, YES, EpisodeResult(0.0, Outcome.INVALID, False, False, False, "?")),
    (YES, None, EpisodeResult(1.0, Outcome.SUCCESS, True, False, False, "y")),
    (YES, YES, EpisodeResult(1.0, Outcome.SUCCESS, True, True, False, "y")),
    (YES, NO, EpisodeResult(0.0, Outcome.SUCCESS, False, False, True, "n")),
    (YES, NONE, EpisodeResult(0.0, Outcome.SUCCESS, False, False, False, "?")),
]


@pytest.mark.parametrize(("first", "second", "expected"), TABLE)
def test_the_rule(first: Verdict, second: Verdict | None, expected: EpisodeResult) -> None:
    assert episode_result(first, second) == expected
    zero = expected._replace(valid=True) if expected.flagged else expected  # only a flagged episode differs
    assert episode_result(first, second, "zero") == zero


def dream(judge: Any, **options: Any) -> DreamVectorEnv:
    kwargs = {"world_model": "null", "starts": "null", "autoreset_mode": "Disabled", "max_episode_steps": 2, **options}
    return DreamVectorEnv(3, judge=judge, **kwargs)


def played(env: DreamVectorEnv) -> list[Trajectory]:
    """Three recorded episodes."""
    env.reset(seed=0)
    for _ in range(env.max_episode_steps):
        env.step(np.zeros((3, 8, 7), np.float32))
    return [trajectory for trajectory in env.trajectories() if trajectory is not None]


def test_second_dreams_have_fresh_noise_and_their_own_verdict() -> None:
    env = dream(ScriptedJudge())
    trajectories = played(env)
    verifier = Verifier(env, draw=2, keep_frames=True)
    again = verifier.second_dreams(trajectories)
    told = env.replay(trajectories, draw=2, return_frames=True)
    for replay, expected, video in zip(again, told, env.videos(), strict=True):
        assert video is not None and replay.verdict == expected.verdict
        assert np.array_equal(replay.frames, expected.frames) and not np.array_equal(replay.frames, video.frames)
    assert verifier.second_dreams([]) == []
    unjudged = verifier.second_dreams(trajectories, judged=False)
    assert all(replay.verdict is None and replay.frames is not None for replay in unjudged)


def test_an_outage_makes_second_verdicts_invalid() -> None:
    class Gone:
        away = False

        def __call__(self, videos: Any, instructions: Any) -> list[Verdict]:
            if self.away:
                raise JudgeUnavailableError("connection refused")
            return [YES] * len(videos)

    judge = Gone()
    env = dream(judge)
    verifier, trajectories = Verifier(env), played(env)
    judge.away = True
    verdicts = [replay.verdict for replay in verifier.second_dreams(trajectories)]
    assert all(v is not None and v.outcome is Outcome.INVALID and "connection refused" in v.reason for v in verdicts)
    assert verifier.result(YES, verdicts[0]) == episode_result(YES, verdicts[0])


def test_a_second_dream_that_breaks_down_is_invalid() -> None:
    class Fragile(NullWorldModel):
        broken = False

        def imagine(self, state: Any, actions: Any) -> Any:
            state, frames = super().imagine(state, actions)
            return state, frames.float() * (math.nan if self.broken else 1.0)

    model, judge = Fragile(), ScriptedJudge()
    env = dream(judge, world_model=model)
    trajectories, calls = played(env), judge.calls
    model.broken = True
    for judged in (True, False):
        for replay in Verifier(env).second_dreams(trajectories, judged=judged):
            assert replay.verdict is not None and "not finite" in replay.verdict.reason
    assert judge.calls == calls


def test_the_judge_is_whoever_gave_the_first_verdict() -> None:
    def own(videos: Any, instructions: Any) -> list[Verdict]:
        return [NO] * len(videos)

    assert Verifier(dream(own)).judge is own
    shown: list[Video] = []

    def reflecting(videos: Any, instructions: Any) -> list[Verdict]:
        shown.extend(videos)
        return [Verdict(Outcome.SUCCESS, probability=0.9)] * len(videos)

    env = dream(own, reflector={"judge": reflecting, "threshold": 0.95}, return_frames=True)
    verifier, trajectories = Verifier(env), played(env)
    shown.clear()
    (replay, *_) = verifier.second_dreams(trajectories)
    assert len(shown) == 3 and replay.verdict is not None
    assert replay.verdict.outcome is Outcome.FAILURE  # 0.9 does not reach the reflector's threshold
    assert Verifier(dream("none")).second_dreams(trajectories)[0].verdict == Verdict(
        Outcome.INVALID, "the second dream was not judged"
    )


def test_counts() -> None:
    env = dream(ScriptedJudge())
    verifier, trajectories = Verifier(env), played(env)
    assert math.isnan(verifier.statistics.flagged_rate) and math.isnan(verifier.statistics.work_ratio)
    verifier.count(episodes=4, chunks=8)
    verifier.count(replayed=trajectories, verdicts=[YES, NO, NONE])
    statistics = verifier.statistics
    assert statistics == DualNoiseStatistics(4, 3, 1, 1, 8, 6)
    assert statistics.flagged_rate == 0.5 and statistics.work_ratio == 1.75


def test_refusals() -> None:
    env = dream(ScriptedJudge())
    with pytest.raises(InvalidOptionError, match="Simulators and arms have no noise to redraw"):
        Verifier(object())
    with pytest.raises(InvalidOptionError, match="draw=0 would repeat"):
        Verifier(env, draw=0)
    with pytest.raises(InvalidOptionError, match="on_disagree='drop' is unknown"):
        Verifier(env, on_disagree="drop")  # type: ignore[arg-type]
