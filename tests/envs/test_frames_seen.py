"""Frames that nobody looks at are not computed, and nothing else changes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import ClosedEnvironmentError, JudgeError, OffloadedError, RawDreamError
from rawdream_env.judges.base import says_what_it_sees
from rawdream_env.judges.embedded import EmbeddedJudge
from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork
from rawdream_env.judges.ensemble import EnsembleJudge, HoldOutJudge
from rawdream_env.judges.robometer import RobometerJudge
from rawdream_env.judges.state import StateJudge
from rawdream_env.judges.vlm.config import VLMServerConfig
from rawdream_env.judges.vlm.prompt import sample_video
from rawdream_env.judges.vlm.server import VLMServerJudge
from rawdream_env.types import Judge, Outcome, SupportsFramesSeen, Verdict, Video
from rawdream_env.world_models.null import NullState, NullWorldModel

ROWS, HORIZON, K = 4, 3, 8


class Frugal(NullWorldModel):
    """Computes the frames that are looked at, and counts them. A task is done after the second chunk."""

    frames = brighter = 0

    def imagine_shown(self, state: NullState, actions: Tensor, shown: Tensor) -> tuple[NullState, Tensor]:
        after, frames = NullWorldModel.imagine(self, state, actions)
        self.frames += int(shown.sum())
        return after, frames[shown] + self.brighter

    def imagine(self, state: NullState, actions: Tensor) -> tuple[NullState, Tensor]:
        after, frames = self.imagine_shown(state, actions, torch.ones(len(state), K, dtype=torch.bool))
        return after, frames.unflatten(0, (len(state), K))

    def success(self, state: NullState, instructions: Sequence[str]) -> NDArray[np.int8]:
        return np.array([key.chunk >= 2 for key in state.keys], np.int8)

    def belief(self, state: NullState) -> Any:
        raise AssertionError("an environment asks for success alone")


def by_hash(frames: NDArray[np.uint8]) -> Verdict:
    chance = zlib.crc32(np.ascontiguousarray(frames).data) % 1000 / 1000
    return Verdict(Outcome(int(chance >= 0.6)), probability=chance)


class Looking:
    """Judges by the start, the middle and the end."""

    def frames_seen(self, total: int, fps: float) -> list[int]:
        assert fps == 10
        return [0, total // 2, total - 1]

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        return [by_hash(v.frames[self.frames_seen(len(v.frames), v.fps)]) for v in videos]


class Watching:
    """Judges by every frame."""

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        return [by_hash(video.frames) for video in videos]


def dream(judge: Any, model: Any = None, **options: Any) -> DreamVectorEnv:
    settings = {"autoreset_mode": "Disabled", "max_episode_steps": HORIZON, "starts": "null", **options}
    return DreamVectorEnv(ROWS, world_model=model or Frugal(), judge=judge, **settings)


def actions_of(step: int) -> NDArray[np.float32]:
    return np.random.default_rng(step).uniform(-1, 1, (ROWS, K, 7)).astype(np.float32)


def run(env: DreamVectorEnv, steps: int = HORIZON) -> list[Any]:
    """Observations, rewards, ends and what is told of the judge, step by step; rows 1 and 3 begin anew after the first."""
    env.reset(seed=0)
    told: list[Any] = []
    for step in range(steps):
        obs, *rest, infos = env.step(actions_of(step))
        told.append((obs["image"], *rest, infos["verdict"], infos.get("success_probability", 0)))
        if step == 0:
            env.reset(options={"reset_mask": np.array([False, True, False, True])})
    return told


def same(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("every", ["episode", "chunk"])
@pytest.mark.parametrize("mode", ["Disabled", "NextStep", "SameStep"])
@pytest.mark.parametrize("kind", [Looking, Watching, StateJudge])
def test_what_is_left_out_changes_nothing(kind: type, mode: str, every: str) -> None:
    told, counts = [], []
    for return_frames in (False, True):
        env = dream(kind(), judge_every=every, autoreset_mode=mode, return_frames=return_frames)
        told.append(run(env, 2 if mode == "Disabled" else 6))
        counts.append(env.world_model.frames)
        videos = [(v.frames, t.extra["verdict"]) for v, t in zip(env.videos(which="current"), env.trajectories(which="current"),
                                                                 strict=True) if v and t]  # fmt: skip
        told[-1].append([video for video, _ in videos])
    assert same(*told)
    assert counts[0] == counts[1] if kind is Watching else counts[0] < counts[1] * 0.6


def test_only_frames_that_are_looked_at_are_computed() -> None:
    env = dream(Looking(), judge_every="episode")
    env.reset(seed=0)
    for step, computed in enumerate((1, 2, 1)):  # frame 12 of 25 is in the second chunk
        env.world_model.frames = 0
        env.step(actions_of(step))
        assert env.world_model.frames == ROWS * computed
    recorded = [t for t in env.trajectories() if t is not None]
    env.world_model.frames = 0
    assert [r.verdict for r in env.replay(recorded, draw=0)] == [t.extra["verdict"] for t in recorded]
    assert env.world_model.frames == ROWS * 2
    env.replay(recorded, judge=False)
    assert env.world_model.frames == ROWS * 2
    env.replay(recorded, judge=Watching())
    assert env.world_model.frames == ROWS * (2 + 24)


def test_videos_are_whole() -> None:
    sparing, whole = dream("state"), dream("state", return_frames=True)
    for env in (sparing, whole):
        run(env, 2)
    assert sparing.world_model.frames == ROWS * 2
    for which in ("current", "finished"):
        for video, expected in zip(sparing.videos(which=which), whole.videos(which=which), strict=True):
            assert video is expected is None or np.array_equal(video.frames, expected.frames)
    computed = sparing.world_model.frames
    sparing.videos(which="current")
    assert sparing.world_model.frames == computed, "they are kept"


def test_videos_that_would_have_to_be_computed_say_so_where_they_cannot_be() -> None:
    env = dream("state")
    run(env, 1)
    with env.offload(), pytest.raises(OffloadedError, match="videos"):
        env.videos(which="current")
    env.close()
    assert env.videos(which="current") == [None] * ROWS
    env = dream("state", return_frames=True)
    env.reset(seed=0)
    env.step(actions_of(0))
    with env.offload():
        assert all(video is not None and len(video.frames) == 9 for video in env.videos(which="current"))


def test_finished_videos_of_a_closed_environment_cannot_be_computed() -> None:
    env = dream("state", max_episode_steps=1)
    env.reset(seed=0)
    env.step(actions_of(0))
    env.close()
    with pytest.raises(ClosedEnvironmentError, match="videos"):
        env.videos()


def test_a_judge_that_comes_later_gets_its_frames() -> None:
    env, whole = (
        dream(StateJudge(), judge_every="episode"),
        dream(Watching(), judge_every="episode", return_frames=True),
    )
    for each in (env, whole):
        each.reset(seed=0)
        each.step(actions_of(0))
    env.judge = Watching()
    assert same([env.step(actions_of(1))[1:4]], [whole.step(actions_of(1))[1:4]])
    env.max_episode_steps = 2  # lowered during the episode: the judge is asked earlier than was expected
    assert not same([env.step(actions_of(2))[4]["verdict"]], [np.zeros(ROWS) - 1])
    whole.step(actions_of(2))
    assert [t.extra["verdict"] for t in env.trajectories() if t] == [
        t.extra["verdict"] for t in whole.trajectories() if t
    ]


def test_episodes_left_unjudged_have_all_their_frames() -> None:
    env = dream("state")
    env.reset(seed=0, options={"judge": False})
    env.step(actions_of(0))
    assert env.world_model.frames == ROWS * K
    assert [len(video.frames) for video in env.videos(which="current") if video is not None] == [9] * ROWS
    assert env.world_model.frames == ROWS * K


@pytest.mark.parametrize("said", [[0, -13, -1], np.array([0, 12, 24]), (i for i in (24, 12, 0)), range(0, 25, 12)])
def test_indices_as_a_judge_may_give_them(said: Any) -> None:
    class Saying(Looking):
        def frames_seen(self, total: int, fps: float) -> Any:
            return indices

        def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
            return [by_hash(video.frames[indices]) for video in videos]

    indices = list(said)
    told = []
    for return_frames in (False, True):
        env = dream(Saying(), judge_every="episode", return_frames=return_frames)
        env.reset(seed=0)
        for step in range(HORIZON):
            infos = env.step(actions_of(step))[4]
        recorded = [t for t in env.trajectories() if t is not None]
        second = [r.verdict.probability for r in env.replay(recorded, return_frames=return_frames) if r.verdict]
        told.append([(infos["success_probability"], second)])
    assert same(*told)


@pytest.mark.parametrize("said", [[25], [-26], [0.5], [None]])
def test_indices_that_no_video_has(said: Any) -> None:
    class Saying(Looking):
        def frames_seen(self, total: int, fps: float) -> Any:
            return said

    env = dream(Saying(), judge_every="episode")
    env.reset(seed=0)
    with pytest.raises(JudgeError, match=r"Saying.frames_seen\(25, 10\) must give indices of a video of 25 frames"):
        env.step(actions_of(0))
    env.judge = Looking()
    env.step(actions_of(0))


def test_a_subclass_that_judges_in_another_way_is_given_every_frame() -> None:
    class Whole(Looking):
        def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
            return [by_hash(video.frames) for video in videos]

    class Counting(Watching):
        frames_seen = 0

    class Renamed(Looking):
        pass

    assert [says_what_it_sees(kind()) for kind in (Whole, Counting, Renamed)] == [False, False, True]
    told = [run(dream(Whole(), judge_every="episode", return_frames=frames), 3) for frames in (False, True)]
    assert same(*told)


def test_frames_that_were_handed_out_stay() -> None:
    """Whatever happens to the start's array and to the world model after the step."""
    env = dream("state")
    env.reset(seed=0)
    frames = [start.frame.copy() for start in map(env.start_of, range(ROWS))]
    image = env.step(actions_of(0))[0]["image"].copy()
    env.start_of(0).frame[:] = 0
    assert isinstance(env.world_model, Frugal)
    env.world_model.brighter = 9
    videos = [video for video in env.videos(which="current") if video is not None]
    for video, start, last in zip(videos, frames, image, strict=True):
        assert np.array_equal(video.frames[0], start) and np.array_equal(video.frames[-1], last)


