"""The one loop that drives a policy: order, refilling, given actions, and environments that are not of this package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.episodes import EpisodeRequest, EpisodeRunner, Rollout, make_env, run_episodes
from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts import NullStarts
from rawdream_env.types import Outcome, PolicyOutput, Start, Verdict
from rawdream_env.wrappers.dual_noise import DualNoiseVerification

K = 8


class KeyedPolicy:
    """Actions drawn from the key and the picture's mean; keeps what it was asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[NoiseKey, str, float]] = []

    def act(self, images: Any, instructions: Any, *, temperature: float, keys: Any) -> PolicyOutput:
        self.asked += [(key, text, temperature) for key, text in zip(keys, instructions, strict=True)]
        means = [image.mean() / 512 for image in images]
        drawn = [key.numpy(7).uniform(-0.5, 0.5, (K, 7)) + mean for key, mean in zip(keys, means, strict=True)]
        actions = torch.tensor(np.stack(drawn), dtype=torch.float32)
        return PolicyOutput(actions, (100 * actions).long().flatten(1), actions.flatten(1))

    def logprobs(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def dream(num_envs: int = 3, **options: Any) -> Any:
    judge = ScriptedJudge(success_rate=0.4)
    defaults = {"world_model": "null", "judge": judge, "starts": "null", "autoreset_mode": "Disabled"}
    defaults |= {"max_episode_steps": 3, "judge_every": "chunk", "return_frames": True}
    return DreamVectorEnv(num_envs, **{**defaults, **options})


def starts(count: int) -> list[Start]:
    return [NullStarts().sample(NoiseKey(5, episode=i)) for i in range(count)]


def same(a: Rollout, b: Rollout) -> bool:
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("images", "actions", "frames", "verdicts")
    )
    assert a.trajectory is not None and b.trajectory is not None
    tensors = torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)
    return arrays and tensors and a.reward == b.reward and a.trajectory.noise_key == b.trajectory.noise_key


def test_episodes_do_not_depend_on_the_number_of_rows() -> None:
    runs = [list(run_episodes(dream(n), starts(9), KeyedPolicy(), temperature=1.0)) for n in (1, 4, 16)]
    assert [rollout.number for rollout in runs[0]] == list(range(9))
    assert {len(rollout) for rollout in runs[0]} == {1, 2, 3}  # some succeed at once, some never
    for other in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], other, strict=True))
    for rollout, start in zip(runs[0], starts(9), strict=True):
        assert rollout.start is not None and np.array_equal(rollout.start.frame, start.frame)
        assert rollout.frames is not None and len(rollout.frames) == 1 + K * len(rollout)
        assert (rollout.reward == 1.0) == rollout.success_any == (rollout.verdict is Outcome.SUCCESS) and rollout.valid


def test_the_policy_is_asked_with_the_key_of_every_chunk() -> None:
    policy = KeyedPolicy()
    (rollout,) = run_episodes(dream(judge_every="episode"), starts(1), policy, temperature=0.7)
    (start,) = starts(1)
    assert policy.asked == [(NoiseKey(start.seed or 0, chunk=c), start.instruction, 0.7) for c in range(3)]
    assert rollout.verdicts[:2].tolist() == [-1, -1] and rollout.success_any == rollout.success_end


def test_rows_are_refilled_and_episodes_handed_out_at_once() -> None:
    env, begun = dream(4), []

    def source() -> Iterator[Start]:
        for i, start in enumerate(starts(12)):
            begun.append(i)
            yield start

    calls = 0
    step = env.step

    def counted(actions: Any) -> Any:
        nonlocal calls
        calls += 1
        return step(actions)

    env.step = counted
    running = run_episodes(env, source(), KeyedPolicy(), ordered=False)
    first = next(running)
    assert len(begun) == 4  # no more than there are rows
    rest = list(running)
    chunks = sum(len(rollout) for rollout in (first, *rest))
    assert sorted(rollout.number for rollout in (first, *rest)) == list(range(12)) and len(first) == 1
    assert chunks / 4 <= calls < 3 * 3  # waves of 4 that wait for their slowest take 3 chunks each


