"""Wrappers that change a space: tokens, vectors, images and word ids, around vector and single environments."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env import text
from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.policies import action_tokens
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.wrappers import FlatAction, ImageOnly, InstructionObservation, TokenActions

NULL = {"world_model": "null", "judge": "scripted", "starts": "null", "max_episode_steps": 2}
DREAM = "rawdream/PiperDream-v0"


def words(env):
    return InstructionObservation(env, words=True)


def make(num_envs=2, autoreset_mode="SameStep"):
    return gym.make_vec(DREAM, num_envs=num_envs, autoreset_mode=autoreset_mode, **NULL)


@pytest.mark.parametrize("wrapper", [FlatAction, TokenActions, ImageOnly, words])
def test_vector_environments_keep_their_contract(wrapper):
    modes = ["NextStep", "SameStep", "Disabled"]
    check = {"num_envs": (1, 3), "chunks": 5, "modes": modes, "strict": True}
    assert check_vector_env(lambda num_envs, autoreset_mode: wrapper(make(num_envs, autoreset_mode)), **check).passed


@pytest.mark.parametrize("wrapper", [FlatAction, TokenActions, ImageOnly])
def test_single_environments_pass_check_env(wrapper):
    env = wrapper(gym.make(DREAM, horizon=2, **{k: v for k, v in NULL.items() if k != "max_episode_steps"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env, skip_render_check=True)
    wanted = {FlatAction: (56,), TokenActions: (56,), ImageOnly: (8, 7)}[wrapper]
    assert env.action_space.shape == wanted
    observation, _ = env.reset(seed=0)
    assert (observation if wrapper is ImageOnly else observation["image"]).shape == (64, 64, 3)


@pytest.mark.parametrize("wrapper", [FlatAction, TokenActions])
def test_actions_reach_the_environment_as_the_policy_decodes_them(wrapper):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 56))
    chunk = action_tokens.decode(tokens).reshape(2, 8, 7)
    given = tokens if wrapper is TokenActions else chunk.reshape(2, 56)
    envs, plain = wrapper(make()), make()
    envs.reset(seed=0), plain.reset(seed=0)
    for actions in (given, torch.from_numpy(given)):
        seen = envs.step(actions)[0]["image"]
        np.testing.assert_array_equal(seen, plain.step(chunk)[0]["image"])
    single = wrapper(gym.make(DREAM, **NULL))
    single.reset(seed=0), plain.reset(seed=[0, 1])
    np.testing.assert_array_equal(single.step(given[0])[0]["image"], plain.step(chunk)[0]["image"][0])


def test_token_space_is_the_policys():
    assert TokenActions(make()).single_action_space == spaces.MultiDiscrete([256] * 56)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 8, 7), int), r"shape \(2, 8, 7\), expected \(2, 56\)"),
        (np.zeros((2, 56)), "float64"),
        (np.full((2, 56), 256), "to 256, expected integers from 0 to 255"),
        (np.full((2, 56), -1), "from -1"),
    ],
)
def test_wrong_tokens_are_named(actions, message):
    envs = TokenActions(make())
    envs.reset(seed=0)
    with pytest.raises(InvalidActionError, match=message):
        envs.step(actions)
    envs.step(np.zeros((2, 56), int))  # nothing was stepped, nothing is broken


def test_wrong_spaces_are_named():
    cart, single = gym.make_vec("CartPole-v1", num_envs=1), gym.make("CartPole-v1")
    for env in (cart, single):
        for wrapper in (FlatAction, TokenActions):
            with pytest.raises(InvalidOptionError, match=f"{wrapper.__name__} wraps Box actions, not"):
                wrapper(env)
        with pytest.raises(InvalidOptionError, match="'image'"):
            ImageOnly(env)
    with pytest.raises(InvalidOptionError, match="from -1 to 1"):
        TokenActions(gym.make("Pendulum-v1"))


def test_images_and_words_of_the_episode_that_ended_are_in_final_obs():
    envs, plain = ImageOnly(words(make())), make()
    observations, _ = envs.reset(seed=0)
    wanted, infos = plain.reset(seed=0)
    np.testing.assert_array_equal(observations, wanted["image"])
    worded = words(make())
    rows, _ = worded.reset(seed=0)
    begun = np.stack([text.tokenize(instruction) for instruction in infos["instruction"]])
    np.testing.assert_array_equal(rows["instruction"], begun)
    for _ in range(2):
        action = plain.action_space.sample()
        ended, ended_worded, ended_plain = (env.step(action)[4] for env in (envs, worded, plain))
    for row in range(2):
        np.testing.assert_array_equal(ended["final_obs"][row], ended_plain["final_obs"][row]["image"])
        np.testing.assert_array_equal(ended_worded["final_obs"][row]["instruction"], begun[row])