def test_videos_of_starts_with_and_without_a_pose() -> None:
    env = dream("state")
    env.reset(seed=0)
    bare = [replace(start, proprio=None) for start in map(env.start_of, range(ROWS))]
    env.reset(seed=0, options={"starts": [start and replace(start, proprio=np.zeros(7, np.float32)) for start in bare]})
    env.reset(options={"reset_mask": np.arange(ROWS) == 1, "starts": bare})
    env.step(actions_of(0))
    assert [len(video.frames) for video in env.videos(which="current") if video is not None] == [9] * ROWS


def test_a_model_that_breaks_in_frames_left_out_is_told_of() -> None:
    class Broken(Frugal):
        def imagine_shown(self, state: NullState, actions: Tensor, shown: Tensor) -> tuple[NullState, Tensor]:
            after, frames = super().imagine_shown(state, actions, shown)
            frames = frames.float()
            if shown.all():
                frames[2] = torch.nan
            return after, frames

    env = dream("state", Broken())
    env.reset(seed=0)
    env.step(actions_of(0))
    with pytest.raises(RawDreamError, match="Broken gave frames that are not finite"):
        env.videos(which="current")
    env.step(actions_of(1))


def test_the_bundled_dream_with_the_bundled_judge() -> None:
    told = []
    for return_frames in (False, True):
        env = DreamVectorEnv(2, max_episode_steps=HORIZON, autoreset_mode="Disabled", return_frames=return_frames)
        env.reset(seed=5)
        for step in range(HORIZON):
            obs, *_, infos = env.step(actions_of(step)[:2] * 0.3)
        told.append([(obs["image"], infos["success_probability"], *(v.frames for v in env.videos() if v))])
        env.close()
    assert same(*told)


