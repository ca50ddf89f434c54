"""The bundled policy inside stable-baselines3: the same log-probabilities and actions, and PPO improves a reward."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies import action_tokens, load_policy
from rawdream_env.wrappers import InstructionObservation, TokenActions

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnvWrapper

from rawdream_env.wrappers import SB3TokenPolicy, SB3VecEnv

NULL = {"world_model": "null", "judge": "scripted", "starts": "null", "max_episode_steps": 2}
T = 0.7


@pytest.fixture
def envs():
    base = gym.make_vec("rawdream/PiperDream-v0", num_envs=4, autoreset_mode="SameStep", **NULL)
    yield SB3VecEnv(TokenActions(InstructionObservation(base, words=True)), end_at_horizon=True)
    base.close()


def ppo(envs, **kwargs):
    kwargs = {"n_steps": 2, "batch_size": 8, "n_epochs": 1, "gamma": 1.0, "seed": 0, "device": "cpu"} | kwargs
    return PPO(SB3TokenPolicy, envs, policy_kwargs={"temperature": T}, **kwargs)


def observed(model, envs):
    """(what stable-baselines3 passes to the policy, images, instructions)"""
    observation = envs.reset()
    instructions = [info["instruction"] for info in envs.reset_infos]
    return model.policy.obs_to_tensor(observation)[0], observation, instructions


def test_log_probabilities_and_actions_are_the_policys_own(envs):
    model, policy = ppo(envs), load_policy("embedded")
    obs, seen, instructions = observed(model, envs)
    with torch.no_grad():
        actions, values, logprob = model.policy(obs)
        own = policy.logprobs(seen["image"], instructions, actions, temperature=T)
        entropy = policy.entropy(seen["image"], instructions, temperature=T).sum(-1)
        again = model.policy.evaluate_actions(obs, actions)
    assert actions.shape == (4, 56) and values.shape == (4, 1)
    torch.testing.assert_close(logprob / 56, own.mean(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(logprob, own.sum(-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(again[1], logprob, atol=1e-4, rtol=0)
    torch.testing.assert_close(again[2], entropy, atol=1e-3, rtol=1e-5)
    greedy, _ = model.predict(seen, deterministic=True)
    chosen = policy.act(seen["image"], instructions, temperature=0.0, keys=[None] * 4)
    np.testing.assert_array_equal(greedy, chosen.tokens)


def test_the_critic_does_not_touch_the_actor(envs):
    model = ppo(envs)
    obs, *_ = observed(model, envs)
    (model.policy.predict_values(obs) - 1).square().mean().backward()
    assert all(p.grad is None for p in model.policy.actor.parameters())
    assert model.policy.critic[-1].bias.grad.abs() > 0


def test_the_critic_learns_how_hard_a_task_is(envs):
    model = ppo(envs)
    obs, _, instructions = observed(model, envs)
    hard = torch.tensor([float(text == instructions[0]) for text in instructions])
    assert 0 < hard.mean() < 1
    features, optimizer = (
        model.policy.critic_features(obs),
        torch.optim.AdamW(model.policy.critic.parameters(), lr=1e-3),
    )
    before = [weight.clone() for weight in model.policy.actor.parameters()]
    assert model.policy.fit_critic(features, 1 - hard, optimizer, 200) < 0.01
    torch.testing.assert_close(model.policy.predict_values(obs)[:, 0], 1 - hard, atol=0.1, rtol=0)
    assert all(map(torch.equal, before, model.policy.actor.parameters()))


def test_a_trained_model_is_saved_and_loaded(envs, tmp_path):
    model = ppo(envs, learning_rate=1e-3)
    model.learn(16)
    model.save(tmp_path / "ppo.zip")
    loaded = PPO.load(tmp_path / "ppo.zip", device="cpu")
    obs, seen, _ = observed(model, envs)
    assert loaded.policy.temperature == T
    assert torch.equal(model.policy.predict_values(obs), loaded.policy.predict_values(obs))
    np.testing.assert_array_equal(*(m.predict(seen, deterministic=True)[0] for m in (model, loaded)))
    assert not torch.equal(model.policy.actor.bins, load_policy("embedded").bins)
    model.policy.save(tmp_path / "policy.zip")
    alone = SB3TokenPolicy.load(tmp_path / "policy.zip", device="cpu")
    assert torch.equal(alone.actor.bins, model.policy.actor.bins)


class Lowers(VecEnvWrapper):
    """Rewards chunks whose gripper closes, so that a policy can improve within a few updates."""

    def reset(self):
        return self.venv.reset()

    def step_async(self, actions):
        self.reward = -action_tokens.decode(actions.reshape(-1, 8, 7))[..., 6].mean(1)
        super().step_async(actions)

    def step_wait(self):
        observations, _, dones, infos = self.venv.step_wait()
        return observations, self.reward.astype(np.float32), dones, infos


def test_ppo_improves_a_reward(envs):
    lowered = Lowers(envs)
    model = ppo(lowered, n_steps=16, batch_size=64, n_epochs=2, learning_rate=3e-4, target_kl=None)
    means = []
    for _ in range(6):
        model.learn(64, reset_num_timesteps=False)
        means.append(model.rollout_buffer.rewards.mean())
    assert np.mean(means[-2:]) > np.mean(means[:2]) + 0.1, means


def test_a_horizon_is_a_truncation_unless_it_ends(envs):
    def truncated(vec_env):
        vec_env.seed(0)
        vec_env.reset()
        for _ in range(2):
            *_, dones, infos = vec_env.step(np.zeros((4, 56), int))
        assert dones.all()
        return [info["TimeLimit.truncated"] for info in infos], [info["is_success"] for info in infos]

    flags, success = truncated(SB3VecEnv(envs.env))
    assert flags == [not s for s in success] and any(flags)
    assert truncated(envs) == ([False] * 4, success)


def test_what_does_not_fit_is_named(envs):
    base = envs.env.env.env
    with pytest.raises(InvalidOptionError, match="words=True"):
        ppo(SB3VecEnv(TokenActions(base)))
    with pytest.raises(InvalidOptionError, match=r"56 action tokens.*TokenActions"):
        ppo(SB3VecEnv(InstructionObservation(base, words=True)))
    with pytest.raises(InvalidOptionError, match="temperature must be positive"):
        PPO(SB3TokenPolicy, envs, policy_kwargs={"temperature": 0.0})
