"""The dream environment on the null model: contract, verdicts, recordings, replays, failures."""

from __future__ import annotations

import json
import pickle
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rawdream_env.envs.dream import DreamVectorEnv
from rawdream_env.errors import (
    CheckpointError,
    ClosedEnvironmentError,
    DatasetError,
    InvalidActionError,
    InvalidOptionError,
    JudgeUnavailableError,
    RawDreamError,
    ResetNeededError,
)
from rawdream_env.judges import load_judge
from rawdream_env.judges.base import is_scanning
from rawdream_env.judges.ensemble import EnsembleJudge
from rawdream_env.judges.robometer import RobometerJudge
from rawdream_env.judges.scripted import ScriptedJudge
from rawdream_env.judges.videomae import VideoMAEJudge
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts import ListStarts, NullStarts, StartSource, load_starts
from rawdream_env.starts.pack import PackStarts, save_start_pack
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.types import Judge, Outcome, Start, Verdict, WorldModel
from rawdream_env.world_models.null import NullState, NullWorldModel

MODES = ("NextStep", "SameStep", "Disabled")


def dream(num_envs=4, **kwargs):
    defaults = {"world_model": "null", "judge": "scripted", "starts": "null", "max_episode_steps": 3}
    return DreamVectorEnv(num_envs, **{**defaults, **kwargs})


def actions_for(env, step=0, seed=0):
    rng = np.random.default_rng([seed, step])
    return rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)


def run(env, steps, seed=0):
    env.reset(seed=seed)
    return [env.step(actions_for(env, t)) for t in range(steps)]


# ---- the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge_every", ["episode", "chunk"])
def test_strict_contract_in_three_modes(judge_every):
    report = check_vector_env(
        lambda num_envs, autoreset_mode: dream(
            num_envs, autoreset_mode=autoreset_mode, judge_every=judge_every, return_frames=True
        ),
        modes=MODES,
        chunks=9,
        strict=True,
    )
    assert not report.skipped
    assert len(report.passed) == 3 * 17


def test_generic_contract_with_torch_observations():
    report = check_vector_env(
        lambda num_envs, autoreset_mode: dream(num_envs, autoreset_mode=autoreset_mode, output="torch"),
        modes=MODES,
        chunks=7,
    )
    assert not report.skipped


