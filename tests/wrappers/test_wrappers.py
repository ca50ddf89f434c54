"""The wrappers, on a small scripted dream that behaves as the environments' contract says."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from PIL import Image

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.envs.imagination import Replay
from rawdream_env.errors import InvalidOptionError, JudgeUnavailableError
from rawdream_env.seeding import NoiseKey
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.types import Outcome, Start, Trajectory, Verdict
from rawdream_env.wrappers import DualNoiseVerification, InstructionObservation, Record, TorchIO
from rawdream_env.wrappers.drawing import COLOURS, Panel, compose, encode
from rawdream_env.wrappers.torch_io import to_torch

K, A, SIZE, HORIZON = 4, 7, 16, 2
S, F, X = Outcome.SUCCESS, Outcome.FAILURE, Outcome.INVALID


class FakeDream(VectorEnv):
    """Every episode lasts HORIZON chunks; ``script[row][episode]`` is (first verdict, second verdict)."""

    def __init__(self, script, mode="NextStep", return_frames=True, probability=0.25):
        self.num_envs = len(script)
        self.script, self.return_frames, self.probability = script, return_frames, probability
        self.autoreset_mode = AutoresetMode(mode)
        self.metadata = {"autoreset_mode": self.autoreset_mode, "render_fps": 10}
        self.single_observation_space = spaces.Dict(image=spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8))
        self.single_action_space = spaces.Box(-1, 1, (K, A), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.episode = np.full(self.num_envs, -1)
        self.actions = [[] for _ in script]
        self.over = np.zeros(self.num_envs, bool)
        self.replay_calls, self.unavailable = [], False
        self.finished = [None] * self.num_envs

    def _frame(self, row, t):
        return np.full((SIZE, SIZE, 3), (20 * row + 40 * self.episode[row] + 9 * t) % 256, np.uint8)

    def _text(self, row):
        return f"task {row} of episode {self.episode[row]}"

    def _observe(self):
        return {"image": np.stack([self._frame(r, K * len(self.actions[r])) for r in range(self.num_envs)])}

    def _restart(self, row):
        self.episode[row] += 1
        self.actions[row] = []
        self.over[row] = False

    def _row_info(self, row, done, stepped):
        verdict = self.script[row][self.episode[row] % len(self.script[row])][0] if done else X
        info = {"instruction": self._text(row), "task_id": row, "is_success": verdict == S, "verdict": np.int8(verdict)}
        info["valid"] = verdict != X or not done
        if self.return_frames and stepped:
            t = K * (len(self.actions[row]) - 1)
            info["frames"] = np.stack([self._frame(row, t + k + 1) for k in range(K)])
        return info

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).pop("reset_mask", np.ones(self.num_envs, bool))
        infos = {}
        for row in np.flatnonzero(mask):
            self._restart(row)
            infos = self._add_info(infos, self._row_info(row, False, False), row)
        return self._observe(), infos

    def step(self, actions):
        n = self.num_envs
        rewards, terminations, truncations, infos = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool), {}
        for row in range(n):
            if self.over[row] and self.autoreset_mode is AutoresetMode.NEXT_STEP:
                self._restart(row)
                infos = self._add_info(infos, self._row_info(row, False, False), row)
                continue
            idle = self.over[row]
            if not idle:
                self.actions[row].append(np.array(actions[row]))
            done = len(self.actions[row]) == HORIZON
            info = self._row_info(row, done, True)
            terminations[row], truncations[row] = done and info["is_success"], done and not info["is_success"]
            if idle:
                continue
            rewards[row] = float(info["is_success"])
            self.over[row] = done
            if done:
                key = NoiseKey(seed=row, episode=int(self.episode[row]))
                start = Start(np.zeros((SIZE, SIZE, 3), np.uint8), self._text(row))
                self.finished[row] = Trajectory(start, key, np.array(self.actions[row], np.float32))
            if done and self.autoreset_mode is AutoresetMode.SAME_STEP:
                final = {"image": self._observe()["image"][row]}
                infos = self._add_info(infos, {"final_obs": final, "final_info": info}, row)
                self._restart(row)
                info = self._row_info(row, False, False)
            infos = self._add_info(infos, info, row)
        return self._observe(), rewards, terminations, truncations, infos

    def trajectories(self, rows=None):
        return [self.finished[row] for row in (range(self.num_envs) if rows is None else rows)]

    def replay(self, trajectories, *, draw=1, return_frames=False):
        if self.unavailable:
            raise JudgeUnavailableError("connection refused")
        self.replay_calls.append([(t.noise_key.seed, t.noise_key.episode, t.actions, draw) for t in trajectories])
        out = []
        for t in trajectories:
            row_script = self.script[t.noise_key.seed]
            second = row_script[t.noise_key.episode % len(row_script)][1]
            frames = np.full((1 + K * len(t.actions), SIZE, SIZE, 3), 200, np.uint8) if return_frames else None
            out.append(Replay(frames, Verdict(second, "scripted", self.probability)))
        return out

    def call(self, name, *args):
        return tuple(self._text(r) for r in range(self.num_envs)) if name == "task_description" else ()


def actions_of(env, value):
    return np.full(env.action_space.shape, value, np.float32)


ROWS = [[(S, S)], [(S, F)], [(S, X)], [(F, S)], [(X, S)]]  # verified, flagged, unreadable, failure, first unreadable


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("on_disagree", ["mask", "zero"])
def test_dual_noise_judges_each_success_again_once_and_in_one_batch(mode, on_disagree):
    base = FakeDream(ROWS, mode)
    env = DualNoiseVerification(base, on_disagree=on_disagree)
    env.reset(seed=0)
    _, rewards, *_, infos = env.step(actions_of(env, 0.1))
    assert base.replay_calls == [] and "verified" not in infos.get("final_info", {})
    _, rewards, terminations, _, infos = env.step(actions_of(env, 0.2))

    (call,) = base.replay_calls
    assert [seed for seed, *_ in call] == [0, 1, 2]
    for _, episode, played, draw in call:
        assert episode == 0 and draw == 1
        np.testing.assert_array_equal(played[:, 0, 0], np.float32([0.1, 0.2]))

    finals = infos["final_info"] if mode == "SameStep" else infos
    np.testing.assert_array_equal(finals["verified"], [True, False, False, True, False])
    np.testing.assert_array_equal(finals["flagged"], [False, True, False, False, False])
    np.testing.assert_array_equal(finals["second_verdict"], [1, 0, -1, -1, -1])
    assert finals["second_verdict"].dtype == np.int8
    np.testing.assert_array_equal(finals["_verified"], [True] * 5)
    np.testing.assert_array_equal(finals["_replay_success_probability"], [True, True, True, False, False])
    np.testing.assert_array_equal(rewards, [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(finals["valid"], [True, on_disagree == "zero", False, True, False])
    np.testing.assert_array_equal(finals["verdict"], [1, 1, 1, 0, -1])
    np.testing.assert_array_equal(terminations, [True, True, True, False, False])

    s = env.statistics
    assert (s.n_episodes, s.n_success, s.n_flagged, s.n_invalid) == (5, 3, 1, 1)
    assert s.flagged_rate == 0.5 and s.work_ratio == 1 + 3 / 5


def test_dual_noise_forgets_nothing_and_repeats_nothing_over_many_steps():
    base = FakeDream([[(S, F), (F, F), (S, S)], [(F, F)]], "NextStep")
    env = DualNoiseVerification(base)
    env.reset(seed=0)
    verified, done_at = [], []
    for step in range(9):  # 2 chunks and 1 reset step an episode
        _, _, terminations, truncations, infos = env.step(actions_of(env, step / 10))
        if (terminations | truncations)[0]:
            verified.append(bool(infos["verified"][0]))
            done_at.append(step)
    assert verified == [False, True, True] and done_at == [1, 4, 7]
    played = [(seed, episode, actions[:, 0, 0].tolist()) for ((seed, episode, actions, _),) in base.replay_calls]
    assert played == [(0, 0, pytest.approx([0.0, 0.1])), (0, 2, pytest.approx([0.6, 0.7]))]

    base = FakeDream([[(S, S)], [(S, S)]], "Disabled")
    env = DualNoiseVerification(base)
    env.reset(seed=0)
    for _ in range(HORIZON + 2):  # stepping on after the end does not replay again
        env.step(actions_of(env, 0))
    assert len(base.replay_calls) == 1
    env.reset(options={"reset_mask": np.array([True, False])})
    for _ in range(HORIZON):
        env.step(actions_of(env, 0))
    assert [seed for seed, *_ in base.replay_calls[1]] == [0]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_dual_noise_on_a_dream_agrees_with_replaying_and_judging_by_hand(mode):
    options = {"world_model": "null", "judge": "scripted", "starts": "null"}
    plain, base = (DreamVectorEnv(16, max_episode_steps=2, autoreset_mode=mode, **options) for _ in range(2))
    env = DualNoiseVerification(base)
    plain.reset(seed=5)
    env.reset(seed=5)
    env.action_space.seed(1)
    for _ in range(2):
        action = env.action_space.sample()
        _, rewards, *_, infos = plain.step(action)
        _, verified_rewards, *_, verified_infos = env.step(action)
    first = infos.get("final_info", infos)["is_success"]
    again = [replay.verdict.outcome == S for replay in plain.replay(plain.trajectories(), draw=1)]
    same = [replay.verdict.outcome == S for replay in plain.replay(plain.trajectories(), draw=0)]
    assert same == first.tolist()  # the recording itself repeats exactly
    finals = verified_infos.get("final_info", verified_infos)
    np.testing.assert_array_equal(finals["flagged"], first & ~np.array(again))
    np.testing.assert_array_equal(finals["verified"], ~finals["flagged"])
    np.testing.assert_array_equal(verified_rewards, rewards * np.array(again))
    assert finals["flagged"].any() and (first & finals["verified"]).any()  # both kinds are in the sample
    assert env.statistics.work_ratio == 1 + first.mean()


def test_dual_noise_leaves_torch_rewards_and_missing_probabilities_alone():
    class TorchRewards(FakeDream):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            self.given = torch.from_numpy(rewards)
            return obs, self.given, *rest

    base = TorchRewards([[(S, F)], [(S, S)]], probability=None)
    env = DualNoiseVerification(base)
    env.reset(seed=0)
    env.step(actions_of(env, 0))
    _, rewards, *_, infos = env.step(actions_of(env, 0))
    assert rewards.tolist() == [0.0, 1.0] and base.given.tolist() == [1.0, 1.0]
    assert not infos["_replay_success_probability"].any()
    assert np.isnan(DualNoiseVerification(base).statistics.flagged_rate)


def test_dual_noise_says_what_it_needs():
    with pytest.raises(InvalidOptionError, match="no noise to redraw"):
        DualNoiseVerification(gym.make_vec("CartPole-v1", num_envs=1))
    with pytest.raises(InvalidOptionError, match="draw=0 would repeat"):
        DualNoiseVerification(FakeDream(ROWS), draw=0)
    with pytest.raises(InvalidOptionError, match="'drop' is unknown"):
        DualNoiseVerification(FakeDream(ROWS), on_disagree="drop")
    with pytest.raises(InvalidOptionError, match="make_vec"):
        DualNoiseVerification(gym.make("CartPole-v1"))


def test_dual_noise_returns_the_step_when_the_judge_is_away_for_the_second_dream():
    base = FakeDream([[(S, S)], [(F, F)]])
    env = DualNoiseVerification(base)
    env.reset(seed=0)
    env.step(actions_of(env, 0))
    base.unavailable = True
    _, rewards, *_, infos = env.step(actions_of(env, 0))
    assert rewards.tolist() == [0, 0] and infos["valid"].tolist() == [False, True]
    assert infos["second_verdict"][0] == -1 and not infos["verified"][0] and not infos["flagged"][0]
    assert "connection refused" in env.last_replays[0].verdict.reason and env.statistics.n_invalid == 1


def seconds(path):
    """The length of a gif, in which pictures that are alike are stored once."""
    with Image.open(path) as film:
        return sum(film.seek(i) or film.info["duration"] for i in range(film.n_frames)) / 1000


def play(env, steps, value=0.5):
    env.reset(seed=0)
    for _ in range(steps):
        env.step(actions_of(env, value))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_record_writes_every_outcome_with_its_border(tmp_path, mode):
    env = Record(DualNoiseVerification(FakeDream(ROWS, mode)), tmp_path)
    play(env, HORIZON)
    words = ["success", "flagged", "success", "failure", "invalid"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"episode_{row:06d}_env{row}_{word}.gif" for row, word in enumerate(words)
    ]
    for row, word in enumerate(words):
        path = tmp_path / f"episode_{row:06d}_env{row}_{word}.gif"
        film = iio.imread(path)
        assert seconds(path) == pytest.approx((1 + HORIZON * K) / 10) and min(film.shape[1:3]) >= 256
        assert np.abs(film[:, 2, 2].astype(int) - COLOURS[word]).max() < 24
        assert (film.shape[2] > 2 * 256) == (row < 3)  # the second dream stands beside a replayed success


def test_record_counts_skips_and_continues(tmp_path):
    env = Record(FakeDream([[(S, S)], [(F, F)]], "SameStep"), tmp_path, every=2, max_videos=3, format="mp4")
    play(env, 5 * HORIZON)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"episode_{n:06d}_env0_success.mp4" for n in (0, 2, 4)] and env.n_videos == 3
    film = iio.imread(env.last_video, plugin="pyav")
    assert film.shape[0] == 1 + HORIZON * K and film.shape[1] % 2 == film.shape[2] % 2 == 0
    again = Record(FakeDream([[(F, F)]]), tmp_path)
    play(again, HORIZON)
    assert again.last_video.name == "episode_000005_env0_failure.gif"


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_record_without_frames_has_one_picture_per_chunk(tmp_path, mode):
    env = Record(FakeDream([[(S, S)]], mode, return_frames=False), tmp_path)
    play(env, HORIZON)
    assert seconds(env.last_video) == pytest.approx((1 + HORIZON) * K / 10)


def test_record_neither_changes_what_it_passes_on_nor_the_action_sampling(tmp_path):
    plain, wrapped = FakeDream([[(S, S)]]), Record(FakeDream([[(S, S)]]), tmp_path)
    for env in (plain, wrapped):
        env.action_space.seed(3)
        env.reset(seed=0)
    for _ in range(HORIZON + 1):
        action = plain.action_space.sample()
        np.testing.assert_array_equal(action, wrapped.action_space.sample())
        a, b = plain.step(action), wrapped.step(action)
        np.testing.assert_array_equal(a[0]["image"], b[0]["image"])
        assert a[4].keys() == b[4].keys()


def test_record_refuses_nonsense(tmp_path):
    with pytest.raises(InvalidOptionError, match="'avi' is unknown"):
        Record(FakeDream(ROWS), tmp_path, format="avi")
    with pytest.raises(InvalidOptionError, match="every=0"):
        Record(FakeDream(ROWS), tmp_path, every=0)
    with pytest.raises(InvalidOptionError, match="image in the observation"):
        Record(gym.make_vec("CartPole-v1", num_envs=1), tmp_path)


def test_pictures_show_the_action_and_hold_the_shorter_film():
    panels = [Panel("dream", np.zeros((3, 64, 64, 3), np.uint8), "success")]
    panels.append(Panel("second dream", np.full((2, 64, 64, 3), 255, np.uint8), "failure"))
    actions = np.zeros((2, A), np.float32)
    actions[0, 0], actions[1, 6] = 1.0, -1.0
    start, up, down = compose(panels, "flagged", "put the spoon into the bowl " * 6, actions)
    assert start.shape == up.shape == down.shape
    changed = np.argwhere((up != start).any(-1))
    middle = up.shape[1] / 2
    assert len(changed) and changed[:, 1].max() < middle / 2  # dx is the leftmost bar
    changed = np.argwhere((down != start).any(-1))
    assert len(changed) and changed[:, 1].min() > 1.5 * middle  # the gripper the rightmost
    first = Image.open(io.BytesIO(encode([start, up], 10, "gif")))
    assert first.n_frames == 2
    with pytest.raises(InvalidOptionError, match="'webm'"):
        encode([start], 10, "webm")


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_instruction_is_part_of_the_observation(mode):
    env = InstructionObservation(FakeDream(ROWS, mode))
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert obs["instruction"] == tuple(f"task {r} of episode 0" for r in range(5))
    for _ in range(HORIZON):
        obs, *_, infos = env.step(actions_of(env, 0))
    if mode == "SameStep":
        assert obs["instruction"][4] == "task 4 of episode 1"
        assert env.single_observation_space.contains(infos["final_obs"][4])
        assert infos["final_obs"][4]["instruction"] == "task 4 of episode 0"
    if mode == "NextStep":
        assert obs["instruction"][4] == "task 4 of episode 0"
        obs, *_ = env.step(actions_of(env, 0))
        assert obs["instruction"][4] == "task 4 of episode 1"
    if mode == "Disabled":
        obs, _ = env.reset(options={"reset_mask": np.arange(5) == 4})
        assert obs["instruction"] == tuple(f"task {r} of episode {int(r == 4)}" for r in range(5))
    assert env.call("task_description")[0].startswith("task 0") and env.autoreset_mode is AutoresetMode(mode)


def test_instruction_errors_name_the_character():
    with pytest.raises(InvalidOptionError, match="outside the charset: '\u2192'"):
        env = FakeDream(ROWS)
        env._text = lambda row: "pot \u2192 stove"
        InstructionObservation(env).reset()
    with pytest.raises(InvalidOptionError, match="once"):
        InstructionObservation(InstructionObservation(FakeDream(ROWS)))
    with pytest.raises(InvalidOptionError, match="Dict"):
        InstructionObservation(gym.make_vec("CartPole-v1", num_envs=1))


def test_torch_io_converts_numbers_and_only_numbers():
    env = TorchIO(InstructionObservation(FakeDream([[(S, S)], [(F, F)]], "SameStep")))
    obs, _ = env.reset(seed=0)
    assert obs["image"].dtype == torch.uint8 and obs["instruction"] == ("task 0 of episode 0", "task 1 of episode 0")
    action = torch.zeros(env.action_space.shape, requires_grad=True)
    env.step(action)
    obs, rewards, terminations, truncations, infos = env.step(action)
    assert rewards.tolist() == [1.0, 0.0] and terminations.tolist() == [True, False] and truncations.dtype == torch.bool
    final = infos["final_obs"][0]
    assert isinstance(final["image"], torch.Tensor) and final["instruction"] == "task 0 of episode 0"
    assert isinstance(infos["verdict"], np.ndarray) and infos["final_info"]["instruction"][0] == "task 0 of episode 0"

    array = np.arange(3)
    tree = to_torch({"a": array, "b": ["x", None, 2.5], "c": np.array(["u"])})
    array[0] = 9
    assert tree["a"].tolist() == [0, 1, 2] and tree["b"][:2] == ["x", None] and tree["b"][2].item() == 2.5
    assert isinstance(tree["c"], np.ndarray)


def test_importing_the_package_of_wrappers_is_light():
    code = (
        "import sys, rawdream_env.wrappers as w; dir(w); "
        "heavy = [m for m in ('torch', 'stable_baselines3', 'PIL', 'av') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="it has DualNoise"):
        import rawdream_env.wrappers

        _ = rawdream_env.wrappers.RewardHacking


@pytest.mark.parametrize("wrapper", [DualNoiseVerification, InstructionObservation, "record"])
def test_wrapped_dreams_still_keep_every_promise_of_a_vector_env(wrapper, tmp_path, monkeypatch):
    monkeypatch.setattr("rawdream_env.wrappers.record.encode", lambda *_: b"")  # some hundred films
    monkeypatch.setattr("rawdream_env.wrappers.record.compose", lambda *_: [])

    def make(num_envs, autoreset_mode):
        options = {"world_model": "null", "judge": "scripted", "starts": "null", "autoreset_mode": autoreset_mode}
        env = DreamVectorEnv(num_envs, max_episode_steps=2, **options)
        return Record(env, tmp_path) if wrapper == "record" else wrapper(env)

    report = check_vector_env(make, num_envs=(1, 3), chunks=5, modes=["NextStep", "SameStep", "Disabled"], strict=True)
    assert report.passed
