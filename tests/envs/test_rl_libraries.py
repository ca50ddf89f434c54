"""RL libraries take the environments as they are."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies import load_policy
from rawdream_env.wrappers import DualNoiseVerification, InstructionObservation

NULL = {"world_model": "null", "judge": "scripted", "starts": "null"}
DREAM = ("rawdream/PiperDream-v0", NULL)
SIM = ("rawdream/PiperSim-v0", {})


def make(env_id, options, num_envs=4, mode="SameStep", **kwargs):
    return gym.make_vec(env_id, num_envs=num_envs, autoreset_mode=mode, max_episode_steps=2, **options, **kwargs)


# ---- stable-baselines3 ---------------------------------------------------------------------------------------------


@pytest.fixture
def sb3_vec_env():
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    from rawdream_env.wrappers import SB3VecEnv

    return SB3VecEnv


def test_sb3_translation_of_episode_ends(sb3_vec_env):
    env, reference = sb3_vec_env(make(*DREAM)), make(*DREAM)
    assert env.action_space == spaces.Box(-1, 1, (56,), np.float32)
    assert env.seed(3) == [3, 4, 5, 6]
    obs = env.reset()
    wanted, infos = reference.reset(seed=3)
    np.testing.assert_array_equal(obs["image"], wanted["image"])
    assert [info["instruction"] for info in env.reset_infos] == list(infos["instruction"])

    env.action_space.seed(0)
    for _ in range(6):
        action = np.stack([env.action_space.sample() for _ in range(4)])
        obs, rewards, dones, rows = env.step(action)
        wanted, r, terminated, truncated, infos = reference.step(action.reshape(4, 8, 7))
        np.testing.assert_array_equal(obs["image"], wanted["image"])
        np.testing.assert_array_equal(rewards, r)
        np.testing.assert_array_equal(dones, terminated | truncated)
        assert rewards.dtype == np.float32 and not any("final_obs" in row for row in rows)
        for i, row in enumerate(rows):
            assert row["TimeLimit.truncated"] == (truncated[i] and not terminated[i])
            assert ("terminal_observation" in row) == dones[i]
            if dones[i]:
                np.testing.assert_array_equal(row["terminal_observation"]["image"], infos["final_obs"][i]["image"])
                assert row["is_success"] == terminated[i] and row["verdict"] in (0, 1)
                assert env.reset_infos[i]["instruction"] == infos["instruction"][i]
    assert dones.all()


def test_sb3_attributes_methods_and_wrappers(sb3_vec_env):
    env = sb3_vec_env(DualNoiseVerification(make(*DREAM, render_mode="rgb_array"), on_disagree="zero"))
    env.reset()
    assert env.get_attr("max_episode_steps", indices=[1, 2]) == [2, 2] and not env.has_attr("no_such_thing")
    env.set_attr("max_episode_steps", 3)
    assert env.get_attr("max_episode_steps") == [3] * 4
    assert env.env_method("task_description", indices=0) == [env.get_attr("task_description")[0]]
    assert env.env_is_wrapped(DualNoiseVerification, indices=0) == [True]
    assert env.env_is_wrapped(InstructionObservation) == [False] * 4
    assert env.render().shape == (128, 128, 3)
    env.set_options({"starts": [env.env.unwrapped.start_of(2)] * 4})
    image = env.reset()["image"]
    assert (image == image[0]).all()
    env.close()
    assert env.env.closed


def test_sb3_refuses_what_it_would_get_wrong(sb3_vec_env):
    with pytest.raises(InvalidOptionError, match=r'has NEXT_STEP.*autoreset_mode="SameStep"'):
        sb3_vec_env(gym.make_vec(DREAM[0], num_envs=1, **NULL))
    with pytest.raises(InvalidOptionError, match="no text"):
        sb3_vec_env(InstructionObservation(make(*DREAM)))
    same_step = {"autoreset_mode": "SameStep"}
    with pytest.raises(InvalidOptionError, match="Discrete"):
        sb3_vec_env(gym.make_vec("CartPole-v1", num_envs=1, vectorization_mode="sync", vector_kwargs=same_step))


def test_sb3_missing_is_a_named_error_with_the_command():
    code = (
        "import sys; sys.modules['stable_baselines3'] = None\n"
        "from rawdream_env.errors import MissingDependencyError\n"
        "try:\n    from rawdream_env.wrappers import SB3VecEnv\n"
        "except MissingDependencyError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'rawdream-env[sb3]'" in result.stdout


def train_ppo(sb3_vec_env, env_id, options, steps, num_envs=4):
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor

    env = VecMonitor(sb3_vec_env(make(env_id, options, num_envs)))
    kwargs = {"features_extractor_kwargs": {"cnn_output_dim": 32}, "net_arch": [32]}
    model = PPO("MultiInputPolicy", env, n_steps=32, batch_size=64, n_epochs=1, seed=0, policy_kwargs=kwargs)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(steps)
    assert model.num_timesteps >= steps
    episodes = list(model.ep_info_buffer)
    assert len(episodes) and all(info["l"] in (1, 2) for info in episodes) and len(model.ep_success_buffer)
    after = model.policy.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())
    env.close()
    return after


def test_sb3_ppo_trains_2000_steps_in_the_dream(sb3_vec_env):
    train_ppo(sb3_vec_env, *DREAM, steps=2000)


def test_sb3_ppo_in_the_dream_repeats_exactly(sb3_vec_env):
    first, second = (train_ppo(sb3_vec_env, *DREAM, steps=256) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("steps", [128, pytest.param(2000, marks=pytest.mark.slow)])
def test_sb3_ppo_trains_in_the_simulator(sb3_vec_env, steps):
    train_ppo(sb3_vec_env, *SIM, steps=steps)


# ---- TorchRL and skrl ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [DREAM, SIM], ids=["dream", "sim"])
def test_torchrl_gym_wrapper_steps(backend):
    libs = pytest.importorskip("torchrl.envs", reason="torchrl is not installed")
    env = libs.GymWrapper(make(*backend, num_envs=2, mode="Disabled"))
    assert env.batch_size == torch.Size([2])
    data = env.rollout(5, policy=always(env, 0.0), break_when_any_done=False)
    assert data["action"].shape == (2, 5, 8, 7) and data["next", "image"].shape == (2, 5, 64, 64, 3)
    assert data["next", "image"].dtype == torch.uint8
    done = data["next", "done"].squeeze(-1)
    assert done[:, [1, 3]].any() and not (done & done.roll(1, 1))[:, 1:].any()
    # within an episode observations follow each other; after its end the next begins with another picture
    same = (data["next", "image"][:, :-1] == data["image"][:, 1:]).flatten(2).all(-1)
    assert torch.equal(same, ~done[:, :-1])
    env.close()


def always(env, value):
    # TorchRL passes the whole TensorDict only to a parameter of this name
    return lambda tensordict: tensordict.set("action", torch.full((*env.batch_size, 8, 7), value))


@pytest.mark.parametrize("backend", [DREAM, SIM], ids=["dream", "sim"])
def test_skrl_wrap_env_steps(backend):
    wrappers = pytest.importorskip("skrl.envs.wrappers.torch", reason="skrl is not installed")
    env = wrappers.wrap_env(make(*backend, num_envs=2), wrapper="gymnasium", verbose=False)
    assert env.num_envs == 2
    observation, _ = env.reset()
    assert observation.shape == (2, 64 * 64 * 3)
    dones = []
    for _ in range(4):
        observation, reward, terminated, truncated, info = env.step(torch.zeros(2, 56))
        assert observation.shape == (2, 64 * 64 * 3) and reward.shape == (2, 1) and "instruction" in info
        dones.append((terminated | truncated).flatten().tolist())
    assert dones == [[False] * 2, [True] * 2] * 2
    env.close()


def test_torchrl_and_skrl_step_through_our_wrappers():
    libs = pytest.importorskip("torchrl.envs", reason="torchrl is not installed")
    wrappers = pytest.importorskip("skrl.envs.wrappers.torch", reason="skrl is not installed")
    env = libs.GymWrapper(DualNoiseVerification(make(*DREAM, num_envs=2, mode="Disabled"), on_disagree="zero"))
    assert env.rollout(3, policy=always(env, 0.5), break_when_any_done=False).shape == (2, 3)
    env = wrappers.wrap_env(DualNoiseVerification(make(*DREAM, num_envs=2)), wrapper="gymnasium", verbose=False)
    env.reset()
    for _ in range(2):
        *_, info = env.step(torch.zeros(2, 56))
    assert info["final_info"]["_verified"].all()


# ---- the examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "needs", "arguments"),
    [
        ("quickstart.py", "PIL", ["--steps", "8"]),
        ("sb3_ppo.py", "stable_baselines3", ["--steps", "32", "--num-envs", "2", "--episodes", "1", "--out", "out"]),
        ("torchrl_ppo.py", "torchrl", ["--updates", "1", "--num-envs", "2", "--episodes", "1", "--out", "out/policy"]),
        ("torchrl_step.py", "torchrl", []),
        ("skrl_step.py", "skrl", []),
        ("rsl_rl_ppo.py", "rsl_rl", ["--updates", "1", "--num-envs", "2"]),
        ("rllib_ppo.py", "ray", ["--updates", "1", "--num-envs", "2"]),
    ],
)
def test_examples_run(script, needs, arguments, tmp_path, monkeypatch, capsys):
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    path = Path(__file__).parents[2] / "examples" / script
    null = [f"{key}={value}" for key, value in NULL.items()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--env-options", *null])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= (1 if needs == "ray" else 10)
    if script == "quickstart.py":
        assert "4 films" in printed and len(list(tmp_path.glob("videos/quickstart/*.gif"))) == 4
    if "--out" in arguments:
        trained, bundled = load_policy(tmp_path / "out" / "policy"), load_policy("embedded")
        assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), bundled.parameters(), strict=True))