def test_single_env_passes_gymnasiums_checker():
    kwargs = {"world_model": "null", "judge": "scripted", "starts": "null"}
    env = gym.make("rawdream/PiperDream-v0", render_mode="rgb_array", **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    observation, info = env.reset(seed=3)
    vector = dream(1, max_episode_steps=8)
    expected, infos = vector.reset(seed=3)
    assert np.array_equal(observation["image"], expected["image"][0])
    assert info["instruction"] == infos["instruction"][0] == env.unwrapped.task_description
    assert type(info["is_success"]) is bool
    assert type(info["verdict"]) is int
    again, _ = env.reset(options={"start": env.unwrapped.start_of()})
    assert np.array_equal(again["image"], observation["image"])
    with pytest.raises(InvalidActionError, match="one step is a whole chunk"):
        env.unwrapped.step(np.zeros(7, np.float32))
    with pytest.raises(InvalidOptionError, match="gym.make_vec"):
        gym.make("rawdream/Dream-v0", autoreset_mode="SameStep", **kwargs)


def test_protocols():
    assert isinstance(NullWorldModel(), WorldModel)
    assert isinstance(ScriptedJudge(), Judge)
    assert isinstance(NullStarts(), StartSource)


def test_null_model_depends_on_everything():
    model = NullWorldModel()
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = [NoiseKey(1), NoiseKey(2)]
    chunk = torch.zeros(2, 8, 7)

    def last(frames=frames, keys=keys, actions=chunk, proprio=None):
        state, _ = model.imagine(model.start(frames, keys, proprio), actions)
        return model.imagine(state, chunk)[1]

    base = last()
    assert torch.equal(base, last())
    assert not torch.equal(base, last(keys=[key.at(draw=1) for key in keys]))
    assert not torch.equal(base, last(frames=frames.flip(1)))
    assert not torch.equal(base, last(proprio=torch.ones(2, 7)))
    changed = chunk.clone()
    changed[:, 0, 6] = 0.01
    assert not torch.equal(base, last(actions=changed)), "the first chunk's actions must still show in the second"
    state = model.start(frames, keys)
    assert state[torch.tensor([1, 1])].keys == (keys[1], keys[1])
    assert len(state[1:]) == len(state[torch.tensor([True, False])]) == 1
    assert NullState.where([True, False], state[[1, 0]], state).keys == (keys[1], keys[1])


def test_layer_is_fast():
    env = dream(8)
    run(env, 3)
    actions = actions_for(env)
    begin = time.process_time()  # other programs do not count
    for _ in range(40):
        env.step(actions)
    assert (time.process_time() - begin) / 40 / 8 < 3e-3  # 0.2 ms; the target is 0.3


# ---- verdicts ----------------------------------------------------------------------------------------------------


def test_judge_once_at_the_horizon_sees_the_whole_video():
    judge = ScriptedJudge(lambda video, text: 0.8 if "up" in text else 0.2)
    env = dream(judge=judge, autoreset_mode="Disabled", return_frames=True)
    results = run(env, 3)
    assert judge.calls == 1
    assert judge.videos == 4
    for _, rewards, terminations, truncations, infos in results[:2]:
        assert not rewards.any()
        assert not (terminations | truncations).any()
        assert (infos["verdict"] == -1).all()
        assert infos["valid"].all()
        assert "success_probability" not in infos
    _, rewards, terminations, truncations, infos = results[2]
    success = np.array(["up" in text for text in infos["instruction"]])
    assert 0 < success.sum() < 4
    assert np.array_equal(rewards, success.astype(np.float64))
    assert np.array_equal(terminations, success)
    assert np.array_equal(truncations, ~success)
    assert np.array_equal(infos["verdict"], success.astype(np.int8))
    assert np.array_equal(infos["success_probability"], np.where(success, 0.8, 0.2))
    for row, video in enumerate(env.videos()):
        parts = [env.start_of(row).frame[None], *(result[4]["frames"][row] for result in results)]
        assert np.array_equal(video.frames, np.concatenate(parts))
        assert video.fps == 10.0


def test_judge_every_chunk_ends_at_the_first_success_and_rows_leave_the_batch():
    class Counting(NullWorldModel):
        batches: tuple[int, ...] = ()

        def imagine(self, state, actions):
            self.batches = (*self.batches, len(state))
            return super().imagine(state, actions)

    model = Counting()
    rule = ScriptedJudge(lambda video, text: len(video.frames) >= (17 if "up" in text else 100))
    env = dream(world_model=model, judge=rule, judge_every="chunk", autoreset_mode="Disabled")
    env.reset(seed=0)
    up = np.array(["up" in text for text in env.task_description])
    results = [env.step(actions_for(env, t)) for t in range(3)]
    assert np.array_equal(results[1][2], up)
    assert model.batches == (4, 4, 4 - up.sum())
    assert np.array_equal(results[2][4]["_verdict"], ~up), "idle rows say nothing"
    assert np.array_equal(results[2][0]["image"][up], results[1][0]["image"][up])
    assert not results[2][1].any()
    with pytest.raises(ResetNeededError, match="reset_mask"):
        env.step(actions_for(env))


class Scanning(ScriptedJudge):
    """Success from 17 frames on, for a judge that looks for the first success in a video."""

    scanning = True

    def __init__(self):
        super().__init__(lambda video, text: len(video.frames) >= 17)


def test_a_scanning_judge_ends_the_episode_at_its_success_by_default():
    whole, scanned = (
        dream(judge=judge, autoreset_mode="Disabled")
        for judge in (ScriptedJudge(lambda video, text: len(video.frames) >= 17), Scanning())
    )
    assert (whole.judge_every, scanned.judge_every) == ("episode", "chunk")
    for env, chunks in ((whole, 3), (scanned, 2)):
        env.reset(seed=0)
        results = [env.step(actions_for(env, t)) for t in range(chunks)]
        assert [result[2].all() for result in results] == [False] * (chunks - 1) + [True]
        assert results[-1][1].tolist() == [1.0] * 4
        assert {len(video.frames) for video in env.videos()} == {
            1 + 8 * chunks
        }  # the frames behind it are not imagined
    assert dream(judge=Scanning(), judge_every="episode").judge_every == "episode"


def test_which_judges_scan():
    assert VideoMAEJudge.scanning and RobometerJudge("http://localhost:8000").scanning
    plain = ScriptedJudge()
    assert not any(is_scanning(judge) for judge in (plain, load_judge("embedded"), EnsembleJudge([plain, Scanning()])))
    assert is_scanning(EnsembleJudge([Scanning(), Scanning()]))
    assert dream(judge=Scanning(), held_out_judge="scripted").judge_every == "chunk"
    assert dream(judge="scripted", held_out_judge=Scanning()).judge_every == "episode"
    assert dream(judge="none").judge_every == "episode"


@pytest.mark.parametrize("mode", MODES)
def test_invalid_verdict_is_neither_success_nor_failure(mode):
    env = dream(judge=ScriptedJudge(lambda video, text: Verdict(Outcome.INVALID, "down")), autoreset_mode=mode)
    _, rewards, terminations, truncations, infos = run(env, 3)[-1]
    final = infos["final_info"] if mode == "SameStep" else infos
    assert not rewards.any()
    assert not terminations.any()
    assert truncations.all()
    assert not final["valid"].any()
    assert (final["verdict"] == -1).all()
    assert not final["is_success"].any()
    assert env.trajectories()[0].extra["verdict"].reason == "down"


@pytest.mark.parametrize("how", ["frames", "flag"])
def test_broken_imagination_is_invalid_and_never_judged(how):
    class Breaking(NullWorldModel):
        def imagine(self, state, actions):
            state, frames = super().imagine(state, actions)
            broken = torch.tensor([key.seed == 1 and key.chunk == 2 for key in state.keys])
            if how == "flag":
                object.__setattr__(state, "finite", ~broken)
                return state, frames
            frames = frames.float()
            frames[broken, -1, 0, 0, 0] = float("nan")
            return state, frames

    judge = ScriptedJudge(lambda video, text: True)
    env = dream(world_model=Breaking(), judge=judge, autoreset_mode="Disabled")
    results = run(env, 3)
    first, _, terminations, truncations, infos = results[1]
    assert not terminations.any()
    assert truncations.tolist() == [False, True, False, False]
    assert infos["valid"].tolist() == [True, False, True, True]
    assert np.array_equal(first["image"][1], results[0][0]["image"][1]), "the last good frame stays"
    assert judge.videos == 3
    assert results[2][1].tolist() == [1, 0, 1, 1]
    replay = env.replay(env.trajectories(), draw=0, return_frames=True)
    assert [r.verdict.outcome for r in replay] == [1, -1, 1, 1]
    assert "not finite" in replay[1].verdict.reason
    assert len(replay[1].frames) == 9
    assert judge.videos == 6


def test_unreachable_judge_loses_nothing():
    class Flaky(ScriptedJudge):
        down = True

        def __call__(self, videos, instructions):
            if self.down:
                raise JudgeUnavailableError("no answer for 60 s")
            return super().__call__(videos, instructions)

    judge = Flaky()
    env, twin = dream(judge=judge, autoreset_mode="SameStep"), dream(autoreset_mode="SameStep")
    run(env, 2)
    expected = run(twin, 3)[-1]
    for _ in range(2):
        with pytest.raises(JudgeUnavailableError):
            env.step(actions_for(env, 2))
    judge.down = False
    observation, rewards, *_ = env.step(actions_for(env, 2))
    assert np.array_equal(observation["image"], expected[0]["image"])
    assert np.array_equal(rewards, expected[1])


def test_no_judge_gives_no_verdicts():
    env = dream(judge="none")
    _, rewards, _, truncations, infos = run(env, 3)[-1]
    assert not rewards.any()
    assert truncations.all()
    assert infos["valid"].all()
    assert (infos["verdict"] == -1).all()
    assert env.replay(env.trajectories())[0].verdict is None


# ---- recordings and replays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_replay_of_draw_zero_is_the_recording(mode):
    env = dream(autoreset_mode=mode)
    results = run(env, 3)
    videos, trajectories = env.videos(), env.trajectories()
    same = env.replay(trajectories, draw=0, return_frames=True)
    other = env.replay(trajectories, return_frames=True)
    for video, replay, second, trajectory in zip(videos, same, other, trajectories, strict=True):
        assert np.array_equal(video.frames, replay.frames)
        assert replay.verdict.outcome == trajectory.extra["verdict"].outcome
        assert not np.array_equal(video.frames[1:], second.frames[1:])
    infos = results[-1][4]
    verdicts = infos["final_info"]["verdict"] if mode == "SameStep" else infos["verdict"]
    assert [r.verdict.outcome for r in same] == verdicts.tolist()


def test_replay_mixes_lengths_and_leaves_the_environment_alone():
    env, twin = dream(), dream()
    run(env, 3, seed=5)
    long = env.trajectories()
    env.reset(seed=[9, None, None, None], options={"reset_mask": np.array([True, False, False, False])})
    run(env, 2, seed=0)
    run(twin, 2, seed=0)
    short = env.trajectories(which="current")
    assert [t.actions.shape for t in short] == [(2, 8, 7)] * 4
    mixed = [long[2], short[1], long[0], short[3], long[2]]
    together = env.replay(mixed, return_frames=True)
    assert [len(r.frames) for r in together] == [25, 17, 25, 17, 25]
    for alone, joined in zip((env.replay([t], return_frames=True)[0] for t in mixed), together, strict=True):
        assert np.array_equal(alone.frames, joined.frames)
        assert alone.verdict.outcome == joined.verdict.outcome
    for small, joined in zip(env.replay(mixed, return_frames=True, batch_size=2), together, strict=True):
        assert np.array_equal(small.frames, joined.frames)
    assert env.replay([]) == []
    assert env.replay(mixed, judge=False)[0].verdict is None
    assert env.replay(mixed)[0].frames is None
    assert np.array_equal(env.step(actions_for(env, 2))[0]["image"], twin.step(actions_for(twin, 2))[0]["image"])


def test_replay_refuses_what_does_not_fit():
    env = dream()
    assert env.trajectories() == [None] * 4
    run(env, 1)
    good = env.trajectories([0], which="current")[0]
    with pytest.raises(InvalidActionError, match=r"trajectories\[0\].*\(T, 8, 7\)"):
        env.replay([type(good)(good.start, good.noise_key, good.actions[:, :4])])
    small = Start(np.zeros((32, 32, 3), np.uint8), "x", proprio=np.zeros(7, np.float32))
    with pytest.raises(InvalidOptionError, match=r"\(32, 32, 3\)"):
        env.replay([type(good)(small, good.noise_key, good.actions)])
    with pytest.raises(InvalidOptionError, match="expected a Trajectory"):
        env.replay([None])
    with pytest.raises(InvalidOptionError, match="which='last'"):
        env.trajectories(which="last")


def test_noise_key_names_row_and_episode():
    env = dream(autoreset_mode="SameStep")
    run(env, 4, seed=[7, 7, 3, 1])
    finished, current = env.trajectories(), env.trajectories(which="current")
    assert [t.noise_key for t in finished] == [NoiseKey(seed) for seed in (7, 7, 3, 1)]
    assert [t.noise_key for t in current] == [NoiseKey(seed, episode=1) for seed in (7, 7, 3, 1)]
    assert finished[0].start.instruction == finished[1].start.instruction
    assert not np.array_equal(finished[0].start.frame, current[0].start.frame)


# ---- options, errors, life cycle ---------------------------------------------------------------------------------


def test_actions_are_checked_and_named():
    env = dream()
    env.reset(seed=0)
    good = actions_for(env)
    for change, message in [
        (lambda a: a[0], r"shape \(8, 7\)"),
        (lambda a: a[:1], r"expected \(num_envs, chunk_len, action_dim\) = \(4, 8, 7\)"),
        (lambda a: a.astype(complex), "complex"),
        (lambda a: a.astype(str), "dtype <U"),
        (lambda a: None, r"shape \(\)"),
        (lambda a: [[1], [2, 3]], "cannot be read"),
    ]:
        with pytest.raises(InvalidActionError, match=message):
            env.step(change(good.copy()))
    for value, message in [(np.nan, "nan, not a finite"), (-np.inf, "-inf"), (1.2, "1.2, outside")]:
        bad = good.copy()
        bad[2, 5, 6] = value
        with pytest.raises(InvalidActionError, match=rf"env 2, action 5, dimension 6\] is {message}"):
            env.step(bad)
    single = dream(1)
    single.reset()
    with pytest.raises(InvalidActionError, match="batch dimension"):
        single.step(good[0])
    twin = dream()
    twin.reset(seed=0)
    expected = twin.step(good)[0]["image"]
    read_only = good.copy()
    read_only.flags.writeable = False
    for same in (torch.from_numpy(good.copy()).requires_grad_(), good.astype(np.float64), good.tolist(), read_only):
        env.reset(seed=0)
        assert np.array_equal(env.step(same)[0]["image"], expected)
    env.step(good.astype(np.float16) * np.float16(1.0))
    env.step(torch.ones(4, 8, 7, dtype=torch.bfloat16))
    env.step(np.zeros((4, 8, 7), dtype=np.int64))


def test_dead_rows_actions_are_not_looked_at():
    env = dream(max_episode_steps=1)
    run(env, 1)
    _, rewards, terminations, truncations, infos = env.step(np.full(env.action_space.shape, np.nan))
    assert not rewards.any()
    assert not (terminations | truncations).any()
    assert env.elapsed_steps == (0,) * 4
    assert infos["_instruction"].all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "num_envs=0"),
        ({"max_episode_steps": True}, "max_episode_steps=True"),
        ({"autoreset_mode": "Sometimes"}, "'SameStep'"),
        ({"output": "jax"}, "'torch'"),
        ({"render_mode": "human"}, "rgb_array"),
        ({"judge_every": "day"}, "'chunk'"),
        ({"layout": "huge"}, "'wide'"),
        ({"starts": "nowhere"}, "nowhere"),
        ({"starts": []}, "empty"),
        ({"starts": 5}, "int"),
        ({"judge": 5}, "int is not a judge: it lacks"),
        ({"world_model": object()}, "it lacks start, imagine"),
        ({"world_model": NullWorldModel(), "num_inference_steps": 3}, "num_inference_steps"),
    ],
)
def test_bad_options_are_named(kwargs, message):
    with pytest.raises(InvalidOptionError, match=message):
        dream(**kwargs)


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        ("zero", None, "seed='zero'"),
        (-1, None, "seed=-1"),
        (1.5, None, "seed=1.5"),
        ([1, 2], None, "2 entries"),
        (None, {"reset_masks": None}, "reset_masks"),
        (None, {"reset_mask": [1, 0, 0, 0]}, "boolean"),
        (None, {"reset_mask": np.zeros(4, bool)}, "False for every row"),
        (None, {"starts": [None]}, "4 entries"),
        (None, {"starts": [3, None, None, None]}, r"\[0\] has type int, expected a Start"),
        (3, {"seed": 3}, "once"),
        (None, [], "dict"),
    ],
)
def test_bad_reset_arguments_are_named(seed, options, message):
    env = dream()
    env.reset(seed=0)
    with pytest.raises(InvalidOptionError, match=message):
        env.reset(seed=seed, options=options)


