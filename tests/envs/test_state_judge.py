"""A dream whose world model knows its state: ``info["state_success"]``, the judge "state", verification with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.verification import Verifier
from rawdream_env.judges.state import StateJudge
from rawdream_env.types import Outcome, SupportsState, Trajectory, Verdict, Video
from rawdream_env.world_models.null import NullState, NullWorldModel

ACTIONS = np.zeros((4, 8, 7), np.float32)


class Knowing(NullWorldModel):
    """Tasks are done after the second chunk; in later draws only where the row's seed is even. "unknown" rows: -1."""

    unknown = False

    def success(self, state: NullState, instructions: Sequence[str]) -> NDArray[np.int8]:
        assert len(instructions) == len(state)
        done = [key.chunk >= 2 and (key.draw == 0 or key.seed % 2 == 0) for key in state.keys]
        return np.where(self.unknown, -1, np.array(done)).astype(np.int8)

    def belief(self, state: NullState) -> Any:
        raise AssertionError("an environment asks for success alone")


def never(videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
    return [Verdict(Outcome.FAILURE)] * len(videos)


def dream(judge: Any = "state", model: Any = None, **options: Any) -> DreamVectorEnv:
    settings = {"autoreset_mode": "Disabled", "max_episode_steps": 3, "starts": "null", **options}
    return DreamVectorEnv(4, world_model=model or Knowing(), judge=judge, **settings)


def test_the_state_is_reported_and_ends_the_episode_as_the_judge() -> None:
    assert isinstance(Knowing(), SupportsState) and not isinstance(NullWorldModel(), SupportsState)
    env = dream()
    assert env.judge_every == "chunk"  # it looks for the first success
    env.reset(seed=0)
    _, reward, ends, _, infos = env.step(ACTIONS)
    assert not reward.any() and not ends.any()
    assert infos["_state_success"].all() and not infos["state_success"].any()
    _, reward, ends, _, infos = env.step(ACTIONS)
    assert reward.all() and ends.all() and infos["state_success"].all() and infos["is_success"].all()
    assert all(video is not None and video.state_success == 1 for video in env.videos())


def test_the_state_is_never_rewarded_by_another_judge() -> None:
    env = dream(never, judge_every="chunk")
    env.reset(seed=0)
    for _ in range(3):
        _, reward, ends, truncated, infos = env.step(ACTIONS)
        assert not reward.any() and not ends.any()
    assert truncated.all() and infos["state_success"].all() and not infos["is_success"].any()


def test_autoreset_moves_it_to_the_final_info() -> None:
    env = dream(autoreset_mode="SameStep")
    env.reset(seed=0)
    env.step(ACTIONS)
    infos = env.step(ACTIONS)[4]
    assert infos["final_info"]["state_success"].all() and not infos["_state_success"].any()


@pytest.mark.parametrize("model", [NullWorldModel, Knowing])
def test_without_a_state_the_verdict_is_invalid(model: Any) -> None:
    made = model()
    made.unknown = True
    env = dream(model=made, judge_every="episode")
    env.reset(seed=0)
    for _ in range(3):
        _, reward, _, _, infos = env.step(ACTIONS)
    assert not reward.any() and (infos["verdict"] == -1).all() and not infos["valid"].any()
    assert "state_success" not in infos
    verdict = StateJudge()([Video(np.zeros((1, 8, 8, 3), np.uint8), 10.0)], ["stack"])[0]
    assert verdict.outcome == Outcome.INVALID and "reports no state" in verdict.reason


def test_it_watches_as_the_held_out_judge() -> None:
    env = dream(never, held_out_judge="state")
    env.reset(seed=0)
    for _ in range(3):
        reward = env.step(ACTIONS)[1]
    verdicts = [trajectory.extra["verdict"] for trajectory in env.trajectories() if trajectory is not None]
    assert len(verdicts) == 4 and not reward.any()
    assert all(v.outcome == Outcome.FAILURE and v.held_out == Outcome.SUCCESS for v in verdicts)


def test_a_second_dream_has_its_own_state() -> None:
    env = dream()
    env.reset(seed=[0, 1, 2, 3])
    env.step(ACTIONS)
    env.step(ACTIONS)
    trajectories: list[Trajectory] = [trajectory for trajectory in env.trajectories() if trajectory is not None]
    again = Verifier(env).second_dreams(trajectories)
    even = [trajectory.noise_key.seed % 2 == 0 for trajectory in trajectories]
    assert even == [True, False, True, False]
    assert [replay.verdict.outcome == Outcome.SUCCESS for replay in again if replay.verdict] == even
    results = [Verifier(env).result(trajectory.extra["verdict"], replay.verdict)
               for trajectory, replay in zip(trajectories, again, strict=True)]  # fmt: skip
    assert [result.verified for result in results] == even
    assert [result.flagged for result in results] == [not verified for verified in even]