def test_given_actions_of_different_lengths() -> None:
    rng = np.random.default_rng(0)
    given = [rng.uniform(-1, 1, (t, K, 7)).astype(np.float32) for t in (1, 3, 2, 3)]
    env = dream(2, judge="none")
    rollouts = list(run_episodes(env, starts(4), actions=given))
    assert [len(rollout) for rollout in rollouts] == [1, 3, 2, 3]
    for rollout, start, actions in zip(rollouts, starts(4), given, strict=True):
        assert rollout.tokens is None and rollout.trajectory is None and np.array_equal(rollout.actions, actions)
        (again,) = run_episodes(dream(1, judge="none"), [start], actions=[actions])
        assert np.array_equal(rollout.frames, again.frames)
    acted = list(run_episodes(dream(3), starts(5), KeyedPolicy()))
    echoes = list(run_episodes(dream(2), starts(5), actions=[rollout.actions for rollout in acted]))
    assert all(
        np.array_equal(a.frames, b.frames) and a.verdict == b.verdict for a, b in zip(acted, echoes, strict=True)
    )


def test_requests_name_seed_key_and_tag() -> None:
    policy = KeyedPolicy()
    request = EpisodeRequest(None, 11, NoiseKey(99), tag=("group", 3))
    (rollout,) = run_episodes(dream(), [request], policy)
    env = dream(1)
    observation, infos = env.reset(seed=11)
    assert np.array_equal(rollout.start.frame, observation["image"][0]) and rollout.request.tag == ("group", 3)
    assert rollout.start.instruction == infos["instruction"][0] and policy.asked[0][0] == NoiseKey(99)
    assert rollout.trajectory is not None and rollout.trajectory.noise_key.seed == 11


def test_unjudged_episodes_keep_their_frames() -> None:
    judge = ScriptedJudge()
    env = dream(2, judge=judge, judge_every="episode", return_frames=False)
    runner = EpisodeRunner(env, KeyedPolicy(), judged=False)
    runner.begin([EpisodeRequest(start, 0, NoiseKey(0)) for start in starts(2)])
    finished = [rollout for _ in range(3) for rollout in runner.step()]
    assert judge.calls == 0 and len(runner) == 0 and runner.step() == []
    assert [(r.verdict, r.valid, len(r.frames)) for r in finished] == [(Outcome.INVALID, True, 1 + 3 * K)] * 2  # type: ignore[arg-type]


def test_an_episode_without_a_verdict_is_not_a_failure() -> None:
    broken = ScriptedJudge(lambda video, text: Verdict(Outcome.INVALID, "cannot read it"))
    (rollout,) = run_episodes(dream(judge=broken, judge_every="episode"), starts(1), KeyedPolicy())
    assert (rollout.verdict, rollout.valid, rollout.reward) == (Outcome.INVALID, False, 0.0)
    assert rollout.reason == "cannot read it"
    (unjudged,) = run_episodes(dream(judge="none"), starts(1), KeyedPolicy())
    assert (unjudged.verdict, unjudged.valid) == (Outcome.INVALID, False)


def test_flags_of_verification_arrive() -> None:
    seen: set[bytes] = set()

    def first_time(video: Any, text: str) -> bool:  # a success that never repeats
        fresh = video.frames[0].tobytes() not in seen
        seen.add(video.frames[0].tobytes())
        return fresh

    env = DualNoiseVerification(dream(2, judge=ScriptedJudge(first_time), judge_every="episode"))
    for rollout in run_episodes(env, starts(3), KeyedPolicy()):
        assert (rollout.flagged, rollout.verified, rollout.valid, rollout.reward) == (True, False, False, 0.0)
        assert rollout.verdict is Outcome.SUCCESS