def test_partial_reset_with_given_starts_and_seeds():
    env = dream(autoreset_mode="Disabled", starts=[NullStarts().sample(NoiseKey(i)) for i in range(3)])
    env.reset(seed=0)
    chosen = NullStarts().sample(NoiseKey(99), "null_left")
    mask = torch.tensor([False, True, False, True])
    observation, infos = env.reset(seed=20, options={"reset_mask": mask, "starts": [None, chosen, None, None]})
    assert env.row_seeds == (0, 21, 2, 23)
    assert infos["_instruction"].tolist() == [False, True, False, True]
    assert env.start_of(1) is chosen
    assert np.array_equal(observation["image"][1], chosen.frame)
    assert env.call("task_description")[1] == env.get_attr("task_description")[1] == "move the block left"
    assert env.get_attr("task_id")[1] == 0
    fresh = dream()
    with pytest.raises(ResetNeededError, match="env 0 was never reset"):
        fresh.reset(options={"reset_mask": mask})


def test_unseeded_resets_differ_and_go_on():
    env = dream()
    first = env.reset()[0]["image"]
    assert not np.array_equal(first, dream().reset()[0]["image"])
    assert not np.array_equal(first, env.reset()[0]["image"])
    a, b = dream(), dream()
    a.reset(seed=4)
    b.reset(seed=4)
    assert np.array_equal(a.reset()[0]["image"], b.reset()[0]["image"])