def noisy(frames: NDArray[np.uint8], seen: Sequence[int]) -> NDArray[np.uint8]:
    """Other frames, but for those that are ``seen``."""
    other = np.random.default_rng(1).integers(0, 256, frames.shape, dtype=np.uint8)
    other[list(seen)] = frames[list(seen)]
    return other


def small_judge(hold: int) -> EmbeddedJudge:
    torch.manual_seed(hold)
    network = JudgeNetwork(EmbeddedJudgeConfig(hold=hold))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return EmbeddedJudge(network)


@pytest.mark.parametrize("total", [2, 9, 17, 25, 65])
def test_verdicts_depend_on_the_frames_seen_alone(total: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (total, 64, 64, 3), dtype=np.uint8)
    one, two = small_judge(0), small_judge(3)
    judges: list[Judge] = [one, two, EnsembleJudge([one, two]), HoldOutJudge(one, two, alarm=None), Looking(),
                           HoldOutJudge(Looking(), StateJudge(), alarm=None)]  # fmt: skip
    for judge in judges:
        assert isinstance(judge, SupportsFramesSeen)
        seen = sorted(judge.frames_seen(total, 10.0))
        assert set(seen) <= set(range(total)) and {0, total - 1} <= set(seen)
        first, again = (judge([Video(x, 10.0, 0)], ["stack the red block"])[0] for x in (frames, noisy(frames, seen)))
        assert (first.outcome, first.probability, first.held_out) == (again.outcome, again.probability, again.held_out)
        changed = noisy(frames, seen[:-1])
        last = judge([Video(changed, 10.0, 0)], ["stack the red block"])[0]
        assert last.probability != first.probability or judge is not one, "the last frame matters"


@pytest.mark.parametrize("total", [2, 3, 8, 9, 65, 300])
def test_what_is_sent_depends_on_the_frames_seen_alone(total: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (total, 8, 8, 3), dtype=np.uint8)
    model = VLMServerJudge(VLMServerConfig(servers=("http://127.0.0.1:9/v1",), max_frames=20), check=False)
    seen = model.frames_seen(total, 10.0)
    sent = [sample_video(Video(x, 10.0), max_frames=20)[0] for x in (frames, noisy(frames, seen))]
    assert sent[0] is not None and sent[1] is not None and np.array_equal(sent[0].frames, sent[1].frames)
    assert RobometerJudge("http://127.0.0.1:9").frames_seen(total, 10.0) == sorted({*range(0, total, 8), total - 1})