class Counter(VectorEnv[Any, Any, Any]):
    """An environment of somebody else: counts the sum of its actions; done at 8. Reports no frames and no start."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.single_observation_space = Dict({"image": Box(0, 255, (2, 2, 3), np.uint8)})
        self.single_action_space = Box(-1, 1, (2, 1), np.float32)
        self.sums, self.steps = np.zeros(num_envs), np.zeros(num_envs, int)

    def picture(self) -> dict[str, Any]:
        return {"image": np.broadcast_to(self.sums[:, None, None, None].astype(np.uint8), (self.num_envs, 2, 2, 3))}

    def infos(self) -> dict[str, Any]:
        done = self.sums >= 8
        text = np.full(self.num_envs, "count", object)
        return {"instruction": text, "verdict": done.astype(int), "valid": np.ones(self.num_envs, bool)}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        rows = options["reset_mask"]
        self.sums[rows], self.steps[rows] = [seed[row] % 4 for row in np.flatnonzero(rows)], 0
        return self.picture(), self.infos()

    def step(self, actions: np.ndarray) -> Any:
        self.sums += actions.sum((1, 2))
        self.steps += 1
        done = self.sums >= 8
        return self.picture(), done.astype(float), done, self.steps >= 4, self.infos()


def test_an_environment_of_somebody_else() -> None:
    class Ones:
        def act(self, images: Any, instructions: Any, *, temperature: float, keys: Any) -> PolicyOutput:
            actions = torch.ones(len(instructions), 2, 1)
            return PolicyOutput(actions, actions.long().flatten(1), actions.flatten(1))

    requests = [EpisodeRequest(None, seed, NoiseKey(seed)) for seed in (0, 3, 2, 1, 2)]
    for num_envs in (1, 2, 5):
        rollouts = list(run_episodes(Counter(num_envs), requests, Ones()))  # type: ignore[arg-type]
        assert [len(rollout) for rollout in rollouts] == [4, 3, 3, 4, 3]
        assert [rollout.images[:, 0, 0, 0].tolist() for rollout in rollouts[:2]] == [[0, 2, 4, 6], [3, 5, 7]]
        assert all(rollout.reward == 1.0 and rollout.verdict is Outcome.SUCCESS for rollout in rollouts)
        assert rollouts[1].frames is None and rollouts[1].trajectory is None and not rollouts[1].verified
        assert (rollouts[1].start.instruction, rollouts[1].start.seed, rollouts[1].start.task_id) == ("count", 3, -1)


def test_mistakes_are_named() -> None:
    (start,) = starts(1)
    policy = KeyedPolicy()
    with pytest.raises(InvalidOptionError, match="autoreset_mode='Disabled', but the environment has"):
        next(run_episodes(dream(autoreset_mode="NextStep"), [start], policy))
    with pytest.raises(InvalidOptionError, match="a policy or actions, not both"):
        next(run_episodes(dream(), [start], policy, actions=[]))
    with pytest.raises(InvalidOptionError, match="no actions and the runner has no policy"):
        next(run_episodes(dream(), [start]))
    with pytest.raises(InvalidOptionError, match="fewer actions than episodes"):
        next(run_episodes(dream(), [start], actions=[]))
    with pytest.raises(InvalidOptionError, match="start without a seed"):
        next(run_episodes(dream(), [Start(start.frame, "go")], policy))
    for shape in ((0, K, 7), (2, K, 6)):
        with pytest.raises(InvalidActionError, match=r"expected \(T >= 1, chunk_len, action_dim\)"):
            next(run_episodes(dream(), [start], actions=[np.zeros(shape, np.float32)]))
    with pytest.raises(InvalidActionError, match=r"KeyedPolicy chose actions of shape \(8, 7\)"):
        next(run_episodes(Counter(1), [start], policy))
    with pytest.raises(InvalidOptionError, match="2 episodes do not fit on 1 free rows"):
        EpisodeRunner(dream(1), policy).begin([EpisodeRequest(start, 0, NoiseKey(0))] * 2)
    with pytest.raises(InvalidOptionError, match="do not fit rawdream/Dream-v0"):
        make_env("rawdream/Dream-v0", 1, gravity=9.81)