def test_attributes_rendering_and_tiles():
    env = dream(3, render_mode="rgb_tiles")
    with pytest.raises(ResetNeededError):
        env.render()
    with pytest.raises(ResetNeededError):
        env.start_of(0)
    with pytest.raises(ResetNeededError, match=r"call reset\(\) first"):
        env.step(actions_for(env))
    observation, _ = env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (128, 128, 3)
    assert np.array_equal(picture[64:, :64], observation["image"][2])
    assert not picture[64:, 64:].any()
    frames = dream(3, render_mode="rgb_array")
    frames.reset(seed=0)
    assert np.array_equal(np.stack(frames.render()), observation["image"])
    env.set_attr("task", "null_up")
    env.set_attr("max_episode_steps", [2, 2, 2])
    assert env.get_attr("max_episode_steps") == (2, 2, 2)
    env.reset()
    assert env.task_description == ("move the block up",) * 3
    for name, values in [("nothing", 1), ("task_id", 1), ("_phase", 1), ("task", ["a", "b", "c"])]:
        with pytest.raises(InvalidOptionError):
            env.set_attr(name, values)
    with pytest.raises(AttributeError):
        env.call("nothing")


def test_torch_observations():
    env, twin = dream(output="torch", autoreset_mode="SameStep"), dream(autoreset_mode="SameStep")
    got, expected = run(env, 3)[-1], run(twin, 3)[-1]
    assert isinstance(got[0]["image"], torch.Tensor)
    assert got[0]["image"].dtype == torch.uint8
    assert np.array_equal(got[0]["image"].numpy(), expected[0]["image"])
    assert isinstance(got[4]["final_obs"][0]["image"], torch.Tensor)
    assert isinstance(got[1], np.ndarray)


def test_pickle_goes_on_identically():
    env = dream(autoreset_mode="SameStep", judge_every="chunk")
    run(env, 2)
    twin = pickle.loads(pickle.dumps(env))
    for t in range(2, 6):
        a, b = env.step(actions_for(env, t)), twin.step(actions_for(twin, t))
        assert np.array_equal(a[0]["image"], b[0]["image"])
        assert np.array_equal(a[1], b[1])


def test_closed_environment_says_so():
    env = dream()
    run(env, 3)
    trajectories = env.trajectories()
    env.close()
    env.close()
    for call in (env.reset, env.render, lambda: env.step(actions_for(env)), lambda: env.replay(trajectories)):
        with pytest.raises(ClosedEnvironmentError, match="closed"):
            call()


def test_wrong_models_and_judges_are_named():
    class Short(NullWorldModel):
        def imagine(self, state, actions):
            state, frames = super().imagine(state, actions)
            return state, frames[:, :4]

    with pytest.raises(RawDreamError, match=r"\(4, 4, 64, 64, 3\), expected \(4, 8, 64, 64, 3\)"):
        run(dream(world_model=Short()), 1)
    with pytest.raises(RawDreamError, match="0 verdicts for 4 videos"):
        run(dream(judge=lambda videos, instructions: []), 3)


# ---- starts ------------------------------------------------------------------------------------------------------


def test_pack_round_trip_and_damage(tmp_path):
    tasks = list(zip(NullStarts.TASKS, NullStarts.INSTRUCTIONS, strict=True))
    starts = [NullStarts().sample(NoiseKey(i), i % 2) for i in range(6)]
    path = tmp_path / "pack.safetensors"
    save_start_pack(path, starts, tasks, layout="wide")
    pack = load_starts(path)
    assert (len(pack), pack.layout) == (6, "wide")
    for a, b in zip(starts, (pack[i] for i in range(6)), strict=True):
        assert np.array_equal(a.frame, b.frame)
        assert np.array_equal(a.proprio, b.proprio)
        assert (a.instruction, a.task_id, a.seed) == (b.instruction, b.task_id, b.seed)
    assert {pack.sample(NoiseKey(i)).task_id for i in range(20)} == {0, 1}
    assert {pack.sample(NoiseKey(i), "null_right").task_id for i in range(5)} == {1}
    assert np.array_equal(pack.sample(NoiseKey(3, chunk=4)).frame, pack.sample(NoiseKey(3, draw=1)).frame)
    with pytest.raises(InvalidOptionError, match="null_left"):
        pack.sample(NoiseKey(0), "fly")
    with pytest.raises(InvalidOptionError, match="no start for task"):
        pack.sample(NoiseKey(0), "null_up")
    env = dream(starts=str(path), task=1)
    env.reset(seed=0)
    assert env.task_id == (1,) * 4
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"pack\.safetensors"):
        PackStarts(path)
    with pytest.raises(CheckpointError, match="starts='sim'"):
        PackStarts(tmp_path / "none.safetensors")


def test_folder_of_images(tmp_path):
    Image.new("RGB", (128, 96), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), (0, 255, 0)).save(tmp_path / "b.png")
    listing = tmp_path / "instructions.json"
    entry = {"instruction": "lift the cup", "task_id": 4, "proprio": [0.1] * 7}
    listing.write_text(json.dumps({"a.png": "push the pot", "b.png": {**entry, "proprio": None}}))
    source = load_starts(str(tmp_path))
    assert [(s.instruction, s.task_id) for s in source.starts] == [("push the pot", 5), ("lift the cup", 4)]
    assert source.starts[0].frame.shape == (64, 64, 3)
    assert (source.starts[0].frame == [255, 0, 0]).all()
    assert source.sample(NoiseKey(0), "lift the cup").task_id == 4
    run(dream(starts=str(tmp_path)), 1)
    for content, message in [
        ("[", "cannot be read"),
        ("{}", "at least one"),
        ('{"../x.png": "a"}', "plain name"),
        ('{"c.png": "a"}', "c.png"),
        ('{"a.png": " "}', "not empty"),
        ('{"a.png": {"instruction": "a", "who": 1}}', "who"),
        ('{"a.png": {"instruction": "a", "task_id": 1.5}}', "task_id"),
        ('{"a.png": {"instruction": "a", "proprio": [NaN]}}', "proprio"),
    ]:
        listing.write_text(content)
        with pytest.raises(DatasetError, match=message):
            load_starts(str(tmp_path))


def test_a_turned_photo_is_a_start_that_stands_upright(tmp_path):
    photo = Image.new("RGB", (96, 64), (255, 0, 0))
    photo.paste((0, 0, 255), (0, 0, 48, 64))  # stored with blue on the left; turned right, blue is at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "instructions.json").write_text(json.dumps({"a.png": "push the pot"}))
    frame = load_starts(str(tmp_path)).starts[0].frame
    assert (frame[:30] == [0, 0, 255]).all() and (frame[34:] == [255, 0, 0]).all()


def test_starts_with_and_without_proprio_do_not_mix():
    frame = np.zeros((64, 64, 3), np.uint8)
    mixed = [Start(frame, "a"), Start(frame, "b", proprio=np.zeros(7, np.float32))]
    env = dream(2, starts=ListStarts(mixed))
    with pytest.raises(InvalidOptionError, match="1 of 2 starts have a proprio"):
        env.reset(options={"starts": mixed})


# ---- random sequences of calls -----------------------------------------------------------------------------------

CALLS = st.sampled_from(
    [
        "reset",
        "seeded",
        "listed",
        "mask",
        "starts",
        "step",
        "step",
        "step",
        "nan",
        "shape",
        "replay",
        "render",
        "pickle",
        "close",
    ]
)


@settings(max_examples=40)
@given(mode=st.sampled_from(MODES), every=st.sampled_from(["episode", "chunk"]), calls=st.lists(CALLS, max_size=25))
def test_only_documented_errors(mode, every, calls):
    judge = ScriptedJudge(success_rate=0.4, invalid_rate=0.2)
    env = dream(2, judge=judge, autoreset_mode=mode, judge_every=every, max_episode_steps=2, render_mode="rgb_array")
    for number, name in enumerate(calls):
        try:
            env = _do(env, name, number)
        except RawDreamError:
            continue  # documented; anything else fails the test


def _do(env, name, number):
    if name == "reset":
        env.reset()
    elif name == "seeded":
        env.reset(seed=number)
    elif name == "listed":
        env.reset(seed=[number, None])
    elif name == "mask":
        env.reset(options={"reset_mask": np.array([number % 2 == 0, number % 3 == 0])})
    elif name == "starts":
        env.reset(options={"starts": [NullStarts().sample(NoiseKey(number)), None]})
    elif name in ("step", "nan", "shape"):
        actions = actions_for(env, number)
        actions[0, 0, 0] = np.nan if name == "nan" else 0.5
        results = env.step(actions[:1] if name == "shape" else actions)
        assert results[0] in env.observation_space
        assert not (results[2] & results[3]).any()
        assert set(results[1]) <= {0.0, 1.0}
    elif name == "replay":
        env.replay([t for t in env.trajectories() if t is not None], draw=number % 3)
    elif name == "render":
        assert len(env.render()) == 2
    elif name == "pickle":
        return pickle.loads(pickle.dumps(env))
    else:
        env.close()
    return env
